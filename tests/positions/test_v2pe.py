import copy
import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mminfer import Engine, InferenceConfig, patch
from mminfer.errors import ConfigError, UntrainedWarning
from mminfer.layout import TokenLayout
from mminfer.models.registry import adapter_for
from mminfer.positions import V2PE, v2pe_mrope_positions, v2pe_positions
from tests.tiny import tiny_model

DELTAS = st.sampled_from([1 / 2**n for n in range(9)])
masks = st.lists(st.booleans(), min_size=1, max_size=60)


def one_by_one(visual, delta):
    """The rule read token by token; a leading visual run starts at 0."""
    positions, last = [], -1.0
    for is_visual in visual:
        if not is_visual:
            last = math.ceil(last) + 1
        elif positions:
            last += delta
        else:
            last = 0.0
        positions.append(float(last))
    return positions


@settings(deadline=None, max_examples=150)
@given(mask=masks, delta=DELTAS)
def test_equals_the_rule_token_by_token(mask, delta):
    found = v2pe_positions(torch.tensor([mask]), delta)
    assert found.dtype == torch.float64 and found[0].tolist() == one_by_one(mask, delta)


@settings(deadline=None, max_examples=50)
@given(mask=masks)
def test_delta_one_is_the_identity(mask):
    assert torch.equal(v2pe_positions(torch.tensor([mask]), 1)[0], torch.arange(len(mask)).double())


@settings(deadline=None, max_examples=80)
@given(mask=masks, delta=DELTAS, pad=st.integers(0, 9), left=st.booleans(), visual_padding=st.booleans())
def test_padding_changes_nothing(mask, delta, pad, left, visual_padding):
    padding = [visual_padding] * pad
    padded = padding + mask if left else mask + padding
    valid = [0] * pad + [1] * len(mask) if left else [1] * len(mask) + [0] * pad
    found = v2pe_positions(torch.tensor([padded]), delta, torch.tensor([valid]))[0]
    valid = torch.tensor(valid).bool()
    assert found[valid].tolist() == one_by_one(mask, delta)
    assert not found[~valid].any()


def test_rows_of_a_batch_do_not_touch():
    masks = torch.rand(4, 63) < 0.6
    together = v2pe_positions(masks, 1 / 16)
    for row, mask in zip(together, masks, strict=True):
        assert torch.equal(row, v2pe_positions(mask[None], 1 / 16)[0])


def test_steps_that_are_no_powers_of_two_cost_text_nothing():
    """70 * 0.1 is 7.000000000000001, and text still goes on at 8 + 1."""
    mask = torch.tensor([[False, False] + [True] * 70 + [False]])
    assert v2pe_positions(mask, 0.1)[0, -1] == 9


def test_a_million_tokens_stay_exact():
    mask = torch.ones(1, 2**20, dtype=torch.bool)
    mask[:, 0] = False
    found = v2pe_positions(mask, 1 / 256)[0]
    assert torch.equal(found * 256, torch.arange(2**20).double())


@pytest.mark.parametrize("delta", [0, -0.5, 1.5, math.nan])
def test_delta_out_of_range(delta):
    with pytest.raises(ConfigError, match="delta"):
        v2pe_positions(torch.zeros(1, 3, dtype=torch.bool), delta)
    with pytest.raises(ConfigError, match="delta"):
        v2pe_mrope_positions(torch.zeros(3, 1), torch.zeros(1).bool(), torch.zeros(1).long(), delta)


def test_wrong_shapes_are_named():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="wanted \\[B, N\\]"):
        v2pe_positions(mask, 0.5, torch.ones(2, 4))
    with pytest.raises(ValueError, match="is \\[5\\], attention_mask None, wanted \\[B, N\\]"):
        v2pe_positions(mask[0], 0.5)
    with pytest.raises(ValueError, match="wanted \\[A, N\\]"):
        v2pe_mrope_positions(torch.zeros(5), mask[0], mask[0].long(), 0.5)
    with pytest.raises(ValueError, match="wanted \\[A, N\\]"):
        v2pe_mrope_positions(torch.zeros(3, 5), mask, mask.long(), 0.5)


def prompt(*parts):
    """Types (0 text, 1 image, 2 video), ids and grids of a prompt: an int is text, a triple a grid."""
    types, ids, images, videos, count = [], [], [], [], 0
    for part in parts:
        if isinstance(part, int):
            types += [0] * part
            ids += [-1] * part
            continue
        frames, height, width = part
        (videos if frames > 1 else images).append([frames, 2 * height, 2 * width])
        types += [2 if frames > 1 else 1] * (frames * height * width)
        ids += [count] * (frames * height * width)
        count += 1
    return torch.tensor(types), torch.tensor(ids), images, videos


