"""Samples as prompts that are read once: media encoded, rows laid out, the uncompressed model's answer noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mminfer.bench.protocols import Protocol
from mminfer.calibration.samples import Sample
from mminfer.engine import Engine
from mminfer.errors import InputError
from mminfer.inputs.content import MediaOptions
from mminfer.inputs.parts import Message, TextPart
from mminfer.inputs.transcript import Transcript
from mminfer.layout import GIVEN_ROWS, TokenLayout
from mminfer.running.model_lock import lock_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTOCOLS = (Protocol.IN_PROMPT, Protocol.NEXT_TURN)


@dataclass(frozen=True, eq=False)
class Stretch:
    """What goes through the model in one pass.

    Args:
        embeds: [T, C], of one sequence.
        layout: of these rows.
    """

    embeds: Tensor
    layout: TokenLayout


@dataclass(frozen=True, eq=False)
class Prompt:
    """One sample by one protocol, as far as no setting changes it.

    Args:
        stretches: one where the question stands in the prompt; else the context, and the question behind it.
    """

    stretches: tuple[Stretch, ...]

    @property
    def text(self) -> int:
        """Rows of text."""
        return self.rows - self.visual

    @property
    def visual(self) -> int:
        """Visual rows."""
        return sum(sum(stretch.layout.visual_lengths) for stretch in self.stretches)

    @property
    def rows(self) -> int:
        """All of them."""
        return sum(len(stretch.layout) for stretch in self.stretches)


@contextmanager
def turn_of(engine: Engine) -> Iterator[None]:
    """Within it the model is this thread's, in eval mode, without gradients."""
    engine.runner.check_free()
    with lock_of(engine.model).turn(), torch.no_grad():
        yield


def prompt_of(engine: Engine, sample: Sample, protocol: Protocol) -> Prompt:
    """A sample as the model takes it.

    Raises:
        InputError: the sample has no question behind its context, which asking in the next turn needs.
    """
    if protocol is Protocol.IN_PROMPT:
        return Prompt((_stretch(engine, engine.reader.inputs([list(sample.messages)], MediaOptions())),))
    content, question = _parted(sample.messages)
    reading = engine.reader.turn(Transcript(), content, MediaOptions(), closes=False, size=None)
    context = [_stretch(engine, inputs) for inputs in reading]
    asking = engine.reader.turn(reading.transcript, question, MediaOptions(), closes=True, size=None)
    return Prompt((*context, *(_stretch(engine, inputs) for inputs in asking)))


def with_answer(engine: Engine, sample: Sample, token_ids: Sequence[int]) -> Stretch:
    """A sample's prompt with these tokens behind it, all in one stretch."""
    inputs = engine.reader.inputs([list(sample.messages)], MediaOptions())
    ids: Tensor = inputs["input_ids"]
    behind = ids.new_tensor([list(token_ids)])
    longer: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "input_ids":
            value = torch.cat([ids, behind], 1)
        elif name == "attention_mask":
            value = torch.cat([value, torch.ones_like(behind, dtype=value.dtype)], 1)
        elif isinstance(value, Tensor) and value.shape == ids.shape:  # kinds of tokens, of which 0 is text
            value = torch.cat([value, value.new_zeros(behind.shape)], 1)
        elif name == GIVEN_ROWS:
            value = replace(value, mask=torch.cat([value.mask, value.mask.new_zeros(behind.shape)], 1))
        longer[name] = value
    return _stretch(engine, longer)


def _stretch(engine: Engine, inputs: Mapping[str, Any]) -> Stretch:
    given = inputs.get(GIVEN_ROWS)
    with turn_of(engine):
        return Stretch(*engine.adapter.embed({k: v for k, v in inputs.items() if k != GIVEN_ROWS}, given))


def _parted(messages: Sequence[Message]) -> tuple[list[Any], str]:
    """Context and question of a chat of one message."""
    parts = messages[-1].parts
    if len(messages) > 1 or len(parts) < 2 or not isinstance(parts[-1], TextPart):
        raise InputError(
            "a sample for next-turn is one message of the user's: a context, and the question as its last text; found "
            f"{len(messages)} messages, the last one of {len(parts)} parts"
        )
    return list(parts[:-1]), parts[-1].text
