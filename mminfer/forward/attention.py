"""Prompt attention over packed rows, and the seam through which the host's attention modules reach it.

The host's attention modules project, normalise and rotate, then call whatever function their config names. For the
time of one pass that name is ours, and the function hands queries, keys and values to the callable that the pass gave
each layer as a keyword argument. Whoever else runs the model meanwhile, in another thread, gives none: such a call goes
to the function that the config named before.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, Protocol

import torch
from mminfer_kernels import note_backend, prompt_attention
from mminfer_kernels.prompt_attention.reference import blocked_attention
from mminfer_kernels.tracing import watched
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mminfer.errors import UnsupportedModelError
from mminfer.forward.turns import TurnLock, undone

NAME = "mminfer"
# What attention modules may hand over beside the scale and the window: None always, these values, and what the passes
# themselves hand to layers. All else would be left out.
_NEUTRAL: dict[str, object] = {"dropout": 0.0, "is_causal": True, "output_attentions": False}
_OURS = frozenset({"position_ids", "use_cache"})


@dataclass
class _Route:
    host_implementation: str | None
    passes: set[int] = field(default_factory=set)  # numbers of those that go through it


_lock, _numbers = TurnLock(), itertools.count()
_routes: dict[int, _Route] = {}  # by the id of the text config


@dataclass(frozen=True)
class Visibility:
    """Which keys queries see; by default each query sees its own key and all before it.

    Args:
        query_index: [S] int64 ascending: the place of each query among the keys; None: the last S places.
        window: a query sees its last `window` keys only.
        last_key: [S] int64: the last key each query sees, at or behind its own place (tokens of one image see each
            other in both directions); None: its own.
    """

    query_index: Tensor | None = None
    window: int | None = None
    last_key: Tensor | None = None


CAUSAL = Visibility()


class Attend(Protocol):
    """One layer's attention: q [1, H, T, D], k and v [1, G, T, D], after rotation -> [1, H, T, D]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor: ...


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Attend | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    if attend is None:  # not of our pass
        others |= {"scaling": scaling, "sliding_window": sliding_window}
        out: tuple[Tensor, Tensor | None] = _host_attention(module)(module, query, key, value, attention_mask, **others)
        return out
    for argument, found in others.items():
        if found is not None and argument not in _OURS and (argument not in _NEUTRAL or found != _NEUTRAL[argument]):
            shown = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else repr(found)[:200]
            raise UnsupportedModelError(
                f"{type(module).__name__} hands {argument} to its attention ({shown}), which our pass would leave out; "
                "it honours a scale and a window, and no dropout (model.eval())"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, scale, sliding_window).transpose(1, 2), None


def _host_attention(module: Any) -> Callable[..., Any]:
    """The attention of a module without our route."""
    of_its_file = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get(_host_implementation(module.config), of_its_file)
    return function


def _host_mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """The mask that the host makes for its own attention; `eager` for hosts that do not say which config asks."""
    name = "eager" if config is None else _host_implementation(config)
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, **kwargs)


def _host_implementation(config: Any) -> str:
    """What the config names as its attention, or named before a route went up."""
    with _lock.held():
        route = _routes.get(id(config))
        name = config._attn_implementation_internal if route is None else route.host_implementation
    return "eager" if name is None else name


@contextmanager
def routed_attention(config: Any) -> Iterator[None]:
    """Routes the attention of the language model with this text config to the `attend=` its layers are given.

    Passes on one config may overlap: the first puts the route up, the last takes it down.
    """
    number = next(_numbers)
    with undone(lambda: _take_down(config, number)):
        with _lock.held():
            route = _routes.setdefault(id(config), _Route(config._attn_implementation_internal))
            route.passes.add(number)
            ALL_ATTENTION_FUNCTIONS[NAME] = _attention_forward
            ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _host_mask)
            config._attn_implementation_internal = NAME
        yield


def _take_down(config: Any, number: int) -> None:
    with _lock.held():
        route = _routes.get(id(config))
        if route is not None:
            route.passes.discard(number)
            if not route.passes:
                config._attn_implementation_internal = route.host_implementation
                del _routes[id(config)]
        if NAME in ALL_ATTENTION_FUNCTIONS and not _routes and not _host_runs_elsewhere():
            for names in (ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, ALL_ATTENTION_FUNCTIONS._local_mapping):
                names.pop(NAME, None)


def _host_runs_elsewhere() -> bool:
    """Whether another thread is within the host, where it may be about to look up the name that it read of a config."""
    for thread, frame in sys._current_frames().items():
        while thread != get_ident() and frame is not None:
            if frame.f_globals.get("__name__", "").startswith("transformers"):
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Visibility = CAUSAL, log_mass: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale + log_mass + causal) v of one sequence, never the whole score matrix.

    By flash-attn where it is installed and can take the tensors, else by the op `prompt_attention`.

    Args:
        q: [1, H, S, D].
        k: [1, G, N, D].
        v: [1, G, N, D].
        scale: factor of the scores.
        visible: which keys each query sees.
        log_mass: [1, G, N] float32, the logarithm of how many keys each one stands for; None: 0.

    Returns:
        [1, H, S, D].
    """
    query_index, window = visible.query_index, visible.window
    if visible.last_key is not None:
        note_backend("prompt_attention", "sdpa")
        places = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        places = places if query_index is None else query_index
        return blocked_attention(q, k, v, scale, places, window, visible.last_key, log_mass)
    plain = query_index is None and log_mass is None
    flash = _flash_for(q) if plain and not watched() else None  # a FLOP counter would not see it
    if flash is None:
        return prompt_attention(q, k, v, scale, query_index, window, log_mass)
    note_backend("prompt_attention", "flash-attn")
    rows_first = (x.transpose(1, 2) for x in (q, k, v))
    left = -1 if window is None else window - 1
    out: Tensor = flash(*rows_first, softmax_scale=scale, causal=True, window_size=(left, -1))
    return out.transpose(1, 2)


def _flash_for(q: Tensor) -> Callable[..., Any] | None:
    """flash-attn's entry, if it can take tensors like this one."""
    return _flash_attention() if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else None


@functools.cache
def _flash_attention() -> Callable[..., Any] | None:
    """flash-attn's entry, which aligns causal queries with the last keys; None where it is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func
