"""How a request runs: how its prompts go in, and what its arguments tell the host's `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from mminfer.errors import InputError
from mminfer.forward.kv_cache import HEADROOM

MAX_HEADROOM = 1024  # beyond, a cache grows when the tokens come


@dataclass(frozen=True)
class RunOptions:
    """How prompts go in.

    Args:
        chunk_size: tokens of a chat that go through the model at a time; None: the prompt at once.
        progress: show a bar of the tokens read.
    """

    chunk_size: int | None = None
    progress: bool = False


class GenerationArguments:
    """The arguments of one call of the host's `generate`, read as the host reads them.

    Args:
        model: the host model, whose generation config gives what the call leaves open.
        arguments: of the call; beside the host's own, `stopped` is called after each chunk of the prompt and ends the
            reading if it gives True.

    Attributes:
        host_arguments: those that go to the host.
        stopped: as above; None: nobody ends the reading.
    """

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        self._model = model
        self.host_arguments = dict(arguments)
        self.stopped: Callable[[], bool] | None = self.host_arguments.pop("stopped", None)

    def check(self) -> None:
        """Refuses names that the host does not know, which it would say only behind the prompt.

        Raises:
            InputError: there is one.
        """
        known = {"tokenizer", *vars(GenerationConfig()), *vars(self._model.generation_config)}
        for function in (self._model.generate, self._model.forward):
            known |= set(inspect.signature(function).parameters)
        unknown = [name for name in self.host_arguments if name not in known]
        if unknown:
            raise InputError(f"generate() knows no argument {', '.join(unknown)}: leave it out, or check its spelling")

    def setting(self, name: str) -> Any:
        """A setting of generation: of the call, else of the config it passes, else the model's."""
        config = self.host_arguments.get("generation_config") or self._model.generation_config
        return self.host_arguments.get(name, getattr(config, name, None))

    @property
    def expand_size(self) -> int:
        """How many times the host repeats every sequence: for beams, or for sequences to return."""
        return max(self.setting(name) or 1 for name in ("num_beams", "num_return_sequences"))

    @property
    def end_ids(self) -> set[int]:
        """Tokens that end a turn."""
        ids = self.setting("eos_token_id")
        if ids is None:
            return set()
        return set(ids) if isinstance(ids, (list, tuple)) else {ids}

    @property
    def finishing_ids(self) -> set[int]:
        """Tokens behind which a row of the batch generates no more; none with beams, whose rows change places."""
        return set() if (self.setting("num_beams") or 1) > 1 else self.end_ids

    @property
    def headroom(self) -> int:
        """How many tokens to come a cache should have room for from the start."""
        return min(max(HEADROOM, self.host_arguments.get("max_new_tokens") or 0), MAX_HEADROOM)
