"""How vision towers are built, and what they are asked to compute: read off shapes, nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mminfer.errors import UnsupportedModelError
from mminfer.layout import Modality
from mminfer.models.ragged import FixedGridTower, RaggedTower

PIXEL_INPUTS = {Modality.IMAGE: "pixel_values", Modality.VIDEO: "pixel_values_videos"}


@dataclass(frozen=True)
class VisionWork:
    """One call of a host's encoder.

    Args:
        images: images, tiles or frames that go through the tower.
        patches: patches that the first convolution cuts, those of padding too.
        rows: rows in the tower's layers.
        pairs: query-key pairs of the attention in each layer.
        projected: rows that go through the projector.
    """

    images: int
    patches: int
    rows: int
    pairs: tuple[int, ...]
    projected: int


class VisionTower:
    """A tower of CLIP's or SigLIP's build behind LLaVA's projector; subclasses name what differs.

    Args:
        base: the host's base model.
        config: the host model's config.
    """

    # Dotted names from the base model on; of the attention, within a layer.
    convolution: ClassVar[str] = "vision_tower.embeddings.patch_embedding"
    layer_list: ClassVar[str] = "vision_tower.encoder.layers"
    attention: ClassVar[str] = "self_attn"
    projector: ClassVar[str] = "multi_modal_projector"
    pooling: ClassVar[str] = "vision_tower.head"
    class_token: ClassVar[str] = "vision_tower.embeddings.class_embedding"
    # Of the tower as the host's encoder calls it.
    module: ClassVar[str] = "vision_tower"
    # How it is given some of its patches.
    ragged: ClassVar[type[RaggedTower]] = FixedGridTower
    # Whether each cell of a picture becomes one token, in the order of the grid.
    cells_are_tokens: ClassVar[bool] = True

    def __init__(self, base: Any, config: Any) -> None:
        self.base, self.config = base, config

    def work(self, modality: Modality, inputs: Mapping[str, Any]) -> VisionWork:
        """What encoding the pixels of this modality will take.

        Args:
            modality: of which there are pixels among the inputs.
            inputs: the model's inputs.
        """
        images, height, width = self.images(modality, inputs)
        patches = (height // self.patch_sides[-2]) * (width // self.patch_sides[-1])
        rows = patches + int(self.part(self.class_token) is not None)
        pairs = (images * rows**2,) * len(self.layers)
        return VisionWork(images, images * patches, images * rows, pairs, images * self.projected(rows, patches))

    def images(self, modality: Modality, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """Images that go through the tower, and their height and width in pixels."""
        *images, _, height, width = inputs[PIXEL_INPUTS[modality]].shape
        count = 1
        for n in images:
            count *= n
        return count, height, width

    @property
    def cell_side(self) -> int:
        """Patches a side of what becomes one token."""
        return 1

    def takes_cells(self) -> bool:
        """Whether the tower is built as its `ragged` kind runs it."""
        needed = (self.module, self.convolution, self.layer_list)
        return all(self.part(name) is not None for name in needed)

    def frames(self, modality: Modality, inputs: Mapping[str, Any]) -> int:
        """How many of the tower's pictures are one video's, in order; 1: they are images."""
        return int(inputs[PIXEL_INPUTS[modality]].shape[1]) if modality is Modality.VIDEO else 1

    def pictures(self, modality: Modality, inputs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Of each image or video what its encoding depends on; None where they cannot be told apart.

        Args:
            modality: of which there are pixels among the inputs.
            inputs: what the host's encoder is given, by name.
        """
        count = len(inputs[PIXEL_INPUTS[modality]])
        if any(not isinstance(x, Tensor) or x.dim() == 0 or len(x) != count for x in inputs.values()):
            return None
        return [{name: x[i] for name, x in inputs.items()} for i in range(count)]

    def chosen(self, modality: Modality, inputs: Mapping[str, Any], some: list[int]) -> dict[str, Any] | None:
        """What the host's encoder is given for some of `pictures`, in order; None: it cannot be given those alone."""
        return {name: x[some] for name, x in inputs.items()}

    def projected(self, rows: int, patches: int) -> int:
        """Rows of an image that go through the projector, of its rows in the tower."""
        return rows - int(self.config.vision_feature_select_strategy == "default")  # which drops the first

    @property
    def patch_sides(self) -> tuple[int, ...]:
        """Height and width of a patch in pixels, behind its frames where there are several."""
        sides: tuple[int, ...] = self._needed(self.convolution).kernel_size
        return sides

    @property
    def layers(self) -> list[Any]:
        """The tower's layers."""
        return list(self._needed(self.layer_list))

    @property
    def patch_weights(self) -> int:
        """Weights that a patch is multiplied with."""
        return int(self._needed(self.convolution).weight.numel())

    @property
    def width(self) -> int:
        """Size of a row in the tower, which is that of all heads of its attention together."""
        return int(self._needed(self.convolution).out_channels)

    @property
    def projector_weights(self) -> int:
        """Weights that each row behind the tower is multiplied with."""
        return linear_weights(self._needed(self.projector))

    def attention_weights(self, layer: Any) -> int:
        """Weights of the attention's projections."""
        return linear_weights(self._found(getattr(layer, self.attention, None), self.attention))

    def layer_weights(self, layer: Any) -> int:
        """Weights of all linear layers of one of the tower's layers."""
        return linear_weights(layer)

    def pooling_flops(self, work: VisionWork) -> int:
        """SigLIP's attention pooling: one query an image looks at its rows; hosts run it though nobody reads it."""
        head = self.part(self.pooling)
        if head is None:
            return 0
        projections = 2 * self.width**2 * (2 * work.images + 2 * work.rows)
        return projections + 4 * self.width * work.rows + 2 * linear_weights(head.mlp) * work.images

    def part(self, name: str) -> Any:
        """The part of the base model with this dotted name; None where there is none."""
        first, *steps = name.split(".")
        found = getattr(self.base, first, None)
        found = getattr(found, "vision_model", found)  # older hosts wrap CLIP and SigLIP once more
        for step in steps:
            found = getattr(found, step, None)
        return found

    def _needed(self, name: str) -> Any:
        return self._found(self.part(name), name)

    def _found(self, found: Any, name: str) -> Any:
        if found is None:
            raise UnsupportedModelError(
                f"{type(self.base).__name__} has no {name}: FLOPs of its vision tower are not known"
            )
        return found


def linear_weights(module: nn.Module) -> int:
    """Elements of the weights of all linear layers in a module; a quantised one counts as what it stands for."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def grids(sizes: Tensor, sides: tuple[int, ...]) -> list[int]:
    """Patches of images of these sizes, [n, 2] height and width in pixels."""
    return [(h // sides[-2]) * (w // sides[-1]) for h, w in sizes.tolist()]
