"""Messages as users write them, checked and with their media loaded: mistakes are found before any forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from mminfer.errors import InputError
from mminfer.inputs.embeddings import checked_embedding
from mminfer.inputs.media import load_image, read_video
from mminfer.inputs.sources import check_source

ROLES = ("system", "user", "assistant")
SOURCE_KEYS = {"image": ("image", "path", "url"), "video": ("video", "path", "url")}

Part = dict[str, Any]
Message = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class MediaOptions:
    """How media are taken.

    Args:
        allow_remote: fetch http(s) URLs.
        num_frames: frames to take of each video file, evenly spread.
        fps: take so many frames a second of it instead.
        supports_video: whether the model takes videos; if not, their frames go in as images.
        hidden_size: width of the model's rows, for embeddings; None: not known yet.
    """

    allow_remote: bool = False
    num_frames: int = 8
    fps: float | None = None
    supports_video: bool = True
    hidden_size: int | None = None


def is_batch(messages: Any) -> bool:
    """Whether this is a list of chats; else it is one chat."""
    return isinstance(messages, (list, tuple)) and any(isinstance(chat, (list, tuple)) for chat in messages)


def normalise_messages(messages: Any, options: MediaOptions | None = None, *, lazy: bool = False) -> list[Message]:
    """Check one chat and load its media; what was given is left as it is.

    Args:
        messages: a list of {"role", "content"}, or the content of a single user message: a string or parts. Parts are
            a list or any iterable, which is gone through once. A part is a string or {"type": "text", "text": ...},
            {"type": "image", "image" | "path" | "url": ...},
            {"type": "images", "images": an iterable of what "image" takes},
            {"type": "video", "video" | "path" | "url": ...} or
            {"type": "embedding", "embedding": [n, C] tensor of the model's width, "modality": "visual" or "text"}.
        options: how media are taken.
        lazy: leave the last message's content an iterator, which loads each part when it is asked for; of a list,
            what can be seen without loading is checked now.
    Returns:
        The chat with contents as lists of parts, images as RGB PIL images, videos as uint8 [F, H, W, 3] with
        the fields of their `VideoMetadata` beside them under "metadata".

    Raises:
        InputError: the chat is malformed or empty, does not end with the user, or a medium cannot be loaded.
    """
    options = options or MediaOptions()
    given = _as_messages(messages)
    _check_order(given)
    checked = []
    for n, message in enumerate(given):
        parts = load_parts(message["content"], f"message {n}", options)
        later = lazy and n == len(given) - 1
        checked.append({"role": message["role"], "content": parts if later else list(parts)})
    if lazy:
        return checked
    if not any(p["type"] != "text" or p["text"].strip() for m in checked for p in m["content"]):
        raise InputError("the prompt is empty: wanted text, an image or a video")
    return checked


def load_parts(content: Any, where: str, options: MediaOptions) -> Iterator[Part]:
    """The parts of one message's content, each loaded when it is asked for.

    Raises:
        InputError: the content is no content, at once; or a part is wrong, when its turn comes. Of a list or tuple
            the form of all parts, and that their files are there, is checked at once.
    """
    if isinstance(content, str):
        content = [content]
    if isinstance(content, Mapping) or not isinstance(content, Iterable):
        raise InputError(f"{where}: content is {type(content).__name__}: wanted a string or a list of parts")
    if isinstance(content, (list, tuple)):
        for k, part in enumerate(content):
            _check_part(part, f"{where}, part {k}", options)
    return _loaded(content, where, options)


def last_content(messages: Any) -> Any:
    """What the last message of a chat that was checked holds."""
    return _as_messages(messages)[-1]["content"]


def as_text_part(item: Any) -> Part:
    """A text of a list as a part; an empty one in place of anything else."""
    if isinstance(item, dict):
        item = item.get("text") if item.get("type") == "text" else None
    return {"type": "text", "text": item if isinstance(item, str) else ""}


def count_parts(content: Any) -> int | None:
    """How many parts there will be, images of an iterable counted one by one; None where nobody knows."""
    if isinstance(content, str):
        return 1
    if not isinstance(content, (list, tuple)):
        return len(content) if isinstance(content, Sized) else None
    counts = [count_parts(p["images"]) if isinstance(p, dict) and p.get("type") == "images" else 1 for p in content]
    return None if None in counts else sum(n for n in counts if n is not None)


def _loaded(content: Iterable[Any], where: str, options: MediaOptions) -> Iterator[Part]:
    for place, part in _items(content, f"{where}, part"):
        if isinstance(part, dict) and part.get("type") == "images":
            _check_part(part, place, options)
            for item_place, item in _items(part["images"], f"{place}, item"):
                yield from _load_part({"type": "image", "image": item}, item_place, options)
        else:
            yield from _load_part(part, place, options)


def _items(given: Iterable[Any], where: str) -> Iterator[tuple[str, Any]]:
    """Each item and its place; what a caller's iterator raises names the place."""
    iterator, k = iter(given), 0
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a caller's code raises anything
            raise InputError(f"{where} {k}: the iterator raised {type(error).__name__}: {error}") from error
        yield f"{where} {k}", item
        k += 1


def _as_messages(messages: Any) -> list[Message]:
    if is_batch(messages):
        raise InputError("a list of chats where one chat was wanted: pass them one by one, or to generate()")
    if isinstance(messages, str):
        messages = [messages]
    if isinstance(messages, Iterable) and not isinstance(messages, (list, tuple, Mapping, str, bytes)):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "an empty list" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise InputError(f'the messages are {found}: wanted a string or a list of {{"role", "content"}}')
    if not any(isinstance(m, dict) and m.keys() & {"role", "content"} for m in messages):
        return [{"role": "user", "content": list(messages)}]
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            keys = list(message) if isinstance(message, dict) else type(message).__name__
            raise InputError(f'message {n} is {keys}: wanted a dict with "role" and "content"')
        if message["role"] not in ROLES:
            raise InputError(f"message {n} has role {message['role']!r}: wanted one of {', '.join(ROLES)}")
    return list(messages)


def _check_order(messages: Sequence[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise InputError(f"message {roles.index('system', 1)} is the system's: wanted at most one, in front")
    if roles[-1] != "user":
        raise InputError(f"the last message is the {roles[-1]}'s: wanted the user's, to be answered")


def _check_part(part: Any, where: str, options: MediaOptions) -> None:
    """What can be seen of a part without loading it."""
    if isinstance(part, str):
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f'{where}: "text" is {type(part.get("text")).__name__}: wanted a string')
    elif kind == "embedding":
        _named(where, lambda: checked_embedding(part, options.hidden_size))
    elif kind == "images":
        images = part.get("images")
        if isinstance(images, (str, Mapping)) or not isinstance(images, Iterable):
            raise InputError(f'{where}: "images" is {type(images).__name__}: wanted an iterable of images')
    elif isinstance(kind, str) and kind in SOURCE_KEYS:
        source = _source(part, kind, where)
        _named(where, lambda: check_source(source, kind, allow_remote=options.allow_remote))
    else:
        found = f"a part of type {kind!r}" if isinstance(part, dict) else type(part).__name__
        raise InputError(
            f'{where}: {found}: wanted a string or a dict of type "text", "image", "images", "video" or "embedding"'
        )


def _load_part(part: Any, where: str, options: MediaOptions) -> list[Part]:
    _check_part(part, where, options)
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    kind = part["type"]
    if kind == "text":
        return [{"type": "text", "text": part["text"]}]
    if kind == "embedding":
        embedding = checked_embedding(part, options.hidden_size)
        return [{"type": kind, "embedding": embedding, "modality": part.get("modality", "visual")}]
    source = _source(part, kind, where)
    if kind == "image":
        image = _named(where, lambda: load_image(source, allow_remote=options.allow_remote))
        return [{"type": "image", "image": image}]
    sampling: dict[str, Any] = {"num_frames": options.num_frames, "fps": options.fps}
    frames, metadata = _named(where, lambda: read_video(source, allow_remote=options.allow_remote, **sampling))
    if options.supports_video:
        return [{"type": "video", "video": frames, "metadata": metadata}]
    return [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]


def _named(where: str, act: Callable[[], T]) -> T:
    """What `act` gives; its errors name the place."""
    try:
        return act()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _source(part: Part, kind: str, where: str) -> Any:
    keys = [key for key in SOURCE_KEYS[kind] if part.get(key) is not None]
    if len(keys) != 1:
        found = " and ".join(map(repr, keys)) if keys else "none"
        wanted = ", ".join(SOURCE_KEYS[kind])
        raise InputError(f"{where}: {kind} part with {found} of {wanted}: wanted exactly one")
    return part[keys[0]]
