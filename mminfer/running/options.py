"""How a request runs: how its prompts go in, and what its arguments tell the host's `generate`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from mminfer.errors import InputError
from mminfer.forward.kv_cache import HEADROOM
from mminfer.technique import is_whole

REPEATING = ("num_beams", "num_return_sequences")  # the settings by which the host repeats every sequence
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


def check_length(max_new_tokens: Any) -> None:
    """Raises `InputError` unless an answer can be of so many tokens at most."""
    if not is_whole(max_new_tokens, least=1):
        raise InputError(f"max_new_tokens={max_new_tokens!r}: wanted a whole number from 1")


class GenerationArguments:
    """The arguments of one call of the host's `generate`, read as the host reads them.

    Args:
        model: the host model, whose generation config gives what the call leaves open.
        arguments: of the call.

    Attributes:
        given: those arguments, in a dictionary of its own.
    """

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        self._model, self.given = model, dict(arguments)

    def check(self, one_answer_for: str | None = None) -> None:
        """Refuses what the host would refuse behind the prompt only.

        Args:
            one_answer_for: what takes one answer only, if it does, and what to do instead.

        Raises:
            InputError: a name that the host does not know, or wrong numbers of tokens, beams or sequences to return.
        """
        self._check_names()
        check_length(self.given.get("max_new_tokens", 1))
        for name in REPEATING:
            value = self.setting(name)
            if value is not None and not is_whole(value, least=1):
                raise InputError(f"{name}={value!r}: wanted a whole number from 1")
        if one_answer_for is not None and self.expand_size != 1:
            raise InputError(f"num_beams or num_return_sequences is {self.expand_size}: {one_answer_for}")

    def _check_names(self) -> None:
        known = {"tokenizer", *vars(GenerationConfig()), *vars(self._model.generation_config)}
        for function in (self._model.generate, self._model.forward):
            known |= set(inspect.signature(function).parameters)
        unknown = [name for name in self.given if name not in known]
        if unknown:
            raise InputError(f"generate() knows no argument {', '.join(unknown)}: leave it out, or check its spelling")

    def setting(self, name: str) -> Any:
        """A setting of generation: of the call, else of the config it passes, else the model's."""
        config = self.given.get("generation_config") or self._model.generation_config
        return self.given.get(name, getattr(config, name, None))

    @property
    def expand_size(self) -> int:
        """How many times the host repeats every sequence: for beams, or for sequences to return."""
        return max(self.setting(name) or 1 for name in REPEATING)

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
        return min(max(HEADROOM, self.given.get("max_new_tokens") or 0), MAX_HEADROOM)
