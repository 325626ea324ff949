"""The parts of a message as types: each is checked when it is made, and never again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mminfer.errors import InputError, shown
from mminfer.inputs.pixels import check_pixels, check_size, described
from mminfer.inputs.videos import is_positive, video_metadata

ROLES = ("system", "user", "assistant")
MODALITIES = ("visual", "text")


@dataclass(frozen=True)
class TextPart:
    """A text.

    Raises:
        InputError: it is no string.
    """

    kind: ClassVar[str] = "text"
    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f'"text" is {type(self.text).__name__}: wanted a string')
        object.__setattr__(self, "text", str.__str__(self.text))  # and no subclass, which may render as it likes


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A loaded image; `mminfer.media.load_image` makes one of a file.

    Args:
        image: RGB.

    Raises:
        InputError: it is no image, without a pixel, or in another mode.
    """

    kind: ClassVar[str] = "image"
    image: Image.Image

    def __post_init__(self) -> None:
        if not isinstance(self.image, Image.Image) or self.image.mode != "RGB":
            found = getattr(self.image, "mode", type(self.image).__name__)
            raise InputError(f"the image is {found}: wanted an RGB image of PIL: make it by mminfer.media.load_image")
        width, height = self.image.size
        if not width or not height:
            raise InputError(f"the image is {width} x {height} pixels: wanted one pixel or more a side")
        check_size("the image", height, width)


@dataclass(frozen=True, eq=False)
class VideoPart:
    """The frames of a video; `mminfer.media.read_video` makes both fields of a file.

    Args:
        frames: uint8 [F, H, W, 3].
        metadata: fields of the host's `VideoMetadata`; without any, the frames are the whole video, at no known rate.

    Raises:
        InputError: the frames are no such array, or the metadata are no dictionary.
    """

    kind: ClassVar[str] = "video"
    frames: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.frames, np.ndarray):
            found = type(self.frames).__name__
            raise InputError(f"the frames are {found}: wanted a uint8 array: make it by mminfer.media.read_video")
        check_pixels(self.frames, "video", ("F", "H", "W", 3))
        if not isinstance(self.metadata, Mapping):
            found = type(self.metadata).__name__
            raise InputError(f"the metadata are {found}: wanted a dictionary, as mminfer.media.read_video gives")
        count = len(self.frames)
        whole = video_metadata(self.frames, list(range(count)), count, None)
        object.__setattr__(self, "metadata", {**whole, **_checked_metadata(self.metadata, whole, count)})

    def lengthened(self, count: int) -> VideoPart:
        """A video of at least so many frames: the last one stays for longer, as hosts have it that take several."""
        missing = count - len(self.frames)
        if missing <= 0:
            return self
        frames = np.concatenate([self.frames, *[self.frames[-1:]] * missing])
        indices = list(self.metadata["frames_indices"])
        return VideoPart(frames, {**self.metadata, "frames_indices": indices + indices[-1:] * missing})


@dataclass(frozen=True, eq=False)
class EmbeddingPart:
    """Rows that go into the model as they are, in place of tokens.

    Args:
        embedding: [n, C] floating-point tensor or array; a model checks that C is its width when it takes it.
        modality: "visual" rows are an image to every technique, "text" rows are text.

    Raises:
        InputError: wrong type, shape, modality, or values that are not finite.
    """

    kind: ClassVar[str] = "embedding"
    embedding: Tensor
    modality: Literal["visual", "text"] = "visual"

    def __post_init__(self) -> None:
        if not isinstance(self.modality, str) or self.modality not in MODALITIES:
            raise InputError(f'"modality" is {shown(self.modality)}: wanted "visual" or "text"')
        found = _floats(self.embedding)
        if found.dim() != 2 or not found.numel():
            raise InputError(f'"embedding" has shape {list(found.shape)}: wanted [n, C] with n of 1 or more')
        if not bool(found.isfinite().all()):
            raise InputError('"embedding" holds values that are not finite: wanted numbers only')
        object.__setattr__(self, "embedding", found)

    def __len__(self) -> int:
        """Rows, each of which stands for a token."""
        return len(self.embedding)

    def check_fit(self, hidden_size: int, dtype: torch.dtype, where: str) -> None:
        """Raises `InputError`, which names the place, unless the rows have a model's width, and values of its type."""
        if self.embedding.shape[1] != hidden_size:
            found = list(self.embedding.shape)
            raise InputError(
                f'{where}: "embedding" has shape {found}: this model\'s rows are {hidden_size} wide, wanted '
                f"[n, {hidden_size}]"
            )
        if dtype != self.embedding.dtype and not bool(self.embedding.to(dtype).isfinite().all()):
            largest = float(self.embedding.abs().max())
            raise InputError(
                f'{where}: "embedding" holds values up to {largest:.4g}, too large for this model\'s {dtype}: wanted '
                f"at most {torch.finfo(dtype).max:.4g}: scale them down"
            )


Part = TextPart | ImagePart | VideoPart | EmbeddingPart


@dataclass(frozen=True)
class Message:
    """A message of a chat with its media loaded. A list of them goes wherever a chat does, and is not checked again.

    Args:
        role: "system", "user" or "assistant".
        parts: in order.

    Raises:
        InputError: another role, or something that is no part.
    """

    role: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.role, str) or self.role not in ROLES:
            raise InputError(f"a message has role {shown(self.role)}: wanted one of {', '.join(ROLES)}")
        if isinstance(self.parts, (Part, str)) or not isinstance(self.parts, Iterable):
            found = type(self.parts).__name__
            raise InputError(f"the parts of a message are {found}: wanted a tuple of typed parts, also of a single one")
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if not isinstance(part, Part):
                raise InputError(f"a message holds a {type(part).__name__}: wanted typed parts, such as TextPart")


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _floats(found: Any) -> Tensor:
    """The tensor of an embedding, of whichever shape.

    Raises:
        InputError: it is no tensor or array of plain floating-point values.
    """
    wanted = "wanted a floating-point tensor [n, C] of 16, 32 or 64 bits"
    if isinstance(found, np.ndarray) and not isinstance(found, np.ma.MaskedArray):
        if found.dtype.kind != "f" or found.dtype.itemsize > 8:
            raise InputError(f'"embedding" is {described(found)}: {wanted}')
        found = torch.from_numpy(np.array(found, dtype=found.dtype.newbyteorder("=")))
    if not isinstance(found, Tensor):
        raise InputError(f'"embedding" is {type(found).__name__}: {wanted}')
    plain = found.layout == torch.strided and not found.is_meta and not found.is_nested
    if found.dtype not in FLOATS or not plain:
        raise InputError(f'"embedding" is {described(found)}: {wanted}')
    return found.detach()


def _checked_metadata(given: Mapping[str, Any], known: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """Metadata of so many frames; raises `InputError` for fields that the host does not know, and for wrong numbers."""
    unknown = [name for name in given if name not in (*known, "video_backend")]
    if unknown:
        raise InputError(f"the metadata hold {shown(unknown[0])}: wanted {', '.join(known)}")
    indices = given.get("frames_indices", range(count))
    if isinstance(indices, str) or not isinstance(indices, Iterable) or len(list(indices)) != count:
        raise InputError(f'"frames_indices" is {shown(indices)}: wanted a list of {count} numbers, one a frame')
    for name in ("fps", "duration", "total_num_frames"):
        value = given.get(name)
        if value is not None and not is_positive(value):
            raise InputError(f'"{name}" is {shown(value)}: wanted a positive number, or None')
    return given


def is_blank(part: Part) -> bool:
    """Whether there is nothing in it to answer."""
    return isinstance(part, TextPart) and not part.text.strip()
