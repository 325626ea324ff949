"""Steps of decoding over the compressed cache, by the quickest way that the host's layers allow."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from mminfer_kernels import DecoderWeights, backend_for, decode_attention, note_backend, packed_decode_attention
from mminfer_kernels import decode_step as fused_step
from mminfer_kernels.decode_step import MAX_ROWS
from mminfer_kernels.tracing import watched
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.forward.attention import Attend, routed_attention
from mminfer.forward.compiled import CompiledStep
from mminfer.forward.fused import fused_weights, hook_dictionaries
from mminfer.forward.graphed import GraphedSteps
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.kv_layer import CompressedLayer, PaddedLayer
from mminfer.forward.packed_layer import PackedLayer
from mminfer.forward.rotary import RotaryAhead, Tables, fractional, frequency_factors
from mminfer.models.adapter import ModelAdapter


class Decoder:
    """Runs decoding steps of one host model.

    Standard layers of float32 on the CPU that nobody has hooked or changed take the fused step in C++; all others
    run as the host's own modules, on a GPU recorded as a CUDA graph where that can be.

    Args:
        adapter: the host model.
        config: the techniques (only positions matter here).
        compile: run the host's modules under torch.compile instead, where that works.
        record: whether CUDA graphs may be made.
    """

    def __init__(
        self, adapter: ModelAdapter, config: InferenceConfig, compile: bool = False, record: bool = True
    ) -> None:
        self.adapter, self._config = adapter, config
        self._compiled = CompiledStep(adapter) if compile else None
        self._graphed = GraphedSteps(adapter) if record else None
        self.refresh()

    def refresh(self) -> None:
        """Looks at the host's modules afresh: between two prompts they may have been changed."""
        factors = partial(frequency_factors, self._config, self.adapter.spec)
        self._rotary = RotaryAhead(self.adapter, fractional(self._config), factors)
        self._layers = LayersSnapshot(self.adapter)
        self.let_go()

    def let_go(self) -> None:
        """No more steps are to come for now: lets CUDA graphs go."""
        if self._graphed is not None:
            self._graphed.refresh()

    def records(self, device: torch.device) -> bool:
        """Whether steps on this device are recorded as CUDA graphs, as far as is known."""
        return self._graphed is not None and self._graphed.takes(device)

    def is_recorded(self, cache: CompressedCache) -> bool:
        """Whether steps over this cache, as long as it stays where it is in memory, are replayed from a CUDA graph."""
        return self._graphed is not None and self._graphed.has(cache)

    @torch.no_grad()
    def step(self, hidden_states: Tensor, cache: CompressedCache) -> Tensor:
        """Runs one new token of each sequence; if anything raises, the cache is as it was.

        Args:
            hidden_states: [B, 1, C], the tokens' embeddings.
            cache: grows by one column.

        Returns:
            Logits [B, 1, vocabulary].
        """
        tables = self._rotary.tables(hidden_states, cache.next_position, cache.rotary_length)
        logits = self._compiled_step(hidden_states, tables, cache)
        if logits is None:
            logits = self._graphed_step(hidden_states, tables, cache)
        if logits is None:
            logits = self._fused_step(hidden_states, tables, cache)
        if logits is None:
            logits = self._module_step(hidden_states, tables, cache)
        cache.advance(1)
        return logits

    @property
    def compile_ms(self) -> float:
        """Time of the steps so far in which something was compiled."""
        return 0.0 if self._compiled is None else self._compiled.compile_ms

    def _compiled_step(self, hidden_states: Tensor, tables: Tables, cache: CompressedCache) -> Tensor | None:
        if self._compiled is None or self._compiled.failed or self._layers.hooked or watched():
            return None
        note_backend("decode_step", "compiled")
        return self._compiled(hidden_states, tables, cache)

    def _graphed_step(self, hidden_states: Tensor, tables: Tables, cache: CompressedCache) -> Tensor | None:
        if self._graphed is None or not self.records(hidden_states.device) or self._layers.hooked:
            return None
        logits = self._graphed(hidden_states, tables, cache)
        if logits is not None:
            note_backend("decode_step", "cuda graph" if self.is_recorded(cache) else "host")
        return logits

    def _fused_step(self, hidden_states: Tensor, tables: Tables, cache: CompressedCache) -> Tensor | None:
        weights = self._fused_weights(hidden_states, tables)
        if weights is None:
            return None
        cos, sin = tables[self.adapter.layer_kinds[0]]
        caches = [layer.step_cache() for layer in cache.layers]
        return fused_step(hidden_states[:, 0], cos[:, 0], sin[:, 0], weights, caches, "native")[:, None]

    def _fused_weights(self, hidden_states: Tensor, tables: Tables) -> DecoderWeights | None:
        """The layers' weights, if the fused step may run this time."""
        if len(hidden_states) > MAX_ROWS or hidden_states.dtype != torch.float32 or hidden_states.device.type != "cpu":
            return None
        if self._layers.hooked or watched() or torch.is_autocast_enabled("cpu"):
            return None
        cos = tables[self.adapter.layer_kinds[0]][0]
        shape = (len(hidden_states), 1, self.adapter.spec.head_dim)  # older hosts give each axis of M-RoPE its table
        return self._layers.fused_weights if cos.shape == shape else None

    def _module_step(self, hidden_states: Tensor, tables: Tables, cache: CompressedCache) -> Tensor:
        note_backend("decode_step", "host")
        adapter = self.adapter
        arguments = adapter.layer_arguments(cache.next_position[:, None], hidden_states.device)
        with routed_attention(adapter.text_config):
            for layer, kind, layer_cache in zip(adapter.layers, adapter.layer_kinds, cache.layers, strict=True):
                hidden_states = layer(
                    hidden_states,
                    position_embeddings=tables[kind],
                    attention_mask=None,
                    use_cache=False,
                    attend=_attend_over(layer_cache),
                    **arguments,
                )
        return adapter.logits(hidden_states)


