"""Adapters read a host model as it is: its embeddings, its positions, its next position, its rotary table."""

import functools
import math

import pytest
import torch

from mminfer import V2PE, InputError
from mminfer.layout import Modality
from mminfer.models.registry import adapter_for
from tests.tiny import FAMILIES, IMAGE, IMAGE_ID, VIDEO, VIDEO_ID, tiny_inputs, tiny_model, tiny_rows

WITH_VIDEO = [family for family in FAMILIES if FAMILIES[family].video_tokens]
# Images in front, at the end, alone, behind each other; text alone; one token; videos before, behind, alone.
PROMPTS = [[3, IMAGE, 5, IMAGE, 4], [IMAGE, 2], [2, IMAGE], [IMAGE], [7], [1], [2, IMAGE, IMAGE, 1]]
VIDEO_PROMPTS = [[2, VIDEO, 3, IMAGE, 4], [IMAGE, VIDEO, 1], [VIDEO], [VIDEO, VIDEO, 2]]


def embed(family, prompts):
    """The model, its inputs, and what the adapter makes of them."""
    model, inputs = tiny_model(family), tiny_inputs(family, prompts)
    with torch.no_grad():
        return model, inputs, *adapter_for(model).embed(inputs)


@functools.cache
def embed_batch(family):
    return embed(family, PROMPTS + (VIDEO_PROMPTS if family in WITH_VIDEO else []))


def host_calls(model, inputs, steps):
    """What the host hands its language model at the prompt and at each step of decoding."""
    calls = []

    def look(module, args, kwargs):
        calls.append(kwargs)

    hook = adapter_for(model).language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    finally:
        hook.remove()
    return calls


def axes_of(position_ids, adapter):
    """[A, B, N]; the host puts plain text positions in front of three axes."""
    return position_ids[None] if adapter.position_axes == 1 else position_ids[-3:]


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_positions_are_the_hosts(family):
    model, inputs, embeds, layout = embed_batch(family)
    adapter = adapter_for(model)
    prompt, *steps = host_calls(model, inputs, 3)
    mask = inputs["attention_mask"].bool()
    assert torch.equal(embeds, prompt["inputs_embeds"][mask])
    assert layout.position.dtype == torch.float64 and layout.position.shape[0] == adapter.position_axes
    assert torch.equal(layout.position, axes_of(prompt["position_ids"], adapter)[:, mask].double())
    for n, step in enumerate(steps):
        wanted = axes_of(step["position_ids"], adapter)[..., -1].double()
        assert torch.equal(wanted, (layout.next_position + n).expand_as(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_tells_the_prompt(family):
    _, inputs, embeds, layout = embed_batch(family)
    mask = inputs["attention_mask"].bool()
    ids = inputs["input_ids"][mask]
    assert len(layout) == len(embeds) == len(ids) and layout.source.tolist() == list(range(len(ids)))
    assert list(layout.lengths) == mask.sum(1).tolist()
    assert torch.equal(layout.modality == Modality.IMAGE, ids == IMAGE_ID)
    assert torch.equal(layout.modality == Modality.VIDEO, ids == VIDEO_ID)
    assert torch.equal(layout.image_id >= 0, layout.is_visual)
    assert (layout.size[layout.text_rows] == 1).all()
    # every image and frame is one run of rows within one sequence and one modality, and has an id of its own
    runs = layout.image_id[layout.is_visual].unique_consecutive()
    assert len(runs) == len(runs.unique())
    assert sorted(runs.tolist()) == list(range(len(runs)))
    for image in runs.tolist():
        own = layout.image_id == image
        assert len(layout.sequence[own].unique()) == len(layout.modality[own].unique()) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_prompts_one_after_another(family):
    prompts = [[3, IMAGE, 5], [6], [IMAGE, 2]]
    _, _, embeds, layout = embed(family, prompts)
    adapter = adapter_for(tiny_model(family))
    for row, one in enumerate(tiny_rows(family, prompts)):
        first, stop = layout.spans[row]
        with torch.no_grad():
            single, single_layout = adapter.embed(one)
        torch.testing.assert_close(embeds[first:stop], single, rtol=0, atol=1e-5)
        assert torch.equal(layout.position[:, first:stop], single_layout.position)
        assert layout.next_position[row] == single_layout.next_position[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_a_model_leaves_it_as_it_was(family):
    model = tiny_model(family)
    inputs = embed_batch(family)[1]
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    copies = {name: value.clone() for name, value in inputs.items()}
    with torch.no_grad():
        adapter_for(model).embed(inputs)
    assert inputs.keys() == copies.keys()
    assert all(torch.equal(inputs[name], copies[name]) for name in copies)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
    assert getattr(model.base_model, "rope_deltas", None) is before["model"].get("rope_deltas")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spec_is_the_text_models_geometry(family):
    spec = adapter_for(tiny_model(family)).spec
    assert (spec.family, spec.num_layers, spec.hidden_size) == (family, 4, 64)
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (4, 2, 16)
    assert (spec.intermediate_size, spec.vocab_size) == (128, 500)
    assert spec.position_axes == (3 if family.startswith("qwen") else 1)


def test_qwens_positions_are_its_rope_index():
    model, inputs, _, layout = embed_batch("qwen2_5_vl")
    mask = inputs["attention_mask"]
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    wanted, deltas = model.base_model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], attention_mask=mask, **grids
    )
    assert torch.equal(layout.position, wanted[:, mask.bool()].double())
    assert torch.equal(layout.next_position, (deltas[:, 0] + mask.sum(1)).double())
    bare = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    assert torch.equal(embed_batch("qwen2_5_vl")[3].position, adapter_for(model).embed(bare)[1].position)


def test_qwens_frames_have_an_id_each():
    """Two frames of 2 x 4 tokens; an image is one, whatever its sides."""
    _, _, _, layout = embed("qwen2_5_vl", [[1, VIDEO, VIDEO, IMAGE, 2]])
    ids, counts = layout.image_id[layout.is_visual].unique_consecutive(return_counts=True)
    assert ids.tolist() == [0, 1, 2, 3, 4] and counts.tolist() == [8, 8, 8, 8, 24]
    assert (layout.size == 1).all()


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 8), (8, 2), (4, 4)])
def test_qwens_frames_of_any_shape_have_an_id_each(height, width):
    """Down to one token a frame, one row and one column."""
    frames, per_frame = 3, height * width // 4
    inputs = {
        "input_ids": torch.tensor([[5, *[VIDEO_ID] * (frames * per_frame), 6]]),
        "pixel_values_videos": torch.randn(frames * height * width, 96),
        "video_grid_thw": torch.tensor([[frames, height, width]]),
    }
    with torch.no_grad():
        _, layout = adapter_for(tiny_model("qwen2_5_vl")).embed(inputs)
    wanted = torch.arange(frames).repeat_interleave(per_frame).tolist()
    assert layout.image_id[layout.is_visual].tolist() == wanted


