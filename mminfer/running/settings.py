"""Settings of one generation, resolved once, before anything runs, by the host's own rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import EosTokenCriteria, StopStringCriteria, TextStreamer

from mminfer.errors import InputError, shown
from mminfer.forward.room import HEADROOM
from mminfer.running.arguments import REPEATING, check_model_settings, check_names, check_values, token_ids
from mminfer.running.merging import asked_settings, host_arguments, setting
from mminfer.running.rehearsal import Prepared, prepare

MAX_HEADROOM = 1024  # beyond, a cache grows when the tokens come
MOST_BEAM_TOKENS = 2**28  # the host keeps room for all tokens of all beams from the start
_RESOLVED = ("length_penalty", "max_length", "max_new_tokens", *REPEATING)  # looked at also where a checkpoint set them


@dataclass(frozen=True)
class GenerationSettings:
    """What one call of the host's `generate` is told, and what follows from it.

    Args:
        arguments: of the host's `generate`, without those below.
        stopping_criteria: the caller's own, and those of stop strings.
        streamer: the caller's.
        end_ids: tokens that end a turn.
        num_beams: of beam search; 1: none.
        expand_size: how many times the host repeats every sequence: for beams, or for sequences to return.
        guided: whether the host compares with a second, unconditional run of the model.
        max_new_tokens: the most tokens of an answer; None: `max_length` decides.
        max_length: the most tokens of prompt and answer; None: `max_new_tokens` decides.
        pad_token_id: what stands in rows that have ended.
    """

    arguments: dict[str, Any]
    stopping_criteria: tuple[Any, ...]
    streamer: Any
    end_ids: frozenset[int]
    num_beams: int
    expand_size: int
    guided: bool
    max_new_tokens: int | None
    max_length: int | None
    pad_token_id: int

    @property
    def finishing_ids(self) -> frozenset[int]:
        """Tokens behind which a row of the batch generates no more.

        None with beams, whose rows change places, nor with guidance, whose second run has rows of its own.
        """
        return frozenset() if self.num_beams > 1 or self.guided else self.end_ids

    @property
    def headroom(self) -> int:
        """How many tokens to come a cache should have room for from the start."""
        return min(max(HEADROOM, self.max_new_tokens or 0), MAX_HEADROOM)

    def controlled(self, streamer: Any, stopping_criteria: Sequence[Any]) -> GenerationSettings:
        """The same settings, with another streamer and other criteria."""
        return replace(self, streamer=streamer, stopping_criteria=tuple(stopping_criteria))

    def check_rows(self, chats: int) -> None:
        """Raises `InputError` where the streamer takes one row only and there are more; chats: of the batch."""
        rows = chats * self.expand_size
        if rows > 1 and isinstance(self.streamer, TextStreamer):
            raise InputError(f"streamer: a {type(self.streamer).__name__} takes one answer, and {rows} were asked for")

    def check_prompt(self, tokens: int) -> None:
        """Raises `InputError` where a prompt of so many tokens leaves no room for an answer."""
        if self.max_length is not None and tokens >= self.max_length:
            raise InputError(
                f"max_length={self.max_length} counts the prompt too, and that has {tokens} tokens or more: "
                "pass max_new_tokens, or a greater max_length"
            )


def resolve(
    model: Any, tokenizer: Any, vocab_size: int, given: Mapping[str, Any], one_answer_for: str | None = None
) -> GenerationSettings:
    """The settings of a call: its own, behind them its generation config's, behind them the model's.

    Args:
        model: the host model.
        tokenizer: of its processor.
        vocab_size: width of its logits.
        given: arguments of the call.
        one_answer_for: what takes one answer only, if it does, and what to do instead.

    Raises:
        InputError: an argument is unknown, cannot be honoured, or has a value that the host would refuse, if only late.
    """
    asked = asked_settings(given, model.generation_config)
    check_names(model, asked)
    check_model_settings(model, asked)
    resolved = {name: setting(model, asked, name) for name in _RESOLVED}
    check_values({**{name: value for name, value in resolved.items() if value is not None}, **asked}, vocab_size)
    expand_size = max(resolved[name] or 1 for name in REPEATING)
    if one_answer_for is not None and expand_size != 1:
        raise InputError(f"num_beams or num_return_sequences is {expand_size}: {one_answer_for}")
    prepared = prepare(model, given, vocab_size)
    criteria = _stopping(given, setting(model, asked, "stop_strings"), tokenizer)
    return _settings(host_arguments(model, given), prepared, criteria, given.get("streamer"), vocab_size)


def _stopping(given: Mapping[str, Any], strings: Any, tokenizer: Any) -> list[Any]:
    """The caller's criteria, and one for stop strings, unless the caller brings one."""
    criteria = list(given.get("stopping_criteria") or ())
    if strings is None or any(type(one) is StopStringCriteria for one in criteria):
        return criteria
    try:
        return [StopStringCriteria(given.get("tokenizer") or tokenizer, strings), *criteria]
    except Exception as error:  # the host raises anything
        raise InputError(
            f"stop_strings={shown(strings)}: wanted a string or a list of them ({error!r:.200})"
        ) from error


def _settings(
    arguments: dict[str, Any], prepared: Prepared, criteria: list[Any], streamer: Any, vocab_size: int
) -> GenerationSettings:
    config = prepared.config
    ends = [number for one in prepared.criteria if type(one) is EosTokenCriteria for number in _ids_of(one)]
    length, pad, num_beams = config.max_new_tokens, config.pad_token_id, config.num_beams or 1
    expand_size = max(num_beams, config.num_return_sequences or 1)
    if streamer is not None and num_beams > 1:
        raise InputError(f"streamer: an answer of num_beams={num_beams} is not known before its end; leave one out")
    if num_beams > 1 and expand_size * (length or config.max_length) > MOST_BEAM_TOKENS:
        raise InputError(
            f"num_beams={num_beams} with {length or config.max_length} tokens each: wanted {MOST_BEAM_TOKENS} in all "
            "at most, for which the host keeps room; pass a smaller max_new_tokens"
        )
    if num_beams > 1 and len(ends) >= vocab_size:
        raise InputError(
            f"eos_token_id has {len(ends)} ids: with beams wanted fewer than the {vocab_size} tokens there are"
        )
    return GenerationSettings(
        arguments,
        tuple(criteria),
        streamer,
        frozenset(ends),
        num_beams,
        expand_size,
        guided=config.guidance_scale not in (None, 1),
        max_new_tokens=length,
        max_length=config.max_length if length is None else None,
        pad_token_id=token_ids("pad_token_id", pad)[0] if pad is not None else next(iter(ends), 0),
    )


def _ids_of(criterion: EosTokenCriteria) -> list[int]:
    ids: list[int] = criterion.eos_token_id.reshape(-1).tolist()
    return ids
