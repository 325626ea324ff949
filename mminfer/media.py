"""Loading images and videos from untrusted sources: checked before they are decoded, never half read."""

from __future__ import annotations

import base64
import binascii
import logging
import stat
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from http.client import HTTPException
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from mminfer.errors import InputError

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970  # where Pillow speaks of a decompression bomb
MAX_REMOTE_BYTES = 64 * 2**20
REMOTE_TIMEOUT_S = 20
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Containers that hold their own frames. Playlists (hls, concat, dash) are left out: they make ffmpeg open other files.
VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,gif"
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: Any, *, allow_remote: bool = False) -> Image.Image:
    """Load one image; of an animation or a multi-page file, the first.

    Args:
        source: a PIL image, a path, a "data:image/...;base64," or http(s) URL, or uint8 pixels [H, W, 3] as a NumPy
            array or [H, W, 3] or [3, H, W] as a tensor.
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
        return Image.fromarray(np.ascontiguousarray(_check_pixels(source, "image", ("H", "W", 3))))
    with _open(source, "image", allow_remote) as (file, name):
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:
            file.seek(0)
            raise InputError(
                f"{name}: not an image; it starts with {file.read(12)!r}, wanted one of {', '.join(IMAGE_FORMATS)}: "
                "pass an image file, or convert it"
            ) from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InputError(f"{name}: {error}; scale it down to {MAX_PIXELS:,} pixels") from error
        except Exception as error:  # plugins raise anything on hostile headers
            raise _damaged(name, error) from error
        return _to_rgb(image, name)


def load_video(
    source: Any, *, num_frames: int = 8, fps: float | None = None, allow_remote: bool = False
) -> np.ndarray:
    """The frames of `read_video`, without their times."""
    return read_video(source, num_frames=num_frames, fps=fps, allow_remote=allow_remote)[0]


def read_video(
    source: Any, *, num_frames: int = 8, fps: float | None = None, allow_remote: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Load frames spread evenly over a video; only they are kept in memory.

    Args:
        source: a path or http(s) URL of a video file, its frames uint8 [F, H, W, 3], or a list of images.
        num_frames: how many frames to take; all, if the video has fewer.
        fps: take so many frames a second of a video file instead.
        allow_remote: fetch http(s) URLs.

    Returns:
        uint8 [F, H, W, 3], and where they stand in the video: the fields of the host's `VideoMetadata`.

    Raises:
        InputError: nothing there, not a video, no frame in it, PyAV missing, or wrong numbers.
    """
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise InputError(f"num_frames is {num_frames!r}: wanted a whole number from 1")
    if fps is not None and not 0 < fps < float("inf"):
        raise InputError(f"fps is {fps!r}: wanted a positive number")
    if isinstance(source, (str, Path)):
        with _open(source, "video", allow_remote) as (file, name):
            return _sample_file(file, name, num_frames, fps)
    frames = _given_frames(source, allow_remote)
    if fps is not None:
        raise InputError("fps needs a video file; frames given as they are have no rate: use num_frames")
    total = len(frames)
    indices = _spread(min(num_frames, total), total)
    return frames[indices], _metadata(frames, indices, total, None)


def _spread(count: int, total: int) -> list[int]:
    """`count` of `total` frames, by the host's rule."""
    return [k * total // count for k in range(count)]


def _metadata(frames: np.ndarray, indices: list[int], total: int, rate: Fraction | None) -> dict[str, Any]:
    return {
        "total_num_frames": total,
        "fps": float(rate) if rate else None,
        "duration": float(total / rate) if rate else None,
        "frames_indices": indices,
        "height": frames.shape[1],
        "width": frames.shape[2],
    }


def _check_pixels(pixels: np.ndarray, kind: str, shape: tuple[str | int, ...]) -> np.ndarray:
    wanted = f"uint8 [{', '.join(map(str, shape))}]"
    if pixels.dtype != np.uint8 or pixels.ndim != len(shape) or pixels.shape[-1] != 3 or not pixels.size:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise InputError(f"the given {kind} is {found}: wanted {wanted}, no side empty, values 0 to 255")
    return pixels


def _given_frames(source: Any, allow_remote: bool) -> np.ndarray:
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _check_pixels(source, "video", ("F", "H", "W", 3))
    if not isinstance(source, (list, tuple)) or not source:
        found = "an empty list" if isinstance(source, (list, tuple)) else type(source).__name__
        raise InputError(f"the given video is {found}: wanted a path, uint8 frames [F, H, W, 3] or a list of images")
    images = [load_image(frame, allow_remote=allow_remote) for frame in source]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise InputError(f"the given video's frames differ in size, {sorted(sizes)}: make them all one size")
    return np.stack([np.asarray(image) for image in images])


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: damaged or cut short ({error}); wanted a whole file: fetch or export it again")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if not width or not height or width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels: wanted 1 to {MAX_PIXELS:,} pixels in all")
    if image.mode in DEEP_MODES:
        raise InputError(f"{name}: pixels of mode {image.mode}, which RGB would clip: scale them to 8 bits first")
    try:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise anything on hostile data
        raise _damaged(name, error) from error


