"""Pictures without a label: contexts, condensed training batches, and what the frames stage starts from."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from mminfer import nano

pytest.importorskip("sklearn")

from mminfer.nano import build, data
from mminfer.positions.v2pe import v2pe_positions as paper_positions
from training.nano import batches, owners

TASKS = ["q1"] * 4 + ["q1_none"] * 2 + ["q2"] * 4 + ["q3"] * 2


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(nano.checkpoint_path())


@pytest.fixture(scope="module")
def encoder(processor):
    return batches.Encoder(processor.tokenizer)


def asked(context):
    return [q.text for q in context.questions if q.task.startswith("q1")]


def shown(frames):
    return {f"Which image shows a {data.COLOUR_NAMES[f.colour]} {f.digit}?" for f in frames}


@pytest.mark.parametrize("seed", range(20))
def test_no_frame_shows_what_is_asked_for(seed):
    context = data.sample_context(random.Random(seed), 8, 3, TASKS, num_frames=200)
    assert len(context.frames) == 200
    assert [type(item) for item in context.pictures].count(data.ImageItem) == 8
    assert not shown(context.frames) & set(asked(context))


def test_decoys_show_what_is_asked_for():
    context = data.sample_context(random.Random(0), 8, 3, TASKS, num_frames=200, decoys=True)
    assert shown(context.frames) >= set(asked(context))


@pytest.mark.parametrize("num_runs", [1, 3, None])
def test_frames_keep_the_other_items_in_order(num_runs):
    plain = data.sample_context(random.Random(1), 8, 3, TASKS)
    mixed = data.sample_context(random.Random(1), 8, 3, TASKS, num_frames=50, num_runs=num_runs)
    assert [i for i in mixed.items if not isinstance(i, data.FrameItem)] == plain.items
    is_frame = [isinstance(item, data.FrameItem) for item in mixed.items]
    runs = sum(now and not before for before, now in zip([False, *is_frame], is_frame, strict=False))
    assert 1 <= runs <= (num_runs or 12)


def test_tokens_are_those_of_the_chat_template(processor, encoder):
    context = data.sample_context(random.Random(2), 3, 2, TASKS, num_frames=9)
    pictures = data.draw_images(context, "test", 0)
    assert len(pictures) == 12
    inputs = processor.apply_chat_template(
        data.to_messages(context, pictures, context.questions[0]),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert inputs["input_ids"][0] == encoder.context(context) + encoder.question(context.questions[0])


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("delta", [1.0, 1 / 4, 1 / 256])
def test_positions_behind_a_condensed_frame_are_those_behind_its_copies(encoder, delta, paper):
    condensed = data.sample_context(random.Random(3), 4, 2, TASKS, num_frames=3)
    condensed.frames[0].copies, condensed.frames[2].copies = 5, 2
    copied = copy.deepcopy(condensed)
    copied.items = [item for item in copied.items for _ in range(getattr(item, "copies", 1))]
    for frame in copied.frames:
        frame.copies = 1
    position, mask = {}, {}
    for name, context in (("condensed", condensed), ("copied", copied)):
        ids = torch.tensor(encoder.conversation(context)[0])
        items, copies = (torch.tensor(x) for x in encoder.copies(context, len(ids)))
        visual, ends = ids == encoder.image, ids == encoder.image_end
        position[name] = batches.condensed_positions(visual, ends, copies, delta, paper)
        frame = torch.tensor([False] + [isinstance(item, data.FrameItem) for item in context.items])
        mask[name] = ~frame[items]
    torch.testing.assert_close(*(position[name][mask[name]] for name in position))
    rule = paper_positions if paper else batches.v2pe_positions
    torch.testing.assert_close(position["copied"], rule(visual[None], delta)[0].float())


def test_a_condensed_frame_weighs_what_its_copies_weigh():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 6, 8, generator=generator, dtype=torch.double)
    query = torch.randn(1, 1, 6, 8, generator=generator, dtype=torch.double)
    copies = torch.tensor([[1, 1, 7, 7, 1, 1]])  # a frame of two tokens stands for seven
    items = torch.tensor([[0, 1, 2, 2, 3, 3]])
    bias = batches.attention_bias(items, copies)
    condensed = F.scaled_dot_product_attention(query, keys[None, None], values[None, None], bias.double())
    repeats = copies[0]
    for row in (4, 5):
        last = row + 1
        k, v = (x[:last].repeat_interleave(repeats[:last], 0)[None, None] for x in (keys, values))
        expected = F.scaled_dot_product_attention(query[:, :, row:last], k, v)
        torch.testing.assert_close(condensed[:, :, row:last], expected)
    # Among its own tokens, and before it, a frame counts once.
    first = (query[:, :, :4], keys[None, None, :4], values[None, None, :4])
    plain = F.scaled_dot_product_attention(*first, is_causal=True)
    torch.testing.assert_close(condensed[:, :, :4], plain)


@pytest.mark.parametrize("seed", range(10))
def test_batches_stay_in_the_window(encoder, seed):
    bank = data.ImageBank(1, "train")
    source = batches.Batches(encoder, bank, random.Random(seed), tokens=2000)
    for batch in (source.next(28), source.next_frames(24)):
        is_visual = batch.input_ids == encoder.image
        assert is_visual.sum() == len(batch.pictures) * build.TOKENS_PER_IMAGE
        assert batch.positions.shape == batch.input_ids.shape
        assert (batch.positions.diff(dim=1) > 0).all()
        assert batch.positions.max() < batches.WINDOW
    assert batch.num_frames > 0
    if batch.bias is not None:
        assert batch.bias.shape == (len(is_visual), 1, is_visual.shape[1], is_visual.shape[1])


def test_some_frames_are_condensed_and_some_are_not():
    totals = []
    for seed in range(40):
        context = data.sample_context(random.Random(seed), 4, 2, TASKS, num_frames=8)
        batches.condense(random.Random(seed), context, 1 / 256)
        totals.append(sum(frame.copies for frame in context.frames))
    assert min(totals) == 8
    assert 1000 < max(totals) <= batches.MAX_FRAMES


@pytest.mark.slow
def test_scores_single_out_the_latest_start_of_a_picture():
    frequency = 1e5 ** -(torch.arange(16) / 16)
    cosines, sines = owners.fit_distances(frequency)
    for delta in (1.0, 1 / 16, 1 / 256):
        extent = 2 + build.TOKENS_PER_IMAGE * delta
        own = torch.linspace(delta, build.TOKENS_PER_IMAGE * delta, 16)[:, None]
        distance = own + torch.arange(0, 100) * extent
        angle = distance[..., None] * frequency
        score = angle.cos() @ cosines + angle.sin() @ sines
        assert (score.softmax(1)[:, 0] > 0.5).float().mean() > 0.5
        assert score[:, 0].min() > math.log(build.WINDOW)


def test_checkpoint_has_the_window_it_was_trained_on():
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(nano.checkpoint_path()).text_config
    assert text.max_position_embeddings == build.WINDOW
    assert text.rope_parameters == build.ROPE


@pytest.mark.slow
def test_questions_are_answered_among_frames(processor):
    from training.nano.evaluate import evaluate, table

    model = AutoModelForImageTextToText.from_pretrained(nano.checkpoint_path(), dtype=torch.float32).eval()
    rows = evaluate(model, processor, num_images=24, deltas=[1.0, 1 / 256], questions=8, labelled=6)
    for row in rows:
        assert row["labelled"] == 6
        for task in ("Q1", "Q2", "Q3"):
            assert row[task] > 0.85, row
    assert table(rows).count("\n") == 4
