"""What each image of a prompt shows, as the model's tokens cover it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

Pictures = Sequence[Image.Image | None]


def image_pictures(processor: Any, inputs: Mapping[str, Any], given: Pictures, count: int) -> Pictures:
    """One picture for each of the `count` images or tiles that the model sees; None where it is not known.

    The pictures of the request where each is one image to the model, unless the processor crops or pads them; else
    the pixels that went in, which are tiles.

    Args:
        processor: the host's.
        inputs: what it made of the request.
        given: pictures of the request.
        count: images or tiles that the model sees.
    """
    taken = getattr(processor, "image_processor", None)
    framed = any(getattr(taken, name, False) for name in ("do_center_crop", "do_pad")) and "image_sizes" not in inputs
    if len(given) == count and not framed:
        return given
    tiles = _tiles(taken, inputs.get("pixel_values"))
    if len(tiles) == count:
        return tiles
    return given if len(given) == count else [None] * count


def frame_pictures(videos: Sequence[Any], count: int) -> Pictures:
    """One frame for each of the `count` frames that the model sees, the first where it joins several; else None.

    Args:
        videos: uint8 [F, H, W, 3] each.
        count: frames that the model sees, over all videos.
    """
    frames = [frame for video in videos for frame in video]
    step = len(frames) // count if count else 0
    if not step or step * count != len(frames):
        return [None] * count
    return [Image.fromarray(np.asarray(frame)) for frame in frames[::step]]


def _tiles(image_processor: Any, pixels: Any) -> list[Image.Image]:
    """Pixels that went in ([..., 3, H, W], normalised), as pictures; none where they are in another form."""
    if not isinstance(pixels, Tensor) or pixels.dim() not in (4, 5) or pixels.shape[-3] != 3:
        return []
    mean, std = (getattr(image_processor, f"image_{name}", None) for name in ("mean", "std"))
    if mean is None or std is None:
        return []
    flat = pixels.detach().float().cpu().flatten(0, -4)
    shown = (flat * flat.new_tensor(std)[:, None, None] + flat.new_tensor(mean)[:, None, None]).clamp(0, 1) * 255
    return [Image.fromarray(tile) for tile in shown.permute(0, 2, 3, 1).round().byte().numpy()]
