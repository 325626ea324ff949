"""Decoding steps over the host's modules under torch.compile, one graph for all lengths of the cache."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mminfer.attention import routed_attention
from mminfer.cache.kv_cache import CompressedCache
from mminfer.models.base import ModelAdapter

logger = logging.getLogger(__name__)

Tables = dict[str, tuple[Tensor, Tensor]]  # for each kind of layer cos and sin, [..., B, 1, D]


class CompiledStep:
    """Runs steps until one fails; from then on it is not `ready`, and the caller goes another way.

    Args:
        adapter: the host model.

    Attributes:
        ready: whether it may be called.
        compile_ms: time of the calls in which something was compiled.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self.ready = True
        self.compile_ms = 0.0

    def __call__(self, hidden_states: Tensor, tables: Tables, cache: CompressedCache) -> Tensor | None:
        """Logits [B, 1, vocabulary], the new entries staged behind the cache's end; None: it does not work here."""
        start, graphs = time.perf_counter(), _graphs()
        held = [(*layer.reserve(1), layer.starts) for layer in cache.layers]
        for keys, values, _ in held:
            for buffer in (keys, values):
                torch._dynamo.maybe_mark_dynamic(buffer, 2)
        ends = torch.tensor([layer.end for layer in cache.layers], device=hidden_states.device)
        try:
            with routed_attention(self._adapter.text_config):
                logits: Tensor = _compiled()(self._adapter, hidden_states, tables, held, ends)
        except Exception as error:  # compilers raise anything, and a step that is wrong in itself fails again without
            self.ready = False
            logger.warning("mminfer: decoding goes on uncompiled: %s", str(error).strip().partition("\n")[0])
            return None
        if _graphs() != graphs:
            self.compile_ms += 1e3 * (time.perf_counter() - start)
        return logits


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_step, fullgraph=True, backend=_inductor)


def _inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
    """torch's compiler, with what it stores for this processor kept apart from what it stored for others.

    It stores C++ that is written for one vector width, and does not ask which one when it builds it again: where two
    processors share the folder, or one instruction set is forced, that fails or, worse, computes something else.
    """
    tag = f"{torch.compiler.config.cache_key_tag}{torch.backends.cpu.get_cpu_capability()}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled: Callable[..., object] = torch._dynamo.lookup_backend("inductor")(graph, inputs)
        return compiled


def _graphs() -> int:
    """How many graphs torch has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _step(
    adapter: ModelAdapter,
    hidden_states: Tensor,
    tables: Tables,
    held: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    ends: Tensor,
) -> Tensor:
    for i, (layer, kind, buffers) in enumerate(zip(adapter.layers, adapter.layer_kinds, held, strict=True)):
        hidden_states = layer(
            hidden_states,
            position_embeddings=tables[kind],
            attention_mask=None,
            use_cache=False,
            attend=partial(_attend, *buffers, ends[i : i + 1]),
        )
    return adapter.logits(hidden_states)


def _attend(
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None,
    end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention over whole buffers [B, G, capacity, D] under a mask, so that no shape depends on the step."""
    keys.index_copy_(2, end, k)
    values.index_copy_(2, end, v)
    place = torch.arange(keys.shape[2], device=keys.device)
    seen = (place <= end)[None]  # [1, T]
    if window is not None:
        seen = seen & (place > end - window)
    if starts is not None:
        seen = seen & (place >= starts[:, None])
    folded = q.reshape(*keys.shape[:2], -1, q.shape[-1])  # the heads of a group as rows: keys are read once
    return F.scaled_dot_product_attention(folded, keys, values, seen[:, None, None], scale=scale).reshape(q.shape)
