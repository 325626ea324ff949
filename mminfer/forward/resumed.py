"""The uncompressed pass over a prompt, kept as it enters each layer, so that what one layer changes costs the layers
behind it and nothing before."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.forward.attention import routed_attention
from mminfer.forward.layer_attention import LayerAttention, PassSettings
from mminfer.forward.rotary import fractional, frequency_factors
from mminfer.forward.rows import Rows, through_layer
from mminfer.layout import TokenLayout
from mminfer.models.adapter import ModelAdapter
from mminfer.technique import PositionTechnique, SkipTechnique


class KeptPass:
    """The rows of one prompt as they enter each layer of the uncompressed model.

    No cache is filled: what comes out is hidden states. Rows behind the prompt (an answer's, forced) may be among them.

    Args:
        adapter: the host model.
        positions: where visual tokens stand; None: as the host has it.
        inputs_embeds: [T, C], of one sequence.
        layout: of these T rows, at the host's positions.

    Attributes:
        entering: the rows that enter each layer, and behind them those that leave the last one.
    """

    def __init__(
        self, adapter: ModelAdapter, positions: PositionTechnique | None, inputs_embeds: Tensor, layout: TokenLayout
    ) -> None:
        self._adapter = adapter
        config = InferenceConfig(positions=positions)
        placed = layout.on_host
        if positions is not None:
            placed = positions.apply(placed, adapter.spec.max_position_embeddings)
        layout = layout.placed_as(placed)
        factors = frequency_factors(config, adapter.spec, float(layout.next_position.max()))
        rotate = partial(adapter.rotary, precise=fractional(config), factors=factors)
        rows = Rows(inputs_embeds, layout, rotate(inputs_embeds[None], layout.position[:, None]), rotate)
        self.entering = [rows]
        for layer in range(adapter.spec.num_layers):
            self.entering.append(self.through(layer, self.entering[-1]))

    def behind(self, skip: SkipTechnique, first: int) -> Tensor:
        """[T, C] behind the last layer, where a technique leaves operators out of some.

        Args:
            skip: the technique.
            first: the first layer of which it leaves something out.
        """
        rows = self.entering[first]
        for layer in range(first, self._adapter.spec.num_layers):
            rows = self.through(layer, rows, skip)
        return rows.hidden

    @torch.no_grad()
    def through(self, layer: int, rows: Rows, skip: SkipTechnique | None = None) -> Rows:
        """Rows behind one layer, none of which leave."""
        config, depth = InferenceConfig(skip=skip), self._adapter.spec.num_layers
        queries, ffn = (None, None) if skip is None else skip.apply(rows.layout, layer, depth)
        settings = PassSettings(self._adapter, config, rows.layout.lengths)
        attend = LayerAttention(settings, rows.layout, layer, queries, None)
        with routed_attention(self._adapter.text_config):
            table = rows.tables[self._adapter.layer_kinds[layer]]
            hidden = through_layer(attend, rows.hidden[None], table, ffn)[0]
        return Rows(hidden, rows.layout, rows.tables, rows.rotate)
