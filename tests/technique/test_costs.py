"""What techniques say they spend: the matrix products of their rules, a multiplication and an addition each."""

import pytest
import torch

from mminfer import AIMPrune, LookM, RegionMerge
from mminfer.cache.digest import Digest
from mminfer.cache.digest_rules import PIECE
from mminfer.models.registry import adapter_for
from mminfer.technique import LayerWork
from mminfer.tokens.fastv import FastV
from tests.tiny import tiny_model

SPEC = adapter_for(tiny_model("llava")).spec
HEADS, GROUPS, SIZE = SPEC.num_attention_heads, SPEC.num_key_value_heads, SPEC.head_dim


def work(**facts):
    """300 queries behind 100 entries that were held, all pairs looked at, 50 entries kept."""
    pairs = sum(range(101, 401))
    given = {"layer_idx": 1, "seen": 400, "visual": 200, "queries": 300, "keys": 400, "pairs": pairs, "kept": 50}
    return LayerWork(**given | facts)


def votes(pairs, steps=1):
    """A product for the logit of each pair in each query head, and one for each vote with its probability."""
    return sum(2 * SIZE + 2 * steps for _ in range(HEADS)) * pairs


def test_fastv_asks_its_last_query():
    technique = FastV(2, 0.5)
    assert technique.cost(SPEC, [7, 30]) == votes(37)
    assert technique.layer_cost(SPEC, work()) == votes(400)
    assert technique.layer_cost(SPEC, work(queries=0)) == 0


def test_aims_importance_is_asked_for_where_some_leave_and_some_stay():
    technique = AIMPrune(1, 4, iterations=3)
    assert technique.cost(SPEC, [7, 30]) == votes(37, 3)
    assert technique.layer_cost(SPEC, work(layer_idx=2)) == votes(work().pairs, 3)
    assert technique.layer_cost(SPEC, work(layer_idx=3)) == 0  # all leave behind it
    assert technique.layer_cost(SPEC, work(visual=0)) == 0
    assert technique.layer_cost(SPEC, work(visual=1)) == votes(work().pairs, 3)


@pytest.mark.parametrize("queries", ["all", "last", "strided"])
@pytest.mark.parametrize("merge", ["none", "pivot"])
def test_lookm_counts_its_voters_and_matches_what_is_dropped(queries, merge):
    technique = LookM(0.1, 0.1, merge=merge, queries=queries, window=7, stride=4)
    asked = {"all": range(300), "last": range(293, 300), "strided": range(3, 300, 4)}[queries]
    scores = votes(sum(100 + query + 1 for query in asked))
    matched = 0 if merge == "none" else sum(2 * SIZE for _ in range(GROUPS)) * 350 * 50
    assert technique.layer_cost(SPEC, work()) == scores + matched
    assert technique.layer_cost(SPEC, work(mass_given=True)) == matched
    assert technique.layer_cost(SPEC, work(queries=0, pairs=0)) == matched
    assert LookM(0.6, 0.4, merge=merge, queries=queries).layer_cost(SPEC, work()) == 0
    assert LookM(budget=500, merge=merge, queries=queries, window=7, stride=4).layer_cost(SPEC, work()) > 0


def test_digest_reads_for_some_queries_and_looks_for_the_nearest_twice():
    technique = Digest(0.2, queries=64)
    read = sum(2 * SIZE + 2 * SIZE for _ in range(HEADS))
    near = 2 * sum(2 * 2 * SIZE for _ in range(GROUPS))  # keys and values, to choose and to join
    assert technique.cost(SPEC, [7, 30]) == read * 37
    assert technique.layer_cost(SPEC, work()) == read * 64 * 400 + near * PIECE * 50
    assert technique.layer_cost(SPEC, work(queries=9, keys=40, kept=5)) == read * 9 * 40 + near * 40 * 5
    assert technique.layer_cost(SPEC, work(kept=400)) == read * 64 * 400


def test_regions_compare_each_token_with_two_neighbours_twice():
    assert RegionMerge().cost(SPEC, [7, 30]) == 2 * 2 * (2 * SPEC.hidden_size) * 37


def test_queries_that_vote_are_counted_from_the_last():
    """Every stride-th, and the last among them whatever their number."""
    for count in range(1, 30):
        voting = LookM(queries="strided", stride=4)._voting(count, torch.device("cpu")).tolist()
        assert voting == sorted(range(count - 1, -1, -4))
        voting = LookM(queries="last", window=5)._voting(count, torch.device("cpu")).tolist()
        assert voting == list(range(count))[-5:]
    assert LookM()._voting(9, torch.device("cpu")) is None
