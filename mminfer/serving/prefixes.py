"""Reuse by content: what was read once is kept compressed, found again by what it is made of, and forked."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from mminfer.config import InferenceConfig
from mminfer.forward.kv_cache import CompressedCache
from mminfer.inputs.parts import ImagePart, Message, Part, TextPart
from mminfer.inputs.reader import RequestReader
from mminfer.inputs.reading import Reading
from mminfer.inputs.transcript import Transcript
from mminfer.metrics.records import PromptRecord
from mminfer.serving.answering import TextListener
from mminfer.serving.content import Chat, text_digest


@dataclass(frozen=True)
class PromptFacts:
    """What a prompt was, for the usage of an answer.

    Args:
        cached: tokens that were known already.
        visual: visual tokens.
        merged: tokens left after merging.
        kept: entries a head that the cache held behind the prompt: the mean of the layers, rounded.
    """

    cached: int = 0
    visual: int = 0
    merged: int = 0
    kept: int = 0

    def behind(self, record: PromptRecord, row: int) -> PromptFacts:
        """The same with one more pass, in which this was the row."""
        entries = [layer.entries[row] for layer in record.layers]
        kept = round(sum(entries) / max(1, len(entries)))
        visual, merged = self.visual + record.visual[row], self.merged + record.merged[row]
        return replace(self, visual=visual, merged=merged, kept=kept)


@dataclass(frozen=True)
class Known:
    """A beginning of prompts that was read.

    Args:
        cache: at rest; whoever goes on from it takes a copy.
        transcript: what it holds.
        facts: of its passes.
    """

    cache: CompressedCache
    transcript: Transcript
    facts: PromptFacts


class Shelf(Protocol):
    """A slower place than the store, where beginnings are kept for one engine; any thread may call."""

    def get(self, key: bytes) -> Known | None:
        """What stands under a key."""

    def put(self, key: bytes, known: Known) -> None:
        """Keeps it, if it can be kept."""


class PrefixStore:
    """Beginnings of prompts, the one used least recently out first, bounded in bytes.

    It is used by the thread of the scheduler alone; others may look at its numbers.

    Args:
        most_bytes: of all caches together, spare room included; 0: nothing is kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def get(self, key: bytes) -> Known | None:
        """What stands under a key, which is used by that."""
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def put(
        self, key: bytes, cache: CompressedCache, row: int, transcript: Transcript, facts: PromptFacts
    ) -> Known | None:
        """Keeps a copy of a row of a cache, and gives it, unless it is there already or larger than all may be."""
        if not self._most_bytes or self.get(key) is not None:
            return None
        # A guess before it is copied: a cache may be as large as all that is kept.
        if cache.nbytes // max(1, len(cache.tokens)) > 2 * self._most_bytes:
            return None
        held = CompressedCache.of_rows([(cache, row)])
        held.settle()
        known = Known(held, transcript, facts)
        return known if self.add(key, known) else None

    def add(self, key: bytes, known: Known) -> bool:
        """Keeps what nobody else holds, if it is not larger than all may be."""
        size = known.cache.allocated_bytes
        if size > self._most_bytes or key in self._known:
            return False
        self.nbytes += size
        self._known[key] = known
        while self.nbytes > self._most_bytes:
            _, gone = self._known.popitem(last=False)
            self.nbytes -= gone.cache.allocated_bytes
        return True


class Station(NamedTuple):
    """A place in a chat behind which a beginning may be known.

    Args:
        key: of all that stands before it, and of the settings.
        messages: how many messages there are up to it.
        parts: how many parts of the last of them.
        is_read_to: whether a prompt is read up to it in a stretch of its own: behind the last medium of a user's turn.
    """

    key: bytes
    messages: int
    parts: int
    is_read_to: bool


