"""A stretch of a chat on its way into the cache, piece by piece: media are loaded when their piece comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mminfer.errors import InputError
from mminfer.inputs.embeddings import as_text, check_fillers
from mminfer.inputs.messages import Message, Part
from mminfer.inputs.request import build_piece, check_placeholders
from mminfer.inputs.template import Template
from mminfer.layout import READY
from mminfer.models.base import ModelAdapter

GROUP = 16  # parts of an iterator that are rendered at a time


@dataclass(frozen=True)
class Host:
    """What a reading needs of an engine."""

    adapter: ModelAdapter
    processor: Any
    device: torch.device
    dtype: torch.dtype


@dataclass
class _Piece:
    """Rendered text, its images and videos, and how many tokens are text."""

    text: str = ""
    media: list[Part] = field(default_factory=list)
    texts: int = 0
    is_text: bool = True  # nothing but text of the template and the user

    @property
    def images(self) -> int:
        return sum(part["type"] == "image" for part in self.media)

    def extend(self, other: _Piece) -> None:
        self.text += other.text
        self.media += other.media
        self.texts += other.texts
        self.is_text &= other.is_text


class Reading:
    """New parts of a chat's last turn, as model inputs for one piece after the other.

    What the pieces hold is what the template adds to what was rendered before: nothing that is in the cache is
    tokenised or computed again. Pieces begin at an image or video, where tokenizers split anyway.

    Attributes:
        messages: the chat, media as bare placeholders; grows as parts are read.
        rendered: its text as far as it was read.
        ids: its token ids as far as they were read.
        parts_read: how many of the new parts were asked for.
        parts_expected: how many there will be, if anybody knows.

    Args:
        host: the model's side.
        messages: the chat so far, media bare; the last message is the user's, to whose content the parts are added.
        parts: loaded parts, from anything that can be gone through.
        media: loaded images and videos of the messages so far that were not read before.
        rendered: the text that was read before.
        ids: the token ids that were read before.
        unread: ids that were generated before but not yet run through the model.
        closes: whether the turn ends with these parts, so that the answer is next.
        piece_size: tokens a piece should hold at most, as far as one can tell before; None: one piece.
        parts_expected: as above.
    """

    def __init__(
        self,
        host: Host,
        messages: list[Message],
        parts: Iterable[Part],
        *,
        media: Iterable[Part] = (),
        rendered: str = "",
        ids: Iterable[int] = (),
        unread: Iterable[int] = (),
        closes: bool = True,
        piece_size: int | None = None,
        parts_expected: int | None = None,
    ) -> None:
        self.parts_expected = parts_expected
        self.messages, self.rendered, self.ids = list(messages), rendered, list(ids)
        last = self.messages[-1]
        self.messages[-1] = {**last, "content": list(last["content"])}
        self.parts_read = 0
        self._host, self._template = host, Template(host.processor)
        self._parts, self._unread = iter(parts), list(unread)
        self._closes, self._size = closes, piece_size
        self._loaded: dict[str, deque[Part]] = {"image": deque(), "video": deque()}
        self._embeddings: deque[Part] = deque()
        self._embeds, self._fillers = False, list[Part]()
        self._hold(media)
        self._rendered_at_start, self._read_ahead = rendered, ""
        self._costs: dict[str, int] = {}
        self._per_medium = 0  # tokens of an image or video, with the text that goes with it; the most so far

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Model inputs of one sequence without padding, at the host's positions from 0 on."""
        least = self._host.adapter.least_images_in_a_call
        waiting: _Piece | None = None  # for what may have to join it
        for piece in self._pieces(least):
            if waiting is not None and piece.images < least:
                waiting.extend(piece)
                continue
            if waiting is not None:
                yield self._inputs(waiting)
            waiting = piece
            if least == 1:
                yield self._inputs(waiting)
                waiting = None
        if waiting is not None:
            yield self._inputs(waiting)
        if any(self._loaded.values()) or self._embeddings:
            raise InputError("the model's chat template shows fewer images, videos or embeddings than there are")

    def _pieces(self, least: int) -> Iterator[_Piece]:
        """The new text with its media, of about the size asked for, and `least` images in each but the last."""
        piece, most = _Piece(), least
        for kind, segment in self._segments():
            texts = self._text_tokens(segment)
            size = piece.texts + texts + (len(piece.media) + (kind is not None)) * self._per_medium
            # Twice as many media at most as in the piece before: what they take may grow.
            full = self._size is not None and (size > self._size or len(piece.media) >= most)
            begins = kind is not None or self._template.begins_with_rows(segment)
            if full and begins and not piece.is_text and (piece.images == 0 or piece.images >= least):
                yield piece
                piece, most = _Piece(), max(most, 2 * len(piece.media))
            medium = [] if kind is None else [self._loaded[kind].popleft()]
            piece.extend(_Piece(segment, medium, texts, kind is None and not begins))
        self._refuse_nothing()
        if piece.text or piece.media:
            yield piece

    def _refuse_nothing(self) -> None:
        parts = [part for message in self.messages for part in message["content"]]
        if self._closes and not any(part["type"] != "text" or part["text"].strip() for part in parts):
            raise InputError("the prompt is empty: wanted text, an image or a video")

    @property
    def parts_done(self) -> int:
        """How many of the new parts have been handed out."""
        return self.parts_read - sum(map(len, self._loaded.values()))

    def _segments(self) -> Iterator[tuple[str | None, str]]:
        for text in self._stretches():
            segments = self._template.segments(text)
            for kind, held in self._loaded.items():
                found = sum(k == kind for k, _ in segments)
                if found > len(held):
                    raise InputError(
                        f"the model's chat template shows {found} placeholders for {len(held)} {kind}s: it cannot be "
                        "read piece by piece; leave prefill_chunk_size out"
                    )
            yield from segments

    def _stretches(self) -> Iterator[str]:
        """The new text, a group of parts at a time, each up to the medium with which the next group begins."""
        count, waiting = 0, list[Part]()
        while True:
            group = waiting
            for part in self._parts:
                enough = len(group) >= GROUP or (part["type"] == "video" and group)
                if self._size is not None and enough and part["type"] != "text":
                    break
                group.append(part)
            else:
                break
            self._take(group)
            yield self._stretch(group, part, count)
            count, waiting = count + 1, [part]
        self._take(group)
        yield self._new((self._template.closed if self._closes else self._template.open)(self.messages))

    def _take(self, parts: Iterable[Part]) -> None:
        for part in parts:
            check_placeholders(self._host.processor, [part])
            self._check_rows(part)
            self.messages[-1]["content"].append(bare(part, self._host.processor))
            self.parts_read += 1
            self._hold([part])

    def _check_rows(self, part: Part) -> None:
        """Embeddings and texts that hold their filler do not go together."""
        if part["type"] == "embedding":
            self._embeds = True
            check_fillers(self._host.processor, self._fillers)
        elif part["type"] == "text" and (self._template.filler or "\n") in part["text"]:
            self._fillers.append(part)
            if self._embeds:
                check_fillers(self._host.processor, [part])

    def _hold(self, parts: Iterable[Part]) -> None:
        """Keeps what parts show until their piece comes."""
        for part in parts:
            if part["type"] != "text":
                self._loaded.get(part["type"], self._embeddings).append(part)

    def _stretch(self, group: list[Part], following: Part, count: int) -> str:
        """What the template makes of a group, up to the medium that follows it."""
        shown = [bare(part, self._host.processor) for part in (*group, following)]
        rows = len(following["embedding"]) if following["type"] == "embedding" else 0
        here = self._template.between_media(shown, rows) if count else ""
        if count < 2:  # a template may look back, to number images for instance: the second group would show it
            last = self.messages[-1]
            messages = [*self.messages[:-1], {**last, "content": [*last["content"], shown[-1]]}]
            whole = self._new(self._template.before_last_medium(messages, rows))
            if count and whole != here:
                raise InputError(
                    "the model's chat template makes an image's text depend on the images before it, so content "
                    "cannot be read piece by piece: leave prefill_chunk_size out"
                )
            here = whole
        self._read_ahead += here
        return here

    def _new(self, rendered: str) -> str:
        """What a rendering adds to the text so far."""
        so_far = self._rendered_at_start + self._read_ahead
        if not rendered.startswith(so_far):
            raise InputError(
                "the model's chat template rewrites what was read before: start a new chat with the whole history"
            )
        return rendered[len(so_far) :]

    def _text_tokens(self, segment: str) -> int:
        """Tokens of a segment but for its medium; only of use where pieces have a size."""
        if self._size is None:
            return 0
        if segment not in self._costs:
            text = self._template.without_mark(segment)
            ids = self._host.processor.tokenizer(text, add_special_tokens=False).input_ids if text else []
            self._costs[segment] = len(ids)
        return self._costs[segment]

    def _inputs(self, piece: _Piece) -> dict[str, Any]:
        host, text = self._host, piece.text
        given = [*piece.media, *self._embeddings_in(text)]
        inputs = build_piece(host.processor, text, given, first=not self.rendered, device=host.device, dtype=host.dtype)
        ids: Tensor = inputs["input_ids"]
        if piece.media:
            self._per_medium = max(self._per_medium, -(-(ids.shape[1] - piece.texts) // len(piece.media)))
        unread = self._unread if self._unread != ids[0, :1].tolist() else []
        self._unread = []
        if unread:
            inputs["input_ids"] = ids = torch.cat([ids.new_tensor([unread]), ids], 1)
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in inputs:
                    types = inputs[name]
                    inputs[name] = torch.cat([types.new_zeros(1, len(unread)), types], 1)
            if READY in inputs:
                mask = inputs[READY].mask
                inputs[READY] = replace(inputs[READY], mask=torch.cat([mask.new_zeros(1, len(unread)), mask], 1))
        inputs["attention_mask"] = None  # one sequence, which is not padded
        positions = host.adapter.host_positions(inputs, torch.ones_like(ids, dtype=torch.bool))[:, None]
        inputs["position_ids"] = positions if host.adapter.position_axes > 1 else positions[0]
        self.rendered += text
        self.ids += ids[0].tolist()
        return inputs

    def _embeddings_in(self, text: str) -> Iterator[Part]:
        """The embeddings whose fillers stand in a text."""
        rows = text.count(self._template.filler or "\n") if self._embeddings else 0
        while rows > 0 and self._embeddings:
            part = self._embeddings.popleft()
            rows -= len(part["embedding"])
            yield part


def bare(part: Part, processor: Any) -> Part:
    """The part as templates need it: what it shows is not theirs."""
    if part["type"] == "embedding":
        return as_text(part, processor)
    return part if part["type"] == "text" else {"type": part["type"]}
