"""AIM, second half: pruning visual tokens inside the language model by their importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from mminfer_kernels import power_iterate, top_places
from mminfer_kernels.checks import MOST_ITERATIONS
from torch import Tensor

from mminfer.errors import ConfigError, shown
from mminfer.layout import places_of
from mminfer.technique import (
    MOST_FACTOR,
    MOST_LAYERS,
    LayerView,
    LayerWork,
    PruneTechnique,
    check_layer,
    is_number,
    is_whole,
    layer_index,
)

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass(frozen=True)
class AIMPrune(PruneTechnique):
    """Pruning of unimportant visual tokens inside the language model, a few behind each layer.

    The rows really leave: hidden states, keys and values of a pruned token exist in no later layer.

    Args:
        start: first layer behind which tokens leave; an index, or a fraction of the depth (float).
        end: number of layers that any visual token goes through; likewise.
        temperature: divides the attention logits of the importance.
        iterations: steps of the importance.

    Raises:
        ConfigError: a setting is out of range.

    Reference:
        AIM (arXiv 2412.03248) section 3.3; the paper's 28 layers prune from 14 to 22. The authors' code masks pruned
        tokens, which saves nothing, and builds an N x N matrix a head.
    """

    start: int | float = 14 / 28
    end: int | float = 22 / 28
    temperature: float = 0.1
    iterations: int = 5

    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        sound = is_number(self.temperature, above=0, most=MOST_FACTOR) and self.temperature >= 1 / MOST_FACTOR
        if not sound or not is_whole(self.iterations, least=1, most=MOST_ITERATIONS):
            raise ConfigError(
                f"AIMPrune(temperature={shown(self.temperature)}, iterations={shown(self.iterations)}): wanted a "
                f"temperature above 0, from {1 / MOST_FACTOR:g} to {MOST_FACTOR:g}, and at least one iteration, "
                f"{MOST_ITERATIONS} at most"
            )
        for name in ("start", "end"):
            if not is_number(getattr(self, name), above=-MOST_LAYERS, most=MOST_LAYERS):
                raise ConfigError(
                    f"AIMPrune.{name}={shown(getattr(self, name))}, wanted a layer, or a fraction of the depth"
                )

    def check(self, spec: ModelSpec) -> None:
        if spec.bidirectional_images:
            raise ConfigError(
                f"{type(self).__name__}: importance is passed on over a causal attention matrix, but images of this "
                "model attend in both directions; leave prune=None for it"
            )
        self.check_layers(spec)

    def check_layers(self, spec: ModelSpec) -> None:
        """Raises `ConfigError` if start and end do not fit the model's depth."""
        check_layer("AIMPrune.start", self.start, spec.num_layers)
        check_layer("AIMPrune.end", self.end, spec.num_layers, last=spec.num_layers)
        self.schedule(spec.num_layers)

    def schedule(self, num_layers: int) -> list[float]:
        """Kept fraction of visual tokens behind each layer."""
        return aim_schedule(num_layers, layer_index(self.start, num_layers), layer_index(self.end, num_layers))

    def prunes(self, layer_idx: int, num_layers: int) -> bool:
        kept = [1.0, *self.schedule(num_layers)]
        return kept[layer_idx + 1] < kept[layer_idx]

    def apply(self, view: LayerView) -> Tensor:
        rows, visual, is_visual = len(view.is_visual), view.rows.visual, view.is_visual
        if view.rows.ends_visual:  # a prompt that ends with an image: its last token asks for the next one
            is_visual, visual = torch.cat([is_visual[:-1], is_visual.new_zeros(1)]), visual - 1
        rate = self.schedule(view.num_layers)[view.layer_idx]
        if visual == 0:
            return torch.arange(rows, device=is_visual.device)
        if rate == 0:
            return places_of(~is_visual, rows - visual)
        return aim_keep(self.importance(view)[-rows:], is_visual, view.prompt_tokens, rate, visual)

    def importance(self, view: LayerView) -> Tensor:
        """[N] float32, of every key of one sequence; a row without a query casts no vote.

        Where an earlier pass left heads of different lengths, of the rows of this pass alone.
        """
        if view.query_index is not None and len(view.query_index) == 0:
            return torch.zeros(len(view.entries), dtype=torch.float32, device=view.keys.device)
        if view.entries.is_packed:  # each head begins with the same on each of its keys, be they many or few
            of_heads = [len(x.entries) * self._mass(x)[..., -len(view.is_visual) :] for x in view.heads()]
            mass = torch.cat(of_heads, 1).div_(max(view.entries.lengths))
        else:
            mass = self._mass(view)
        return _root_mean_square(mass)[0]

    def _mass(self, view: LayerView) -> Tensor:
        """[1, H, N] float32."""
        return power_iterate(view.queries, view.keys, self.iterations, self.temperature, view.query_index, view.scale)

    def cost(self, spec: ModelSpec, lengths: Sequence[int]) -> int:
        """One product for the logits, and one of `iterations` votes with the probabilities."""
        return 2 * spec.num_attention_heads * (spec.head_dim + self.iterations) * sum(lengths)

    def layer_cost(self, spec: ModelSpec, work: LayerWork) -> int:
        """Where all or no visual token leaves, nobody asks for importance."""
        asks = work.visual > 0 and self.schedule(spec.num_layers)[work.layer_idx] > 0
        return self.cost(spec, [work.pairs]) if asks else 0

    def describe(self) -> str:
        start, end = (f"{x}" if isinstance(x, int) else f"{100 * x:.0f} % of the depth" for x in (self.start, self.end))
        return f"Visual tokens leave behind the layers from {start} to {end}, the least important ones first."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        # The paper's 28 layers: pruning from layer 14 to 22 (AIM, section 4.1).
        return {"aim-prune": cls(start=14 / 28, end=22 / 28)}

    @classmethod
    def sweeps(cls) -> dict[str, dict[str, Self]]:
        return {"AIM prune": {"": cls(start=14 / 28, end=22 / 28)}}


