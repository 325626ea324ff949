"""Running a prompt with recording techniques, and once more without any, and putting together what was seen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mminfer.config import InferenceConfig
from mminfer.errors import InputError
from mminfer.forward.host_check import check_host
from mminfer.forward.native_build import prepare_kernels
from mminfer.inputs.parts import ImagePart, VideoPart
from mminfer.inspection.facts import Floats, ImageFacts, Inspection, LayerFacts, Mask, Rows, TokenFacts
from mminfer.inspection.pictures import Pictures, frame_pictures, image_pictures
from mminfer.inspection.recording import PassRecord, recording
from mminfer.layout import Modality, TokenLayout
from mminfer.metrics.fidelity import kl_divergence
from mminfer.models.registry import adapter_for
from mminfer.models.spec import ModelSpec, attention_mask
from mminfer.output import GenerationOutput
from mminfer.running import Runner
from mminfer.tokens.grid import grid_of

if TYPE_CHECKING:
    from mminfer.engine import Engine


def inspect_chat(
    engine: Engine, messages: Any, max_new_tokens: int = 64, *, name: str = "", **media: Any
) -> Inspection:
    """Answers one chat with the engine's settings and with none, and tells what the settings did to the prompt.

    Args:
        engine: the model and the settings.
        messages: as for `Engine.generate`.
        max_new_tokens: tokens of each answer at most.
        name: of the model.
        media: how media are taken; as for `Engine.generate`.

    Raises:
        InputError: the request is wrong.
    """
    chat = engine.check(messages, **media)
    parts = [part for message in chat for part in message.parts]
    inputs = engine.prepare([chat])
    return inspect_inputs(
        engine.model,
        engine.processor,
        engine.config,
        inputs,
        max_new_tokens,
        name=name,
        pictures=[part.image for part in parts if isinstance(part, ImagePart)],
        videos=[part.frames for part in parts if isinstance(part, VideoPart)],
    )


def inspect_inputs(
    model: Any,
    processor: Any,
    config: InferenceConfig,
    inputs: Mapping[str, Any],
    max_new_tokens: int = 64,
    *,
    name: str = "",
    pictures: Pictures = (),
    videos: Sequence[Any] = (),
) -> Inspection:
    """The same for inputs that a processor has prepared.

    Args:
        model: the host model, not patched.
        processor: its processor; its tokenizer decodes.
        config: the settings.
        inputs: of one chat, with `input_ids`.
        max_new_tokens: tokens of each answer at most.
        name: of the model.
        pictures: the images of the request, in order.
        videos: the frames of its videos, uint8 [F, H, W, 3] each.

    Raises:
        InputError: several chats, or no token ids.
        ConfigError: a setting does not fit the model.
    """
    ids = inputs.get("input_ids")
    if ids is None or len(ids) != 1:
        found = "none" if ids is None else f"{len(ids)} rows"
        raise InputError(f"input_ids: {found}; an inspection takes one chat: wanted one row of token ids")
    adapter = adapter_for(model)
    config.check(adapter.spec)
    check_host(adapter, config)  # the recording ones stand for techniques that were checked
    recorded, record = recording(config)
    runs = _both_answers(model, processor, (recorded, config), inputs, max_new_tokens)
    if record.host is None or record.placed is None:
        raise RuntimeError("the prompt pass left no record")
    images, image_of = _image_facts(record.host, _shown_pictures(processor, inputs, record.host, pictures, videos))
    importance, importance_from = _importance(record, config, len(record.host))
    return Inspection(
        model=name or adapter.spec.family,
        settings=config.to_dict(),
        images=images,
        tokens=_token_facts(record, record.host, image_of, importance, adapter.spec),
        texts=_texts(processor.tokenizer, ids[0][attention_mask(inputs)[0]].tolist(), record.host),
        layers=_layer_facts(record, runs),
        answer=runs.own.text,
        full_answer=runs.full.text,
        first_token_kl=runs.first_token_kl,
        stats=runs.own.stats,
        full_stats=runs.full.stats,
        importance_from=importance_from,
        evicted="" if config.cache is None else config.cache.describe_evicted(),
        last_position=float(record.placed.next_position[0]) - 1,
        full_last_position=float(record.host.next_position[0]) - 1,
    )


@dataclass(frozen=True)
class _Runs:
    """The answer with the settings, and that of the full model."""

    own: GenerationOutput
    full: GenerationOutput

    @property
    def first_token_kl(self) -> float:
        """Divergence of the first token's distributions, in nats."""
        if self.own.logits is None or self.full.logits is None:
            raise RuntimeError("an answer brought no logits")
        return kl_divergence(self.full.logits[0], self.own.logits[0]).item()


