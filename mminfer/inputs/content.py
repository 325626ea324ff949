"""What a message holds, as users write it: its form is checked here, once; media are loaded when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from mminfer.errors import InputError, shortened, shown
from mminfer.inputs.images import load_image
from mminfer.inputs.parts import EmbeddingPart, ImagePart, Message, Part, TextPart, VideoPart
from mminfer.inputs.pixels import check_given
from mminfer.inputs.sources import check_source
from mminfer.inputs.videos import check_sampling, read_video
from mminfer.technique import is_whole

SOURCE_KEYS = {"image": ("image", "path", "url"), "video": ("video", "path", "url")}
PART_KEYS = {
    "text": ("text",),
    "embedding": ("embedding", "modality"),
    "images": ("images",),
    **SOURCE_KEYS,
}

T = TypeVar("T")


@dataclass(frozen=True)
class MediaOptions:
    """How media are taken.

    Args:
        allow_remote: fetch http(s) URLs.
        num_frames: frames to take of each video file, evenly spread.
        fps: take so many frames a second of it instead.
        max_video_tokens: visual tokens of one video at most; None: all that its frames give.
        allow_private_hosts: fetch URLs from this machine and its network too.

    Raises:
        InputError: one is out of range.
    """

    allow_remote: bool = False
    num_frames: int = 8
    fps: float | None = None
    max_video_tokens: int | None = None
    allow_private_hosts: bool = False

    def __post_init__(self) -> None:
        for name in ("allow_remote", "allow_private_hosts"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {shown(getattr(self, name))}: wanted True or False")
        check_sampling(self.num_frames, self.fps)
        if self.max_video_tokens is not None and not is_whole(self.max_video_tokens, least=1):
            found = shown(self.max_video_tokens)
            raise InputError(f"max_video_tokens is {found}: wanted a whole number from 1, or None")

    @property
    def access(self) -> dict[str, bool]:
        """What may be fetched."""
        return {"allow_remote": self.allow_remote, "allow_private_hosts": self.allow_private_hosts}

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> MediaOptions:
        """Those of a call that takes no others.

        Raises:
            InputError: there is no option of a name.
        """
        unknown = [name for name in given if name not in MEDIA_OPTIONS]
        if unknown:
            raise InputError(
                f"there is no option {', '.join(unknown)} of media: leave it out, or use {', '.join(MEDIA_OPTIONS)}"
            )
        return cls(**given)


MEDIA_OPTIONS = tuple(option.name for option in fields(MediaOptions))


@dataclass(frozen=True)
class PendingPart:
    """An image or video that is there, but was not opened yet.

    Args:
        kind: "image" or "video".
        load: opens it; raises `InputError` where it is damaged.
    """

    kind: str
    load: Callable[[], ImagePart | VideoPart]


@dataclass(frozen=True)
class ImageRun:
    """Images of an iterable, one after the other."""

    images: Iterable[Any]


class Entry(NamedTuple):
    """A part and its place in the chat, for messages about it."""

    where: str
    part: Part | PendingPart


class Content:
    """The content of one message. Going through it gives its entries; media are not opened by that.

    Args:
        content: a string, a part or a typed message of the user's, or parts: a list or any iterable, which is gone
            through as often as this is.
        where: its place in the chat.
        options: how media are taken.

    Raises:
        InputError: at once, if it is no content, or, of a list or tuple, if a part is wrong as far as one can see
            without opening it; while it is gone through, if a part of another iterable is wrong.
    """

    def __init__(self, content: Any, where: str, options: MediaOptions) -> None:
        if isinstance(content, Message) and content.role == "user":
            content = content.parts
        if isinstance(content, (str, Part)):
            content = [content]
        if isinstance(content, (Mapping, bytes, bytearray)) or not isinstance(content, Iterable):
            raise InputError(f"{where}: content is {type(content).__name__}: wanted a string or a list of parts")
        self._given, self._where, self._options = content, where, options
        self._parsed: list[tuple[str, Part | PendingPart | ImageRun]] | None = None
        if isinstance(content, (list, tuple)):
            self._parsed = list(self._parse(content))

    def __iter__(self) -> Iterator[Entry]:
        for where, part in self._parse(self._given) if self._parsed is None else self._parsed:
            if isinstance(part, ImageRun):
                yield from self._images(where, part)
            else:
                yield Entry(where, part)

    @property
    def is_list(self) -> bool:
        """Whether its entries can be told without asking an iterator of the user's for them."""
        return self._parsed is not None and not any(isinstance(part, ImageRun) for _, part in self._parsed)

    @property
    def known_texts(self) -> list[TextPart]:
        """The texts that can be told without asking an iterator for them."""
        return [part for _, part in self._parsed or [] if isinstance(part, TextPart)]

    @property
    def expected_parts(self) -> int | None:
        """How many parts there will be, images of an iterable counted one by one; None where nobody knows."""
        return _count_parts(self._given)

    def _parse(self, content: Iterable[Any]) -> Iterator[tuple[str, Part | PendingPart | ImageRun]]:
        for where, given in _items(content, f"{self._where}, part"):
            part = _parse_part(given, where, self._options)
            if isinstance(part, ImageRun) and isinstance(part.images, (list, tuple)):
                yield from self._images(where, part)
            else:
                yield where, part

    def _images(self, where: str, run: ImageRun) -> Iterator[Entry]:
        for place, image in _items(run.images, f"{where}, item"):
            yield Entry(place, _parse_medium({"type": "image", "image": image}, place, self._options))


