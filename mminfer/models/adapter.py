"""What the prompt pass must know of a host model. One adapter carries every family of the common structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from mminfer_kernels import rotary_table
from torch import Tensor, nn

from mminfer.errors import InputError, UnsupportedModelError
from mminfer.layout import GivenRows, Modality, TokenLayout
from mminfer.models.encoder_cache import EncoderCache
from mminfer.models.encoding import Encoded, HostEncoder
from mminfer.models.entry import embedding_scale
from mminfer.models.packing import PackedRows
from mminfer.models.spec import (
    ModelSpec,
    VisualUnit,
    attention_mask,
    layer_kinds,
    rescaled,
    says_variable_positions,
)
from mminfer.models.structure import check_structure, parameters_of, wants_positions
from mminfer.models.vision import PIXEL_INPUTS, VisionTower, VisionWork


class ModelAdapter:
    """A family's names and rules. It reads the host model and calls its modules; it never changes them.

    Attributes:
        encoder_cache: of pictures that were encoded before; None: none are kept.

    Args:
        model: a Hugging Face `...ForConditionalGeneration` whose language model is a stack of decoder layers with
            `self_attn`, between a rotary embedding and a norm.

    Raises:
        UnsupportedModelError: the language model is built in another way.
    """

    language_model_name: ClassVar[str] = "language_model"
    position_axes: ClassVar[int] = 1
    # Whether frequencies are dealt to the axes in turn rather than in sections.
    interleaved_axes: ClassVar[bool] = False
    # Whether the tokens of an image see each other in both directions.
    bidirectional_images: ClassVar[bool] = False
    # Images that a call of the processor must hold so that each is encoded as in a prompt of many.
    least_images_in_a_call: ClassVar[int] = 1
    # What the host keeps on the model between calls; an undone patch puts it back.
    host_state: ClassVar[tuple[str, ...]] = ()
    # How the vision tower is built.
    tower_kind: ClassVar[type[VisionTower]] = VisionTower

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encoder_cache: EncoderCache | None = None
        self.base: Any = model.base_model
        self.language_model: Any = getattr(self.base, self.language_model_name)
        check_structure(self.language_model)
        self.layers: Sequence[Any] = self.language_model.layers
        self.text_config: Any = self.layers[0].self_attn.config
        self.layer_kinds = layer_kinds(self.text_config)
        self._positions_wanted = wants_positions(self.layers[0].self_attn)
        self._rotary_by_kind = "layer_type" in parameters_of(self.language_model.rotary_emb)
        self.spec = replace(
            self.spec_of(model.config.model_type, self.text_config),
            variable_positions=says_variable_positions(model.config, self.text_config),
            ragged_tower=self.tower.takes_cells(),
        )

    @classmethod
    def spec_of(cls, family: str, config: Any) -> ModelSpec:
        """The geometry of a language model, from its text config alone.

        Raises:
            UnsupportedModelError: layers that are neither of full nor of sliding attention.
        """
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = layer_kinds(config)
        other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if other:
            raise UnsupportedModelError(f"layers of type {', '.join(other)} are not supported, only full attention")
        sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
        return ModelSpec(
            family=family,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            position_axes=cls.position_axes,
            sliding_layers=sliding,
            sliding_window=config.sliding_window if sliding else None,
            bidirectional_images=cls.bidirectional_images,
        )

    def placeholder_id(self, modality: Modality) -> int | None:
        """The token id that stands for one visual token of this modality."""
        return getattr(self.model.config, f"{modality.name.lower()}_token_id", None)

    def visual_units(self, inputs: Mapping[str, Any]) -> dict[Modality, list[VisualUnit]]:
        """Images and frames of a request in prompt order, encoded by the host's own tower and projector.

        Features that `generate` has encoded already (`mm_encoder_outputs`) are taken as they are.
        """
        return HostEncoder(self).encode(inputs).units

    def _to_encode(self, inputs: Mapping[str, Any]) -> dict[Modality, Any]:
        """The host's encoders for what comes as pixels and was not encoded before."""
        encoded, encoders = inputs.get("mm_encoder_outputs") or {}, {}
        for modality, pixels in PIXEL_INPUTS.items():
            name = modality.name.lower()
            encode = getattr(self.base, f"get_{name}_features", None)
            if encoded.get(name) is None and inputs.get(pixels) is not None and encode is not None:
                encoders[modality] = encode
        return encoders

    @property
    def tower(self) -> VisionTower:
        """The geometry of the vision tower."""
        return self.tower_kind(self.base, self.model.config)

    def vision_work(self, inputs: Mapping[str, Any]) -> list[VisionWork]:
        """What `visual_units` of these inputs asks of the vision tower."""
        return [self.tower.work(modality, inputs) for modality in self._to_encode(inputs)]

    def split_units(self, modality: Modality, output: Any) -> list[VisualUnit]:
        """The output of the host's encoder as one unit an image.

        Args:
            modality: of all the units.
            output: its `pooler_output` is a [images, n, C] tensor or a list of [n, C].
        """
        return [VisualUnit.of_patches(x) for x in output.pooler_output]

    def host_positions(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Positions of the packed rows as the host counts them, [A, T] float64.

        Args:
            inputs: the model's inputs; `position_ids` ([B, N], float or integer) are used where given.
            mask: [B, N] bool, False on padding, on the CPU.
        """
        position_ids = _on_cpu(inputs.get("position_ids"))
        if position_ids is None:  # columns, as the host counts them; what stands before a row shifts all of it alike
            columns = torch.arange(mask.shape[1])
            position_ids = (columns - mask.long().argmax(-1, keepdim=True)).clamp_min(0)
        return position_ids.expand(mask.shape)[mask].double()[None]

    def rotary(
        self, hidden_states: Tensor, position: Tensor, precise: bool, factors: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """For each kind of layer cos and sin, [..., D] each, for positions [A, ...] float64.

        Where kinds of layers have frequencies of their own, factors are for full attention alone: a sliding layer sees
        no farther than its window, however long the prompt.

        Args:
            hidden_states: gives dtype and device.
            precise: form angles in float64, as fractional positions far out need; else the host's own rounding, so
                that nothing differs from the host by a bit.
            factors: [D / 2], of the host's frequencies; angles are then formed in float64. None: 1.

        Reference:
            Gemma 3 (arXiv 2503.19786): its own linear factor of 8 stands on the layers of full attention only.
        """
        if not self._rotary_by_kind:
            return dict.fromkeys(self.layer_kinds, self._table(hidden_states, position, precise, factors))
        return {
            kind: self._table(hidden_states, position, precise, factors if kind == "full_attention" else None, kind)
            for kind in set(self.layer_kinds)
        }

    def _table(
        self, hidden_states: Tensor, position: Tensor, precise: bool, factors: Tensor | None, kind: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cos and sin; kind: of the layers, where they have frequencies of their own."""
        rotary: Any = self.language_model.rotary_emb
        of_kind = () if kind is None else (kind,)
        if not precise and factors is None:
            cos, sin = rotary(hidden_states, self._host_axes(position), *of_kind)
            return cos, sin
        if self.rotary_follows_length:  # brings the frequencies up to date
            rotary(hidden_states[:1, :1], self._host_axes(position.amax().expand(self.position_axes, 1, 1)), *of_kind)
        prefix = "" if kind is None else f"{kind}_"
        return rotary_table(
            self._host_axes(position),
            rescaled(getattr(rotary, f"{prefix}inv_freq"), factors),
            getattr(rotary, f"{prefix}attention_scaling"),
            sections=self.rotary_sections(rotary),
            dtype=hidden_states.dtype,
            interleaved=self.interleaved_axes,
        )

    @property
    def rotary_follows_length(self) -> bool:
        """Whether the host's rotary frequencies depend on the longest position of a call."""
        found = self.language_model.rotary_emb.rope_type
        kinds = found.values() if isinstance(found, dict) else [found]
        return any("dynamic" in kind or kind == "longrope" for kind in kinds)

    def _host_axes(self, position: Tensor) -> Tensor:
        return position if self.position_axes > 1 else position[0]

    def rotary_sections(self, rotary: Any) -> list[int] | None:
        """M-RoPE's split of the frequencies over the axes; None for one axis.

        Args:
            rotary: the host's rotary module.
        """
        return None

    def entering(self, embeds: Tensor) -> Tensor:
        """Embeddings as the first layer takes them; see `embedding_scale`."""
        scale = embedding_scale(self.language_model, self.spec.hidden_size)
        return embeds if scale == 1.0 else embeds * scale

    def layer_arguments(self, position: Tensor, device: torch.device) -> dict[str, Tensor]:
        """What the layers' attention must be told of rows at these positions ([..., T] float64), beside the rotary.

        Ministral 3 scales its queries by the position. Whole positions go as integers, as the host counts them.
        """
        if not self._positions_wanted:
            return {}
        whole = position.long()
        ids = whole if torch.equal(whole.to(position), position) else position.float()
        return {"position_ids": ids.to(device, non_blocking=True)}

    @property
    def step_modules(self) -> list[nn.Module]:
        """What rows run through, from the first layer to the logits."""
        return [*self.layers, self.language_model.norm, self.model.lm_head]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Final norm and head: [..., C] -> [..., vocabulary]."""
        return self.model.lm_head(self.language_model.norm(hidden_states))

    def embed(
        self, inputs: Mapping[str, Any], given: GivenRows | None = None, encoded: Encoded | None = None
    ) -> tuple[Tensor, TokenLayout]:
        """The packed prompt: input embeddings [T, C] with visual features in place, and their layout.

        Args:
            inputs: the model's inputs.
            given: rows whose embeddings are given; visual ones are images of their own.
            encoded: the pictures; None: they are encoded now.

        Raises:
            InputError: placeholders and features do not match, or the batch is not in the host's format.
        """
        mask = attention_mask(inputs).cpu()  # all but features is put together there: one wait, before anything runs
        sequence = torch.arange(mask.shape[0])[:, None].expand_as(mask)[mask]
        given_embeds, ids = inputs.get("inputs_embeds"), None
        if given_embeds is None:
            ids = inputs["input_ids"].cpu()[mask]
            embeds = self.model.get_input_embeddings()(ids.to(inputs["input_ids"].device, non_blocking=True))
        else:
            embeds = _packed(given_embeds, mask)
        packed = PackedRows(embeds)
        if given is not None:
            rows = given.mask.cpu()[mask].nonzero()[:, 0]
            packed.put(rows, given.features, given.modality.cpu(), given.part.cpu(), rows.new_ones(len(rows)))
            ids = ids if ids is None else ids.index_fill(0, rows, -1)  # no placeholder, whatever stands there
        units = self.visual_units(inputs) if encoded is None else encoded.units
        for kind in PIXEL_INPUTS:
            of_kind = units.get(kind, [])
            rows = self._placeholder_rows(kind, ids, of_kind)
            if rows.numel() > 0:
                parts = torch.repeat_interleave(torch.tensor([len(u.features) for u in of_kind]))
                sizes = torch.cat([u.size for u in of_kind])
                packed.put(
                    rows, torch.cat([u.features for u in of_kind]), torch.full_like(rows, int(kind)), parts, sizes
                )
                packed.accompany(rows, [u.companions for u in of_kind if u.companions is not None])
                if any(unit.back is not None for unit in of_kind):
                    packed.stand_in(rows, torch.cat([_steps_back(unit) for unit in of_kind]))
        position = self.host_positions(inputs, mask)
        last = position.new_full((mask.shape[0],), -1.0)
        last = last.scatter_reduce(0, sequence, position.amax(0), "amax", include_self=True)
        layout = self.marked(packed.layout(sequence, position, last + 1), inputs, mask)
        return self.entering(packed.embeds), layout.to(embeds.device)

    def marked(self, layout: TokenLayout, inputs: Mapping[str, Any], mask: Tensor) -> TokenLayout:
        """The layout with what the family knows beyond it of the rows.

        Args:
            layout: of all rows, on the CPU.
            inputs: the model's.
            mask: [B, N] bool, False on padding, on the CPU.
        """
        return layout

    def _placeholder_rows(self, kind: Modality, ids: Tensor | None, units: list[VisualUnit]) -> Tensor:
        token = self.placeholder_id(kind)
        name = kind.name.lower()
        found = sum(len(u.features) for u in units)
        if ids is None or token is None:
            if found:
                raise InputError(f"{found} {name} features but no token ids to place them: pass input_ids")
            return torch.empty(0, dtype=torch.int64)
        rows = (ids == token).nonzero()[:, 0]
        if len(rows) != found:
            raise InputError(
                f"the prompt holds {len(rows)} {name} placeholder tokens but its {name}s give {found} features: "
                f"pass the {name}s of exactly the placeholders in the prompt, as the processor prepares them"
            )
        return rows


def _packed(padded: Tensor, mask: Tensor) -> Tensor:
    """[B, N, C] -> [T, C]: the rows at which `mask` ([B, N] bool, on the CPU) is true."""
    flat = padded.flatten(0, 1)
    if bool(mask.all()):
        return flat
    return flat.index_select(0, mask.flatten().nonzero()[:, 0].to(flat.device, non_blocking=True))


def _steps_back(unit: VisualUnit) -> Tensor:
    """[n] int64, as `VisualUnit.back`."""
    return torch.zeros(len(unit.features), dtype=torch.int64) if unit.back is None else unit.back


def _on_cpu(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cpu()
