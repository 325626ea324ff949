"""Rendering: the text that the chat template adds to a chat for new parts of the user's last turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mminfer.errors import InputError
from mminfer.inputs.content import PendingPart
from mminfer.inputs.markers import Markers
from mminfer.inputs.parts import EmbeddingPart, Part, TextPart
from mminfer.inputs.template import Template
from mminfer.inputs.transcript import Transcript

GROUP = 16  # parts between which a piece may begin at an embedding; those of an iterator are rendered at a time


class HeldPart(NamedTuple):
    """A medium or embedding that waits for its piece.

    Args:
        place: how many of the new parts stand before it.
        part: the medium or embedding.
        begins_group: whether a group of parts begins with it, so that the text may be cut before it.
    """

    place: int
    part: Part | PendingPart
    begins_group: bool = False


class Stretch(NamedTuple):
    """New text, and the media and embeddings that stand in it, in order."""

    text: str
    parts: list[HeldPart]


@dataclass(frozen=True)
class Turn:
    """The user's turn that new parts belong to.

    Args:
        transcript: the chat so far; its last message is the user's, to whose content the parts are added.
        closes: whether the turn ends with these parts, so that the answer is next.
        before: parts of the chat so far that were not read yet.
    """

    transcript: Transcript
    closes: bool = True
    before: Sequence[Part] = ()


class Rendering:
    """The new text of a turn, stretch by stretch.

    Attributes:
        messages: the chat as templates take it, with the parts that were rendered.
        parts_read: how many of the new parts were asked for.
    """

    def __init__(self, template: Template, markers: Markers, turn: Turn) -> None:
        self._template, self._markers, self._turn = template, markers, turn
        *earlier, last = turn.transcript.messages
        self.messages: list[dict[str, Any]] = [*earlier, {**last, "content": list(last["content"])}]
        self.parts_read = 0
        self._held_before = [HeldPart(0, part) for part in turn.before if not isinstance(part, TextPart)]

    def __iter__(self) -> Iterator[Stretch]:
        raise NotImplementedError

    def _take(self, parts: Iterable[Part | PendingPart]) -> list[HeldPart]:
        """Adds parts to the last message; gives back those whose place in the text matters."""
        held, in_group = list[HeldPart](), 0
        for part in parts:
            self.messages[-1]["content"].append(self._markers.template_part(part))
            begins = _begins_group(part, in_group)
            if not isinstance(part, TextPart):
                held.append(HeldPart(self.parts_read, part, begins))
            in_group = 1 if begins else in_group + 1
            self.parts_read += 1
        return held

    def _system_texts(self) -> list[TextPart]:
        """What the system says, where it goes in together with this turn."""
        first = self._turn.transcript.messages[0]
        if self._turn.transcript.rendered or first["role"] != "system":
            return []
        return [TextPart(part["text"]) for part in first["content"] if part["type"] == "text"]

    def _whole(self) -> str:
        """The chat with all parts."""
        parts = [part for message in self.messages for part in message["content"]]
        if self._turn.closes and not any(part["type"] != "text" or part["text"].strip() for part in parts):
            raise InputError("the prompt is empty: wanted text, an image or a video")
        return (self._template.closed if self._turn.closes else self._template.open)(self.messages)


class WholeRendering(Rendering):
    """Of parts whose kinds are known: the chat is rendered once, here, however often its text is gone through.

    Args:
        template: the host's.
        markers: the processor's.
        turn: where the parts belong.
        parts: all of them; media need not be open.

    Raises:
        InputError: a text holds a placeholder, the template refuses the chat, or rewrites what was read before.
    """

    def __init__(self, template: Template, markers: Markers, turn: Turn, parts: Sequence[Part | PendingPart]) -> None:
        super().__init__(template, markers, turn)
        new = [*turn.before, *parts]
        markers.check_placeholders(new)
        if any(isinstance(part, EmbeddingPart) for part in new):
            markers.check_fillers([*new, *self._system_texts()])
        held = [*self._held_before, *self._take(parts)]
        self._stretch = Stretch(_added(turn.transcript.rendered, self._whole()), held)

    def __iter__(self) -> Iterator[Stretch]:
        yield self._stretch


class GroupwiseRendering(Rendering):
    """Of parts of an iterator that may never end: rendered group by group, each up to the medium that the next begins.

    A group is rendered by itself, so templates whose text for a medium depends on those before it are refused.

    Args:
        template: the host's.
        markers: the processor's.
        turn: where the parts belong.
        parts: loaded; gone through once.
    """

    def __init__(self, template: Template, markers: Markers, turn: Turn, parts: Iterator[Part]) -> None:
        super().__init__(template, markers, turn)
        self._parts = parts
        self._so_far = turn.transcript.rendered
        self._embeds, self._with_filler = False, list[Part]()
        for part in (*turn.before, *self._system_texts()):
            self._check(part)

    def __iter__(self) -> Iterator[Stretch]:
        before = self._held_before
        for count, (group, following) in enumerate(self._groups()):
            for part in group:
                self._check(part)
            held = self._take(group)
            text = self._whole_rest() if following is None else self._up_to(group, following, count)
            yield Stretch(text, [*before, *held])
            before = []

    def _groups(self) -> Iterator[tuple[list[Part], Part | None]]:
        """Groups of parts, each with the medium that the next one begins with."""
        group = list[Part]()
        for part in self._parts:
            if _begins_group(part, len(group)):
                yield group, part
                group = []
            group.append(part)
        yield group, None

    def _check(self, part: Part) -> None:
        """Refuses texts with placeholders; embeddings and texts that hold their filler do not go together."""
        self._markers.check_placeholders([part])
        if isinstance(part, EmbeddingPart):
            self._embeds = True
        elif self._markers.holds_filler(part):
            self._with_filler.append(part)
        if self._embeds:
            self._markers.check_fillers(self._with_filler)

    def _up_to(self, group: list[Part], following: Part, count: int) -> str:
        """What the template makes of a group, up to the medium that follows it."""
        shown = [self._markers.template_part(part) for part in (*group, following)]
        rows = len(following) if isinstance(following, EmbeddingPart) else 0
        text = self._template.between_media(shown, rows) if count else ""
        if count < 2:  # a template may look back, to number images for instance: the second group would show it
            last = self.messages[-1]
            messages = [*self.messages[:-1], {**last, "content": [*last["content"], shown[-1]]}]
            whole = _added(self._so_far, self._template.before_last_medium(messages, rows))
            if count and whole != text:
                raise InputError(
                    "the model's chat template makes an image's text depend on the images before it, so content "
                    "cannot be read piece by piece: leave prefill_chunk_size out"
                )
            text = whole
        self._so_far += text
        return text

    def _whole_rest(self) -> str:
        return _added(self._so_far, self._whole())


def _begins_group(part: Part | PendingPart, in_group: int) -> bool:
    """Whether a part begins a new group, where so many parts are in the one before."""
    return part.kind != "text" and (in_group >= GROUP or (part.kind == "video" and in_group > 0))


def _added(so_far: str, rendered: str) -> str:
    """What a rendering adds to the text so far."""
    if not rendered.startswith(so_far):
        raise InputError(
            "the model's chat template rewrites what was read before: start a new chat with the whole history"
        )
    return rendered[len(so_far) :]
