"""What entries write: each value by itself through the host's own output projection, however that is made."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mminfer import InferenceConfig, OperatorSkip, Replay, patched
from mminfer.forward.written import OutputWeights, output_weights, sampled
from tests.forward.test_replay import Noted
from tests.tiny import IMAGE, tiny_inputs, tiny_model

HEADS, GROUPS, SIZE, CHANNELS = 6, 2, 8, 40


class Wrapped(nn.Module):
    """A projection whose weights cannot be read."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        batch, rows, _ = x.shape  # as layers ask
        return self.inner(x).view(batch, rows, -1)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def one_by_one(project, values):
    """[G, n]: the largest norm over the heads of a group of a value that stands alone in the head's place."""
    bias = project(values.new_zeros(HEADS * SIZE))
    norms = torch.zeros(values.shape[:2])
    for group, entry, head in torch.cartesian_prod(
        torch.arange(GROUPS), torch.arange(values.shape[1]), torch.arange(3)
    ).tolist():
        alone = values.new_zeros(HEADS, SIZE)
        alone[group * 3 + head] = values[group, entry]
        written = (project(alone.flatten()) - bias).norm()
        norms[group, entry] = max(norms[group, entry], written)
    return norms


@pytest.mark.parametrize("kind", ["plain", "bias", "wrapped", "parametrized", "hooked", "steered", "replaced"])
@torch.no_grad()
def test_a_value_by_itself_through_the_projection(kind):
    torch.manual_seed(0)
    project = nn.Linear(HEADS * SIZE, CHANNELS, bias=kind != "plain")
    if kind == "parametrized":
        parametrize.register_parametrization(project, "weight", Doubled())
    if kind == "steered":
        project.register_forward_hook(lambda module, args, out: out * torch.arange(CHANNELS))
    if kind == "replaced":
        project.forward = lambda x: nn.functional.linear(x, project.weight.flip(0) * 3 + project.weight)
    values = torch.randn(GROUPS, 5, SIZE)
    wanted = one_by_one(project, values)
    asked = Wrapped(project) if kind == "wrapped" else project
    if kind == "hooked":  # as where weights lie elsewhere until they are called for
        weight = project.weight.data
        project.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
        project.register_forward_pre_hook(lambda module, _: setattr(module, "weight", nn.Parameter(weight)))
    torch.testing.assert_close(OutputWeights(asked, HEADS, values).norms(values), wanted)


@torch.no_grad()
def test_units_are_of_values_and_of_what_a_middling_row_reads():
    project = nn.Linear(HEADS * SIZE, CHANNELS)
    outputs = torch.randn(HEADS, 7, SIZE) * torch.arange(1, 8.0)[:, None]
    norms = torch.stack([project(outputs[:, n].flatten()).norm() for n in range(7)])
    weights = OutputWeights(project, HEADS, outputs)
    torch.testing.assert_close(weights.usual(outputs), norms.sort().values[3])
    values = torch.randn(GROUPS, 5, SIZE)
    own = weights.norms(values)
    torch.testing.assert_close(weights.written(values, outputs), own / (own.mean() * norms.median()).sqrt())


def test_some_rows_are_spread_over_all():
    parts = [torch.arange(100.0)[None, None, :, None], torch.arange(100.0, 130)[None, None, :, None]]
    rows = sampled(parts)[0, :, 0].tolist()
    assert len(rows) <= 32 and rows == sorted(set(rows)) and rows[0] == 0 and rows[-1] > 120


@pytest.mark.parametrize("fast", [False, True], ids=["again", "fast"])
@pytest.mark.parametrize("skip", [None, OperatorSkip(attention=[0, 1, 2])], ids=["plain", "attention skipped"])
def test_the_pass_hands_it_over_beside_the_shares(fast, skip):
    model, technique = tiny_model("llava"), Noted(0.5, fast=fast)
    with patched(model, InferenceConfig(cache=technique, skip=skip)):
        model(**tiny_inputs("llava", [[5, IMAGE, 30], [4, IMAGE]]), use_cache=True)
    assert len(technique.seen) == 2
    for layers, replayed in technique.seen:
        for layer, entries, (stretch,) in zip(model.model.language_model.layers, layers, replayed, strict=True):
            weights = output_weights(layer.self_attn, layer.self_attn.config.num_attention_heads, entries.values)
            unit = weights.norms(entries.values[0]) / stretch.written
            torch.testing.assert_close(unit, unit[:1, :1].expand_as(unit))
            assert stretch.peaks.shape == stretch.written.shape and bool((stretch.written > 0).all())


def test_without_it_shares_alone_count():
    model, technique = tiny_model("llava"), Noted(0.5, by_output=False)
    with patched(model, InferenceConfig(cache=technique)):
        model(**tiny_inputs("llava", [[5, IMAGE, 30]]), use_cache=True)
    assert all(stretch.written is None for (stretch,) in technique.seen[0][1])


def test_a_projection_that_nobody_knows_leaves_the_shares():
    assert output_weights(nn.Module(), HEADS, torch.zeros(1, SIZE)) is None
    assert Replay().replay.outputs
