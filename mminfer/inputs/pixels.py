"""Pixels that a program gives: arrays and tensors, checked before they are anybody's image or frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mminfer.errors import InputError

MAX_PIXELS = 178_956_970  # where Pillow speaks of a decompression bomb
SIDES: dict[str, tuple[str | int, ...]] = {"image": ("H", "W", 3), "video": ("F", "H", "W", 3)}


def given_pixels(source: np.ndarray | torch.Tensor, kind: str, shape: tuple[str | int, ...]) -> np.ndarray:
    """Pixels as a uint8 array; a tensor's are copied to the CPU. An image's channels may come first.

    Args:
        source: an array or tensor of whatever type.
        kind: "image" or "video", for messages.
        shape: names of the sides, channels last.

    Raises:
        InputError: they are not uint8 of this shape, empty, too many, or nowhere (meta, sparse, quantised, masked).
    """
    if isinstance(source, np.ma.MaskedArray):
        raise _wrong(source, kind, shape, "a masked array")
    if isinstance(source, torch.Tensor):
        if source.dtype != torch.uint8 or source.layout != torch.strided or source.is_nested or source.is_meta:
            raise _wrong(source, kind, shape)
        channels_first = source.ndim == 3 == len(shape) and source.shape[-1] != 3 and source.shape[0] == 3
        try:
            source = (source.permute(1, 2, 0) if channels_first else source).detach().cpu().numpy()
        except Exception as error:  # tensor types of other libraries raise anything
            raise _wrong(source, kind, shape) from error
    return check_pixels(source, kind, shape)


def check_given(source: np.ndarray | torch.Tensor, kind: str) -> None:
    """Raises `InputError` as `given_pixels` does; what would have to be copied for that is not looked at.

    Args:
        source: an array or tensor of whatever type.
        kind: "image" or "video".
    """
    if not isinstance(source, torch.Tensor) or source.device.type in ("cpu", "meta"):
        given_pixels(source, kind, SIDES[kind])


def check_pixels(pixels: np.ndarray, kind: str, shape: tuple[str | int, ...]) -> np.ndarray:
    """The same array; raises `InputError` unless it is uint8 of this shape, not empty and not too large."""
    if pixels.dtype != np.uint8 or pixels.ndim != len(shape) or pixels.shape[-1] != 3 or not pixels.size:
        raise _wrong(pixels, kind, shape)
    height, width = pixels.shape[-3:-1]
    check_size(f"the given {kind}", height, width)
    return pixels


def check_size(name: str, height: int, width: int) -> None:
    """Raises `InputError` unless an image of this size may be held in memory."""
    if not width or not height or width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels: wanted 1 to {MAX_PIXELS:,} pixels in all")


def _wrong(source: Any, kind: str, shape: tuple[str | int, ...], found: str | None = None) -> InputError:
    if found is None:
        found = described(source)
    wanted = f"uint8 [{', '.join(map(str, shape))}]"
    return InputError(f"the given {kind} is {found}: wanted {wanted}, no side empty, values 0 to 255")


def described(values: np.ndarray | torch.Tensor) -> str:
    """Type and shape of values, and what else keeps them from being read."""
    if isinstance(values, np.ndarray):
        return f"{values.dtype} {list(values.shape)}"
    kind = "nested" if values.is_nested else "meta" if values.is_meta else str(values.layout).removeprefix("torch.")
    sides = "" if values.is_nested else f" {list(values.shape)}"
    return f"{values.dtype}{sides}" + ("" if kind == "strided" else f" ({kind}: it holds no plain values)")
