"""Loading images from untrusted sources: checked before they are decoded, never half read."""

from __future__ import annotations

from io import BytesIO
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from mminfer.errors import InputError, shortened
from mminfer.inputs.pixels import MAX_PIXELS, SIDES, check_size, given_pixels
from mminfer.inputs.sources import open_source

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: Any, *, allow_remote: bool = False, allow_private_hosts: bool = False) -> Image.Image:
    """Load one image; of an animation or a multi-page file, the first.

    Args:
        source: a PIL image, a path, a "data:image/...;base64," or http(s) URL, or uint8 pixels: an array
            [H, W, 3], or a tensor [H, W, 3] or [3, H, W].
        allow_remote: fetch http(s) URLs.
        allow_private_hosts: fetch them from this machine and its network too.

    Returns:
        RGB, upright as its EXIF orientation says, over white where it is transparent, as the host's image processors
        have it. Colour profiles are not applied, as the host applies none.

    Raises:
        InputError: nothing there, not an image, damaged, empty or too large.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the given PIL image")
    if isinstance(source, (torch.Tensor, np.ndarray)):
        return Image.fromarray(np.ascontiguousarray(given_pixels(source, "image", SIDES["image"])))
    opened = open_source(source, "image", allow_remote=allow_remote, allow_private_hosts=allow_private_hosts)
    with opened as (file, name):
        return _to_rgb(_opened(file, name), name)


def load_image_bytes(content: bytes, name: str, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """One image of a file's content, as `load_image` gives it.

    Args:
        content: of the file.
        name: for messages.
        most_pixels: of the image; a larger one is refused before it is decoded.

    Raises:
        InputError: not an image, damaged, empty or too large.
    """
    image_size(content, name, most_pixels)
    return _to_rgb(_opened(BytesIO(content), name), name)


def image_size(content: bytes, name: str, most_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image by the header of its file; arguments and errors as of `load_image_bytes`."""
    image = _opened(BytesIO(content), name)
    check_size(name, image.height, image.width)
    if image.width * image.height > most_pixels:
        raise InputError(f"{name}: {image.width} x {image.height} pixels: scale it down to {most_pixels:,} pixels")
    return image.width, image.height


def _opened(file: IO[bytes], name: str) -> Image.Image:
    """Whose header was read, and nothing else."""
    try:
        return Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(12)
        found = f"it starts with {start!r}" if start else "it is empty"
        raise InputError(
            f"{name}: not an image; {found}: wanted one of {', '.join(IMAGE_FORMATS)}: pass an image file, or "
            "convert it"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: {error}; scale it down to {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # plugins raise anything on hostile headers
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: damaged or cut short ({shortened(error)}): wanted a whole file: get it again")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    check_size(name, image.height, image.width)
    if image.mode in DEEP_MODES:
        raise InputError(f"{name}: mode {image.mode}, which would be clipped: scale its pixels to 8 bits")
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        return _over_white(upright) if _is_transparent(upright) else upright.convert("RGB")
    except Exception as error:  # decoders raise anything on hostile data
        raise _damaged(name, error) from error


def _is_transparent(image: Image.Image) -> bool:
    return bool({"A", "a"} & set(image.getbands())) or image.info.get("transparency") is not None


def _over_white(image: Image.Image) -> Image.Image:
    seen = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, (255, 255, 255, 255)), seen).convert("RGB")
