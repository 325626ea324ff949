"""What must hold of a saved chat, whoever wrote its file: a chat that passes cannot end the process."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mminfer.chat_files.identity import ChatIdentity
from mminfer.errors import InputError, shown
from mminfer.forward.storage import CONTINUATION_NAMES

FACTS = {
    *("format", "model", "weights", "model_settings", "tokenizer", "template", "config"),
    *("cache", "messages", "rendered", "ids", "unread"),
}
_CACHE_FACTS = {"logical_length", "tokens", "seen", "head_lengths", "rotary_length"}
_HIGHEST_POSITION = 2.0**31
_COLUMN_DTYPES = {
    "is_visual": torch.bool,
    "score": torch.float32,
    "size": torch.float32,
    "source": torch.int64,
    "log_mass": torch.float32,
}


class Shape(NamedTuple):
    """Type and shape of a tensor that was not read yet."""

    dtype: torch.dtype
    size: tuple[int, ...]


def check_facts(facts: dict[str, Any], identity: ChatIdentity) -> None:
    """Raises `InputError` unless the facts are those of one chat of this engine's."""
    identity.check(facts)
    _check_transcript(facts, identity.vocabulary)
    _check_counts(facts["cache"], len(facts["ids"]), identity.adapter.spec.num_layers)
    _check_heads(facts["cache"], identity)


def _check_transcript(facts: dict[str, Any], vocabulary: int) -> None:
    ids, unread, rendered = facts["ids"], facts["unread"], facts["rendered"]
    for name, found, most in (("ids", ids, math.inf), ("unread", unread, 1)):
        whole = isinstance(found, list) and len(found) <= most and all(type(token) is int for token in found)
        _require(whole and all(0 <= token < vocabulary for token in found), name, found)
    _require(_is_text(rendered), "rendered", rendered)
    messages = facts["messages"]
    _require(isinstance(messages, list), "messages", messages)
    for message in messages:
        _check_message(message)
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    _require(turns == [("user", "assistant")[i % 2] for i in range(len(turns))], "roles", roles)


def _check_message(message: Any) -> None:
    sound = isinstance(message, dict) and set(message) == {"role", "content"} and isinstance(message["content"], list)
    _require(sound, "message", message)
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            _require(set(part) == {"type", "text"} and _is_text(part["text"]), "part", part)
        else:
            _require(kind in ("image", "video") and set(part) == {"type"}, "part", part)


def _check_counts(cache: Any, tokens: int, num_layers: int) -> None:
    """The counts of a cache that took in so many tokens."""
    _require(isinstance(cache, dict) and set(cache) == _CACHE_FACTS, "cache", cache)
    lengths = [tokens] if tokens else []
    for name, wanted in (("tokens", lengths), ("logical_length", tokens)):
        _require(_same(cache[name], wanted), name, cache[name])
    seen = cache["seen"]
    _require(isinstance(seen, list) and len(seen) == (num_layers if tokens else 0), "layers", seen)
    for of_layer in seen:
        one = isinstance(of_layer, list) and len(of_layer) == 1 and type(of_layer[0]) is int
        _require(one and 0 < of_layer[0] <= tokens, "tokens of a layer", of_layer)
    reached = cache["rotary_length"]
    _require(type(reached) is float and 0 <= reached < _HIGHEST_POSITION, "rotary_length", reached)


def _check_heads(cache: dict[str, Any], identity: ChatIdentity) -> None:
    """The lengths of the heads of each layer, where they differ."""
    found, heads = cache["head_lengths"], identity.adapter.spec.num_key_value_heads
    _require(isinstance(found, list) and len(found) == len(cache["seen"]), "head_lengths", found)
    for of_layer, (seen,) in zip(found, cache["seen"], strict=True):
        _require(isinstance(of_layer, list) and len(of_layer) == 1, "head_lengths", of_layer)
        lengths = of_layer[0]
        if lengths is None:
            continue
        whole = isinstance(lengths, list) and len(lengths) == heads and all(type(n) is int for n in lengths)
        fits = identity.by_head and whole and all(0 <= n <= seen for n in lengths) and sum(lengths) > 0
        _require(fits, "head_lengths", lengths)


