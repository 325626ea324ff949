"""By what a model is known again: its geometry, the sizes of its weights, and a few rows of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mminfer.errors import ConfigError, shown
from mminfer.models.spec import ModelSpec

ROWS = 4  # of each weight, evenly spread
COLUMNS = 64  # of each of these rows
DIGITS = 16


@dataclass(frozen=True)
class Fingerprint:
    """A model as a file of settings knows it, on whatever device and in whatever precision it is loaded.

    Args:
        geometry: family and sizes of its language model.
        weights: digest over names, shapes and a few rows of every parameter.
    """

    geometry: str
    weights: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Fingerprint:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: it is none.
        """
        if not isinstance(data, Mapping) or not all(isinstance(data.get(name), str) for name in cls.__annotations__):
            raise ConfigError(f'"model" is {shown(data)}: wanted the geometry and the digest that a calibration wrote')
        return cls(data["geometry"], data["weights"])

    def check_geometry(self, spec: ModelSpec) -> None:
        """Raises `ConfigError` if a model of this geometry is another one."""
        found = geometry_of(spec)
        if found != self.geometry:
            raise ConfigError(f"these settings were calibrated on {self.geometry}, this model is {found}: {_WAY_OUT}")

    def check(self, spec: ModelSpec, model: nn.Module) -> None:
        """Raises `ConfigError` if this model is another one."""
        self.check_geometry(spec)
        found = weights_of(model)
        if found != self.weights:
            raise ConfigError(
                f"these settings were calibrated on a model of this geometry with other weights (digest {self.weights},"
                f" this one's {found}): {_WAY_OUT}"
            )


_WAY_OUT = (
    "what they lose here nobody has measured; run `mminfer calibrate` on this model, or pass any_model=True to "
    "InferenceConfig.from_file to take them all the same"
)


def fingerprint_of(spec: ModelSpec, model: nn.Module) -> Fingerprint:
    """Of a loaded model."""
    return Fingerprint(geometry_of(spec), weights_of(model))


def geometry_of(spec: ModelSpec) -> str:
    """Family and sizes, in words."""
    return (
        f"{spec.family} of {spec.num_layers} layers, width {spec.hidden_size}, FFN {spec.intermediate_size}, "
        f"{spec.num_attention_heads}/{spec.num_key_value_heads} heads of {spec.head_dim}, {spec.vocab_size} tokens"
    )


def weights_of(model: nn.Module) -> str:
    """Digest over every parameter's name, shape and a few rows, rounded so that it is the same in any precision."""
    found = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        found.update(f"{name.replace('_orig_mod.', '')} {list(weight.shape)}".encode())
        found.update(_sample(weight))
    return found.hexdigest()[:DIGITS]


def _sample(weight: Tensor) -> bytes:
    """Some numbers of a weight as bfloat16 has them; nothing of one that lies elsewhere or is no plain tensor."""
    weight = weight.detach()
    if weight.is_meta or weight.layout is not torch.strided or not weight.is_floating_point() or not weight.numel():
        return b""
    rows = weight.flatten(1) if weight.dim() > 1 else weight[None]
    chosen = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), dtype=torch.float64).round().long()
    part = rows[chosen.to(rows.device), :COLUMNS].bfloat16().cpu().contiguous()
    return part.view(torch.uint8).numpy().tobytes()