@contextmanager
def _open(source: Any, kind: str, allow_remote: bool) -> Iterator[tuple[IO[bytes], str]]:
    """The bytes of a path or URL, and what to call them."""
    if not isinstance(source, (str, Path)):
        raise InputError(f"the {kind} is {type(source).__name__}: wanted a path, a URL, a PIL image or uint8 pixels")
    scheme = source.partition("://")[0].lower() if isinstance(source, str) and "://" in source[:32] else None
    if isinstance(source, str) and source[:5].lower() == "data:":
        yield BytesIO(_decode_data_url(source, kind)), "the data: URL"
    elif scheme in ("http", "https"):
        yield BytesIO(_fetch(str(source), allow_remote)), str(source)
    elif scheme is not None:
        raise InputError(f"{source}: {scheme}:// is not allowed: pass a plain path, or an http(s) or data: URL")
    else:
        name = str(source)
        with _open_local(Path(source), name, kind) as file:
            yield file, name


def _open_local(path: Path, name: str, kind: str) -> IO[bytes]:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # also keeps us from pipes and devices, which may never end
            found = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError(f"{name}: {found}: wanted the path of one {kind} file")
        return path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: {reason}: wanted the path of a readable {kind} file") from error


def _decode_data_url(url: str, kind: str) -> bytes:
    head, _, payload = url.partition(",")
    if kind != "image" or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise InputError(f"{head[:60]!r}, given as {kind}: wanted 'data:image/...;base64,' (videos: pass a file)")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the data: URL is not base64: {error}") from error


def _fetch(url: str, allow_remote: bool) -> bytes:
    if not allow_remote:
        raise InputError(f"{url}: remote sources are off: pass allow_remote=True, or download it first")
    request = urllib.request.Request(url, headers={"User-Agent": "mminfer"})
    try:
        with urllib.request.urlopen(request, timeout=REMOTE_TIMEOUT_S) as response:
            content = response.read(MAX_REMOTE_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(f"{url}: could not be fetched: {error}") from error
    if len(content) > MAX_REMOTE_BYTES:
        raise InputError(f"{url}: larger than {MAX_REMOTE_BYTES:,} bytes: download it and pass the path")
    return content


def _sample_file(
    file: IO[bytes], name: str, num_frames: int, fps: float | None
) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        import av
    except ImportError as error:
        raise InputError(f"{name}: reading video files needs PyAV: pip install mminfer[video]") from error
    try:
        with _container(av, file, name) as container:
            stream = container.streams.video[0]
            claimed, rate = stream.frames, stream.average_rate
        if fps is not None and not rate:
            raise InputError(f"{name}: the file does not tell its frame rate: use num_frames instead of fps")
        for total in (claimed, None):  # a header may be silent or wrong about the length: then count
            total = total or sum(1 for _ in _decoded(av, file, name))
            count = num_frames if fps is None else max(1, int(total / rate * Fraction(fps)))
            count = min(count, total)
            frames = _pick(_decoded(av, file, name), count, total)
            if count and len(frames) == count:
                pixels = np.stack(frames)
                return pixels, _metadata(pixels, _spread(count, total), total, rate)
    except av.FFmpegError as error:
        raise InputError(
            f"{name}: not a video that PyAV can read ({error}): pass a video file such as MP4, WebM or MKV"
        ) from error
    raise InputError(f"{name}: no frame could be decoded: wanted a whole video file; fetch or export it again")


def _pick(frames: Iterator[Any], count: int, total: int) -> list[np.ndarray]:
    """The frames that `_spread` names, as far as there are any; the rest is let go at once."""
    wanted = (k * total // count for k in range(count))
    target = next(wanted, None)
    picked: list[np.ndarray] = []
    for i, frame in enumerate(frames):
        if i == target:
            height, width = picked[0].shape[:2] if picked else (frame.height, frame.width)
            picked.append(frame.to_ndarray(format="rgb24", height=height, width=width))
            target = next(wanted, None)
        if target is None:
            break
    return picked


@contextmanager
def _container(av: ModuleType, file: IO[bytes], name: str) -> Iterator[Any]:
    file.seek(0)
    options = {"format_whitelist": VIDEO_FORMATS}
    with av.open(file, container_options=options, metadata_errors="ignore") as container:
        if not container.streams.video:
            raise InputError(f"{name}: a {container.format.long_name} file without a video stream: pass a video")
        context = container.streams.video[0].codec_context
        if context.width * context.height > MAX_PIXELS:
            raise InputError(f"{name}: frames of {context.width} x {context.height}: scale them to {MAX_PIXELS:,} pixels")
        yield container


def _decoded(av: ModuleType, file: IO[bytes], name: str) -> Iterator[Any]:
    """Every frame in turn, up to the end or to where the file is damaged."""
    with _container(av, file, name) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        seen = 0
        try:
            for seen, frame in enumerate(chain(container.decode(stream)), 1):
                yield frame
        except av.FFmpegError as error:
            logger.warning("%s: damaged after frame %d (%s): only what comes before is used", name, seen, error)