@pytest.fixture(scope="module")
def host_positions():
    """The host model's own M-RoPE positions of a prompt, [3, N]."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1}
    vision = {"depth": 0, "hidden_size": 8, "out_hidden_size": 8, "num_heads": 1, "tokens_per_second": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 8}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    host = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).model

    def positions(*parts):
        types, _, images, videos = prompt(*parts)
        grids = {"image_grid_thw": images, "video_grid_thw": videos}
        grids = {name: torch.tensor(grid) if grid else None for name, grid in grids.items()}
        return host.get_rope_index(torch.zeros_like(types)[None], types[None], **grids)[0][:, 0].double()

    return positions


PROMPTS = [
    (5, (1, 4, 6), 3),
    ((1, 3, 3), 2),
    (2, (1, 2, 8), 1, (1, 5, 1), 4, (1, 3, 3)),
    (3, (6, 2, 2), 2, (1, 4, 4), 2),
    (7,),
]


@pytest.mark.parametrize("parts", PROMPTS)
def test_mrope_delta_one_is_the_host(parts, host_positions):
    host, (types, ids, *_) = host_positions(*parts), prompt(*parts)
    assert torch.equal(v2pe_mrope_positions(host, types > 0, ids, 1), host)


@pytest.mark.parametrize("delta", [1 / 2, 1 / 16, 1 / 256])
@pytest.mark.parametrize("parts", PROMPTS)
def test_mrope_scales_images_and_closes_up(parts, delta, host_positions):
    host, (types, ids, *_) = host_positions(*parts), prompt(*parts)
    found = v2pe_mrope_positions(host, types > 0, ids, delta)
    at, place = 0, 0
    for part in parts:
        count = part if isinstance(part, int) else math.prod(part)
        mine, theirs = found[:, place : place + count], host[:, place : place + count]
        if isinstance(part, int):
            assert torch.equal(mine, (at + torch.arange(count).double()).expand(3, -1))
            at += part
        else:
            torch.testing.assert_close(mine, at + delta * (theirs - theirs.min()), rtol=0, atol=0)
            at += math.ceil(delta * (max(part[1:]) - 1)) + 1
        place += count


def test_frames_with_ids_of_their_own_stay_together(host_positions):
    parts = (3, (6, 2, 2), 2)
    host, (types, ids, *_) = host_positions(*parts), prompt(*parts)
    frames = torch.where(types > 0, (torch.arange(len(ids)) - 3) // 4, -1)
    whole = v2pe_mrope_positions(host, types > 0, ids, 1 / 16)
    assert torch.equal(v2pe_mrope_positions(host, types > 0, frames, 1 / 16), whole)
    assert torch.equal(v2pe_mrope_positions(host, types > 0, frames, 1), host)


def test_mrope_of_nothing():
    empty = torch.zeros(0)
    assert v2pe_mrope_positions(torch.zeros(3, 0), empty.bool(), empty.long(), 0.5).shape == (3, 0)


@pytest.mark.parametrize(
    ("window", "delta"), [(10_000, 1), (100, 1 / 2), (60, 1 / 4), (20, 1 / 32), (14, 1 / 256), (3, 1 / 256)]
)
def test_auto_takes_the_largest_delta_that_fits(window, delta):
    """Two sequences: the first has 150 visual tokens among 13 of text, the second text alone."""
    visual = torch.tensor([False] * 6 + [True] * 150 + [False] * 7 + [False] * 9)
    sequence = torch.tensor([0] * 163 + [1] * 9)
    position = torch.cat([torch.arange(163), torch.arange(9)]).double()[None]
    size = torch.ones(172)
    layout = TokenLayout(
        sequence,
        visual.to(torch.int8),
        visual.long() - 1,
        size,
        torch.arange(172),
        position,
        torch.tensor([163.0, 9.0]),
    )
    auto = V2PE("auto", window=window).apply(layout, 1 << 20)
    fixed = V2PE(delta).apply(layout, 1 << 20)
    assert torch.equal(auto.position[:, :163], fixed.position[:, :163])
    assert torch.equal(auto.position[:, 163:], layout.position[:, 163:])
    assert V2PE("auto").apply(layout, window).next_position.equal(auto.next_position)


def layout_of(visual):
    """One sequence at plain positions."""
    rows = torch.arange(len(visual))
    kind = torch.tensor(visual).to(torch.int8)
    return TokenLayout(
        rows * 0, kind, kind.long() - 1, torch.ones(len(visual)), rows, rows.double()[None],
        torch.tensor([len(visual)]).double(),
    )  # fmt: skip


@pytest.mark.parametrize("delta", [1 / 4, 1 / 16, "auto"])
def test_a_prompt_gets_the_rules_positions(delta):
    """Two sequences in one layout, each from 0 by the rule; generated tokens go on one behind the last."""
    masks = ([False, False, True, True, True, False, True], [True, True, False, True, False])
    parts = [layout_of(mask) for mask in masks]
    layout = dataclasses.replace(
        parts[0],
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in ("modality", "image_id", "size")},
        **{name: torch.cat([getattr(part, name) for part in parts], -1) for name in ("position", "next_position")},
        sequence=torch.tensor([0] * 7 + [1] * 5),
        source=torch.arange(12),
    )
    found = V2PE(delta, window=6).apply(layout, 4)
    steps = (1 / 2, 1) if delta == "auto" else (delta, delta)
    wanted = [one_by_one(mask, step) for mask, step in zip(masks, steps, strict=True)]
    torch.testing.assert_close(found.position, torch.tensor([[*wanted[0], *wanted[1]]]).double(), rtol=0, atol=0)
    assert found.next_position.tolist() == [math.ceil(max(own)) + 1 for own in wanted]
    assert V2PE(1).apply(layout, 4) is layout


def test_a_prompt_on_three_axes_gets_the_rules_positions(host_positions):
    parts = (2, (1, 2, 8), 1, (1, 5, 1), 4)
    host, (types, ids, *_) = host_positions(*parts), prompt(*parts)
    layout = dataclasses.replace(
        layout_of((types > 0).tolist()), position=host, image_id=ids, next_position=host.amax()[None] + 1
    )
    found = V2PE(1 / 4).apply(layout, 1 << 20)
    assert torch.equal(found.position, v2pe_mrope_positions(host, types > 0, ids, 1 / 4))
    assert found.next_position.tolist() == [float(found.position[0, -1]) + 1]


def test_auto_alone_needs_the_whole_prompt():
    assert 'V2PE.delta="auto"' in V2PE("auto").needs_whole_prompt
    assert V2PE(1 / 16).needs_whole_prompt is None


def rest_of(layout, start, before):
    """The rows from `start` on as a pass of their own, behind one that ended as `before` says."""
    rest = layout.select(torch.arange(start, len(layout)))
    moved = before.resume_position - rest.position[0, 0]
    return dataclasses.replace(
        rest, position=rest.position + moved, next_position=rest.next_position + moved, run_before=before.last_in_run
    )


@settings(deadline=None, max_examples=150)
@given(
    visual=st.lists(st.booleans(), min_size=2, max_size=40),
    share=st.floats(0, 1),
    delta=st.one_of(DELTAS, st.just(0.3)),
)
def test_stretches_stand_where_the_whole_prompt_does(visual, share, delta):
    """Cut anywhere, also within a run of visual tokens or behind a leading one."""
    start = 1 + int(share * (len(visual) - 2))
    layout, technique = layout_of(visual), V2PE(delta)
    whole = technique.apply(layout, 1 << 20)
    head = layout.select(torch.arange(start))
    first = technique.apply(dataclasses.replace(head, next_position=torch.tensor([start]).double()), 1 << 20)
    second = technique.apply(rest_of(layout, start, first), 1 << 20)
    torch.testing.assert_close(torch.cat([first.position, second.position], 1), whole.position, rtol=0, atol=1e-9)
    torch.testing.assert_close(second.next_position, whole.next_position, rtol=0, atol=1e-9)


@pytest.mark.parametrize("delta", [0.3, 1 / 3, 1 / 256])
def test_long_runs_keep_their_digits(delta):
    """A run of 300,000 visual tokens, on one axis and on three, to 1e-9 of the exact products."""
    count = 300_000
    visual = torch.tensor([False] + [True] * count)
    exact = torch.arange(1, count + 1, dtype=torch.float64) * delta
    torch.testing.assert_close(v2pe_positions(visual[None], delta)[0, 1:], exact, rtol=0, atol=1e-9)
    leading = v2pe_positions(visual[None, 1:], delta)[0]
    torch.testing.assert_close(leading, exact - delta, rtol=0, atol=1e-9)
    axes = torch.arange(count + 1).double().expand(3, -1)
    found = v2pe_mrope_positions(axes, visual, visual.long() - 1, delta)
    torch.testing.assert_close(found[:, 1:], (1 + exact - delta).expand(3, -1), rtol=0, atol=1e-9)


def untrained(caught):
    return [str(w.message) for w in caught if issubclass(w.category, UntrainedWarning)]


@pytest.mark.parametrize(("delta", "warned"), [(1, 0), (1 / 4, 1), ("auto", 1)])
def test_a_step_below_one_on_a_model_not_known_to_be_trained_so_warns_once(delta, warned):
    model = copy.deepcopy(tiny_model("llava"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = patch(model, InferenceConfig(positions=V2PE(delta)))
        for _ in range(2):
            model(input_ids=torch.full((1, 5), 20))
        handle.undo()
    assert len(untrained(caught)) == warned
    assert all(f"V2PE(delta={delta!r})" in told and "rope_pos_id_version" in told for told in untrained(caught))


@pytest.mark.parametrize("part", ["root", "language model"])
def test_a_configuration_that_says_so_is_believed(part):
    model = copy.deepcopy(tiny_model("internvl"))
    config = model.config if part == "root" else model.config.get_text_config()
    for version, trained in (("default", False), (7, False), ("v2pe_fix", True), ("v2pe_rnd", True)):
        config.rope_pos_id_version = version
        spec = adapter_for(model).spec
        assert spec.variable_positions is trained
        assert (V2PE(1 / 16).doubt(spec) is None) is trained


def test_the_bundled_model_was_trained_so():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = Engine.from_pretrained("nano", InferenceConfig(positions=V2PE(1 / 16)))
    assert not untrained(caught) and engine.adapter.spec.variable_positions
