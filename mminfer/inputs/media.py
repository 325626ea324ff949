"""Loading images and videos from untrusted sources: checked before they are decoded, never half read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from mminfer.errors import InputError
from mminfer.inputs.sources import open_source
from mminfer.technique import is_whole

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970  # where Pillow speaks of a decompression bomb
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Containers that hold their own frames: a playlist (hls, concat, dash) would make ffmpeg open other files.
VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,gif"
PROGRESS: dict[str, Any] = {"delay": 2.0, "leave": False, "disable": None}  # on terminals, for what takes its time
MANY = 2**62  # frames, where all are wanted
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: Any, *, allow_remote: bool = False) -> Image.Image:
    """Load one image; of an animation or a multi-page file, the first.

    Args:
        source: a PIL image, a path, a "data:image/...;base64," or http(s) URL, or uint8 pixels: an array
            [H, W, 3], or a tensor [H, W, 3] or [3, H, W].
        allow_remote: fetch http(s) URLs.

    Returns:
        RGB, upright as its EXIF orientation says.

    Raises:
        InputError: nothing there, not an image, damaged, empty or too large.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the given PIL image")
    if isinstance(source, torch.Tensor):
        channels_first = source.ndim == 3 and source.shape[-1] != 3 and source.shape[0] == 3
        source = (source.permute(1, 2, 0) if channels_first else source).detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(check_pixels(source, "image", ("H", "W", 3))))
    with open_source(source, "image", allow_remote=allow_remote) as (file, name):
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:
            file.seek(0)
            raise InputError(
                f"{name}: not an image; it starts with {file.read(12)!r}: wanted one of "
                f"{', '.join(IMAGE_FORMATS)}: pass an image file, or convert it"
            ) from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InputError(f"{name}: {error}; scale it down to {MAX_PIXELS:,} pixels") from error
        except Exception as error:  # plugins raise anything on hostile headers
            raise _damaged(name, error) from error
        return _to_rgb(image, name)


def load_video(source: Any, *, num_frames: int = 8, fps: float | None = None, allow_remote: bool = False) -> np.ndarray:
    """The frames of `read_video`, without their times."""
    return read_video(source, num_frames=num_frames, fps=fps, allow_remote=allow_remote)[0]