def test_onevisions_newlines_stand_for_no_patch():
    """A base image of 16, then 4 rows of 8 patches, each with a newline behind it."""
    model, _, embeds, layout = embed("llava_onevision", [[1, IMAGE, 2]])
    newline = (embeds == model.base_model.image_newline).all(1)
    assert newline.sum() == 4
    assert torch.equal(layout.size == 0, newline)
    places = (newline.nonzero()[:, 0] - 1).tolist()
    assert places == [16 + 9 * row + 8 for row in range(4)]
    assert layout.image_lengths == (48,) and (layout.image_id[layout.is_visual] == 0).all()


def test_onevisions_frames_have_an_id_each():
    """Two frames of 2 x 2 tokens; the newline behind the last belongs to it."""
    _, _, _, layout = embed("llava_onevision", [[1, VIDEO, 2, IMAGE, 1]])
    video = layout.modality == Modality.VIDEO
    first = int(layout.image_id[video].min())
    assert (layout.image_id[video] - first).tolist() == [0] * 4 + [1] * 5
    assert layout.size[video].tolist() == [1.0] * 8 + [0.0]
    assert sorted(layout.image_lengths) == [4, 4, 48]


def without(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_must_match_features(family):
    model, inputs = tiny_model(family), tiny_inputs(family, [[3, IMAGE, 4]])
    adapter, ids = adapter_for(model), inputs["input_ids"]
    fewer = ids.clone()
    fewer[0, (ids[0] == IMAGE_ID).nonzero()[0]] = 7
    more = ids.clone()
    more[0, 0] = IMAGE_ID
    per_image = FAMILIES[family].image_tokens
    for wrong, count in ((fewer, per_image - 1), (more, per_image + 1)):
        given = {**without(inputs, "mm_token_type_ids"), "input_ids": wrong}
        with pytest.raises(InputError, match=f"{count} image placeholder tokens.*{per_image} features"):
            adapter.embed(given)
    with pytest.raises(InputError, match=f"{per_image} image placeholder tokens.* 0 features"):
        adapter.embed(without(inputs, "pixel_values"))
    with pytest.raises(InputError, match="0 image placeholder tokens"):
        adapter.embed({**inputs, "input_ids": torch.full_like(ids, 7)})
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(InputError, match="no token ids to place them: pass input_ids"):
        adapter.embed({**without(inputs, "input_ids", "mm_token_type_ids"), "inputs_embeds": embeds})


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_video_placeholders_must_match_features(family):
    inputs = tiny_inputs(family, [[3, VIDEO, 4]])
    with pytest.raises(InputError, match=r"video placeholder tokens.* 0 features"):
        adapter_for(tiny_model(family)).embed(without(inputs, "pixel_values_videos"))


@pytest.mark.parametrize("family", FAMILIES)
def test_malformed_batches_are_refused(family):
    inputs = tiny_inputs(family, [[3, IMAGE, 4], [5]])
    adapter, mask = adapter_for(tiny_model(family)), inputs["attention_mask"]
    rows, tokens = mask.shape
    four_dimensional = torch.zeros(rows, 1, tokens, tokens)
    with pytest.raises(InputError, match=rf"shape \({rows}, 1, {tokens}, {tokens}\): only a 2D"):
        adapter.embed({**inputs, "attention_mask": four_dimensional})
    with pytest.raises(InputError, match="dict: only a 2D"):
        adapter.embed({**inputs, "attention_mask": {"full_attention": mask}})
    empty_row = mask.clone()
    empty_row[1] = 0
    with pytest.raises(InputError, match="all zero"):
        adapter.embed({**inputs, "attention_mask": empty_row})
    with pytest.raises(InputError, match="prompt is empty"):
        adapter.embed({"input_ids": torch.empty(1, 0, dtype=torch.int64)})
    with pytest.raises(InputError, match="prompt is empty"):
        adapter.embed({"attention_mask": mask})


@pytest.mark.parametrize("cut", [(slice(None), slice(2, None)), (slice(0, 1), slice(None))])
def test_a_mask_of_another_shape_is_refused(cut):
    inputs = tiny_inputs("llava", [[3, IMAGE, 4], [5]])
    with pytest.raises(InputError, match="attention_mask"):
        adapter_for(tiny_model("llava")).embed({**inputs, "attention_mask": inputs["attention_mask"][cut]})


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_given_are_taken_as_text(family):
    given = torch.randn(2, 6, 64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    embeds, layout = adapter_for(tiny_model(family)).embed({"inputs_embeds": given, "attention_mask": mask})
    assert torch.equal(embeds, given[mask.bool()])
    assert layout.visual_lengths == (0, 0) and layout.next_position.tolist() == [4, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_precise_rotary_table_is_the_hosts_at_integers(family):
    model, _, embeds, layout = embed_batch(family)
    adapter = adapter_for(model)
    hidden = embeds[None]
    steps = layout.next_position[:, None].expand(adapter.position_axes, -1, 1)  # as decoding asks, [A, B, 1]
    for position in (layout.position[:, None], steps):
        precise, host = (adapter.rotary(hidden, position, flag) for flag in (True, False))
        assert precise.keys() == host.keys()
        for kind in host:
            for table, wanted in zip(precise[kind], host[kind], strict=True):
                assert table.dtype == wanted.dtype
                torch.testing.assert_close(table, wanted, rtol=0, atol=1e-5)


def walk(ids, delta, grids, interval):
    """V2PE over three axes, token by token: the rule of Qwen2.5-VL with visual offsets scaled by delta."""
    positions, place, current, grids = [], 0, 0, dict(grids)
    while place < len(ids):
        if ids[place] not in grids:
            positions.append([current] * 3)
            current, place = current + 1, place + 1
            continue
        frames, height, width = grids[ids[place]]
        step = interval if ids[place] == VIDEO_ID else 1
        for t in range(frames):
            for h in range(height):
                positions += [[current + delta * x for x in (t * step, h, w)] for w in range(width)]
        place += frames * height * width
        current += math.ceil(delta * (max(height, width) - 1)) + 1
    return positions


@pytest.mark.parametrize("delta", [1, 1 / 2, 1 / 4, 1 / 16, 1 / 256])
def test_v2pe_scales_qwens_images_and_text_goes_on_at_the_next_integer(delta):
    model, inputs, _, layout = embed_batch("qwen2_5_vl")
    moved = V2PE(delta).apply(layout, 1 << 20)
    if delta == 1:
        assert moved is layout
    interval = model.config.vision_config.tokens_per_second
    grids = {IMAGE_ID: (1, 4, 6), VIDEO_ID: (2, 2, 4)}
    mask = inputs["attention_mask"].bool()
    for row, (start, stop) in enumerate(moved.spans):
        ids = inputs["input_ids"][row, mask[row]].tolist()
        wanted = torch.tensor(walk(ids, delta, grids, interval), dtype=torch.float64).T
        assert torch.equal(moved.position[:, start:stop], wanted)
        assert moved.next_position[row] == torch.ceil(wanted.max()) + 1
    text = moved.position[:, moved.text_rows]
    assert torch.equal(text, text.round()) and torch.equal(text[0], text[1]) and torch.equal(text[0], text[2])


@pytest.mark.parametrize("family", ["internvl", "llava", "llava_onevision"])
@pytest.mark.parametrize("delta", [1, 1 / 4, 1 / 256])
def test_v2pe_moves_every_sequence_by_its_own_images(family, delta):
    _, _, _, layout = embed_batch(family)
    moved = V2PE(delta).apply(layout, 1 << 20)
    for row, (start, stop) in enumerate(layout.spans):
        position, wanted = 0.0, []
        visual = layout.is_visual[start:stop].tolist()
        for i, seen in enumerate(visual):
            if i:
                position = position + delta if seen else math.ceil(position) + 1
            wanted.append(position)
        assert moved.position[0, start:stop].tolist() == wanted
        assert moved.next_position[row] == math.ceil(wanted[-1]) + 1
