"""The host's own preparation of a generation, without a pass: what it would refuse later, it refuses here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from mminfer.errors import InputError, shortened, shown
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache
from mminfer.running.merging import asked_settings, host_arguments, without

MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
# What the host asks only when it samples.
SAMPLING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_MOST_SCORES = 2**25  # for which processors are tried: a model's head takes longer
_CALLING_OUT = (PrefixConstrainedLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


@dataclass(frozen=True)
class Prepared:
    """What the host made of the arguments.

    Args:
        config: the generation config, merged by the host's rules.
        criteria: that stop rows, the caller's among them.
    """

    config: Any
    criteria: list[Any]


def prepare(model: Any, given: Mapping[str, Any], vocab_size: int) -> Prepared:
    """Has the host prepare a generation, and calls what it made of the settings once; the model is not called.

    Args:
        model: the host's, whose state stays as it is.
        given: arguments of a call.
        vocab_size: width of the model's logits.

    Raises:
        InputError: the host, or something it made, refuses the arguments, or they ask for what is no mode of ours.
    """
    asked = asked_settings(given, model.generation_config)
    try:
        prepared = _rehearse(model, given, vocab_size)
        if any(asked.get(name) is not None for name in SAMPLING) and prepared.config.do_sample is not True:
            _rehearse(model, {**given, **_as_if_sampling(asked)}, vocab_size)
    except Exception as error:  # the host raises anything
        raise _refusal(model, given, vocab_size, error) from error
    mode = prepared.config.get_generation_mode()
    if mode not in MODES:
        raise InputError(f"the settings ask for {mode.value}: wanted one of {', '.join(MODES)}")
    return prepared


def _as_if_sampling(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling settings are looked at where nothing is sampled, too, but for a temperature of 0: that means greedy."""
    return {"do_sample": True, **({"temperature": None} if asked.get("temperature") == 0 else {})}


def _refusal(model: Any, given: Mapping[str, Any], vocab_size: int, error: Exception) -> InputError:
    """An error that names the settings without which the host would have been content; all if there are none."""
    asked = asked_settings(given, model.generation_config)
    asked = {name: value for name, value in asked.items() if value is not None and name != "generation_config"}
    culprits = [name for name in asked if _passes(model, without(given, name), vocab_size)] or list(asked)
    found = ", ".join(f"{name}={shown(asked[name])}" for name in culprits)
    return InputError(f"{shortened(found)}: the host refuses it ({shortened(str(error))}). Leave it out, or mend it")


def _passes(model: Any, given: Mapping[str, Any], vocab_size: int) -> bool:
    try:
        _rehearse(model, given, vocab_size)
    except Exception:
        return False
    return True


class Made(NamedTuple):
    """What the host makes of a call's settings before it would call the model.

    Args:
        input_ids: [rows, tokens], as the model would be called with.
        processors: of logits.
        criteria: that stop rows.
        config: the generation config, merged by the host's rules.
    """

    input_ids: Tensor
    processors: list[Any]
    criteria: list[Any]
    config: Any


def made_by_host(model: Any, prompt: Mapping[str, Any], arguments: Mapping[str, Any], criteria: Iterable[Any]) -> Made:
    """Runs the host's `generate` up to where it would call the model; raises what it raises.

    Args:
        model: the host's.
        prompt: inputs that `generate` begins with, a cache among them.
        arguments: others of the call.
        criteria: the caller's own that stop rows.
    """
    seen: list[Made] = []

    def stand_in(
        model: Any,
        input_ids: Tensor,
        logits_processor: list[Any],
        stopping_criteria: list[Any],
        generation_config: Any,
        **_: Any,
    ) -> Tensor:
        seen.append(Made(input_ids, list(logits_processor), list(stopping_criteria), generation_config))
        return input_ids

    model.generate(**prompt, **arguments, stopping_criteria=list(criteria), custom_generate=stand_in)
    return seen[0]


def _rehearse(model: Any, given: Mapping[str, Any], vocab_size: int) -> Prepared:
    """What the host makes of the arguments, after it was tried; raises what that raises."""
    processors = given.get("logits_processor") or []
    criteria = given.get("stopping_criteria") or []
    made = made_by_host(model, _prompt(model), host_arguments(model, given), criteria)
    _try(_without(made.processors, processors), made.input_ids, vocab_size, made.config.do_sample)
    for criterion in _without(made.criteria, criteria):
        criterion(made.input_ids, None)
    return Prepared(made.config, made.criteria)


def _prompt(model: Any) -> dict[str, Any]:
    """One token, which stands in for a prompt that may not be known yet."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": ids,  # else some hosts would work them out, and keep them
        CACHE_NAME: CompressedCache(),
    }


def _try(processors: list[Any], input_ids: Tensor, vocab_size: int, do_sample: Any) -> None:
    """Calls logits processors once; raises what they raise, and `ValueError` where no token is left."""
    if not processors or len(input_ids) * vocab_size > _MOST_SCORES:
        return
    scores = torch.linspace(-1, 1, vocab_size, device=input_ids.device).repeat(len(input_ids), 1)
    for processor in processors:
        if not isinstance(processor, _CALLING_OUT):
            scores = processor(input_ids, scores)
    if do_sample and not scores.softmax(-1).isfinite().all():
        raise ValueError("it leaves no token to choose from")


def _without(made: list[Any], given: Any) -> list[Any]:
    """What the host made itself: the caller's own may keep count of their calls."""
    return [one for one in made if all(one is not other for other in given)]
