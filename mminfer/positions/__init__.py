"""Positions of tokens: where the rotary embedding puts text and visual tokens."""

from mminfer.positions.scaling import DynamicNTK, LinearScaling
from mminfer.positions.v2pe import V2PE, v2pe_mrope_positions, v2pe_positions

__all__ = ["V2PE", "DynamicNTK", "LinearScaling", "v2pe_mrope_positions", "v2pe_positions"]