def _both_answers(
    model: Any,
    processor: Any,
    configs: tuple[InferenceConfig, InferenceConfig],
    inputs: Mapping[str, Any],
    max_new_tokens: int,
) -> _Runs:
    """The answer with the recording settings, and without any; the same one where there are none to leave out."""
    recorded, config = configs
    adapter = adapter_for(model)
    with torch.no_grad():
        own = _answer(Runner(model, processor, adapter, recorded, False, True), inputs, max_new_tokens)
        if not config.techniques:
            return _Runs(own, own)
        full = _answer(Runner(model, processor, adapter, InferenceConfig(), False, True), inputs, max_new_tokens)
    return _Runs(own, full)


def _shown_pictures(
    processor: Any, inputs: Mapping[str, Any], host: TokenLayout, pictures: Pictures, videos: Sequence[Any]
) -> dict[Modality, Pictures]:
    """What the images and frames of the prompt show, as far as it is known."""
    counts = {kind: len(_images(host, kind)) for kind in (Modality.IMAGE, Modality.VIDEO)}
    return {
        Modality.IMAGE: image_pictures(processor, inputs, pictures, counts[Modality.IMAGE]),
        Modality.VIDEO: frame_pictures(videos, counts[Modality.VIDEO]),
    }


def _answer(runner: Runner, inputs: Mapping[str, Any], max_new_tokens: int) -> GenerationOutput:
    alone = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    settings = runner.settings({"max_new_tokens": max_new_tokens, "output_logits": True, **alone})
    prepare_kernels(runner.device)
    (output,) = runner.run(dict(inputs), time.perf_counter(), settings)
    return output


def _images(layout: TokenLayout, kind: Modality) -> list[int]:
    """Ids of the images or frames of this kind, in the order in which the adapter counted them."""
    ids: list[int] = layout.image_id[layout.modality == kind].unique().tolist()
    return ids


def _image_facts(layout: TokenLayout, shown: dict[Modality, Pictures]) -> tuple[tuple[ImageFacts, ...], Rows]:
    """The images in the order of the prompt, and [T] the image of each token, -1 for text."""
    grids = _grids(layout)
    image_id, found = layout.image_id.cpu().numpy(), []
    for kind, pictures in shown.items():
        name = "image" if kind is Modality.IMAGE else "frame"
        for image, picture in zip(_images(layout, kind), pictures, strict=True):
            found.append((np.flatnonzero(image_id == image), ImageFacts(name, tuple(grids.get(image, ())), picture)))
    found.sort(key=lambda pair: int(pair[0][0]))
    image_of = np.full(len(layout), -1, np.int64)
    for place, (rows, _) in enumerate(found):
        image_of[rows] = place
    return tuple(facts for _, facts in found), image_of


