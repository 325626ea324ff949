"""Loading videos from untrusted sources: frames spread over the time that a video takes, and where they stand in it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mminfer.errors import InputError, shown
from mminfer.inputs.images import load_image
from mminfer.inputs.pixels import SIDES, given_pixels
from mminfer.inputs.sources import open_source
from mminfer.inputs.video_files import VideoFile
from mminfer.technique import is_whole

logger = logging.getLogger(__name__)


def load_video(source: Any, *, num_frames: int = 8, fps: float | None = None, **access: bool) -> np.ndarray:
    """The frames of `read_video`, without their times."""
    return read_video(source, num_frames=num_frames, fps=fps, **access)[0]


def read_video(
    source: Any,
    *,
    num_frames: int = 8,
    fps: float | None = None,
    allow_remote: bool = False,
    allow_private_hosts: bool = False,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Load frames spread evenly over a video; only they are kept in memory.

    Frames are taken by their time stamps, so that one which is shown for long may be taken more than once. They stand
    upright, as the file's display matrix says, have square pixels, and white behind them where they are transparent.

    Args:
        source: a path or http(s) URL of a video file, its frames uint8 [F, H, W, 3], or a list of images.
        num_frames: how many frames to take of a file; all, if it has fewer. Given frames are all taken.
        fps: take so many frames a second of a video file instead.
        allow_remote: fetch http(s) URLs.
        allow_private_hosts: fetch them from this machine and its network too.

    Returns:
        uint8 [F, H, W, 3], and where they stand in the video: the fields of the host's `VideoMetadata`.

    Raises:
        InputError: nothing there, not a video, no frame in it, PyAV missing, or wrong numbers.
    """
    check_sampling(num_frames, fps)
    access = {"allow_remote": allow_remote, "allow_private_hosts": allow_private_hosts}
    if isinstance(source, (str, Path)):
        with open_source(source, "video", **access) as (file, name):
            return _sample_file(VideoFile(file, name), num_frames, fps)
    pixels = _given_frames(source, access)
    if fps is not None:
        raise InputError("fps needs a video file; frames given as they are have no rate")
    return pixels, video_metadata(pixels, list(range(len(pixels))), len(pixels), None)


def frames(
    source: str | Path,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    allow_remote: bool = False,
    allow_private_hosts: bool = False,
) -> Iterator[Image.Image]:
    """Frames of a video file as images, spread evenly and decoded as they are taken: one is held at a time.

    Args:
        source: a path or http(s) URL.
        num_frames: how many to take; None, without `fps`: all.
        fps: take so many frames a second instead.
        allow_remote: fetch http(s) URLs.
        allow_private_hosts: fetch them from this machine and its network too.

    Raises:
        InputError: when the first frame is asked for: nothing there, not a video, no frame in it, PyAV missing, wrong
            numbers.
    """
    if num_frames is not None or fps is not None:
        check_sampling(1 if num_frames is None else num_frames, fps)
    opened = open_source(source, "video", allow_remote=allow_remote, allow_private_hosts=allow_private_hosts)
    with opened as (opened_file, name):
        file = VideoFile(opened_file, name)
        chosen: Iterator[int] | None = None  # everything, whatever the header claims
        if num_frames is not None or fps is not None:
            timeline = file.timeline(needs_rate=fps is not None)
            total = timeline.total or file.count_frames()
            count = _how_many(num_frames or total, fps, total, timeline.rate)
            chosen = iter(timeline.chosen(count, total))
        taken = 0
        for pixels in file.pixels(chosen):
            taken += 1
            yield Image.fromarray(pixels)
        if not taken:
            raise file.no_frame()
        if chosen is not None and taken < count:
            logger.warning("%s: only %d of %d frames are there", name, taken, count)


def frame_indices(count: int, total: int) -> list[int]:
    """`count` of `total` frames, by the host's rule."""
    return [k * total // count for k in range(count)]


def check_sampling(num_frames: int, fps: float | None) -> None:
    """Raises `InputError` unless so many frames, or so many a second, can be taken of a video."""
    if not is_whole(num_frames, least=1):
        raise InputError(f"num_frames is {shown(num_frames)}: wanted a whole number from 1")
    if fps is None:
        return
    if not is_positive(fps):
        raise InputError(f"fps is {shown(fps)}: wanted a positive number")


def is_positive(value: Any) -> bool:
    """Whether this is a number above 0 that a float holds."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
    except OverflowError:
        return False


def video_metadata(pixels: np.ndarray, indices: list[int], total: int, rate: Fraction | None) -> dict[str, Any]:
    """Where frames stand in their video: the fields of the host's `VideoMetadata`."""
    return {
        "total_num_frames": total,
        "fps": float(rate) if rate else None,
        "duration": float(total / rate) if rate else None,
        "frames_indices": indices,
        "height": pixels.shape[1],
        "width": pixels.shape[2],
    }


def _given_frames(source: Any, access: dict[str, bool]) -> np.ndarray:
    if isinstance(source, (torch.Tensor, np.ndarray)):
        return given_pixels(source, "video", SIDES["video"])
    if not isinstance(source, (list, tuple)) or not source:
        found = "an empty list" if isinstance(source, (list, tuple)) else type(source).__name__
        raise InputError(f"the given video is {found}: wanted a path, uint8 frames [F, H, W, 3] or a list of images")
    images = [load_image(frame, **access) for frame in source]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise InputError(f"the given video's frames differ in size, {shown(sorted(sizes))}: make them all one size")
    return np.stack([np.asarray(image) for image in images])


def _sample_file(file: VideoFile, num_frames: int, fps: float | None) -> tuple[np.ndarray, dict[str, Any]]:
    timeline = file.timeline(needs_rate=fps is not None)
    for total in (timeline.total, 0):  # a file may be silent or wrong about its length: then count
        total = total or file.count_frames()
        timeline = timeline.cut_to(total)
        count = _how_many(num_frames, fps, total, timeline.rate)
        picked = list(file.pixels(iter(timeline.chosen(count, total)), expected=total))
        if count and len(picked) == count:
            if total < timeline.claimed:
                logger.warning("%s: only %d of %d frames are there", file.name, total, timeline.claimed)
            pixels = np.stack(picked)
            return pixels, video_metadata(pixels, timeline.indices(count, total), total, timeline.rate)
    raise file.no_frame()


def _how_many(num_frames: int, fps: float | None, total: int, rate: Fraction | None) -> int:
    if fps is None or not rate:
        return min(total, num_frames)
    return min(total, max(1, int(total / rate * Fraction(float(fps)))))