class ChainPrompt:
    """A chat whose beginning may be known.

    Its stretches end behind the last image of each of the user's turns, whether or not anything is known of it, so that
    an answer does not depend on what is kept, but for answers that are gone on from.

    Args:
        reader: of the model.
        store: what is known.
        chat: typed messages and digests of their parts.
        config: the techniques.
        size: tokens that a piece should hold at most; None: the whole prompt goes in at once, and nothing is kept of it
            where a technique needs that.
    """

    def __init__(
        self, reader: RequestReader, store: PrefixStore, chat: Chat, config: InferenceConfig, size: int | None
    ) -> None:
        self._reader, self._store, self._messages, self._size = reader, store, chat.messages, size
        self._keeps = not any(technique.needs_whole_prompt for technique in config.techniques)
        beginning = hashlib.sha256(f"{config.to_json()} {size}".encode()).digest()
        self._stations, self._end = stations_of(chat, beginning)
        self._transcript, self._cache, self._row = Transcript(), CompressedCache(), 0
        self.facts = PromptFacts()
        self._shelf: Shelf | None = None
        self._fetched: tuple[bytes, Known] | None = None

    def use(self, shelf: Shelf) -> None:
        """Takes the longest beginning from a slower place that knows one longer than the store; by any thread."""
        self._shelf = shelf
        for station in reversed(self._stations) if self._keeps else ():
            if station.key in self._store:
                return
            known = shelf.get(station.key)
            if known is not None:
                self._fetched = station.key, known
                return

    def begin(self) -> CompressedCache:
        self._left = [station for station in self._stations if station.is_read_to] if self._keeps else []
        if self._fetched is not None:
            self._store.add(*self._fetched)
        station = self._known_to()
        known = None if station is None else self._store.get(station.key)
        if known is None and station is not None and self._fetched is not None:  # too large for the store
            known = self._fetched[1]
        if station is not None and known is not None:
            self._cache, self._transcript = known.cache.clone(), known.transcript
            self.facts = replace(known.facts, cached=len(known.transcript.ids))
            self._left = [one for one in self._left if one[1:3] > station[1:3]]
        return self._cache

    @property
    def text_left(self) -> int | None:
        first, taken = self._known_place
        left = [
            *self._messages[first].parts[taken:],
            *(part for one in self._messages[first + 1 :] for part in one.parts),
        ]
        texts = [part.text for part in left if isinstance(part, TextPart)]
        return sum(map(len, texts)) if len(texts) == len(left) else None

    def open_images(self, opened: Callable[[Part], Part]) -> None:
        """Has the images decoded that are not known, as far as is known now; it may be called by any thread."""
        first, taken = self._known_place
        messages = list(self._messages)
        for place in range(first, len(messages)):
            parts, begin = messages[place].parts, taken if place == first else 0
            messages[place] = Message(messages[place].role, (*parts[:begin], *map(opened, parts[begin:])))
        self._messages = tuple(messages)

    @property
    def _known_place(self) -> tuple[int, int]:
        """A message, and how many of its parts are known with all before."""
        station = self._known_to()
        return (0, 0) if station is None else (station.messages - 1, station.parts)

    def _known_to(self) -> Station | None:
        """Where the longest beginning ends that is known."""
        stations = reversed(self._stations) if self._keeps else iter(())
        fetched = None if self._fetched is None else self._fetched[0]
        return next((station for station in stations if station.key in self._store or station.key == fetched), None)

    def readings(self) -> Iterator[Reading]:
        for station in self._left:
            *earlier, last = self._messages[: station.messages]
            upto = [*earlier, Message(last.role, last.parts[: station.parts])]
            yield from self._stretch(upto, closes=False)
            self._keep(station.key, self._cache, self._row, self._transcript)
        yield from self._stretch(self._messages, closes=True)

    def _stretch(self, messages: list[Message] | tuple[Message, ...], *, closes: bool) -> Iterator[Reading]:
        reading = self._reader.onward(self._transcript, messages, closes=closes, size=self._size)
        yield reading
        self._transcript = reading.transcript

    def took(self, record: PromptRecord, cache: CompressedCache, row: int) -> None:
        self._cache, self._row = cache, row
        self.facts = self.facts.behind(record, row)

    @property
    def ids(self) -> tuple[int, ...]:
        return self._transcript.ids

    def answered(self, listener: TextListener, cache: CompressedCache, row: int) -> None:
        """Keeps the chat with its answer, if the words that were told are read as the tokens that were generated."""
        if not self._keeps:
            return
        ids, ends = listener.token_ids, listener.end_ids
        plain = ids[:-1] if ids[-1] in ends else ids
        if not plain or self._reader.tokens_of(listener.text) != plain:
            return
        key = _behind_message(self._end, "assistant", [text_digest(listener.text)])
        self._keep(key, cache, row, self._transcript.answered(ids))

    def _keep(self, key: bytes, cache: CompressedCache, row: int, transcript: Transcript) -> None:
        known = self._store.put(key, cache, row, transcript, replace(self.facts, cached=0))
        if known is not None and self._shelf is not None:
            self._shelf.put(key, known)


def stations_of(chat: Chat, beginning: bytes) -> tuple[list[Station], bytes]:
    """Where a beginning of a chat may be known, in order; and the key behind all messages.

    Args:
        chat: its messages and digests.
        beginning: of the settings.
    """
    key, stations = beginning, list[Station]()
    for place, (message, digests) in enumerate(zip(chat.messages, chat.digests, strict=True)):
        if message.role == "user":
            count = max((k + 1 for k, part in enumerate(message.parts) if isinstance(part, ImagePart)), default=0)
            if count:
                within = _hashed(key, message.role, digests[:count])
                stations.append(Station(within, place + 1, count, True))
        key = _behind_message(key, message.role, digests)
        if message.role == "assistant":
            stations.append(Station(key, place + 1, len(message.parts), False))
    return stations, key


def _behind_message(key: bytes, role: str, digests: list[bytes] | tuple[bytes, ...]) -> bytes:
    return _hashed(key, role, [*digests, b"end"])


def _hashed(key: bytes, role: str, digests: list[bytes] | tuple[bytes, ...]) -> bytes:
    chain = hashlib.sha256(key + role.encode()).digest()
    for digest in digests:
        chain = hashlib.sha256(chain + digest).digest()
    return chain
