"""FastV: visual tokens leave once, by what the last token looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from mminfer_kernels import column_mass
from torch import Tensor

from mminfer.errors import ConfigError, shown
from mminfer.technique import MOST_LAYERS, LayerView, LayerWork, PruneTechnique, check_fraction, check_layer, is_whole
from mminfer.tokens.prune import aim_keep

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass(frozen=True)
class FastV(PruneTechnique):
    """Pruning once: behind layer `layer` stay the visual tokens that the prompt's last token looks at most.

    Of a prompt in chunks, each chunk's last token judges the chunk.

    Args:
        layer: K, layers that all tokens go through.
        ratio: kept fraction of the visual tokens, in (0, 1].

    Raises:
        ConfigError: a setting is out of range.

    Reference:
        FastV (arXiv 2403.06764) section 4; the paper's usual setting is layer 2 with half of the tokens. Its R is the
        removed fraction, 1 - `ratio`.
    """

    layer: int = 2
    ratio: float = 0.5

    baseline: ClassVar[bool] = True
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction("FastV.ratio", self.ratio)
        if not is_whole(self.layer, least=1, most=MOST_LAYERS):
            raise ConfigError(f"FastV.layer={shown(self.layer)}, wanted a number of layers, 1 or more")

    def check(self, spec: ModelSpec) -> None:
        check_layer("FastV.layer", self.layer, spec.num_layers)
        if self.layer - 1 in spec.sliding_layers:
            sees = f"layer {self.layer - 1} attends within a window of {spec.sliding_window}"
            raise ConfigError(
                f"FastV.layer={self.layer}: {sees}, so most tokens would go unseen; count to a full layer"
            )

    def prunes(self, layer_idx: int, num_layers: int) -> bool:
        return layer_idx == self.layer - 1 and self.ratio < 1

    def apply(self, view: LayerView) -> Tensor:
        rows = len(view.is_visual)
        # The last token asks for the next one.
        is_visual = torch.cat([view.is_visual[:-1], view.is_visual.new_zeros(1)])
        if view.queries.shape[2] == 0:
            return torch.arange(rows, device=is_visual.device)
        visual = view.rows.visual - int(view.rows.ends_visual)
        return aim_keep(self.importance(view)[-rows:], is_visual, view.prompt_tokens, self.ratio, visual)

    def importance(self, view: LayerView) -> Tensor:
        """[N] float32, of every key of one sequence: what the last query looks at; zero where there is no query.

        Where an earlier pass left heads of different lengths, of the rows of this pass alone.
        """
        if view.queries.shape[2] == 0:
            return torch.zeros(len(view.entries), dtype=torch.float32, device=view.keys.device)
        if view.entries.is_packed:
            of_heads = [_looked_at(x)[..., -len(view.is_visual) :] for x in view.heads()]
            return torch.cat(of_heads, 1).mean(1)[0]
        return _looked_at(view).mean(1)[0]

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """One product for the logits, and one of a vote with the probabilities, for pairs of queries that count."""
        return 2 * spec.num_attention_heads * (spec.head_dim + 1) * sum(lengths)

    def layer_cost(self, spec: ModelSpec, work: LayerWork) -> int:
        """The last query alone counts, if there is one."""
        return self.cost(spec, [work.keys]) if work.queries else 0

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"fastv": cls(layer=2, ratio=0.5)}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"FastV": {f"{share} %": cls(2, share / 100) for share in (50, 25, 10)}}


def _looked_at(view: LayerView) -> Tensor:
    """[1, H, N] float32: what the last query gives each key."""
    last = view.query_index[-1:] if view.query_index is not None else None
    return column_mass(view.queries[:, :, -1:], view.keys, query_index=last, scale=view.scale)
