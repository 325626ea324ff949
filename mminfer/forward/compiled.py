"""Decoding steps over the host's modules under torch.compile, one graph for all lengths of the cache."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mminfer.forward.attention import routed_attention
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.kv_layer import PaddedLayer
from mminfer.forward.rotary import Tables
from mminfer.models.adapter import ModelAdapter

logger = logging.getLogger(__name__)


class LayerBuffers(NamedTuple):
    """What one layer of the cache holds, spare columns included.

    Args:
        keys: [B, G, capacity, D].
        values: [B, G, capacity, D].
        left_padding: [B] int64, columns of padding before each sequence; None: there is none.
    """

    keys: Tensor
    values: Tensor
    left_padding: Tensor | None


class CompiledStep:
    """Runs steps until one fails; from then on the caller has to go another way.

    Args:
        adapter: the host model.

    Attributes:
        failed: whether a step failed, so that it must not be called any more.
        compile_ms: time of the calls in which something was compiled.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self.failed = False
        self.compile_ms = 0.0

    def __call__(self, hidden_states: Tensor, tables: Tables, cache: CompressedCache) -> Tensor | None:
        """Logits [B, 1, vocabulary], the new entries written ahead in the cache; None: the step failed."""
        start, graphs = time.perf_counter(), _graphs()
        padded = [layer for layer in cache.layers if isinstance(layer, PaddedLayer)]
        layers = [LayerBuffers(*layer.reserve(1), layer.left_padding) for layer in padded]
        for buffers in layers:
            torch._dynamo.maybe_mark_dynamic(buffers.keys, 2)
            torch._dynamo.maybe_mark_dynamic(buffers.values, 2)
        arguments = self._adapter.layer_arguments(cache.next_position.to(hidden_states.device)[:, None])
        columns = torch.tensor([layer.num_columns for layer in cache.layers], device=hidden_states.device)
        try:
            with routed_attention(self._adapter.text_config):
                logits: Tensor = _compiled()(self._adapter, hidden_states, tables, layers, columns, arguments)
        except Exception as error:  # compilers raise anything, and a step that is wrong in itself fails again without
            self.failed = True
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
    layers: Sequence[LayerBuffers],
    columns: Tensor,
    arguments: dict[str, Tensor],
) -> Tensor:
    """One step over all layers.

    Args:
        adapter: the host model.
        hidden_states: [B, 1, C].
        tables: rotary, of each kind of layer.
        layers: what the cache holds.
        columns: [L] int64, the column into which each layer writes the new entry.
        arguments: what else the layers are given.
    """
    for i, (layer, kind, buffers) in enumerate(zip(adapter.layers, adapter.layer_kinds, layers, strict=True)):
        hidden_states = layer(
            hidden_states,
            position_embeddings=tables[kind],
            attention_mask=None,
            use_cache=False,
            attend=partial(_attend, (buffers, columns[i : i + 1])),
            **arguments,
        )
    return adapter.logits(hidden_states)


def _attend(
    target: tuple[LayerBuffers, Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention over whole buffers under a mask, so that no shape depends on the step.

    Args:
        target: a layer's buffers, and the column ([1] int64) into which the new entry goes.
        q: [B, H, 1, D].
        k: [B, G, 1, D], of the new entry.
        v: [B, G, 1, D].
        scale: factor of the scores.
        window: the query sees its last `window` keys only; None: all.
    """
    (keys, values, left_padding), last = target
    keys.index_copy_(2, last, k)
    values.index_copy_(2, last, v)
    column = torch.arange(keys.shape[2], device=keys.device)
    visible = (column <= last)[None]  # [1 or B, capacity]
    if window is not None:
        visible = visible & (column > last - window)
    if left_padding is not None:
        visible = visible & (column >= left_padding[:, None])
    grouped = q.reshape(*keys.shape[:2], -1, q.shape[-1])  # the heads of a group as rows: keys are read once
    return F.scaled_dot_product_attention(grouped, keys, values, visible[:, None, None], scale=scale).reshape(q.shape)
