"""A cache technique whose heads keep different numbers of entries, drawn by lot, and what the host gives for it.

The truth is the host's own attention over all tokens of a sequence at once, under a bias for each layer and head: minus
infinity for entries that are gone, the log-mass for those that stay.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mminfer.models.registry import adapter_for
from mminfer.technique import CacheEntries, CacheTechnique, LayerView


@dataclass(frozen=True)
class ByLot(CacheTechnique, register=False):
    """Keeps entries by lot, more of them in later heads; none of the first head but one.

    Args:
        most: of the last head, the share that stays.
        weighed: whether those that stay have log-masses, drawn too.
        seed: of the lot.
    """

    most: float = 0.8
    weighed: bool = False
    seed: int = 0

    by_head: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("is_visual", "source")

    def apply(self, view: LayerView) -> CacheEntries:
        keep, log_mass = self.drawn(view.entries.lengths, view.layer_idx)
        keep = keep.reshape(view.entries.keys.shape[:3]).to(view.keys.device)
        kept = view.entries.select_heads(keep)
        if not self.weighed:
            return kept
        mass = log_mass.reshape(keep.shape).to(view.keys.device)[keep][None, None]
        return replace(kept, log_mass=mass if kept.log_mass is None else kept.log_mass + mass)

    def drawn(self, lengths: tuple[int, ...], layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[sum of lengths] which entries stay, and what is added to their log-masses; heads one behind the other."""
        lot = torch.Generator().manual_seed(1000 * self.seed + 17 * layer_idx + sum(lengths))
        keep = [
            torch.rand(length, generator=lot) < self.most * head / max(len(lengths) - 1, 1)
            for head, length in enumerate(lengths)
        ]
        for head, mask in enumerate(keep):
            if head == 0 or not len(lengths) > 1:
                mask[:1] = True
        return torch.cat(keep), torch.randn(sum(lengths), generator=lot)


@dataclass(frozen=True)
class Masked(ByLot, register=False):
    """The same lot, but all entries stay: those that would leave count for nothing. Of one pass."""

    def apply(self, view: LayerView) -> CacheEntries:
        keep, log_mass = self.drawn(view.entries.lengths, view.layer_idx)
        mass = (log_mass if self.weighed else torch.zeros(len(keep))).where(keep, -1e9)
        return replace(view.entries, log_mass=mass.reshape(view.entries.keys.shape[:3]))


class Truth:
    """What the host gives for a sequence whose cache a `ByLot` compresses behind each pass.

    Args:
        model: the host's.
        technique: with which it is compressed.

    Attributes:
        bias: for each layer, of each row of queries so far what is added to its logits, [G, tokens] each.
    """

    def __init__(self, model: Any, technique: ByLot) -> None:
        self.model, self.technique = model, technique
        spec = adapter_for(model).spec
        self.groups, self.heads = spec.num_key_value_heads, spec.num_attention_heads
        self.held = [torch.zeros(self.groups, 0) for _ in range(spec.num_layers)]
        self.bias: list[list[torch.Tensor]] = [[] for _ in self.held]

    def tokens(self, count: int) -> None:
        """So many tokens come in, by one pass or step by step; nothing is compressed."""
        for layer, held in enumerate(self.held):
            self.bias[layer] += [held] * count
            self.held[layer] = torch.cat([held, torch.zeros(self.groups, count)], 1)

    def compress(self) -> None:
        """The end of a prompt pass."""
        for layer, held in enumerate(self.held):
            there = held.isfinite()
            keep, mass = self.technique.drawn(tuple(there.sum(1).tolist()), layer)
            stays = there.clone()
            stays[there] = keep
            weight = torch.zeros_like(held)
            weight[there] = mass if self.technique.weighed else 0.0
            self.held[layer] = (held + weight).where(stays, -torch.inf)

    @property
    def lengths(self) -> list[tuple[int, ...]]:
        """Of each layer, the entries of each head."""
        return [tuple(held.isfinite().sum(1).tolist()) for held in self.held]

    @torch.no_grad()
    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[N, vocabulary], of all tokens so far."""
        count = self.held[0].shape[1]
        added = [torch.full((self.groups, count, count), -torch.inf) for _ in self.bias]
        for bias, rows in zip(added, self.bias, strict=True):
            for i, row in enumerate(rows):
                bias[:, i, : i + 1] = torch.nn.functional.pad(row, (0, max(0, i + 1 - row.shape[1])))[:, : i + 1]
        with _biased(adapter_for(self.model).text_config, added, self.heads // self.groups):
            return self.model(**inputs, use_cache=False).logits[0]


@contextlib.contextmanager
def _biased(config: Any, added: list[torch.Tensor], per_group: int) -> Any:
    """The host's eager attention with something added to its logits in each layer."""

    def attention(module, query, key, value, attention_mask, scaling=None, **others):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        bias = added[module.layer_idx].repeat_interleave(per_group, 0).to(query.dtype)
        weights = (query @ key.mT * scale + bias).softmax(-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2), weights

    before = config._attn_implementation_internal
    ALL_ATTENTION_FUNCTIONS["biased"] = attention
    ALL_MASK_ATTENTION_FUNCTIONS["biased"] = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    config._attn_implementation_internal = "biased"
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("biased", None)
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.pop("biased", None)
