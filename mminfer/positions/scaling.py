"""Scaled rotary frequencies, as text models reach beyond the window they were trained with: linear, dynamic NTK."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from mminfer.errors import ConfigError, shown
from mminfer.layout import TokenLayout
from mminfer.technique import MOST_FACTOR, PositionTechnique, is_number, is_whole

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


class _Scaling(PositionTechnique):
    """Leaves positions as they are, and turns by them more slowly."""

    def check(self, spec: ModelSpec) -> None:
        """Any rotary model will do."""

    @property
    def fractional(self) -> bool:
        return False

    def apply(self, layout: TokenLayout, max_positions: int) -> TokenLayout:
        return layout


@dataclass(frozen=True)
class LinearScaling(_Scaling):
    """Linear position scaling: every rotary frequency divided by one factor, which is position interpolation.

    It needs no training to run, but models follow it well only after some; it also brings the tokens of text closer
    together, where V2PE moves only the visual ones. The factor works on the host's frequencies whatever made them
    (Llama 3's rule, M-RoPE on all axes); where kinds of layers have frequencies of their own, on full attention's.

    "auto" takes it from the first pass into an empty cache: positions reached (by the longest sequence of a batch)
    over `window`, at least 1. Later turns and decoding steps keep that factor, since the keys in the cache were
    rotated with it. What they will add, and a prompt read piece by piece, has to be provided for by a number.

    Args:
        factor: 1 or more; 1 is the host's own, bit for bit. Or "auto".
        window: positions the model was trained with; None: as many as it was made for.

    Raises:
        ConfigError: `factor` or `window` is out of range.

    Reference:
        Position interpolation (arXiv 2306.15595) section 2.3; the survey of Giraffe (arXiv 2308.10882). "auto" is
        ours: the authors train for one factor and stay with it.
    """

    factor: float | str = "auto"
    window: int | None = None
    long_prompt_advice = "give a factor for all turns to come, for example positions=LinearScaling(factor=8.0)"

    def __post_init__(self) -> None:
        if self.factor != "auto":
            _check_factor("LinearScaling", self.factor, 'or "auto"')
        _check_positions("LinearScaling.window", self.window, "the model's own")

    def frequency_factors(self, length: float, window: int, head_dim: int) -> Tensor | None:
        factor = self._factor(length, self.window or window)
        return None if factor == 1 else torch.full((head_dim // 2,), 1 / factor, dtype=torch.float64)

    def covered_positions(self, length: float, window: int) -> float:
        window = self.window or window
        return max(length, window) if self.factor == "auto" else window * self._factor(length, window)

    @property
    def needs_whole_prompt(self) -> str | None:
        return 'LinearScaling.factor="auto": give a number, such as 8.0' if self.factor == "auto" else None

    def _factor(self, length: float, window: int) -> float:
        return max(1.0, length / window) if isinstance(self.factor, str) else self.factor

    def describe(self) -> str:
        by = "as much as the prompt asks for" if isinstance(self.factor, str) else f"{self.factor:g}"
        return f"Every rotary frequency is divided by one factor: {by}."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"linear-auto": cls("auto")}


@dataclass(frozen=True)
class DynamicNTK(_Scaling):
    """Dynamic NTK scaling: low rotary frequencies shrink with the length, the highest stays.

    Frequency i is multiplied by `s ** (-2 * i / (D - 2))` with `s = factor * L / window - (factor - 1)`, which is the
    host library's `theta * s ** (D / (D - 2))`; L is the length, at least `window`. On top of whatever frequencies
    the host has, as `LinearScaling` is.

    Scaling anew at every length, as the host library does, is wrong with a cache: its keys were rotated with the
    frequencies of their day, and queries of other frequencies see them at other distances. So the length is taken
    once, from the first pass into an empty cache (positions reached by the longest sequence of a batch), and kept for
    all later turns and decoding steps. What they will add, and a prompt read piece by piece, has to be provided for
    by `length`.

    Args:
        factor: 1 or more; how much stronger frequencies shrink with the length.
        length: L in positions, for example 270_000; None: that of the first pass.
        window: positions the model was trained with; None: as many as it was made for.

    Raises:
        ConfigError: a setting is out of range.

    Reference:
        Dynamic NTK as in YaRN (arXiv 2309.00071) and in Hugging Face's `rope_type="dynamic"`, whose frequencies for
        one length these are. YaRN would keep keys unrotated instead of the length fixed.
    """

    factor: float = 1.0
    length: int | None = None
    window: int | None = None
    long_prompt_advice = "give the length with all turns to come, for example positions=DynamicNTK(length=270_000)"

    def __post_init__(self) -> None:
        _check_factor("DynamicNTK", self.factor)
        _check_positions("DynamicNTK.length", self.length, "that of the first prompt")
        _check_positions("DynamicNTK.window", self.window, "the model's own")

    def frequency_factors(self, length: float, window: int, head_dim: int) -> Tensor | None:
        # factor * L / window - (factor - 1), in the order that gives 1 exactly for L = window
        stretch = 1 + self.factor * (self.covered_positions(length, window) / (self.window or window) - 1)
        if stretch == 1:
            return None
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / max(head_dim - 2, 1)
        return stretch**-exponent

    def covered_positions(self, length: float, window: int) -> float:
        return max(self.length or length, self.window or window)

    @property
    def needs_whole_prompt(self) -> str | None:
        return "DynamicNTK.length=None: give a number, such as 270_000" if self.length is None else None

    def describe(self) -> str:
        length = "the first prompt's length" if self.length is None else f"{self.length:,} positions"
        return f"Low rotary frequencies shrink for {length}; the highest one stays."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"ntk-auto": cls()}


def _check_factor(owner: str, factor: Any, otherwise: str = "") -> None:
    if not is_number(factor, most=MOST_FACTOR) or factor < 1:
        wanted = " ".join(["a number of 1 or more", otherwise]).strip()
        raise ConfigError(
            f"{owner}.factor={shown(factor)}, wanted {wanted}; 1 leaves frequencies as they are, "
            f"{MOST_FACTOR:g} is the most"
        )


def _check_positions(name: str, value: Any, default: str) -> None:
    if value is not None and not is_whole(value, least=1):
        raise ConfigError(f"{name}={shown(value)}, wanted 1 or more positions, or None for {default}")
