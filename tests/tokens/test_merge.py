import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mminfer import AIMMerge, patched
from mminfer.config import InferenceConfig
from mminfer.errors import ConfigError
from mminfer.layout import Modality, TokenLayout
from mminfer.models.registry import adapter_for
from mminfer.tokens import aim_merge, merge_round
from tests.tiny import IMAGE, refusal, tiny_inputs, tiny_model


def one_by_one(x, sizes, r):
    """The rule for one image, source after source, in float64: place -> (token, size)."""
    x, unit = x.double(), torch.nn.functional.normalize(x.double(), dim=-1)
    cosines = unit[::2] @ unit[1::2].mT
    best, match = cosines.max(-1)
    sums = {place: x[place] * sizes[place] for place in range(len(x))}
    counts = dict(enumerate(sizes.tolist()))
    for source in best.argsort(descending=True)[:r].tolist():
        target = 2 * int(match[source]) + 1
        sums[target] = sums[target] + sums.pop(2 * source)
        counts[target] += counts.pop(2 * source)
    return {place: (sums[place] / counts[place], counts[place]) for place in sorted(sums)}


@pytest.mark.parametrize("tokens", [2, 3, 63, 300])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_equals_the_rule_source_by_source(tokens, share):
    x, sizes = torch.randn(2, tokens, 16), torch.randint(1, 5, (2, tokens)).float()
    r = int(tokens // 2 * share)
    place, merged, grown = merge_round(x, sizes, r)
    for image in range(2):
        wanted = one_by_one(x[image], sizes[image], r)
        assert place[image].tolist() == list(wanted)
        torch.testing.assert_close(
            merged[image].double(), torch.stack([token for token, _ in wanted.values()]), rtol=1e-5, atol=1e-6
        )
        assert grown[image].tolist() == [size for _, size in wanted.values()]


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(1, 40), rounds=st.integers(1, 4), seed=st.integers(0, 999), theirs=st.booleans())
def test_sizes_and_the_mean_are_conserved(tokens, rounds, seed, theirs):
    torch.manual_seed(seed)
    x = torch.randn(1, tokens, 6).double()
    merged, sizes = x, torch.ones(1, tokens)
    for _ in range(rounds):
        _, merged, sizes = merge_round(merged, sizes, merged.shape[1] // 2, reference_order=theirs)
    assert sizes.sum() == tokens and (sizes >= 1).all()
    if not theirs:
        torch.testing.assert_close((merged * sizes[..., None]).sum(1), x.sum(1), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(2, 40), r=st.integers(0, 20), seed=st.integers(0, 999))
def test_spatial_order_is_kept(tokens, r, seed):
    torch.manual_seed(seed)
    r = min(r, tokens // 2)
    x = torch.randn(1, tokens, 6)
    place, merged, sizes = merge_round(x, torch.ones(1, tokens), r)
    assert (place.diff() > 0).all() and place.shape[1] == tokens - r
    assert set(range(1, tokens, 2)) <= set(place[0].tolist())  # destinations never leave
    alone = sizes == 1
    assert torch.equal(merged[alone], x[0, place[alone]])  # what nothing merged into is untouched


@pytest.mark.parametrize("shape", [(1, 8), (9, 8), (2, 9, 8), (2, 0, 8)])
def test_merging_none_is_the_identity(shape):
    x = torch.randn(shape)
    tokens, sizes = aim_merge(x, 0)
    assert torch.equal(tokens, x) and torch.equal(sizes, torch.ones(shape[:-1]))


def test_both_orders_hold_the_same_tokens_after_one_round():
    x = torch.randn(63, 16)
    spatial, spatial_sizes = aim_merge(x, 20)
    theirs, their_sizes = aim_merge(x, 20, reference_order=True)
    place, _, _ = merge_round(x[None], torch.ones(1, 63), 20, reference_order=True)
    order = place[0].argsort()
    torch.testing.assert_close(theirs[order], spatial)
    assert torch.equal(their_sizes[order], spatial_sizes)
    assert (place[0, :12] % 2 == 0).all() and (place[0, 12:].diff() == 2).all()


def test_images_of_a_batch_do_not_touch():
    x = torch.randn(3, 64, 16)
    tokens, sizes = aim_merge(x, 30)
    for image in range(3):
        alone = aim_merge(x[image], 30)
        torch.testing.assert_close(tokens[image], alone[0])
        assert torch.equal(sizes[image], alone[1])


def test_dtype_and_non_contiguous_input():
    x = torch.randn(16, 2, 64).permute(1, 2, 0).bfloat16()
    tokens, sizes = aim_merge(x, 32)
    assert tokens.dtype == torch.bfloat16 and sizes.dtype == torch.float32
    assert torch.equal(tokens, aim_merge(x.contiguous(), 32)[0])


def test_wrong_input_is_named():
    with pytest.raises(ConfigError, match="r is 5, wanted 0 to 4"):
        aim_merge(torch.randn(9, 4), 5)
    with pytest.raises(ConfigError, match="r is -1"):
        aim_merge(torch.randn(9, 4), -1)
    with pytest.raises(ValueError, match="wanted \\[T, C\\]"):
        aim_merge(torch.randn(9), 1)
    with pytest.raises(ValueError, match="wanted \\[B, T, C\\]"):
        merge_round(torch.randn(1, 9, 4), torch.ones(9), 1)


def prompt(*images, newline=False):
    """Three tokens of text, then pictures of so many patches with one between them; the newlines are no patches."""
    runs = [(False, 3)] + [run for tokens in images for run in ((True, tokens), (False, 1))]
    visual = torch.cat([torch.full((n,), flag) for flag, n in runs])
    owner = torch.cat([torch.full((n,), i // 2 if flag else -1) for i, (flag, n) in enumerate(runs)])
    size = torch.ones(len(visual))
    if newline:
        size[5] = 0
    rows = torch.arange(len(visual))
    modality = torch.where(visual, Modality.IMAGE, Modality.TEXT).to(torch.int8)
    return TokenLayout(
        torch.zeros_like(rows), modality, owner, size, rows, rows.double()[None], torch.tensor([len(rows)]).double()
    )


def test_the_authors_order_stands_in_the_places_that_stay():
    """Several pictures of two sizes, two rounds each: tokens in the order of the authors' calls, all else as it was."""
    layout = prompt(64, 20, 64)
    x = torch.randn(len(layout), 16)
    before = x.clone()
    out, left = AIMMerge(0.25, reference_order=True).apply(x, layout)
    plain, plain_left = AIMMerge(0.25).apply(x, layout)
    assert torch.equal(x, before) and out.shape == plain.shape
    for image, tokens in enumerate((64, 20, 64)):
        own = x[layout.image_id == image]
        half, _ = aim_merge(own, tokens // 2, reference_order=True)
        quarter, _ = aim_merge(half, tokens // 4, reference_order=True)
        torch.testing.assert_close(out[left.image_id == image], quarter)
        assert float(left.size[left.image_id == image].sum()) == tokens
    assert torch.equal(out[~left.is_visual], x[~layout.is_visual])
    assert (left.source.diff() > 0).all() and torch.equal(left.position[0], left.source.double())
    assert not torch.equal(out[left.is_visual], plain[plain_left.is_visual])
    assert torch.equal(left.next_position, layout.next_position)


def test_whoever_became_part_of_a_token_is_named_by_the_place_where_it_stands():
    """What inspections draw by: the patches of each place are those whose mean stands there."""
    layout, owners = prompt(32), []
    x = torch.randn(len(layout), 8).double()

    class Watched(TokenLayout):
        def merge(self, index, size, owner):
            owners.append(owner)
            return super().merge(index, size, owner)

    out, left = AIMMerge(0.5, reference_order=True).apply(x, Watched(**vars(layout)))
    for token, place, size in zip(out, left.source.tolist(), left.size.tolist(), strict=True):
        own = (owners[0] == place).nonzero()[:, 0]
        assert len(own) == size
        torch.testing.assert_close(token, x[own].mean(0))  # one round: the plain mean is that by size


def test_the_host_reads_the_authors_order_alike():
    """A pass over a prompt so merged is the host's over these rows at these positions."""
    model, inputs = tiny_model("internvl"), tiny_inputs("internvl", [[3, IMAGE, 2, IMAGE, 4]])
    merge = AIMMerge(0.5, reference_order=True)
    embeds, layout = adapter_for(model).embed(inputs)
    out, left = merge.apply(embeds, layout)
    host = model(inputs_embeds=out[None], position_ids=left.position.long()).logits[:, -1]
    with patched(model, InferenceConfig(merge=merge)):
        ours = model(**inputs).logits[:, -1]
    torch.testing.assert_close(ours, host, rtol=0, atol=1e-4)


def test_the_authors_order_is_refused_where_it_has_no_place():
    assert "3 axes" in refusal("qwen2_vl", InferenceConfig(merge=AIMMerge(0.5, reference_order=True)))
    with pytest.raises(ConfigError, match="rows among their patches"):
        AIMMerge(0.5, reference_order=True).apply(torch.randn(14, 4), prompt(10, newline=True))
    with pytest.raises(ConfigError, match="never merge across frames"):
        AIMMerge(0.5, across_frames=True, reference_order=True)
    with pytest.raises(ConfigError, match="reference_order='yes', wanted True or False"):
        AIMMerge(0.5, reference_order="yes")


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.5, 0.75, 1.0])
def test_the_cost_is_every_rounds_cosines(ratio):
    """Counted on the rounds themselves: sources times destinations, a multiplication and an addition each channel."""
    spec = adapter_for(tiny_model("llava")).spec
    for lengths in ([1], [2], [3], [7], [64], [9, 64, 1]):
        wanted = 0
        for tokens in lengths:
            x, sizes = torch.randn(1, tokens, 4), torch.ones(1, tokens)
            target = max(1, round(tokens * ratio))
            while x.shape[1] > target:
                wanted += 2 * spec.hidden_size * x[:, ::2].shape[1] * x[:, 1::2].shape[1]
                _, x, sizes = merge_round(x, sizes, min(x.shape[1] // 2, x.shape[1] - target))
        assert AIMMerge(ratio).cost(spec, lengths) == wanted
