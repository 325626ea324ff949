"""What replaying and pruning ask of kernels: rows behind entries, fitted masses, places of what is largest."""

import pytest
import torch
from mminfer_kernels import fit_masses, prompt_attention_peak, replay_attention, top_places
from mminfer_kernels.fit_masses import triton_kernel
from mminfer_kernels.replay_attention import rows_of_entries
from mminfer_kernels.rows import triton_kernel as rows_kernel

from tests.kernels.triton_bar import dirty_memory, meets_the_bar

pytestmark = pytest.mark.usefixtures(dirty_memory.__name__)

# First and one past the last of rows and of entries: two groups of one stretch, one without entries, one row alone.
GROUPS = torch.tensor([[0, 40, 0, 50], [40, 45, 0, 50], [45, 47, 50, 50], [47, 79, 50, 83], [79, 80, 83, 90]]).int()
ROWS, ENTRIES, LONGEST = 80, 95, 40


def drawn(size=24, batch=1, dtype=torch.float32):
    q, (k, v) = torch.randn(batch, 6, ROWS, size), torch.randn(2, batch, 2, ROWS, size)
    keys, values = torch.randn(2, batch, 2, ENTRIES, size)
    return [x.to(dtype) for x in (q, k, v, keys, values)]


def test_rows_read_what_attention_over_their_own_keys_reads():
    q, k, v, keys, values = drawn()
    out, peak = replay_attention(*drawn_of(q, k, v, keys, values))
    for start, stop, begin, end in GROUPS.tolist():
        ahead = [0] if begin else []
        own = [
            torch.cat([held[:, :, [*ahead, *range(begin, end)]], x[:, :, start:stop]], 2)
            for held, x in ((keys, k), (values, v))
        ]
        wanted, given = prompt_attention_peak(q[:, :, start:stop], *own, counted=len(ahead) + end - begin)
        torch.testing.assert_close(out[:, :, start:stop], wanted)
        assert bool((peak[:, :, begin:end] >= given[:, :, len(ahead) :] - 1e-6).all())
    assert torch.equal(peak[:, :, 90:], torch.zeros(1, 2, 5)) and bool((peak[:, :, :90] > 0).all())


def drawn_of(*tensors):
    return (*tensors, GROUPS, rows_of_entries(GROUPS, ENTRIES), LONGEST)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_peak_is_of_all_groups_that_look(backend, native):
    q, k, v, keys, values = drawn()
    both = replay_attention(*drawn_of(q, k, v, keys, values), backend=backend)[1][:, :, :50]
    alone = []
    for group in GROUPS[:2]:
        rows, table = slice(int(group[0]), int(group[1])), group[None] - torch.tensor([group[0], group[0], 0, 0]).int()
        args = (q[:, :, rows], k[:, :, rows], v[:, :, rows], keys, values, table, rows_of_entries(table, ENTRIES))
        alone.append(replay_attention(*args, LONGEST, backend=backend)[1][:, :, :50])
    torch.testing.assert_close(both, torch.maximum(*alone))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_replay_attention_in_triton(dtype):
    meets_the_bar(replay_attention, *drawn_of(*drawn(dtype=dtype)))
    none = torch.zeros(0, 4).int()
    meets_the_bar(replay_attention, *(x[:, :, :0] for x in drawn()), none, torch.zeros(2, 0).int(), 0)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ([[0, 80, 0, 96]], "a group has rows 0 to 80 and entries 0 to 96, wanted rows from 0 on, at most 40 of 80"),
        ([[0, 40, 5, 9], [40, 80, 0, 9]], "a group has rows 40 to 80 and entries 0 to 9"),
        ([[0, 40, 0, 9]], "groups have 40 of 80 rows"),
        ([[0, 40, 0, 9], [40, 80, 0, 9]], "seen is not of these groups"),
        ([0, 40, 0, 9], r"groups is torch.int32 \[4\] on cpu, wanted int32"),
    ],
)
def test_groups_that_are_none(wrong, named):
    seen = rows_of_entries(GROUPS, ENTRIES)
    with pytest.raises(ValueError, match=named):
        replay_attention(*drawn(), torch.tensor(wrong).int(), seen, LONGEST)


@pytest.mark.parametrize("most_queries", [2048, 8])
def test_fitted_masses_in_triton(monkeypatch, most_queries):
    monkeypatch.setattr(triton_kernel, "MOST_QUERIES", most_queries)
    shares, counts = torch.rand(3, 37, 21) / 21, torch.tensor([37, 20, 1])
    shares *= (torch.arange(37) < counts[:, None])[..., None]
    found = meets_the_bar(fit_masses, shares, counts, 0.3, 10, 20.0)
    assert torch.equal(found[1, 20:], torch.ones(17)) and bool((found[0] != 1).any())
    misses = [((x * shares).sum(1) - 1).abs().mean() for x in (found[..., None], torch.ones(()))]
    assert misses[0] < misses[1]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_masses_where_nothing_stays_are_1(backend):
    shares, counts = torch.rand(2, 3, 4), torch.tensor([0, 3])
    shares[0] = 0
    found = fit_masses(shares, counts, 0.3, 2, 20.0, backend=backend)
    assert torch.equal(found[0], torch.ones(3)) and torch.equal(
        found[1:], fit_masses(shares[1:], counts[1:], 0.3, 2, 20.0)
    )


@pytest.mark.parametrize("among", [True, False])
@pytest.mark.parametrize("count", [1, 63, 200])
def test_top_places_in_triton(count, among):
    """Among numbers many of which are equal, some are none, and zeros have two signs."""
    score = torch.randn(2, count)
    score[:, ::5], score[:, 3::11], score[:, 4::13] = 0.5, -0.0, 0.0
    score[0, count // 2], score[1, count // 3], score[1, count // 4] = torch.nan, torch.inf, -torch.inf
    chosen = (torch.rand(2, 2, count) < 0.7)[:, 0] if among else None
    for kept in {0, 1, count // 3, count}:
        meets_the_bar(top_places, score, kept, chosen)
    assert top_places(score[0] > 0, 1, backend="triton").tolist() == top_places(score[0] > 0, 1).tolist()


def test_places_come_in_order_the_first_of_equal_ones():
    score = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 0.0])
    assert top_places(score, 3).tolist() == [1, 2, 3]
    assert top_places(score, 3, torch.tensor([True] * 5 + [False])).tolist() == [1, 3, 5]
    assert top_places(score > 1, 4).tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="count is 7, wanted a whole number from 0 to 6"):
        top_places(score, 7)


@pytest.mark.parametrize(("batch", "sources", "destinations"), [(1, 1, 1), (3, 200, 50), (2, 130, 400)])
def test_sources_by_destination_are_those_of_a_stable_sort(monkeypatch, batch, sources, destinations):
    index = torch.randint(destinations, (batch, sources))
    counted = rows_kernel.segments(index, destinations)
    monkeypatch.setattr(rows_kernel, "MOST_COUNTED", 0)
    for found, wanted in zip(counted, rows_kernel.segments(index, destinations), strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