def _grids(layout: TokenLayout) -> dict[int, list[Rows]]:
    """The views of each image, by its id: the tokens of each in their places, [h, w]."""
    grid, found = grid_of(layout), dict[int, list[Rows]]()
    if not len(grid.rows):
        return found
    rows, y, x = (part.cpu().numpy() for part in (grid.rows, grid.y, grid.x))
    shapes = zip(grid.height.tolist(), grid.width.tolist(), strict=True)
    ids = layout.image_id[grid.rows[grid.first]].tolist()
    for image, first, (height, width) in zip(ids, grid.first.tolist(), shapes, strict=True):
        view, own = np.empty((height, width), np.int64), slice(first, first + height * width)
        view[y[own], x[own]] = rows[own]
        found.setdefault(image, []).append(view)
    return found


def _token_facts(
    record: PassRecord, host: TokenLayout, image_of: Rows, importance: Floats, spec: ModelSpec
) -> TokenFacts:
    count, heads = len(host), spec.num_key_value_heads
    is_patch: Mask = (host.is_visual & (host.size > 0)).cpu().numpy()
    owner = np.arange(count) if record.merged_into is None else record.merged_into.cpu().numpy()
    size = np.zeros(count, np.float32)
    np.add.at(size, owner, host.size.cpu().numpy())
    present = np.zeros((spec.num_layers, count), np.bool_)
    left, held = np.full(count, -1, np.int64), np.zeros((spec.num_layers, count), np.int64)
    for layer, rows in record.left.items():
        left[rows.cpu().numpy()] = layer
    for layer, rows in enumerate(record.rows):
        present[layer, rows.cpu().numpy()] = True
        held[layer] = present[layer] * heads
        if layer in record.held:
            held[layer] = torch.bincount(record.held[layer].flatten(), minlength=count).cpu().numpy()
    unencoded = np.zeros(count, np.bool_) if record.unencoded is None else record.unencoded.numpy()
    return TokenFacts(image_of, is_patch, owner, size, present, left, held, heads, importance, unencoded)


def _importance(record: PassRecord, config: InferenceConfig, count: int) -> tuple[Floats, str]:
    """[T] float32 and what it is: of the first layer that prunes; else the mean share of attention over the layers."""
    if record.importance is not None:
        first = min(record.left)
        return _array(record.importance), f"importance by {type(config.prune).__name__} behind layer {first}"
    if record.scores:
        shares = torch.stack([score / score.nansum().clamp_min(1e-30) for score in record.scores])
        return _array(shares.mean(0)), f"score by {type(config.cache).__name__}, mean over the layers"
    return np.full(count, np.nan, np.float32), ""


def _array(values: Tensor) -> Floats:
    array: Floats = values.float().cpu().numpy()
    return array


def _layer_facts(record: PassRecord, runs: _Runs) -> tuple[LayerFacts, ...]:
    facts = []
    for i, (attention, ffn) in enumerate(record.skipped):
        facts.append(
            LayerFacts(
                rows=runs.own.stats.layer_rows[i],
                full_rows=runs.full.stats.layer_rows[i],
                left=len(record.left.get(i, ())),
                entries=runs.own.stats.layer_entries[i],
                head_entries=runs.own.stats.head_entries[i],
                full_entries=runs.full.stats.layer_entries[i],
                cache_bytes=runs.own.stats.layer_cache_bytes[i],
                full_cache_bytes=runs.full.stats.layer_cache_bytes[i],
                skipped=("queries",) * attention + ("FFN",) * ffn,
            )
        )
    return tuple(facts)


def _texts(tokenizer: Any, ids: list[int], layout: TokenLayout) -> tuple[str, ...]:
    """What each text token adds to the one before; its name in the vocabulary where that is no whole character."""
    texts: list[str] = []
    before: int | None = None
    for token, visual in zip(ids, layout.is_visual.tolist(), strict=True):
        texts.append("" if visual else _added_text(tokenizer, before, token))
        before = None if visual else token
    return tuple(texts)


def _added_text(tokenizer: Any, before: int | None, token: int) -> str:
    head = "" if before is None else tokenizer.decode([before])
    text: str = tokenizer.decode([token] if before is None else [before, token])
    text = text[len(head) :] if text.startswith(head) else tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
