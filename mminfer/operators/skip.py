"""Skipping operators of the language model for visual tokens: their rows are never computed, not masked away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from mminfer.errors import ConfigError, shown
from mminfer.layout import TokenLayout
from mminfer.technique import MOST_LAYERS, LayerRange, SkipTechnique, check_layer, is_number, only_rows

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec

Layers = tuple[int, ...] | list[int] | LayerRange


@dataclass(frozen=True)
class OperatorSkip(SkipTechnique):
    """Which layers spare visual tokens which operator; a spared operator leaves the residual stream as it was.

    Text tokens always complete. Each field is a list of layer indices or a `LayerRange`.

    Args:
        ffn: layers whose FFN visual tokens skip.
        attention: layers in which visual tokens issue no query; their keys and values are still written.
        block: layers in which they skip both.

    Raises:
        ConfigError: a field is not a list of layer indices.

    Reference:
        arXiv 2405.16700 section 4 and arXiv 2410.09454 (FFN); arXiv 2606.08511 (attention). The authors' prompt-only
        mode adds the normalised hidden state in place of the operator's output; we leave the residual stream alone,
        as the paper says.
    """

    ffn: Layers = ()
    attention: Layers = ()
    block: Layers = ()

    def __post_init__(self) -> None:
        for name in ("ffn", "attention", "block"):
            layers = getattr(self, name)
            if isinstance(layers, list):
                object.__setattr__(self, name, tuple(layers))
            elif not isinstance(layers, (tuple, LayerRange)):
                raise ConfigError(
                    f"OperatorSkip.{name}={shown(layers)}: wanted a list of layer indices or a LayerRange"
                )
            for layer in layers if isinstance(layers, (list, tuple)) else ():
                if not is_number(layer, above=-MOST_LAYERS, most=MOST_LAYERS):
                    raise ConfigError(f"OperatorSkip.{name} holds {shown(layer)}: wanted layer indices (int)")

    def check(self, spec: ModelSpec) -> None:
        for name in ("attention", "block"):
            if spec.bidirectional_images and _indices(getattr(self, name), spec.num_layers):
                raise ConfigError(
                    f"OperatorSkip.{name}: images of this model attend in both directions, and a visual token that "
                    "issues no query never learns of the later ones of its image; skip only the FFN"
                )
        for name in ("ffn", "attention", "block"):
            layers = getattr(self, name)
            if isinstance(layers, LayerRange):
                check_layer(f"OperatorSkip.{name}.start", layers.start, spec.num_layers)
                check_layer(f"OperatorSkip.{name}.end", layers.end, spec.num_layers, last=spec.num_layers)
            else:
                for layer in layers:
                    if not isinstance(layer, int):
                        raise ConfigError(f"OperatorSkip.{name} holds {shown(layer)}: wanted layer indices (int)")
                    check_layer(f"OperatorSkip.{name}", layer, spec.num_layers)

    def apply(self, layout: TokenLayout, layer_idx: int, num_layers: int) -> tuple[Tensor | None, Tensor | None]:
        """Packed rows that issue a query, and rows that go through the FFN; None: all of them."""
        block = layer_idx in _indices(self.block, num_layers)
        attention = block or layer_idx in _indices(self.attention, num_layers)
        ffn = block or layer_idx in _indices(self.ffn, num_layers)
        text = layout.text_rows
        return (text if attention else None), (text if ffn else None)

    @contextmanager
    def restrict(
        self, layer: nn.Module, ffn_modules: tuple[str, str] | None, queries: Tensor | None, ffn: Tensor | None
    ) -> Iterator[None]:
        """Within it, the layer's query and output projections and its FFN see only the rows given ([K] int64)."""
        if ffn is not None and ffn_modules is None:
            raise ConfigError(f"{type(layer).__name__} has no FFN that rows could leave out")
        attention: Any = layer.self_attn
        branch = [getattr(layer, name) for name in ffn_modules or ()]
        with (
            nullcontext() if queries is None else only_rows(attention.q_proj, attention.q_proj, queries),
            nullcontext() if queries is None else only_rows(attention.o_proj, attention.o_proj, queries),
            nullcontext() if ffn is None else only_rows(branch[0], branch[1], ffn),
        ):
            yield

    def describe(self) -> str:
        names = {"ffn": "the FFN", "attention": "their queries", "block": "whole layers"}
        skipped = [what for name, what in names.items() if getattr(self, name)]
        return f"Visual tokens skip {' and '.join(skipped) or 'nothing'} in chosen layers; text always completes."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        # Every other layer from an eighth of the depth on, the form that arXiv 2410.09454 tries.
        return {"skip-ffn": cls(ffn=LayerRange(start=0.125, interval=2))}

    @classmethod
    def variants(cls) -> dict[str, Self]:
        return {f"{cls.__name__} {name}": cls(**{name: [0]}) for name in ("ffn", "attention", "block")}


def _indices(layers: Layers, num_layers: int) -> tuple[int, ...] | list[int]:
    return layers.layers(num_layers) if isinstance(layers, LayerRange) else layers
