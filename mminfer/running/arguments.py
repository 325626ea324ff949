"""Which arguments of generation are honoured, and what they may be: all else is refused by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from mminfer.errors import InputError, shown
from mminfer.running.merging import LENGTHS, same, settings_of
from mminfer.technique import is_number, is_whole

MOST_TOKENS = 2**31 - 1  # of an answer
MOST_ROWS = 4096  # that one prompt may become: by beams, or by sequences to return
REPEATING = ("num_beams", "num_return_sequences")  # the settings by which the host repeats every sequence
TOKEN_IDS = ("eos_token_id", "pad_token_id", "bos_token_id", "forced_bos_token_id", "forced_eos_token_id")

# What is the host's and is passed on to it; the numbers below are honoured too.
HONOURED = frozenset(
    {
        *TOKEN_IDS,
        "bad_words_ids",
        "begin_suppress_tokens",
        "early_stopping",
        "exponential_decay_length_penalty",
        "generation_config",
        "logits_processor",
        "prefix_allowed_tokens_fn",
        "sequence_bias",
        "stop_strings",
        "stopping_criteria",
        "streamer",
        "suppress_tokens",
        "tokenizer",
        "watermarking_config",
    }
)
SWITCHES = frozenset({"do_sample", "output_logits", "remove_invalid_values", "renormalize_logits"})
# Arguments that change nothing as long as they say what is done anyway, and what that is.
HARMLESS: dict[str, tuple[Any, str]] = {
    "return_dict_in_generate": (True, "an engine gives a GenerationOutput"),
    "use_cache": (True, "an engine's prompt goes through once, into the cache"),
    "synced_gpus": (False, "an engine runs a model on its own"),
    "trust_remote_code": (
        False,
        "an engine runs no code of others in generation; from_pretrained takes it for a model",
    ),
}
_ASSISTED = "an engine drafts no tokens ahead: a compressed cache cannot be rolled back"
_CACHE = "an engine has a cache of its own: choose its techniques by the InferenceConfig"
_OUTPUTS = "a GenerationOutput does not hold it: call the model's own generate()"
_REMOTE = "the host runs it by code from its hub only"
# Why some others are refused. What is not named anywhere here is refused without a reason.
REASONS = {
    **dict.fromkeys(("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "use_mtp"), _ASSISTED),
    **dict.fromkeys(("assistant_early_exit", "is_assistant", "speculation_type"), _ASSISTED),
    **dict.fromkeys(("cache", "past_key_values", "cache_params", "cache_config", "max_cache_len"), _CACHE),
    "cache_implementation": _CACHE,
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores"), _OUTPUTS),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "num_beam_groups", "diversity_penalty", "low_memory"), _REMOTE),
    **dict.fromkeys(("constraints", "force_words_ids", "custom_generate"), _REMOTE),
    **dict.fromkeys(("compile_config", "disable_compile"), "whether steps are compiled is said by Engine(compile=...)"),
    "prefill_chunk_size": "it is an argument of the call itself",
}
# Of these the host does nothing where it is not told to by one of the above: a checkpoint may well carry them.
IDLE = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "decoder_start_token_id",
        "disable_compile",
        "diversity_penalty",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
    }
)
_INPUTS = "an engine makes the model's inputs itself: give content as messages"


@dataclass(frozen=True)
class Numbers:
    """Values that a setting may have.

    Args:
        whole: whether they are whole numbers.
        least: the least of them.
        most: the greatest of them.
    """

    whole: bool = False
    least: float = -math.inf
    most: float = math.inf

    def check(self, name: str, value: Any) -> None:
        """Raises `InputError` for any other value."""
        fits = is_whole(value, least=int(self.least)) if self.whole else is_number(value)
        if not fits or not self.least <= value <= self.most:
            raise InputError(f"{name}={shown(value)}: wanted {self}")

    def __str__(self) -> str:
        words = "a whole number" if self.whole else "a number"
        if math.isfinite(self.least):
            words += f" from {self.least:g}" if self.least else " from 0"
        return words + (f" to {self.most:.10g}" if math.isfinite(self.most) else "")


_SHARE = Numbers(least=0, most=1)
_COUNT = Numbers(whole=True, least=0, most=MOST_TOKENS)
NUMBERS: dict[str, Numbers] = {
    **dict.fromkeys(LENGTHS, Numbers(whole=True, least=1, most=MOST_TOKENS)),
    **dict.fromkeys(REPEATING, Numbers(whole=True, least=1, most=MOST_ROWS)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k"), _COUNT),
    "no_repeat_ngram_size": Numbers(whole=True, least=0, most=1024),
    "encoder_no_repeat_ngram_size": Numbers(
        whole=True, least=0, most=64
    ),  # so many copies of the prompt the host makes
    **dict.fromkeys(("top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), _SHARE),
    **dict.fromkeys(("temperature", "repetition_penalty", "encoder_repetition_penalty", "max_time"), Numbers(least=0)),
    "guidance_scale": Numbers(least=-1e6, most=1e6),
    "length_penalty": Numbers(least=-10, most=10),  # the exponent of an answer's length
}


def check_names(model: Any, asked: Mapping[str, Any]) -> None:
    """Raises `InputError` for arguments that nobody knows, and for those that an engine cannot honour."""
    if all(is_honoured(name) for name in asked):
        return
    own = set(vars(GenerationConfig()))
    of_call = set(inspect.signature(model.generate).parameters)
    of_model = set(inspect.signature(model.forward).parameters) - own
    known = (
        own | of_call | of_model | set(REASONS) | set(HARMLESS) | HONOURED | set(settings_of(model.generation_config))
    )
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise InputError(f"generate() knows no argument {', '.join(unknown)}: leave it out, or check its spelling")
    for name, value in asked.items():
        if not is_honoured(name) and not _is_off(name, value):
            reason = REASONS.get(
                name, _INPUTS if name in of_model | of_call else "an engine does not know what it does"
            )
            raise InputError(f"{name}={shown(value)}: not supported, for {_reason(name, reason)}. Leave it out")


def check_model_settings(model: Any, asked: Mapping[str, Any]) -> None:
    """Raises `InputError` for what the model's own generation config sets and an engine cannot honour."""
    own = vars(GenerationConfig())
    for name, value in settings_of(model.generation_config).items():
        if name in asked or name not in own or name in IDLE or is_honoured(name) or _is_off(name, value):
            continue
        if name == "cache_implementation" and value == "hybrid":
            continue  # the host takes it back
        reason = _reason(name, REASONS.get(name, "an engine does not know what it does"))
        raise InputError(
            f"the model's generation config has {name}={shown(value)}: not supported, for {reason}. "
            f"Pass {name}={HARMLESS[name][0] if name in HARMLESS else None}, or change that config"
        )