def _count_parts(content: Iterable[Any]) -> int | None:
    if not isinstance(content, (list, tuple)):
        try:
            return len(content) if isinstance(content, Sized) else None
        except Exception:  # a caller's code raises anything
            return None
    runs = [part["images"] for part in content if _kind_of(part) == "images"]
    counts = [_count_parts(run) for run in runs]
    return None if None in counts else len(content) - len(runs) + sum(n for n in counts if n is not None)


def _items(given: Iterable[Any], where: str) -> Iterator[tuple[str, Any]]:
    """Each item and its place; what a caller's iterator raises names the place."""
    try:
        iterator, k = iter(given), 0
    except Exception as error:  # a caller's code raises anything
        raise InputError(
            f"{where}: {type(given).__name__} gives no items ({shortened(error)}): wanted a list"
        ) from error
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a caller's code raises anything
            found = f"{type(error).__name__}: {shortened(error)}"
            raise InputError(f"{where} {k}: the iterator raised {found}") from error
        yield f"{where} {k}", item
        k += 1


def _parse_part(given: Any, where: str, options: MediaOptions) -> Part | PendingPart | ImageRun:
    """A part as a user writes it, checked as far as one can see without opening it."""
    if isinstance(given, Part):
        return given
    if isinstance(given, str):
        return TextPart(given)
    kind = _kind_of(given)
    if kind is not None:
        _check_keys(given, kind, where)
    if kind == "text":
        return _at(where, lambda: TextPart(given.get("text")))
    if kind == "embedding":
        return _at(where, lambda: EmbeddingPart(given.get("embedding"), given.get("modality", "visual")))
    if kind == "images":
        images = given.get("images")
        if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Iterable):
            raise InputError(f'{where}: "images" is {type(images).__name__}: wanted an iterable of images')
        return ImageRun(images)
    if kind is not None:
        return _parse_medium(given, where, options)
    found = f"a part of type {shown(given.get('type'))}" if isinstance(given, Mapping) else type(given).__name__
    raise InputError(
        f'{where}: {found}: wanted a string or a dict of type "text", "image", "images", "video" or "embedding"'
    )


def _kind_of(given: Any) -> str | None:
    """The type of a part as a user writes it; None: it has none that there is."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    return kind if isinstance(kind, str) and kind in PART_KEYS else None


def _check_keys(given: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuses what a host's template may know, but would not be honoured here. A key of None is none."""
    known = ("type", *PART_KEYS[kind])
    unknown = [key for key, value in given.items() if value is not None and key not in known]
    if unknown:
        raise InputError(
            f"{where}: {kind} part with {shown(unknown[0])}, which is not known: wanted {', '.join(known)}: leave it "
            "out"
        )


def _parse_medium(given: Mapping[str, Any], where: str, options: MediaOptions) -> Part | PendingPart:
    kind = given["type"]
    keys = [key for key in SOURCE_KEYS[kind] if given.get(key) is not None]
    if len(keys) != 1:
        found = " and ".join(map(repr, keys)) if keys else "none"
        wanted = ", ".join(SOURCE_KEYS[kind])
        raise InputError(f"{where}: {kind} part with {found} of {wanted}: wanted exactly one")
    source = given[keys[0]]
    if isinstance(source, (ImagePart, VideoPart)) and source.kind == kind:
        return source
    _at(where, lambda: _check_unopened(source, kind, options))
    load: Callable[[Any, MediaOptions], ImagePart | VideoPart] = _load_image if kind == "image" else _load_video
    return PendingPart(kind, lambda: _at(where, lambda: load(source, options)))


def _check_unopened(source: Any, kind: str, options: MediaOptions) -> None:
    """Refuses what can be seen to be no such medium without opening or copying it."""
    if isinstance(source, (str, Path)):
        check_source(source, kind, allow_remote=options.allow_remote)
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        check_given(source, kind)
    elif kind == "video" and isinstance(source, (list, tuple)):
        for frame in source:
            _check_unopened(frame, "image", options)
    elif not isinstance(source, Image.Image):
        _load_image(source, options) if kind == "image" else _load_video(source, options)  # says what it is


def _load_image(source: Any, options: MediaOptions) -> ImagePart:
    return ImagePart(load_image(source, **options.access))


def _load_video(source: Any, options: MediaOptions) -> VideoPart:
    return VideoPart(*read_video(source, num_frames=options.num_frames, fps=options.fps, **options.access))


def _at(where: str, act: Callable[[], T]) -> T:
    """What `act` gives; its errors name the place."""
    try:
        return act()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