def check_shapes(shapes: Mapping[str, Shape], facts: dict[str, Any], identity: ChatIdentity) -> None:
    """Raises `InputError` unless the tensors are those of such a cache, before they are read."""
    cache, spec = facts["cache"], identity.adapter.spec
    sequences, seen = len(cache["tokens"]), [count for (count,) in cache["seen"]]
    layers = [_tensors_of(i, shapes, identity) for i in range(len(seen))]
    wanted = {*CONTINUATION_NAMES, *(name for layer in layers for name in layer.values())}
    _require(set(shapes) == wanted, "tensors", sorted(set(shapes) ^ wanted))
    for name in CONTINUATION_NAMES:
        _require(shapes[name] == Shape(torch.float64, (sequences,)), name, shapes[name])
    dtype = identity.takes_dtype or (shapes[layers[0]["keys"]].dtype if layers else torch.float32)
    _require(dtype.is_floating_point, "keys", dtype)
    for layer, count, (lengths,) in zip(layers, seen, cache["head_lengths"], strict=True):
        found, heads = shapes[layer["keys"]], spec.num_key_value_heads
        entries = found.size[2] if len(found.size) == 4 else 0
        _require(0 < entries <= count if lengths is None else entries == sum(lengths), layer["keys"], found)
        rows = (1, heads, entries) if lengths is None else (1, 1, entries)
        for column, name in layer.items():
            like = _COLUMN_DTYPES.get(column)
            if column == "score" and dtype.itemsize <= 2 and shapes[name].dtype == torch.bfloat16:
                like = torch.bfloat16  # a technique may hold it so
            fitting = Shape(dtype, (*rows, spec.head_dim)) if like is None else Shape(like, rows)
            _require(shapes[name] == fitting, name, shapes[name])


def _tensors_of(layer: int, names: Collection[str], identity: ChatIdentity) -> dict[str, str]:
    """The names of a layer's tensors by column; log-masses may be there where heads may differ."""
    found = {column: f"{layer}.0.{column}" for column in identity.columns}
    weighed = f"{layer}.0.log_mass"
    return found | ({"log_mass": weighed} if identity.by_head and weighed in names else {})


def check_values(tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Raises `InputError` for values that no pass leaves behind."""
    tokens = len(facts["ids"])
    for name, tensor in tensors.items():
        column = name.rpartition(".")[2]
        _require(_VALUES[column](tensor, tokens), f"{name} out of range", _extremes(tensor))
    runs_on, goes_on = tensors["run_position"], tensors["decode_position"]
    _require(bool((runs_on.isnan() | (runs_on <= goes_on)).all()), "run_position out of range", _extremes(runs_on))


def _within(tensor: Tensor) -> bool:
    return bool(((tensor >= 0) & (tensor < _HIGHEST_POSITION)).all())


_VALUES = {
    "keys": lambda x, _: bool(x.isfinite().all()),
    "values": lambda x, _: bool(x.isfinite().all()),
    "is_visual": lambda x, _: bool((x.view(torch.uint8) <= 1).all()),
    "score": lambda x, _: not bool(x.isnan().any()),
    "size": lambda x, _: bool((x.isfinite() & (x > 0)).all()),
    "source": lambda x, tokens: bool(((x >= 0) & (x < tokens)).all()),
    "log_mass": lambda x, _: bool(x.isfinite().all()),
    "decode_position": lambda x, _: _within(x),
    "resume_position": lambda x, _: _within(x),
    "run_position": lambda x, _: bool(x.isnan().all()) or _within(x),
}


def _extremes(tensor: Tensor) -> list[Any]:
    return [tensor.amin().item(), tensor.amax().item()] if tensor.numel() else []


def _is_text(found: Any) -> bool:
    """Whether it is a string that tokenizers take: no half of a surrogate pair."""
    try:
        return isinstance(found, str) and bool(found.encode() or True)
    except UnicodeEncodeError:
        return False


def _same(found: Any, wanted: int | Sequence[int]) -> bool:
    """Equal, and of whole numbers: `True` is no 1, and 1.0 neither."""
    flat = found if isinstance(found, list) else [found]
    return bool(found == wanted) and all(type(one) is int for one in flat)


def _require(holds: bool, what: str, found: object) -> None:
    if not holds:
        raise InputError(f"its {what} cannot be: found {shown(found)}; the file was changed or is damaged")
