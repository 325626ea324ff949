"""What is to be measured, checked before a model is loaded; and the rows that come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import mminfer
from mminfer.bench import fidelity, speed
from mminfer.bench.contexts import Context
from mminfer.bench.fidelity import FidelityRow
from mminfer.bench.protocols import Protocol
from mminfer.bench.speed import SpeedRow
from mminfer.config import InferenceConfig
from mminfer.engine import Engine
from mminfer.errors import InputError
from mminfer.layout import Modality

LEAST_CHUNK = 512  # tokens of a chunk where none is given; the longest image if that has more


@dataclass(frozen=True)
class Plan:
    """What is to be measured of every setting.

    Args:
        contexts: the first ones are timed, all are compared.
        batch: chats in a timed call.
        new_tokens: of a timed or compared answer.
        repeats: timed calls; 0: none.
        protocols: by which fidelity is asked; empty: not at all.
        chunk_size: tokens of a chunk where contexts are streamed; None: 512, or as many as the longest image has.
    """

    contexts: Sequence[Context]
    batch: int
    new_tokens: int
    repeats: int
    protocols: Sequence[Protocol]
    chunk_size: int | None

    def check(self, settings: Mapping[str, InferenceConfig]) -> None:
        """Raises `InputError` if a setting cannot be measured by these protocols."""
        if Protocol.STREAMED not in self.protocols:
            return
        for name, config in settings.items():
            for technique in config.techniques:
                if technique.needs_whole_prompt:
                    raise InputError(
                        f"{name} by --protocol streamed: chunk by chunk nobody sees the whole prompt, which is needed "
                        f"by {technique.needs_whole_prompt}"
                    )

    def streaming_chunk(self, engine: Engine) -> int:
        """Tokens of a chunk, of which none is too small for an image.

        Raises:
            InputError: the one that was asked for is.
        """
        if Protocol.STREAMED not in self.protocols:
            return LEAST_CHUNK
        longest = max(_longest_image(engine, context) for context in self.contexts)
        if self.chunk_size is None:
            return max(LEAST_CHUNK, longest)
        if self.chunk_size < longest:
            raise InputError(
                f"--chunk-size {self.chunk_size}: an image of this model takes up to {longest} tokens and is never "
                f"split: pass {longest} or more"
            )
        return self.chunk_size


def _longest_image(engine: Engine, context: Context) -> int:
    """The longest run of placeholders in a row."""
    ids = engine.prepare([context.chat(context.questions[0])])["input_ids"][0]
    kinds = [engine.adapter.placeholder_id(kind) for kind in (Modality.IMAGE, Modality.VIDEO)]
    known = torch.tensor([kind for kind in kinds if kind is not None], device=ids.device)
    is_placeholder, counts = torch.isin(ids, known).unique_consecutive(return_counts=True)
    return int(counts[is_placeholder].max()) if bool(is_placeholder.any()) else 1


def measure(plan: Plan, engines: Mapping[str, Engine]) -> tuple[list[SpeedRow], list[FidelityRow], int]:
    """Times and compares as planned.

    Args:
        plan: what.
        engines: by name of their setting, all of one model.

    Returns:
        Rows of time and memory, rows of fidelity, and the tokens of a streamed chunk.
    """
    some = next(iter(engines.values()))
    chunk = plan.streaming_chunk(some)
    timed, compared = [], []
    if plan.repeats:
        own = [plan.contexts[n % len(plan.contexts)] for n in range(plan.batch)]
        chats = [context.chat(context.questions[0]) for context in own]
        settings = {name: engine.config for name, engine in engines.items()}
        timed = speed.measure(some, settings, chats, plan.new_tokens, plan.repeats)
    if plan.protocols:
        compared = fidelity.measure(engines, plan.contexts, plan.protocols, plan.new_tokens, chunk)
    return timed, compared, chunk


def origin(engine: Engine) -> dict[str, Any]:
    """Versions and machine, for every row."""
    return {
        "device": str(engine.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "mminfer": mminfer.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def joined_rows(timed: Sequence[SpeedRow], compared: Sequence[FidelityRow]) -> list[dict[str, Any]]:
    """One row a setting and protocol, all with the same columns; those of what was not measured are empty."""
    times = {row.setting: row.to_dict() for row in timed}
    judged = [dataclasses.asdict(row) for row in compared]
    names = [name for name in times if name not in {row["setting"] for row in judged}]
    rows = [{"setting": name, "protocol": ""} for name in names] + judged
    columns = dict.fromkeys(column for row in (*rows, *times.values()) for column in row)
    return [dict.fromkeys(columns, "") | row | times.get(str(row["setting"]), {}) for row in rows]