def _reason(name: str, reason: str) -> str:
    return HARMLESS[name][1] if name in HARMLESS else reason


def is_honoured(name: str) -> bool:
    """Whether an answer follows this argument, whatever its value."""
    return name in HONOURED or name in NUMBERS or name in SWITCHES


def _is_off(name: str, value: Any) -> bool:
    """Whether an argument that is not honoured says nothing but what holds anyway."""
    if value is None:
        return True
    if name in HARMLESS:
        return value is HARMLESS[name][0]
    own = vars(GenerationConfig())
    return (value is False and name in own) or _is_default(name, value)  # other arguments are no switches


def _is_default(name: str, value: Any) -> bool:
    defaults: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    return type(value) is type(defaults.get(name)) and same(value, defaults[name])


def check_values(asked: Mapping[str, Any], vocab_size: int) -> None:
    """Raises `InputError` for values that no answer could follow; those that the host looks at itself are left to it.

    Args:
        asked: settings by name.
        vocab_size: token ids that there are.
    """
    for name, value in asked.items():
        if value is None and name not in ("max_new_tokens", "length_penalty"):  # of which the host makes no default
            continue
        if name in NUMBERS:
            NUMBERS[name].check(name, value)
        elif name in SWITCHES and not isinstance(value, bool):
            raise InputError(f"{name}={shown(value)}: wanted True or False")
        elif name in TOKEN_IDS:
            _check_token_ids(name, value, vocab_size)
    _check_callables(asked)
    decay = asked.get("exponential_decay_length_penalty")
    if decay is not None and not _is_decay(decay):
        raise InputError(f"exponential_decay_length_penalty={shown(decay)}: wanted (first token, factor)")


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Ids that may come as a number, a list or a tensor; none for None.

    Raises:
        InputError: these are no ids.
    """
    if value is None:
        return ()
    try:
        ids = torch.as_tensor(value, device="cpu")  # wherever a default device would put them
    except Exception:  # a value of any type may come, and tensors of kinds that hold nothing
        ids = torch.empty(0)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim > 1 or not ids.numel():
        raise InputError(f"{name}={shown(value)}: wanted a token id or several, or None")
    return tuple(ids.reshape(-1).tolist())


def _check_token_ids(name: str, value: Any, vocab_size: int) -> None:
    ids = token_ids(name, value)
    if name == "eos_token_id":
        return  # an id that never comes is a way to say that nothing ends an answer
    if name != "forced_eos_token_id" and (len(ids) != 1 or torch.as_tensor(value, device="cpu").ndim):
        raise InputError(f"{name}={shown(value)}: wanted one token id, or None")
    if not all(0 <= number < vocab_size for number in ids):
        raise InputError(f"{name}={shown(value)}: wanted a token id from 0 to {vocab_size - 1}")


def _is_decay(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and is_whole(value[0], least=0) and is_number(value[1], above=0)


def _check_callables(asked: Mapping[str, Any]) -> None:
    """Whatever the host calls at every token: that it can be called so."""
    for name in ("logits_processor", "stopping_criteria"):
        functions = asked.get(name)
        if functions is None:
            continue
        if not isinstance(functions, (list, tuple)):
            raise InputError(
                f"{name}={shown(functions)}: wanted a list of what the host calls with (input_ids, scores)"
            )
        for function in functions:
            if not _takes(function, 2):
                raise InputError(
                    f"{name} has {shown(function)}: wanted what the host can call with (input_ids, scores)"
                )
    allowed = asked.get("prefix_allowed_tokens_fn")
    if allowed is not None and not _takes(allowed, 2):
        raise InputError(f"prefix_allowed_tokens_fn={shown(allowed)}: wanted a function of (batch index, input_ids)")
    streamer = asked.get("streamer")
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise InputError(f"streamer={shown(streamer)}: wanted a transformers streamer, with put(...) and end()")


def _takes(function: Any, count: int) -> bool:
    """Whether it can be called with so many arguments, as far as it tells."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # compiled code may have no signature
        return True
    return True
