"""Cutting: rendered text into pieces of about a size, each of which begins with a medium or an embedding."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mminfer.errors import InputError
from mminfer.inputs.content import PendingPart
from mminfer.inputs.joints import Cut, Joints
from mminfer.inputs.parts import EmbeddingPart, Part
from mminfer.inputs.rendering import HeldPart, Rendering
from mminfer.inputs.template import Segment, Template


@dataclass
class Piece:
    """Rendered text and what stands in it.

    Attributes:
        text: with placeholders and fillers.
        media: its images and videos.
        embeddings: its embeddings.
        text_tokens: tokens of the text, fillers among them, but without what media take.
        is_text: whether it is text of the template and the user, up to embeddings that stand within.
        last_mark: its last placeholder or filler.
        tail: the text behind that.
        before: text that the processor wrote at the end of the piece before, and that belongs to this one.
        dropped: tokens at the end that belong to the next piece.
    """

    text: str = ""
    media: list[Part | PendingPart] = field(default_factory=list)
    embeddings: list[Part | PendingPart] = field(default_factory=list)
    text_tokens: int = 0
    is_text: bool = True
    last_mark: str | None = None
    tail: str = ""
    before: str = ""
    dropped: tuple[int, ...] = ()

    @property
    def images(self) -> int:
        return sum(part.kind == "image" for part in self.media)

    def extend(self, other: Piece) -> None:
        self.text += other.text
        self.media += other.media
        self.embeddings += other.embeddings
        self.text_tokens += other.text_tokens
        self.is_text &= other.is_text
        self.tail = other.tail if other.last_mark is not None else self.tail + other.tail
        self.last_mark = other.last_mark or self.last_mark
        self.dropped = other.dropped

    def end(self, cut: Cut, count_tokens: Callable[[str], int]) -> Piece:
        """Ends this piece; gives back the next one with what is carried over."""
        tokens = count_tokens(cut.carried) if cut.carried else 0
        self.text = self.text.removesuffix(cut.carried)
        self.text_tokens -= tokens
        self.dropped = cut.dropped
        return Piece(cut.carried, text_tokens=tokens, tail=cut.carried, before=cut.before)


class Cutting:
    """Pieces of a rendering, cut where that changes no token; what would be changed stays in one piece.

    Attributes:
        tokens_per_medium: what an image or video takes, with the text that goes with it; the most that was seen so
            far. Whoever makes model inputs of the pieces says so by `measure`.

    Args:
        rendering: what is cut.
        template: whose marks stand in it.
        joints: tell where the text may be cut.
        count_tokens: of a text.
        size: tokens that a piece should hold at most, as far as one can tell before; None: one piece.
        least_images: images that a piece with images must hold at least, if the whole has so many.
    """

    def __init__(
        self,
        rendering: Rendering,
        template: Template,
        joints: Joints,
        count_tokens: Callable[[str], int],
        size: int | None,
        least_images: int,
    ) -> None:
        self.tokens_per_medium = 0
        self._rendering, self._template, self._joints = rendering, template, joints
        self._count_tokens = count_tokens
        self._size, self._least_images = size, least_images
        self._held: dict[str, deque[HeldPart]] = {kind: deque() for kind in ("image", "video", "embedding")}
        self._counted: dict[str, int] = {}

    @property
    def parts_done(self) -> int:
        """How many of the new parts stand in pieces that were handed out."""
        waiting = [held[0].place for held in self._held.values() if held]
        return min(waiting, default=self._rendering.parts_read)

    def measure(self, piece: Piece, tokens: int) -> None:
        """Takes note of how many tokens a piece was in the end."""
        if piece.media:
            self.tokens_per_medium = max(self.tokens_per_medium, -(-(tokens - piece.text_tokens) // len(piece.media)))

    def __iter__(self) -> Iterator[Piece]:
        """One piece after the other; a last one of too few images joins the one before it.

        Raises:
            InputError: the template shows more or fewer media than there are.
        """
        if self._least_images == 1:
            yield from self._pieces()
        else:
            yield from self._joined()
        if any(self._held.values()):
            raise InputError("the model's chat template shows fewer images, videos or embeddings than there are")

    def _joined(self) -> Iterator[Piece]:
        waiting: Piece | None = None  # for what may have to join it
        for piece in self._pieces():
            if waiting is not None and piece.images < self._least_images:
                waiting.extend(piece)
                continue
            if waiting is not None:
                yield waiting
            waiting = piece
        if waiting is not None:
            yield waiting

    def _pieces(self) -> Iterator[Piece]:
        """Pieces of about the size asked for, and of the least images in each but the last."""
        piece, most_media = Piece(), self._least_images
        for segment in self._segments():
            added = self._take(segment)
            tokens = piece.text_tokens + added.text_tokens
            tokens += (len(piece.media) + len(added.media)) * self.tokens_per_medium
            # Twice as many media at most as in the piece before: what they take may grow.
            full = self._size is not None and (tokens > self._size or len(piece.media) >= most_media)
            enough_images = piece.images == 0 or piece.images >= self._least_images
            if full and not added.is_text and not piece.is_text and enough_images:
                cut = self._joints.cut(piece.last_mark, piece.tail, self._template.first_mark(segment.text))
                if cut is not None:
                    ended, piece = piece, piece.end(cut, self._count_tokens)
                    most_media = max(most_media, 2 * len(ended.media))
                    yield ended
            piece.extend(added)
        if piece.text or piece.media:
            yield piece

    def _segments(self) -> Iterator[Segment]:
        for text, parts in self._rendering:
            for held in parts:
                self._held[held.part.kind].append(held)
            segments = self._template.segments(text, self._rows_before_groups())
            for kind in ("image", "video"):
                found = sum(segment.kind == kind for segment in segments)
                if found > len(self._held[kind]):
                    raise InputError(
                        f"the model's chat template shows {found} placeholders for {len(self._held[kind])} {kind}s: "
                        "it cannot be read piece by piece; leave prefill_chunk_size out"
                    )
            yield from segments

    def _rows_before_groups(self) -> list[int]:
        """For each embedding that waits and begins a group, the rows that wait before it."""
        rows, before = 0, []
        for held in self._held["embedding"]:
            if held.begins_group:
                before.append(rows)
            rows += _rows_of(held.part)
        return before

    def _take(self, segment: Segment) -> Piece:
        """A segment as a piece, with the medium that it begins with and the embeddings that stand in it."""
        media = [self._held[segment.kind].popleft().part] if segment.kind is not None else []
        is_text = segment.kind is None and not self._template.begins_with_rows(segment.text)
        embeddings = self._embeddings_in(segment.text)
        last_mark, tail = self._template.last_mark(segment.text, bool(embeddings))
        return Piece(
            segment.text, media, embeddings, self._text_tokens(segment.text), is_text, last_mark=last_mark, tail=tail
        )

    def _embeddings_in(self, text: str) -> list[Part | PendingPart]:
        held, found = self._held["embedding"], list[Part | PendingPart]()
        rows = self._template.rows_in(text) if held else 0
        while rows > 0 and held:
            found.append(held.popleft().part)
            rows -= _rows_of(found[-1])
        return found

    def _text_tokens(self, segment: str) -> int:
        """Tokens of a segment but for its medium; only of use where pieces have a size."""
        if self._size is None:
            return 0
        if segment not in self._counted:
            text = self._template.without_placeholder(segment)
            self._counted[segment] = self._count_tokens(text) if text else 0
        return self._counted[segment]


def _rows_of(part: Part | PendingPart) -> int:
    return len(part) if isinstance(part, EmbeddingPart) else 0
