"""Which rows skip what in which layer, and modules that see no others; on modules of a few numbers."""

import dataclasses

import pytest
import torch
from torch import nn

from mminfer import ConfigError, LayerRange, OperatorSkip
from mminfer.layout import TokenLayout
from mminfer.models.spec import ModelSpec

DEPTH = 6
SPEC = ModelSpec(
    family="test", num_layers=DEPTH, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=128, vocab_size=500, max_position_embeddings=32768,
)  # fmt: skip
TEXT = [0, 1, 5, 8]  # of nine rows


def layout():
    rows = torch.arange(9)
    visual = torch.ones(9, dtype=torch.int8)
    visual[TEXT] = 0
    return TokenLayout(
        rows * 0, visual, visual.long() - 1, torch.ones(9), rows, rows.double()[None], torch.tensor([9.0])
    )


def skipped(technique):
    """Layers in which visual rows issue no query, and in which they skip the FFN; text never does."""
    found = [], []
    for layer in range(DEPTH):
        for layers, rows in zip(found, technique.apply(layout(), layer, DEPTH), strict=True):
            if rows is not None:
                assert rows.tolist() == TEXT
                layers.append(layer)
    return found


@pytest.mark.parametrize(
    ("settings", "queries", "ffn"),
    [
        ({}, [], []),
        ({"ffn": [1, 4]}, [], [1, 4]),
        ({"attention": [0, 5]}, [0, 5], []),
        ({"block": [2]}, [2], [2]),
        ({"ffn": [1], "attention": (3,), "block": [5]}, [3, 5], [1, 5]),
        ({"ffn": LayerRange(1, 6, 2)}, [], [2, 4]),
        ({"attention": LayerRange(0.5)}, [3, 4, 5], []),
        ({"block": LayerRange(0, 0.5, 2)}, [0, 2], [0, 2]),
    ],
)
def test_which_layers_skip_what(settings, queries, ffn):
    technique = OperatorSkip(**settings)
    technique.check(SPEC)
    assert skipped(technique) == (queries, ffn)


def test_settings_are_kept_as_tuples():
    technique = OperatorSkip(ffn=[1, 2], attention=[3])
    assert (technique.ffn, technique.attention, technique.block) == ((1, 2), (3,), ())
    assert technique == OperatorSkip(ffn=(1, 2), attention=(3,))


@pytest.mark.parametrize("name", ["ffn", "attention", "block"])
@pytest.mark.parametrize("layers", [[DEPTH], [-1], [0, 9], LayerRange(0, DEPTH + 1), LayerRange(DEPTH, DEPTH), [0.5]])
def test_layers_that_a_model_does_not_have_are_refused(name, layers):
    with pytest.raises(ConfigError, match=rf"OperatorSkip\.{name}"):
        OperatorSkip(**{name: layers}).check(SPEC)
    OperatorSkip(**{name: [0, DEPTH - 1]}).check(SPEC)
    OperatorSkip(**{name: LayerRange(0, DEPTH)}).check(SPEC)


@pytest.mark.parametrize("name", ["ffn", "attention", "block"])
@pytest.mark.parametrize("layers", [1, "all", None, ["1"], [True], (None,), [10**9], [-(10**9)]])
def test_what_is_no_list_of_layers_is_refused(name, layers):
    with pytest.raises(ConfigError, match=rf"OperatorSkip\.{name}"):
        OperatorSkip(**{name: layers})


def test_images_that_look_both_ways_keep_their_queries():
    spec = dataclasses.replace(SPEC, bidirectional_images=True)
    for name in ("attention", "block"):
        with pytest.raises(ConfigError, match=rf"OperatorSkip\.{name}: images of this model attend in both"):
            OperatorSkip(**{name: [1]}).check(spec)
    OperatorSkip(ffn=[1]).check(spec)


class Counting(nn.Module):
    """Adds a number to rows, and notes how many it saw."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number, self.seen = number, []

    def forward(self, x):
        self.seen.append(x.shape[1])
        return x + self.number


def host_layer():
    layer = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.q_proj, layer.self_attn.o_proj = Counting(1.0), Counting(2.0)
    layer.up, layer.down = Counting(3.0), Counting(4.0)
    return layer


@pytest.mark.parametrize("queries", [None, [0, 5]])
@pytest.mark.parametrize("ffn", [None, [1, 5, 8]])
def test_modules_see_the_rows_that_need_them_and_no_others(queries, ffn):
    layer, x = host_layer(), torch.randn(1, 9, 4)
    rows = [None if index is None else torch.tensor(index) for index in (queries, ffn)]
    with OperatorSkip().restrict(layer, ("up", "down"), *rows):
        projected = [layer.self_attn.q_proj(x), layer.self_attn.o_proj(x)]
        through = layer.down(layer.up(x))
    for out, added, index in ((projected[0], 1, queries), (projected[1], 2, queries), (through, 7, ffn)):
        wanted = x + added
        if index is not None:
            stays = torch.zeros(9, dtype=torch.bool)
            stays[index] = True
            wanted = wanted * stays[:, None]
        torch.testing.assert_close(out, wanted)
    counts = [9 if index is None else len(index) for index in (queries, queries, ffn, ffn)]
    modules = (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.up, layer.down)
    assert [module.seen for module in modules] == [[n] for n in counts]
    assert layer.self_attn.q_proj(x).shape == x.shape and not layer.up._forward_pre_hooks  # nothing stays behind


def test_a_layer_without_an_ffn_is_refused_by_name():
    with (
        pytest.raises(ConfigError, match="Module has no FFN"),
        OperatorSkip().restrict(host_layer(), None, None, torch.tensor([0])),
    ):
        pass
    with OperatorSkip().restrict(host_layer(), None, torch.tensor([0]), None):
        pass
