"""Gemma 3: two kinds of layers with rotary tables of their own, and images that attend in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mminfer_kernels import rotary_table
from torch import Tensor

from mminfer.layout import GivenRows, TokenLayout
from mminfer.models.adapter import ModelAdapter
from mminfer.models.spec import attention_mask, rescaled
from mminfer.models.vision import VisionTower


class Gemma3Tower(VisionTower):
    """Patches are averaged to a fixed number of tokens an image, which one bare matrix projects."""

    @property
    def projector_weights(self) -> int:
        return int(self.part("multi_modal_projector.mm_input_projection_weight").numel())

    def projected(self, rows: int, patches: int) -> int:
        return int(self.config.mm_tokens_per_image)


class Gemma3Adapter(ModelAdapter):
    """Marks each run of image tokens, and gives sliding and full layers their tables."""

    tower_kind = Gemma3Tower
    ffn_modules = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    bidirectional_images = True

    def embed(self, inputs: Mapping[str, Any], given: GivenRows | None = None) -> tuple[Tensor, TokenLayout]:
        embeds, layout = super().embed(inputs, given)
        types = inputs.get("token_type_ids")
        if types is None:  # then the host, too, has every token look back only
            return embeds, layout
        mask = attention_mask(inputs)
        is_image = types[:, -mask.shape[1] :][mask] == 1
        return embeds, replace(layout, block=_runs(is_image, layout.sequence))

    def rotary(
        self, hidden_states: Tensor, position: Tensor, precise: bool, factors: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """As every adapter's, but factors are for full attention alone.

        A sliding layer sees no farther than its window, however long the prompt: its frequencies stay as trained.

        Reference:
            Gemma 3 (arXiv 2503.19786): its own linear factor of 8 stands on the layers of full attention only.
        """
        return {
            kind: self._table(kind, hidden_states, position[0], precise, factors if kind == "full_attention" else None)
            for kind in set(self.layer_kinds)
        }

    def _table(
        self, kind: str, hidden_states: Tensor, position: Tensor, precise: bool, factors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rotary: Any = self.language_model.rotary_emb
        if not precise and factors is None:
            cos, sin = rotary(hidden_states, position, kind)
            return cos, sin
        rotary(hidden_states[:1, :1], position.amax().expand(1, 1), kind)  # frequencies may depend on the length
        frequencies, scaling = getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling")
        return rotary_table(position, rescaled(frequencies, factors), scaling, dtype=hidden_states.dtype)


def _runs(is_image: Tensor, sequence: Tensor) -> Tensor:
    """[T] int64: the run of image tokens that a token belongs to, -1 outside."""
    goes_on = is_image & is_image.roll(1) & (sequence == sequence.roll(1))
    goes_on[:1] = False
    return ((is_image & ~goes_on).cumsum(0) - 1).where(is_image, -1)