class LayersSnapshot:
    """The host's layers as they were found at the last prompt; hooks that come later are seen too.

    Args:
        adapter: the host model.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter

    @cached_property
    def fused_weights(self) -> DecoderWeights | None:
        """For the fused step; None where that is not built, or may not stand in for these layers."""
        weights = fused_weights(self._adapter)
        built = weights is not None and backend_for("decode_step", weights.tensors[0]) == "native"
        return weights if built else None

    @cached_property
    def _hook_dictionaries(self) -> list[Any]:
        return hook_dictionaries(self._adapter)

    @property
    def hooked(self) -> bool:
        """Whether anybody has a hook on one of their modules right now."""
        return any(self._hook_dictionaries)


def _attend_over(layer_cache: CompressedLayer) -> Attend:
    """The attention of one new token of each sequence over this layer."""
    if isinstance(layer_cache, PackedLayer):
        return partial(_attend_packed, layer_cache)
    if isinstance(layer_cache, PaddedLayer):
        return partial(_attend_padded, layer_cache)
    raise TypeError(f"a layer of type {type(layer_cache).__name__}")


def _attend_packed(
    layer_cache: PackedLayer, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """One token's attention over a layer whose heads differ; its own key and value are written ahead there."""
    if window is not None:
        raise ValueError("a window over heads of different lengths")
    keys, values, first, lengths, _, log_mass, longest = layer_cache.write_ahead(k, v)
    return packed_decode_attention(q, keys, values, first, lengths, scale, log_mass, longest)


def _attend_padded(
    layer_cache: PaddedLayer, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """One token's attention over a layer of the cache; its own key and value are written ahead there."""
    keys, values = layer_cache.write_ahead(k, v)
    left_padding = layer_cache.left_padding
    if window is not None and keys.shape[2] > window:
        cut = keys.shape[2] - window
        keys, values = keys[:, :, cut:], values[:, :, cut:]
        left_padding = None if left_padding is None else (left_padding - cut).clamp_min(0)
    return decode_attention(q, keys, values, left_padding, scale)