def read_video(
    source: Any, *, num_frames: int = 8, fps: float | None = None, allow_remote: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Load frames spread evenly over a video; only they are kept in memory.

    Args:
        source: a path or http(s) URL of a video file, its frames uint8 [F, H, W, 3], or a list of images.
        num_frames: how many frames to take of a file; all, if it has fewer. Given frames are all taken.
        fps: take so many frames a second of a video file instead.
        allow_remote: fetch http(s) URLs.

    Returns:
        uint8 [F, H, W, 3], and where they stand in the video: the fields of the host's `VideoMetadata`.

    Raises:
        InputError: nothing there, not a video, no frame in it, PyAV missing, or wrong numbers.
    """
    check_sampling(num_frames, fps)
    if isinstance(source, (str, Path)):
        with open_source(source, "video", allow_remote=allow_remote) as (file, name):
            return _sample_file(file, name, num_frames, fps)
    pixels = _given_frames(source, allow_remote)
    if fps is not None:
        raise InputError("fps needs a video file; frames given as they are have no rate")
    return pixels, video_metadata(pixels, list(range(len(pixels))), len(pixels), None)


def frames(
    source: str | Path, *, num_frames: int | None = None, fps: float | None = None, allow_remote: bool = False
) -> Iterator[Image.Image]:
    """Frames of a video file as images, spread evenly and decoded as they are taken: one is held at a time.

    Args:
        source: a path or http(s) URL.
        num_frames: how many to take; None, without `fps`: all.
        fps: take so many frames a second instead.
        allow_remote: fetch http(s) URLs.

    Raises:
        InputError: when the first frame is asked for: nothing there, not a video, no frame in it, PyAV missing, wrong
            numbers.
    """
    if num_frames is not None or fps is not None:
        check_sampling(1 if num_frames is None else num_frames, fps)
    with open_source(source, "video", allow_remote=allow_remote) as (file, name):
        av = _pyav(name)
        with _as_input_errors(name):
            claimed, rate = _claims(av, file, name, fps)
            everything = num_frames is None and fps is None  # whatever the header claims
            total = MANY if everything else claimed or _counted(av, file, name)
            count = _how_many(num_frames or total, fps, total, rate)
            taken = 0
            for pixels in _pick(_decoded(av, file, name), count, total):
                taken += 1
                yield Image.fromarray(pixels)
        if not taken:
            raise _no_frame(name)
        if taken < count and not everything:
            logger.warning("%s: only %d of %d frames are there", name, taken, count)


def frame_indices(count: int, total: int) -> list[int]:
    """`count` of `total` frames, by the host's rule."""
    return [k * total // count for k in range(count)]


def check_sampling(num_frames: int, fps: float | None) -> None:
    """Raises `InputError` unless so many frames, or so many a second, can be taken of a video."""
    if not is_whole(num_frames, least=1):
        raise InputError(f"num_frames is {num_frames!r}: wanted a whole number from 1")
    if fps is not None and (not isinstance(fps, Real) or isinstance(fps, bool) or not 0 < fps < float("inf")):
        raise InputError(f"fps is {fps!r}: wanted a positive number")


def video_metadata(pixels: np.ndarray, indices: list[int], total: int, rate: Fraction | None) -> dict[str, Any]:
    return {
        "total_num_frames": total,
        "fps": float(rate) if rate else None,
        "duration": float(total / rate) if rate else None,
        "frames_indices": indices,
        "height": pixels.shape[1],
        "width": pixels.shape[2],
    }


def check_pixels(pixels: np.ndarray, kind: str, shape: tuple[str | int, ...]) -> np.ndarray:
    wanted = f"uint8 [{', '.join(map(str, shape))}]"
    if pixels.dtype != np.uint8 or pixels.ndim != len(shape) or pixels.shape[-1] != 3 or not pixels.size:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise InputError(f"the given {kind} is {found}: wanted {wanted}, no side empty, values 0 to 255")
    return pixels


def _given_frames(source: Any, allow_remote: bool) -> np.ndarray:
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return check_pixels(source, "video", ("F", "H", "W", 3))
    if not isinstance(source, (list, tuple)) or not source:
        found = "an empty list" if isinstance(source, (list, tuple)) else type(source).__name__
        raise InputError(f"the given video is {found}: wanted a path, uint8 frames [F, H, W, 3] or a list of images")
    images = [load_image(frame, allow_remote=allow_remote) for frame in source]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise InputError(f"the given video's frames differ in size, {sorted(sizes)}: make them all one size")
    return np.stack([np.asarray(image) for image in images])


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: damaged or cut short ({error}): wanted a whole file: get it again")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if not width or not height or width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels: wanted 1 to {MAX_PIXELS:,} pixels in all")
    if image.mode in DEEP_MODES:
        raise InputError(f"{name}: mode {image.mode}, which would be clipped: scale its pixels to 8 bits")
    try:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise anything on hostile data
        raise _damaged(name, error) from error


def _sample_file(file: IO[bytes], name: str, num_frames: int, fps: float | None) -> tuple[np.ndarray, dict[str, Any]]:
    av = _pyav(name)
    with _as_input_errors(name):
        claimed, rate = _claims(av, file, name, fps)
        for total in (claimed, 0):  # a header may be silent or wrong about the length: then count
            total = total or _counted(av, file, name)
            count = _how_many(num_frames, fps, total, rate)
            decoded = tqdm(_decoded(av, file, name), f"{name}: decoding", total, unit="frame", **PROGRESS)
            picked = list(_pick(decoded, count, total))
            if count and len(picked) == count:
                if total < claimed:
                    logger.warning("%s: only %d of %d frames are there", name, total, claimed)
                pixels = np.stack(picked)
                return pixels, video_metadata(pixels, frame_indices(count, total), total, rate)
    raise _no_frame(name)


def _pyav(name: str) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise InputError(f"{name}: reading video files needs PyAV: pip install mminfer[video]") from error
    return av


@contextmanager
def _as_input_errors(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # FFmpeg's errors, and whatever else a hostile container sets off
        raise InputError(
            f"{name}: not a video that PyAV can read ({error}): pass a video file such as MP4, WebM or MKV"
        ) from error


def _no_frame(name: str) -> InputError:
    return InputError(f"{name}: no frame could be decoded: wanted a whole video file: get it again")


def _claims(av: ModuleType, file: IO[bytes], name: str, fps: float | None) -> tuple[int, Fraction | None]:
    """Frames (0: not told) and rate by the file's header."""
    with _container(av, file, name) as container:
        stream = container.streams.video[0]
        claimed, rate = stream.frames, stream.average_rate
    if fps is not None and not rate:
        raise InputError(f"{name}: the file does not tell its frame rate: use num_frames instead of fps")
    return claimed, rate


def _counted(av: ModuleType, file: IO[bytes], name: str) -> int:
    return sum(1 for _ in tqdm(_decoded(av, file, name), f"{name}: counting frames", unit="frame", **PROGRESS))


def _how_many(num_frames: int, fps: float | None, total: int, rate: Fraction | None) -> int:
    return min(total, num_frames if fps is None or not rate else max(1, int(total / rate * Fraction(fps))))


def _pick(decoded: Iterator[Any], count: int, total: int) -> Iterator[np.ndarray]:
    """The frames that `frame_indices` names, as far as there are any, all of the first one's size."""
    wanted = (k * total // count for k in range(count))
    target, shape = next(wanted, None), None
    for i, frame in enumerate(decoded):
        if target is None:
            break
        if i == target:
            height, width = shape or (frame.height, frame.width)
            shape = height, width
            yield frame.to_ndarray(format="rgb24", height=height, width=width)
            target = next(wanted, None)


@contextmanager
def _container(av: ModuleType, file: IO[bytes], name: str) -> Iterator[Any]:
    file.seek(0)
    options = {"format_whitelist": VIDEO_FORMATS}
    with av.open(file, container_options=options, metadata_errors="ignore") as container:
        if not container.streams.video:
            raise InputError(f"{name}: a {container.format.name} file without a video stream: pass a video")
        context = container.streams.video[0].codec_context
        if context.width * context.height > MAX_PIXELS:
            found = f"{context.width} x {context.height}"
            raise InputError(f"{name}: frames of {found} pixels: wanted at most {MAX_PIXELS:,}: scale down")
        yield container


def _decoded(av: ModuleType, file: IO[bytes], name: str) -> Iterator[Any]:
    """Every frame in turn, up to the end or to where the file is damaged."""
    with _container(av, file, name) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            yield from container.decode(stream)
        except Exception as error:  # as above
            logger.warning("%s: damaged (%s): only the frames before that are used", name, error)
