"""Reading: new parts of a chat on their way into the cache; rendered, cut into pieces, assembled as model inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mminfer.inputs.assembling import Assembling
from mminfer.inputs.cutting import Cutting
from mminfer.inputs.rendering import Rendering
from mminfer.inputs.transcript import Transcript


class Reading:
    """Going through it gives the model inputs of one piece after the other; media are opened when their piece comes.

    What the pieces hold is what the template adds to what was rendered before: nothing that is in the cache is
    tokenised or computed again.

    Args:
        rendering: the new text.
        cutting: its pieces.
        assembling: makes inputs of them.
        parts_expected: how many new parts there will be, if anybody knows.
    """

    def __init__(
        self, rendering: Rendering, cutting: Cutting, assembling: Assembling, parts_expected: int | None = None
    ) -> None:
        self._rendering, self._cutting, self._assembling = rendering, cutting, assembling
        self.parts_expected = parts_expected

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Model inputs of one sequence without padding, at the host's positions from 0 on."""
        for piece in self._cutting:
            inputs = self._assembling.inputs(piece)
            self._cutting.measure(piece, inputs["input_ids"].shape[1])
            yield inputs

    @property
    def ids(self) -> list[int]:
        """The chat's token ids as far as they were handed out."""
        return self._assembling.ids

    @property
    def parts_done(self) -> int:
        """How many of the new parts have been handed out."""
        return self._cutting.parts_done

    @property
    def transcript(self) -> Transcript:
        """The chat as far as it was handed out."""
        read = self._assembling
        return Transcript(tuple(self._rendering.messages), read.rendered, tuple(read.ids), tuple(read.unread))
