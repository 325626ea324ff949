"""The geometry of a language model, and what an adapter hands to the prompt pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mminfer.errors import InputError


@dataclass(frozen=True)
class ModelSpec:
    """Geometry of the language model: all that checks and cost formulas need."""

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    position_axes: int = 1
    sliding_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    bidirectional_images: bool = False
    # Whether its configuration says that it was trained with visual tokens closer together; saved chats go by the rest.
    variable_positions: bool = field(default=False, repr=False)
    # Whether its vision tower can be given some of a picture's patches.
    ragged_tower: bool = field(default=True, repr=False)


@dataclass(frozen=True)
class VisualUnit:
    """One image, tile or frame as the language model will see it.

    Args:
        features: [n, C].
        size: [n] float32, patches that each stands for; on the CPU.
        companions: [n, K, C], what joins the hidden states behind the first K layers, if anything does.
        back: [n] int64, how many tokens of the same modality before each the one comes that stands for it, 0 where it
            stands for itself; on the CPU. None: all stand for themselves.
    """

    features: Tensor
    size: Tensor
    companions: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    def of_patches(cls, features: Tensor) -> VisualUnit:
        """A unit of which every token stands for one patch."""
        return cls(features, torch.ones(features.shape[0], dtype=torch.float32))


def rescaled(inv_freq: Tensor, factors: Tensor | None) -> Tensor:
    """[D / 2]: frequencies times factors, multiplied in float64; None: as they are."""
    return inv_freq if factors is None else (inv_freq.double() * factors.to(inv_freq.device)).to(inv_freq.dtype)


def says_variable_positions(*configs: Any) -> bool:
    """Whether one of a model's configurations says, as V2PE's authors do, that visual steps varied in training."""
    versions = (getattr(config, "rope_pos_id_version", None) for config in configs)
    return any(isinstance(version, str) and version.startswith("v2pe") for version in versions)


def layer_kinds(config: Any) -> list[str]:
    """The attention of each layer; where the host names no kinds, a window is that of every layer."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return list(kinds or ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers)


def attention_mask(inputs: Mapping[str, Any]) -> Tensor:
    """[B, N] bool, on the CPU."""
    ids = inputs.get("input_ids")
    like = ids if ids is not None else inputs.get("inputs_embeds")
    if like is None or like.shape[1] == 0:
        raise InputError("the prompt is empty: pass input_ids or inputs_embeds of at least one token")
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(like.shape[:2], dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"attention_mask of shape {shape}: only a 2D padding mask [batch, tokens] is supported")
    mask = mask[:, -like.shape[1] :].bool().cpu()
    if mask.shape != like.shape[:2]:
        raise InputError(
            f"attention_mask {list(mask.shape)} does not fit the tokens {list(like.shape[:2])}: one value each"
        )
    if not bool(mask.any(-1).all()):
        raise InputError("a row of the batch has no token at all (its attention_mask is all zero): drop that row")
    return mask
