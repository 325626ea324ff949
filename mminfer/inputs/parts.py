"""The parts of a message as types: each is checked when it is made, and never again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mminfer.errors import InputError
from mminfer.inputs.media import check_pixels, video_metadata

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
        object.__setattr__(self, "metadata", {**whole, **self.metadata})


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
            raise InputError(f'"modality" is {self.modality!r}: wanted "visual" or "text"')
        found: Any = self.embedding
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(np.ascontiguousarray(found))
        if not isinstance(found, Tensor) or not found.is_floating_point():
            what = f"{found.dtype} values" if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f'"embedding" is {what}: wanted a floating-point tensor [n, C]')
        if found.dim() != 2 or not found.numel():
            raise InputError(f'"embedding" has shape {list(found.shape)}: wanted [n, C] with n of 1 or more')
        if not bool(found.isfinite().all()):
            raise InputError('"embedding" holds values that are not finite: wanted numbers only')
        object.__setattr__(self, "embedding", found.detach())

    def __len__(self) -> int:
        """Rows, each of which stands for a token."""
        return len(self.embedding)

    def check_width(self, hidden_size: int, where: str) -> None:
        """Raises `InputError`, which names the place, where the rows are not as wide as a model's."""
        if self.embedding.shape[1] != hidden_size:
            found = list(self.embedding.shape)
            raise InputError(
                f'{where}: "embedding" has shape {found}: this model\'s rows are {hidden_size} wide, wanted '
                f"[n, {hidden_size}]"
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
        if self.role not in ROLES:
            raise InputError(f"a message has role {self.role!r}: wanted one of {', '.join(ROLES)}")
        if isinstance(self.parts, (Part, str)) or not isinstance(self.parts, Iterable):
            found = type(self.parts).__name__
            raise InputError(f"the parts of a message are {found}: wanted a tuple of typed parts, also of a single one")
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if not isinstance(part, Part):
                raise InputError(f"a message holds a {type(part).__name__}: wanted typed parts, such as TextPart")


def is_blank(part: Part) -> bool:
    """Whether there is nothing in it to answer."""
    return isinstance(part, TextPart) and not part.text.strip()
