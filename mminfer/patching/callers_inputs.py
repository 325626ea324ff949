"""What callers hand to a pass beside the prompt: caches and masks that it can go by, and those it refuses by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from mminfer.config import InferenceConfig
from mminfer.errors import InputError
from mminfer.forward.call_state import CallState, tokens_of
from mminfer.forward.kv_cache import CACHE_NAME, CompressedCache, Origin


def cache_for(handed: Any) -> CompressedCache:
    """The cache to go on from; a new one, to be moved into it, in place of an empty one of the host's.

    Args:
        handed: what the caller or `generate` brings; None: nothing.

    Raises:
        InputError: it is filled by somebody else, or of a kind whose promises a compressed cache does not keep.
    """
    if isinstance(handed, CompressedCache):
        return handed
    if handed is None:
        return CompressedCache()
    kind = type(handed).__name__
    if not isinstance(handed, Cache):
        raise InputError(f"{CACHE_NAME} is a {kind}: wanted none, an empty DynamicCache, or what the pass returned")
    if getattr(handed, "is_compileable", False):
        raise InputError(f"{kind}: a static cache cannot shrink; leave cache_implementation at its default")
    if type(handed) is not DynamicCache or getattr(handed, "offloading", False):
        raise InputError(
            f"{kind}: a compressed cache is neither quantised, offloaded nor divided; leave cache_implementation at "
            "its default, or pass an empty DynamicCache"
        )
    if handed.get_seq_length() > 0:
        raise InputError(
            f"{CACHE_NAME} is a {kind} filled by the unpatched model: start from an empty cache, or "
            "go on with the cache that the patched model returned"
        )
    return CompressedCache()


def check_continuation(cache: CompressedCache, origin: Origin) -> None:
    """Raises `InputError` unless a pass may go on from what the cache holds.

    Args:
        cache: what came before.
        origin: by what the pass makes its own caches.
    """
    if cache.ends_in_padding:
        raise InputError(f"a row of {CACHE_NAME} ends in padding: pad prompts on the left to go on from them")
    if cache.origin is not origin:
        origin.check(cache)


def check_heads(cache: CompressedCache, config: InferenceConfig) -> None:
    """Raises `InputError` where heads of a cache differ in length and a technique looks at heads that are alike.

    Args:
        cache: what came before.
        config: the techniques of the pass that is to go on from it.
    """
    looking = [x for x in (config.prune, config.cache) if x is not None and not x.by_head]
    if looking and cache.is_packed:
        raise InputError(
            f"{CACHE_NAME} holds a number of entries of its own in each head, and {type(looking[0]).__name__} takes "
            "heads that are alike: go on with the settings that made it, or begin with an empty cache"
        )


def check_columns(cache: CompressedCache, config: InferenceConfig) -> None:
    """Raises `InputError` where a technique judges entries by what another one's do not say.

    Args:
        cache: what came before.
        config: the techniques of the pass that is to go on from it.
    """
    if config.cache is None or config.cache.replay is None or not cache.layers:
        return
    held = cache.layers[0].row(0).columns
    if missing := [name for name in config.cache.columns if held[name] is None]:
        raise InputError(
            f"{CACHE_NAME} was filled with other settings and does not say the {' and the '.join(missing)} of its "
            f"entries, by which {type(config.cache).__name__} judges: go on with the settings that made it, or begin "
            "with an empty cache"
        )


def check_batch(rows: int, cache: CompressedCache) -> None:
    """Raises `InputError` unless the cache holds so many sequences."""
    held = len(cache.tokens)
    if rows != held:
        raise InputError(f"{CACHE_NAME} holds {held} sequences, the inputs have {rows}: one for each row")


def check_holes(inputs: dict[str, Any], window: int | None) -> None:
    """Refuses zeros between the tokens of a row where layers see a window of columns, which a pass does not have.

    Args:
        inputs: the model's, of a prompt.
        window: columns that layers of sliding attention see; None: there are none.

    Raises:
        InputError: there are zeros, and more columns than a window's.
    """
    mask = inputs.get("attention_mask")
    if window is None or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] <= window:
        return
    ones = mask.bool().long()
    between = ones.shape[1] - ones.argmax(-1) - ones.flip(-1).argmax(-1)  # from a row's first token to its last
    if bool((ones.sum(-1) < between).any()):
        raise InputError(
            f"attention_mask has zeros between tokens, and layers of this model see the last {window} columns, zeros "
            "too: leave these tokens out of the prompt"
        )


def check_mask(call: CallState, inputs: dict[str, Any], cache: CompressedCache, last_only: bool) -> bool:
    """Refuses masks under which a pass would not see what the host sees; 4D ones are refused where they are read.

    Args:
        call: what the call is doing; the pieces of a reading have masks of their own.
        inputs: the model's, of a prompt.
        cache: what came before.
        last_only: whether logits of the last row are all that the pass gives.

    Returns:
        Whether a row ends in padding.

    Raises:
        InputError: columns are missing, tokens of the cache are hidden, or padding stands where the host would go on
            from it.
    """
    mask, new = inputs.get("attention_mask"), tokens_of(inputs).shape[1]
    if cache.logical_length:
        check_batch(len(tokens_of(inputs)), cache)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    own_columns = mask.shape[1] == cache.logical_length + new
    if not call.is_reading and not own_columns:
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns: wanted {cache.logical_length + new}, "
            f"for {cache.logical_length} tokens in the cache and {new} new ones"
        )
    if cache.logical_length and own_columns and tuple(mask[:, :-new].bool().sum(1).tolist()) != cache.tokens:
        raise InputError(
            "attention_mask hides tokens that the cache holds: leave them out of the prompt, or give them a new one"
        )
    ends_in_padding = not bool(mask[:, -1].all())
    if ends_in_padding and last_only:
        raise InputError("attention_mask ends in zeros, so that nothing can be generated: pad prompts on the left")
    return ends_in_padding