def aim_importance(q: torch.Tensor, k: torch.Tensor, temperature: float = 0.1, iterations: int = 5) -> torch.Tensor:
    """Importance of each token: a page rank on a layer's attention, by `iterations` steps of power iteration.

    Args:
        q: queries after rotation [B, H, S, D]; with S < N the last S tokens vote.
        k: keys after rotation [B, G, N, D].
        temperature: divides the attention logits.
        iterations: steps from the uniform vector 1 / N.

    Returns:
        [B, N] float32: the root of the mean over heads of the squared importance.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.

    Reference:
        AIM (arXiv 2412.03248), token pruning. Same values as the authors' code, without their N x N matrix a
        head.
    """
    return _root_mean_square(power_iterate(q, k, iterations=iterations, temperature=temperature))


def _root_mean_square(mass: torch.Tensor) -> torch.Tensor:
    """[B, N], over the heads of [B, H, N]."""
    return torch.linalg.vector_norm(mass, dim=1).div_(mass.shape[1] ** 0.5)


def aim_schedule(num_layers: int, start: int, end: int) -> list[float]:
    """Fraction of the prompt's visual tokens kept after each layer.

    1 before layer `start`, then falling by `1 / (end - start)` a layer to 0 after layer `end - 1` and later.

    Args:
        num_layers: L, layers of the language model.
        start: first layer (counted from 0) after which tokens are pruned.
        end: number of layers any visual token goes through, `start < end <= L`.

    Returns:
        L fractions in [0, 1].

    Raises:
        ConfigError: the layers are not `0 <= start < end <= num_layers`.

    Reference:
        AIM (arXiv 2412.03248), token pruning; its setting for 28 layers is start 14, end 22, by the authors'
        code.
    """
    if not 0 <= start < end <= num_layers:
        raise ConfigError(f"start is {start} and end {end}, wanted 0 <= start < end <= {num_layers} layers")
    return [min(1.0, max(0.0, (end - 1 - layer) / (end - start))) for layer in range(num_layers)]


def aim_keep(
    importance: torch.Tensor, visual_mask: torch.Tensor, prompt_tokens: int, rate: float, visual: int | None = None
) -> torch.Tensor:
    """Which tokens of one sequence stay: all text, and the most important visual tokens.

    `int((N0 - T) * rate) + T` tokens stay, of N0 prompt tokens with T text tokens among them.

    Args:
        importance: [N] of the tokens still there.
        visual_mask: [N] bool, true at visual tokens.
        prompt_tokens: N0, the length of the prompt before any pruning.
        rate: fraction of the prompt's visual tokens to keep, in [0, 1].
        visual: how many tokens are visual, so that a GPU need not be asked; None: it is.

    Returns:
        Kept places, int64, ascending; all of them where no more than the quota are left.

    Raises:
        ConfigError: `rate` is out of range.
        ValueError: shapes or counts that do not fit.

    Reference:
        AIM (arXiv 2412.03248), token pruning. The authors' code masks what is not kept; here the caller
        removes it.
    """
    if importance.dim() != 1 or visual_mask.shape != importance.shape:
        raise ValueError(
            f"importance is {list(importance.shape)}, visual_mask {list(visual_mask.shape)}, wanted [N] both"
        )
    if not 0 <= rate <= 1:
        raise ConfigError(f"rate is {rate}, wanted a kept fraction in [0, 1]")
    if prompt_tokens < importance.shape[0]:
        raise ValueError(f"prompt_tokens is {prompt_tokens}, wanted at least the {importance.shape[0]} tokens left")
    visual = int(visual_mask.sum()) if visual is None else visual
    text = len(importance) - visual
    kept = text + min(int((prompt_tokens - text) * rate), visual)
    return top_places(importance, kept, visual_mask)
