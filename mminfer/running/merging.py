"""Settings of generation come from a call, a generation config, a chat and the model: who has the last word."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from transformers import GenerationConfig

from mminfer.errors import InputError, shown

LENGTHS = ("max_new_tokens", "max_length")
MAX_NEW_TOKENS = 64  # of an answer whose length nobody names
OF_CALL = ("streamer", "stopping_criteria", "tokenizer", "generation_config")  # arguments that are no settings


def settings_of(config: Any) -> dict[str, Any]:
    """What a generation config says; what it leaves open is left out."""
    left_out = ("transformers_version",)
    return {
        name: value
        for name, value in vars(config).items()
        if value is not None and not name.startswith("_") and name not in left_out
    }


def asked_settings(given: Mapping[str, Any], model_config: Any) -> dict[str, Any]:
    """What a call asks for: its arguments, and behind them what a generation config among them says.

    What that config has in common with the model's own is not asked for: it may hold anything a checkpoint brought.

    Raises:
        InputError: the generation config is none.
    """
    config = given.get("generation_config")
    if config is None:
        return dict(given)
    if not isinstance(config, GenerationConfig):
        raise InputError(f"generation_config={shown(config)}: wanted a transformers.GenerationConfig")
    own, brought = vars(GenerationConfig()), settings_of(model_config)
    said = settings_of(config).items()
    return {n: v for n, v in said if n in own or not same(v, brought.get(n))} | dict(given)


def same(one: Any, other: Any) -> bool:
    """Whether two values of settings are equal for certain."""
    try:
        return bool(one == other)
    except Exception:  # tensors, for one, compare element by element
        return False


def overridden(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of all calls, with those of one call on top.

    What the one call says in any way, be it in a generation config, stands before what holds for all; a length of its
    own stands in place of any other length.
    """
    config = given.get("generation_config")
    said = set(given) | (set(settings_of(config)) if isinstance(config, GenerationConfig) else set())
    if said & set(LENGTHS):
        said |= set(LENGTHS)
    layered = {name: value for name, value in base.items() if name not in said} | dict(given)
    of_all = base.get("generation_config")
    if isinstance(of_all, GenerationConfig):
        merged = copy(of_all)
        for name in said & set(vars(merged)):
            setattr(merged, name, getattr(config, name, None))
        layered["generation_config"] = merged
    return layered


def without(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments of a call but for one setting, which its generation config does not have either."""
    left = {key: value for key, value in given.items() if key != name}
    if left.get("generation_config") is not None and name in vars(left["generation_config"]):
        left["generation_config"] = copy(left["generation_config"])
        setattr(left["generation_config"], name, None)
    return left


def setting(model: Any, asked: Mapping[str, Any], name: str) -> Any:
    """A setting of generation: of a call, else the model's."""
    return asked.get(name, getattr(model.generation_config, name, None))


def host_arguments(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the host's `generate`, with a length even if nobody names one.

    Left out are a streamer, stopping criteria and stop strings.

    Args:
        model: the host's.
        given: arguments of the call.
    """
    asked = asked_settings(given, model.generation_config)
    arguments = {name: value for name, value in given.items() if name not in OF_CALL}
    arguments |= {"return_dict_in_generate": True, "use_cache": True, "stop_strings": None}
    if all(setting(model, asked, name) is None for name in LENGTHS):
        arguments["max_new_tokens"] = MAX_NEW_TOKENS
    if arguments.get("max_new_tokens") is not None:
        arguments["max_length"] = None  # of two lengths the host takes this one, and warns of the other
    config = given.get("generation_config")
    return arguments if config is None else _in_config(model, config, arguments)


def _in_config(model: Any, config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Settings as part of the generation config: the host wants them all in one place.

    An argument of None stays one, where it must hold against a setting of the model's.
    """
    config, left = copy(config), {}
    for name, value in arguments.items():
        settled = value is not None or getattr(model.generation_config, name, None) is None
        if settled and name in vars(config):
            setattr(config, name, value)
        else:
            left[name] = value
    return {"generation_config": config, **left}
