"""Decoding steps over the host's modules under torch.compile, one graph for all lengths of the cache."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from mminfer_kernels import packed_decode_attention
from torch import Tensor
from torch.nn import functional as F

from mminfer.forward.attention import Attend, routed_attention
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.kv_layer import CompressedLayer, PaddedLayer
from mminfer.forward.packed_layer import PackedLayer
from mminfer.forward.rotary import Tables
from mminfer.models.adapter import ModelAdapter

logger = logging.getLogger(__name__)


class LayerBuffers(NamedTuple):
    """What one layer of the cache holds whose heads are alike, spare columns included.

    Args:
        keys: [B, G, capacity, D].
        values: [B, G, capacity, D].
        left_padding: [B] int64, columns of padding before each sequence; None: there is none.
    """

    keys: Tensor
    values: Tensor
    left_padding: Tensor | None


class PackedBuffers(NamedTuple):
    """What one layer of the cache holds whose heads differ, spare rows included.

    Args:
        keys: [R, D].
        values: [R, D].
        first: [B, G] int64, the row at which each segment begins.
        log_mass: [R] float32; None: nothing is added to the logits.
        room: [rows of the longest segment, spare ones included, 0]: a size that a graph takes as it comes.
    """

    keys: Tensor
    values: Tensor
    first: Tensor
    log_mass: Tensor | None
    room: Tensor


Buffers = LayerBuffers | PackedBuffers


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
        layers, places = zip(*(_buffers(layer) for layer in cache.layers), strict=True)
        arguments = self._adapter.layer_arguments(cache.next_position[:, None], hidden_states.device)
        try:
            with routed_attention(self._adapter.text_config):
                logits: Tensor = _compiled()(self._adapter, hidden_states, tables, layers, places, arguments)
        except Exception as error:  # compilers raise anything, and a step that is wrong in itself fails again without
            self.failed = True
            logger.warning("mminfer: decoding goes on uncompiled: %s", str(error).strip().partition("\n")[0])
            return None
        if _graphs() != graphs:
            self.compile_ms += 1e3 * (time.perf_counter() - start)
        return logits


def _buffers(layer: CompressedLayer) -> tuple[Buffers, Tensor]:
    """A layer's buffers, sizes that grow marked so; and where the new entries go, as `_step` takes it."""
    if isinstance(layer, PackedLayer):
        keys, values, first, lengths, new_rows, log_mass, _ = layer.step_segments()
        room = keys.new_empty(layer.largest_segment, 0)
        for column in (keys, values, room, *(() if log_mass is None else (log_mass,))):
            torch._dynamo.maybe_mark_dynamic(column, 0)
        # Of the lengths of all steps ahead a copy of this step's, since a graph is made for one place in memory.
        return PackedBuffers(keys, values, first, log_mass, room), torch.stack([lengths, new_rows.view_as(lengths)])
    if not isinstance(layer, PaddedLayer):
        raise TypeError(f"a layer of type {type(layer).__name__}")
    keys, values = layer.reserve_written(1)  # attention is masked over whole buffers
    for column in (keys, values):
        torch._dynamo.maybe_mark_dynamic(column, 2)
    return LayerBuffers(keys, values, layer.left_padding), torch.tensor([layer.num_columns], device=keys.device)


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
    layers: Sequence[Buffers],
    places: Sequence[Tensor],
    arguments: dict[str, Tensor],
) -> Tensor:
    """One step over all layers.

    Args:
        adapter: the host model.
        hidden_states: [B, 1, C].
        tables: rotary, of each kind of layer.
        layers: what the cache holds.
        places: of each layer [1] int64, the column into which it writes the new entry; or, where its heads differ,
            [2, B, G]: entries of each segment, the new one included, and the row of that one.
        arguments: what else the layers are given.
    """
    for layer, kind, buffers, place in zip(adapter.layers, adapter.layer_kinds, layers, places, strict=True):
        attend: Attend = (
            partial(_attend, (buffers, place))
            if isinstance(buffers, LayerBuffers)
            else partial(_attend_packed, (buffers, place))
        )
        hidden_states = layer(
            hidden_states,
            position_embeddings=tables[kind],
            attention_mask=None,
            use_cache=False,
            attend=attend,
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


def _attend_packed(
    target: tuple[PackedBuffers, Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention over packed segments, whose lengths are tensors, so that no shape depends on the step.

    Args:
        target: a layer's buffers, and [2, B, G]: entries of each segment, and the row of the new one.
        q: [B, H, 1, D].
        k: [B, G, 1, D], of the new entry.
        v: [B, G, 1, D].
        scale: factor of the scores.
        window: None, since no cache technique takes models whose windows slide.

    Raises:
        ValueError: there is a window.
    """
    if window is not None:
        raise ValueError("a window over heads of different lengths")
    (keys, values, first, log_mass, room), (lengths, new_rows) = target
    keys.index_copy_(0, new_rows.flatten(), k.reshape(-1, k.shape[-1]))
    values.index_copy_(0, new_rows.flatten(), v.reshape(-1, v.shape[-1]))
    return packed_decode_attention(q, keys, values, first, lengths, scale, log_mass, room.shape[0])
