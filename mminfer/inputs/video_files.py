"""Video files by PyAV: containers that hold their own frames, decoded in turn and shown as a player shows them."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from types import ModuleType
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from mminfer.errors import InputError, shortened
from mminfer.inputs import pixels as limits
from mminfer.inputs.progress import PROGRESS
from mminfer.inputs.timeline import Timeline

logger = logging.getLogger(__name__)

# Containers that hold their own frames: a playlist (hls, concat, dash) would make ffmpeg open other files.
VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,gif"
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # by the codecs whose transparency is a stream within theirs
MOST_STRETCHED = 16  # times: what a header says of wider or taller pixels is not believed


class VideoFile:
    """A video file.

    Args:
        file: seekable.
        name: for messages.

    Raises:
        InputError: PyAV is missing.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._av, self._file, self.name = _pyav(name), file, name
        self._pixel_ratio: Fraction | None = None  # width to height of a pixel

    def timeline(self, *, needs_rate: bool) -> Timeline:
        """When its frames are shown, by header and time stamps; nothing is decoded.

        Raises:
            InputError: it is no video, or does not tell the rate that is needed.
        """
        with self._as_input_errors(), self._container() as container:
            stream = container.streams.video[0]
            claimed, rate, tick = stream.frames, stream.average_rate, stream.time_base
            stamps, last, left_out = _stamps(container, stream)
        timeline = Timeline.of(max(0, claimed - left_out), rate, stamps, last, tick or Fraction(1))
        if needs_rate and not timeline.rate:
            raise InputError(f"{self.name}: the file does not tell its frame rate: use num_frames instead of fps")
        return timeline

    def count_frames(self) -> int:
        """How many frames can be decoded."""
        with self._as_input_errors():
            return sum(1 for _ in tqdm(self._decoded(), f"{self.name}: counting frames", unit="frame", **PROGRESS))

    def pixels(self, chosen: Iterator[int] | None, *, expected: int | None = None) -> Iterator[np.ndarray]:
        """Frames as uint8 [H, W, 3], as far as there are any, all of the first one's size.

        Args:
            chosen: which ones, ascending, one perhaps several times; None: all.
            expected: how many are to be decoded, for a bar that shows it; None: no bar.
        """
        decoded: Any = self._decoded()
        if expected is not None:
            decoded = tqdm(decoded, f"{self.name}: decoding", expected, unit="frame", **PROGRESS)
        with self._as_input_errors():
            target, size = 0 if chosen is None else next(chosen, None), None
            for n, frame in enumerate(decoded):
                if target is None:
                    break
                while n == target:
                    size = size or _shown_size(frame, self._pixel_ratio)
                    yield _shown(frame, size)
                    target = n + 1 if chosen is None else next(chosen, None)

    def no_frame(self) -> InputError:
        return InputError(f"{self.name}: no frame could be decoded: wanted a whole video file: get it again")

    @contextmanager
    def _as_input_errors(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # FFmpeg's errors, and whatever else a hostile container sets off
            raise InputError(
                f"{self.name}: not a video that PyAV can read ({shortened(error)}): pass a video file such as MP4, WebM"
                " or MKV"
            ) from error

    @contextmanager
    def _container(self) -> Iterator[Any]:
        self._file.seek(0)
        options = {"format_whitelist": VIDEO_FORMATS}
        with self._av.open(self._file, container_options=options, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise InputError(f"{self.name}: a {container.format.name} file without a video stream: pass a video")
            context = container.streams.video[0].codec_context
            if context.width * context.height > limits.MAX_PIXELS:
                found = f"{context.width} x {context.height}"
                raise InputError(
                    f"{self.name}: frames of {found} pixels: wanted at most {limits.MAX_PIXELS:,}: scale down"
                )
            yield container

    def _decoded(self) -> Iterator[Any]:
        """Every frame in turn, up to the end or to where the file is damaged."""
        with self._container() as container:
            stream = container.streams.video[0]
            stream.thread_type, self._pixel_ratio = "AUTO", stream.sample_aspect_ratio
            own = self._alpha_decoder(stream)
            try:
                if own is None:
                    yield from container.decode(stream)
                else:
                    yield from (frame for packet in container.demux(stream) for frame in own.decode(packet))
            except Exception as error:  # as above
                found = shortened(error)
                logger.warning("%s: damaged (%s): only the frames before that are used", self.name, found)

    def _alpha_decoder(self, stream: Any) -> Any:
        """What decodes a stream with its transparency, where FFmpeg's usual decoder leaves that out; else None."""
        name = ALPHA_DECODERS.get(stream.codec_context.name)
        if name is None or stream.metadata.get("alpha_mode", "0") == "0":
            return None
        try:
            decoder = self._av.CodecContext.create(name, "r")
        except Exception as error:  # a build of FFmpeg without it
            raise InputError(
                f"{self.name}: transparent, which needs {name}, and this build of PyAV has none: convert the video"
            ) from error
        decoder.extradata = stream.codec_context.extradata
        decoder.thread_type = "AUTO"
        return decoder


def _pyav(name: str) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise InputError(f"{name}: reading video files needs PyAV: pip install mminfer[video]") from error
    return av


def _stamps(container: Any, stream: Any) -> tuple[list[int], int, int]:
    """Time stamps of the frames that are shown, how long the last is, and how many are left out.

    No stamps where some frame has none, or the file is damaged: then nothing is known of its times.
    """
    stamps, last, left_out = list[int](), (0, 0), 0
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_corrupt:  # the end of the stream, or of a file that was cut short
                continue
            if packet.is_discard:
                left_out += 1
            elif packet.pts is None:
                return [], 0, left_out
            else:
                stamps.append(packet.pts)
                last = max(last, (packet.pts, packet.duration or 0))
    except Exception:  # a damaged file: decoding will tell how much of it is there
        return [], 0, left_out
    return stamps, last[1], left_out


def _shown_size(frame: Any, ratio: Fraction | None) -> tuple[int, int]:
    """Height and width of a frame before it is turned, its pixels of this width to height made square."""
    height, width = frame.height, frame.width
    if not ratio or ratio == 1 or not Fraction(1, MOST_STRETCHED) <= ratio <= MOST_STRETCHED:
        return height, width
    tall, wide = (height, round(width * ratio)) if ratio > 1 else (round(height / ratio), width)
    return (tall, wide) if tall * wide <= limits.MAX_PIXELS else (height, width)


def _shown(frame: Any, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    if not any(component.is_alpha for component in frame.format.components) and not frame.format.has_palette:
        return _turned(frame.to_ndarray(format="rgb24", height=height, width=width), frame)
    seen = frame.to_ndarray(format="rgba", height=height, width=width).astype(np.uint16)
    alpha = seen[..., 3:]
    return _turned(((seen[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8), frame)


def _turned(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """Upright, as the file's display matrix says; of a matrix that turns by an odd angle, the nearest quarter.

    A pixel in column p and row q is shown in column a p + c q and row b p + d q, up to a shift.
    """
    matrices = [bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    if not matrices or len(matrices[0]) < 36:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("=9i", matrices[0][:36])
    columns, rows = (a, d)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, columns, rows = pixels.swapaxes(0, 1), c, b
    pixels = pixels[:: -1 if rows < 0 else 1, :: -1 if columns < 0 else 1]
    return np.ascontiguousarray(pixels)
