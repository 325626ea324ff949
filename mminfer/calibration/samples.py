"""A user's samples: chats that stand for what the model is asked, without labels; some are held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mminfer.engine import Engine
from mminfer.errors import InputError, MminferError, shortened, shown
from mminfer.inputs.parts import EmbeddingPart, ImagePart, Message, TextPart, VideoPart

LEAST = 4  # samples of different content: two to choose by, two to check with
MOST_LINE = 2**24  # characters
_MEDIA = {"images": "image", "videos": "video"}


@dataclass(frozen=True, eq=False)
class Sample:
    """One chat, its media loaded.

    Args:
        messages: typed; the last one is the user's.
        content: digest of its media, or of its texts where it has none: samples of one content stay on one side.
        digest: of all of it.
    """

    messages: tuple[Message, ...]
    content: str
    digest: str


@dataclass(frozen=True, eq=False)
class Split:
    """Samples to choose settings by, and samples that the choice never saw."""

    tuning: tuple[Sample, ...]
    held_out: tuple[Sample, ...]

    @property
    def digest(self) -> str:
        """Of all samples, and of which of them are held out."""
        parts = ["tuning", *(s.digest for s in self.tuning), "held out", *(s.digest for s in self.held_out)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def checked_samples(engine: Engine, samples: Any) -> list[Sample]:
    """Chats as typed messages that fit the model; no sample twice.

    Args:
        engine: of the model.
        samples: chats, each as for `engine.generate`.

    Raises:
        InputError: there are none, or one is wrong.
    """
    if isinstance(samples, (str, bytes)) or not isinstance(samples, Sequence):
        raise InputError(f"samples of type {type(samples).__name__}: wanted a list of chats, each as for generate()")
    found: dict[str, Sample] = {}
    for place, chat in enumerate(samples):
        try:
            sample = _sample(engine.check(chat))
        except MminferError as error:
            raise InputError(f"sample {place}: {error}") from error
        found.setdefault(sample.digest, sample)
    contents = len({sample.content for sample in found.values()})
    if contents < LEAST:
        raise InputError(
            f"{len(found)} samples of {contents} different contents: wanted {LEAST} or more, since settings are chosen "
            "by some and checked with others; eight or more let the promise be sharper"
        )
    return list(found.values())


def split(samples: Sequence[Sample], held_out: float, seed: int) -> Split:
    """Parts samples by their content, at least two contents a side.

    Args:
        samples: of four contents or more.
        held_out: fraction of the contents that are held out.
        seed: of the lot.
    """
    contents = sorted({sample.content for sample in samples})
    random.Random(f"calibration {seed}").shuffle(contents)
    count = min(max(2, round(len(contents) * held_out)), len(contents) - 2)
    apart = set(contents[:count])
    return Split(
        tuple(sample for sample in samples if sample.content not in apart),
        tuple(sample for sample in samples if sample.content in apart),
    )


def read_samples(path: Path) -> list[Any]:
    """The chats in a file of JSON lines.

    A line is an object with "messages" (a chat), or with "prompt" and any of "images" and "videos" (lists of paths);
    paths are told from the file's folder.

    Raises:
        InputError: there is no such file, or a line is wrong.
    """
    try:
        with path.open(encoding="utf-8") as file:
            chats = [_chat(f"{path}, line {n}", line, path.parent) for n, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}: wanted a file of JSON lines in UTF-8") from error
    if not chats:
        raise InputError(f"{path}: no sample in it: wanted a chat on each line")
    return chats


def _chat(where: str, line: str, folder: Path) -> Any:
    try:
        data = json.loads(line[:MOST_LINE])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON ({shortened(error)})") from error
    wanted = 'wanted {"messages": [...]}, or {"prompt": "...", "images": ["a.png"]}'
    if not isinstance(data, dict):
        raise InputError(f"{where}: {shown(data)}: {wanted}")
    unknown = sorted(data.keys() - {"messages", "prompt", *_MEDIA})
    if unknown:
        raise InputError(f"{where}: unknown {', '.join(map(shown, unknown))}: {wanted}")
    if "messages" in data:
        if len(data) > 1 or not isinstance(data["messages"], list):
            raise InputError(f'{where}: "messages" is {shown(data["messages"])}, wanted a list, and nothing beside it')
        return [_placed_message(message, folder) for message in data["messages"]]
    if not isinstance(data.get("prompt"), str):
        raise InputError(f'{where}: "prompt" is {shown(data.get("prompt"))}: {wanted}')
    parts = []
    for name, kind in _MEDIA.items():
        paths = data.get(name, [])
        if not isinstance(paths, list) or not all(isinstance(own, str) for own in paths):
            raise InputError(f'{where}: "{name}" is {shown(paths)}: wanted a list of paths')
        parts += [{"type": kind, kind: _placed(own, folder)} for own in paths]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": data["prompt"]}]}]


def _placed_message(message: Any, folder: Path) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_placed_part(part, folder) for part in message["content"]]}


def _placed_part(part: Any, folder: Path) -> Any:
    if not isinstance(part, dict):
        return part
    named = {kind: part[kind] for kind in _MEDIA.values() if isinstance(part.get(kind), str)}
    return part | {kind: _placed(path, folder) for kind, path in named.items()}


def _placed(path: str, folder: Path) -> str:
    return path if "://" in path or Path(path).is_absolute() else str(folder / path)


def _sample(messages: list[Message]) -> Sample:
    media, texts, order = hashlib.sha256(), hashlib.sha256(), list[tuple[str, int]]()
    has_media = False
    for message in messages:
        texts.update(message.role.encode())
        order.append((message.role, len(message.parts)))
        for part in message.parts:
            if isinstance(part, TextPart):
                texts.update(part.text.encode("utf-8", "surrogatepass"))
                order.append((part.kind, len(part.text)))
            else:
                has_media = True
                order.append((part.kind, 0))
                if isinstance(part, VideoPart):
                    texts.update(repr(sorted(part.metadata.items())).encode())
                for piece in _bytes_of(part):
                    media.update(piece)
    both = hashlib.sha256(media.digest() + texts.digest() + repr(order).encode()).hexdigest()[:16]
    return Sample(tuple(messages), media.hexdigest()[:16] if has_media else both, both)


def _bytes_of(part: Any) -> Iterator[bytes]:
    """What tells media apart."""
    yield part.kind.encode()
    if isinstance(part, ImagePart):
        yield str(part.image.size).encode()
        yield part.image.tobytes()
    elif isinstance(part, VideoPart):
        yield str(part.frames.shape).encode()
        yield part.frames.tobytes()
    elif isinstance(part, EmbeddingPart):
        yield part.embedding.detach().float().cpu().numpy().tobytes()
