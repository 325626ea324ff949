"""Rotary tables: the frequencies that a configuration asks for, and tables made for many decoding steps at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.models.adapter import ModelAdapter
from mminfer.models.spec import ModelSpec

Tables = dict[str, tuple[Tensor, Tensor]]  # for each kind of layer cos and sin, [..., T, D] each

STEPS_AHEAD = 64


def fractional(config: InferenceConfig) -> bool:
    """Whether rotary positions are no longer the host's integers, so that angles must be formed in float64."""
    return config.positions is not None and bool(config.positions.fractional)


def frequency_factors(config: InferenceConfig, spec: ModelSpec, length: float) -> Tensor | None:
    """[D / 2], of the rotary frequencies of a cache with this `rotary_length`; None: the host's own."""
    if config.positions is None:
        return None
    return config.positions.frequency_factors(length, spec.max_position_embeddings, spec.head_dim)


class RotaryAhead:
    """Rotary tables of the steps to come, made by the host's module for many steps at once.

    Args:
        adapter: the host model.
        precise: form angles in float64; see `ModelAdapter.rotary`.
        factors: of the frequencies, by the cache's `rotary_length`; see `frequency_factors`.
    """

    def __init__(
        self, adapter: ModelAdapter, precise: bool, factors: Callable[[float], Tensor | None] = lambda length: None
    ) -> None:
        self._adapter, self._precise, self._factors = adapter, precise, factors
        # Frequencies that follow the length are only right for the length of the moment.
        self._steps = 1 if adapter.rotary_follows_length else STEPS_AHEAD
        self._tables: Tables = {}
        # What the tables are in, and the length that their frequencies are for.
        self._like: tuple[torch.dtype, torch.device, float] | None = None
        self._positions: list[Tensor] = []  # [B] each, what the tables that are left are for

    def tables(self, hidden_states: Tensor, position: Tensor, length: float = 0.0) -> Tables:
        """For each kind of layer cos and sin, [..., B, 1, D] each.

        Args:
            hidden_states: gives dtype and device.
            position: [B] float64.
            length: the cache's `rotary_length`.
        """
        like = (hidden_states.dtype, hidden_states.device, length)
        if not self._positions or self._like != like or not torch.equal(self._positions[-1], position):
            self._like = like
            ahead = position[:, None] + torch.arange(self._steps, dtype=position.dtype, device=position.device)
            self._positions = list(ahead.unbind(1))[::-1]
            axes = ahead.to(hidden_states.device, non_blocking=True).expand(self._adapter.position_axes, *ahead.shape)
            self._tables = self._adapter.rotary(hidden_states, axes, self._precise, self._factors(length))
        step = self._steps - len(self._positions)
        self._positions.pop()
        return {kind: (c.narrow(-2, step, 1), s.narrow(-2, step, 1)) for kind, (c, s) in self._tables.items()}
