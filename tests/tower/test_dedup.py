"""Pieces of pictures that others stand for: found by pixels, gone from tower and model, and nobody else changed."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import mminfer
from mminfer import V2PE, AIMMerge, ConfigError, Engine, FrameDedup, InferenceConfig, InputError, PatchDedup, Replay
from mminfer.cells import CellGrid, standing_cells
from mminfer.layout import Modality
from mminfer.metrics.flops import measured_flops
from mminfer.metrics.vision import encoded_flops
from mminfer.models.encoding import HostEncoder
from mminfer.models.ragged import patch_owners
from mminfer.models.registry import adapter_for
from mminfer.models.vision import PIXEL_INPUTS, VisionTower
from mminfer.technique import TowerTechnique
from tests.tiny import FAMILIES, IMAGE, VIDEO, tiny_inputs, tiny_model

MIXING = ("out_proj", "o_proj", "attn.proj", "projection_layer", "position_emb", "pos_embed")
CELLS_ARE_TOKENS = [family for family in FAMILIES if not family.startswith(("llava_next", "llava_one"))]
# Where rows of the tower stand as patches do, behind a class token.
IN_ORDER = ["llava", "internvl", "mistral3", "idefics3", "gemma3", "qwen2_vl", "qwen3_vl"]


def half_blank(inputs):
    """The same inputs with half of each lot of pixels of one value."""
    inputs = dict(inputs)
    for name in PIXEL_INPUTS.values():
        if name in inputs:
            x = inputs[name] = inputs[name].clone()
            half = x[len(x) // 4 : 3 * len(x) // 4] if x.dim() == 2 else x[..., x.shape[-1] // 2 :]
            half[half != 0] = 0.5  # tiles of zeros are padding
    return inputs


def prompts(family):
    return [[3, IMAGE, 5, VIDEO if FAMILIES[family].video else IMAGE], [IMAGE, 4]]


@contextmanager
def changed(model, parts, outside=()):
    """The model with some parameters at zero: their names hold one of these parts."""
    some = [p for name, p in model.named_parameters() if any(x in name for x in parts) and not name.startswith(outside)]
    before = [p.detach().clone() for p in some]
    try:
        with torch.no_grad():
            for p in some:
                p.zero_()
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(some, before, strict=True):
                p.copy_(old)


def naive_owner(cells, sizes, threshold):
    """Cell by cell: what stands for the neighbour stands for it, if it is near enough."""
    owner, start = list(range(len(cells))), 0
    for t, h, w in sizes:
        for i in range(start, start + t * h * w):
            place = (i - start) % (h * w)
            beside = [i - 1] * (place % w > 0) + [i - w] * (place >= w)
            near = [n for n in beside if float((cells[i] - cells[n]).abs().max()) <= threshold]
            owner[i] = owner[near[0]] if near else i
        start += t * h * w
    return owner


def test_repeats_of_the_neighbour_left_or_above_are_found():
    sizes = ((1, 4, 5), (2, 3, 3), (1, 1, 1))
    cells = torch.randint(0, 2, (39, 1), generator=torch.Generator().manual_seed(0)).float().expand(39, 20)
    found = PatchDedup().apply(cells, CellGrid(sizes))
    assert found.tolist() == naive_owner(cells, sizes, 0)
    assert 5 < len(set(found.tolist())) < 30
    last = cells.clone()
    last[7, -1] += 1e-3  # beyond the values that are looked at first
    assert PatchDedup().apply(last, CellGrid(sizes))[7] == 7


def test_nothing_is_farther_from_what_stands_for_it_than_the_threshold():
    sizes = ((1, 8, 8),)
    cells = torch.linspace(0, 1, 64)[:, None].expand(64, 20)  # a gradient, on which neighbours are alike
    owner = PatchDedup(0.05).apply(cells, CellGrid(sizes))
    assert float((cells - cells[owner]).abs().max()) <= 0.05
    assert torch.equal(owner[owner], owner) and 10 < len(owner.unique()) < 40


def test_frames_that_do_not_differ_are_found():
    frames = torch.randn(4, 6, 20)
    video = torch.stack([frames[i] for i in (0, 0, 1, 1, 1, 0)]).flatten(0, 1)
    owner = FrameDedup().apply(torch.cat([video, frames[0]]), CellGrid(((6, 2, 3), (1, 2, 3))))
    assert (owner // 6).view(7, 6)[:, 0].tolist() == [0, 0, 2, 2, 2, 5, 6]
    assert torch.equal(owner % 6, torch.arange(42) % 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_repeats_the_tower_gives_the_same_bits(family):
    adapter, inputs = adapter_for(tiny_model(family)), tiny_inputs(family, prompts(family))
    plain, ragged = (HostEncoder(adapter, tower).encode(inputs) for tower in (None, PatchDedup()))
    for kind, units in plain.units.items():
        for unit, own in zip(units, ragged.units[kind], strict=True):
            assert torch.equal(unit.features, own.features) and own.back is None
    assert encoded_flops(adapter, plain) == encoded_flops(adapter, ragged)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_that_of_the_patches_in_its_place(family):
    """In a tower whose patches neither look at each other nor know where they are, repeats are equal anyway."""
    model = tiny_model(family)
    adapter, inputs = adapter_for(model), half_blank(tiny_inputs(family, prompts(family)))
    with changed(model, MIXING, outside=("model.language_model", "model.text_model")):
        plain = HostEncoder(adapter).encode(inputs)
        with measured_flops() as counter:
            ragged = HostEncoder(adapter, PatchDedup()).encode(inputs)
    took = encoded_flops(adapter, ragged).total
    assert took == counter.get_total_flops() < 0.8 * encoded_flops(adapter, plain).total
    for kind, units in plain.units.items():
        for unit, own in zip(units, ragged.units[kind], strict=True):
            torch.testing.assert_close(own.features, unit.features, rtol=1e-5, atol=1e-6)
            if unit.companions is not None:
                torch.testing.assert_close(own.companions, unit.companions, rtol=1e-5, atol=1e-6)
            assert (own.back is not None) == (family in CELLS_ARE_TOKENS)


@pytest.mark.parametrize("family", IN_ORDER)
def test_rows_that_left_are_seen_by_nobody(family, monkeypatch):
    """The tower on all rows, none of which may look at those that left, gives the others what fewer rows give them."""
    model = tiny_model(family)
    adapter, inputs = adapter_for(model), half_blank(tiny_inputs(family, [[3, IMAGE]]))
    (units,) = HostEncoder(adapter, PatchDedup()).encode(inputs).units.values()
    stays = torch.stack([unit.back == 0 for unit in units])  # [tiles, cells]
    assert not bool(stays.all())
    side = 1 if family.startswith("qwen") else adapter.tower.cell_side
    if family.startswith("qwen"):
        rows = stays.repeat_interleave(4, 1)
    else:
        wide = int(stays.shape[1] ** 0.5)
        cells = torch.arange(stays.numel()).where(stays.flatten(), -1).view(-1, wide, wide)
        rows = (patch_owners(cells.clamp_min(0), side) >= 0) & stays.view(-1, wide, wide).repeat_interleave(
            side, 1
        ).repeat_interleave(side, 2).flatten(1)
    attention = torch.nn.functional.scaled_dot_product_attention

    def masked(q, k, v, attn_mask=None, **rest):
        seen = torch.nn.functional.pad(rows, (k.shape[2] - rows.shape[1], 0), value=True)[:, None, None]
        return attention(q, k, v, attn_mask=seen.expand(len(k), 1, q.shape[2], -1), **rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        (wanted,) = HostEncoder(adapter).encode(inputs).units.values()
    (found,) = HostEncoder(adapter, PatchDedup()).encode(inputs).units.values()
    for unit, own, there in zip(wanted, found, stays, strict=True):
        torch.testing.assert_close(own.features[there], unit.features[there], rtol=1e-4, atol=1e-5)


def test_windows_from_which_nothing_left_are_as_before(monkeypatch):
    model = tiny_model("qwen2_5_vl")
    monkeypatch.setattr(model.model.visual, "fullatt_block_indexes", [])
    inputs = tiny_inputs("qwen2_5_vl", [[IMAGE]])
    inputs["pixel_values"][:16] = inputs["pixel_values"][0]  # cells 0 to 3 of 4 x 6, in windows of 2 x 2
    adapter = adapter_for(model)
    (plain,), (ragged,) = (HostEncoder(adapter, t).encode(inputs).units[Modality.IMAGE] for t in (None, PatchDedup()))
    assert ragged.back.tolist() == [0, 1, 2, 3] + [0] * 20
    rest = [4, 5, 10, 11, *range(12, 24)]
    torch.testing.assert_close(ragged.features[rest], plain.features[rest], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ragged.features[6], plain.features[6])  # its window has two cells less
    torch.testing.assert_close(ragged.features[:4], ragged.features[:1].expand(4, -1))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision"])
def test_a_frame_that_repeats_another_is_read_once_and_nothing_changes(family):
    adapter, inputs = adapter_for(tiny_model(family)), tiny_inputs(family, [[3, VIDEO], [VIDEO, 2]])
    pixels = inputs["pixel_values_videos"]
    if family == "llava_onevision":
        pixels[:, 1] = pixels[:, 0]
    else:
        pixels[32:64] = pixels[:32]
    plain, once = (HostEncoder(adapter, tower).encode(inputs) for tower in (None, FrameDedup()))
    for unit, own in zip(plain.units[Modality.VIDEO], once.units[Modality.VIDEO], strict=True):
        torch.testing.assert_close(own.features, unit.features, rtol=1e-4, atol=1e-6)
    assert encoded_flops(adapter, once).ffn < encoded_flops(adapter, plain).ffn


def runner(family, config):
    decoder = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")
    return Engine(tiny_model(family), SimpleNamespace(tokenizer=decoder), config).runner


def answers(family, config, inputs, **settings):
    own = runner(family, config)
    return own.run(inputs, 0.0, own.settings({"max_new_tokens": 3, **settings}))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "llava_onevision"])
def test_tokens_leave_the_model_as_well_and_batches_answer_as_alone(family):
    config, asked = InferenceConfig(tower=PatchDedup()), [[3, IMAGE, 5], [IMAGE, 4]]
    inputs = half_blank(tiny_inputs(family, asked))
    together = answers(family, config, inputs, output_logits=True)
    (units,) = HostEncoder(adapter_for(tiny_model(family)), PatchDedup()).encode(inputs).units.values()
    left = [0 if unit.back is None else int((unit.back > 0).sum()) for unit in units]
    assert [a.stats.prompt_tokens - a.stats.layer_rows[0] for a in together] == left
    assert all(a.stats.vision_flops < 0.9 * a.stats.full_vision_flops for a in together)
    twice = answers(family, config, inputs, num_beams=2, num_return_sequences=2, do_sample=False)
    assert [a.stats.layer_rows[0] for a in twice] == [a.stats.layer_rows[0] for a in together for _ in range(2)]
    second = {k: v[1:] for k, v in inputs.items() if not k.startswith(("pixel", "image"))}
    pad = int((inputs["attention_mask"][1] == 0).sum())
    second = {k: v[:, pad:] for k, v in second.items()}
    pixels = inputs["pixel_values"]
    second |= {k: v[1:] for k, v in inputs.items() if k.startswith("image")}
    second["pixel_values"] = pixels[len(pixels) // 2 :]
    (alone,) = answers(family, config, second, output_logits=True)
    torch.testing.assert_close(alone.logits, together[1].logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "beside",
    [
        {"merge": AIMMerge(0.5)},
        {"positions": V2PE(1 / 4)},
        {"cache": Replay(0.5), "positions": V2PE(1 / 4)},
        {"merge": mminfer.RegionMerge(threshold=None, largest=None, ratio=0.5), "prune": mminfer.AIMPrune()},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::mminfer.errors.UntrainedWarning")
def test_it_goes_with_the_other_stages(beside):
    inputs = half_blank(tiny_inputs("qwen2_5_vl", [[3, IMAGE, 5, VIDEO], [IMAGE, 4]]))
    alone = answers("qwen2_5_vl", InferenceConfig(tower=PatchDedup()), inputs)
    both = answers("qwen2_5_vl", InferenceConfig(tower=PatchDedup(), **beside), inputs)
    for one, other in zip(alone, both, strict=True):
        assert (
            other.stats.layer_rows[0] <= one.stats.layer_rows[0] and other.stats.vision_flops == one.stats.vision_flops
        )
    with_places = InferenceConfig(tower=PatchDedup(), positions=beside.get("positions"))
    places = answers("qwen2_5_vl", with_places, inputs)
    assert [a.stats.prompt_tokens for a in places] == [a.stats.prompt_tokens for a in both]


def test_sizes_add_up_and_places_stay():
    adapter, inputs = (
        adapter_for(tiny_model("qwen2_5_vl")),
        half_blank(tiny_inputs("qwen2_5_vl", prompts("qwen2_5_vl"))),
    )
    _, plain = adapter.embed(inputs)
    _, layout = adapter.embed(inputs, encoded=HostEncoder(adapter, PatchDedup()).encode(inputs))
    assert torch.equal(layout.position, plain.position)
    kept, left = layout.without_copies()
    assert torch.equal(left.position, plain.position[:, kept]) and len(left) < len(plain)
    assert float(left.size.sum()) == float(plain.size.sum()) and torch.equal(left.source, kept)
    assert left.stand_in is None and plain.without_copies()[1] is plain


def test_what_cannot_be_done_is_refused_by_name(monkeypatch):
    model, config = tiny_model("llava"), InferenceConfig(tower=PatchDedup())
    with pytest.raises(ConfigError, match="PatchDedup"):
        mminfer.patch(model, config)
    adapter = adapter_for(model)
    with torch.no_grad():
        output = adapter.base.get_image_features(tiny_inputs("llava", [[IMAGE]])["pixel_values"], return_dict=True)
    with pytest.raises(InputError, match="PatchDedup"):
        HostEncoder(adapter, PatchDedup()).encode({"mm_encoder_outputs": {"image": output}})
    monkeypatch.setattr(VisionTower, "layer_list", "vision_tower.blocks.layers")
    with pytest.raises(ConfigError, match="llava"):
        config.check(adapter_for(model).spec)


def test_a_tower_that_is_never_called_is_told():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[IMAGE]])
    own = model.model.get_image_features
    vars(model.model)["get_image_features"] = lambda *args, **kwargs: own(*args, **kwargs)
    try:
        with pytest.raises(mminfer.UnsupportedModelError, match="vision_tower"):
            HostEncoder(adapter_for(model), PatchDedup()).encode(inputs)
    finally:
        del vars(model.model)["get_image_features"]


def test_a_tower_that_runs_other_rows_is_told():
    """As one may that was compiled or replaced; here somebody's hook adds rows."""
    model, inputs = tiny_model("llava"), half_blank(tiny_inputs("llava", [[IMAGE]]))
    adapter = adapter_for(model)
    doubled = adapter.tower.layers[0].register_forward_hook(lambda module, args, out: torch.cat([out, out], 1))
    try:
        with pytest.raises(mminfer.UnsupportedModelError, match="PatchDedup"):
            HostEncoder(adapter, PatchDedup()).encode(inputs)
    finally:
        doubled.remove()


@pytest.mark.parametrize(
    "owner", [None, torch.zeros(3), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 9])]
)
def test_what_techniques_give_is_checked(owner):
    class _Own(TowerTechnique, register=False):
        def apply(self, cells, grid):
            return owner

    with pytest.raises(ConfigError, match="_Own"):
        standing_cells(_Own(), torch.zeros(3, 4), CellGrid(((1, 1, 2), (1, 1, 1))))
