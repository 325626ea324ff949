"""Entries of heads that are alike or not: selected, extended, taken apart and put together, column by column."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mminfer import ConfigError
from mminfer.technique import CacheEntries, CacheTechnique, checked_entries, mean_length

GROUPS, SIZE = 3, 4


def alike(length, weighed=False, start=0):
    """Entries that can be told apart: head g has 100 g, 100 g + 1, ... as its sources."""
    source = start + torch.arange(length) + 100 * torch.arange(GROUPS)[:, None]
    keys = source[None, :, :, None] + torch.zeros(SIZE)
    mass = source[None].float() / 7 if weighed else None
    return CacheEntries(keys, -keys, size=source[None].float(), source=source[None], log_mass=mass)


def listed(entries):
    """The sources of each head; every other column must tell the same."""
    for head in entries.heads():
        assert torch.equal(head.keys[..., 0].long(), head.source) and torch.equal(head.values, -head.keys)
        assert torch.equal(head.size.long(), head.source)
    return [head.source[0, 0].tolist() for head in entries.heads()]


masks = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=GROUPS, max_size=GROUPS)
)


@given(masks, st.booleans(), st.data())
def test_heads_keep_what_they_are_told_to(keep, weighed, data):
    entries = alike(len(keep[0]), weighed)
    rows = zip(listed(entries), keep, strict=True)
    want = [[s for s, stays in zip(row, mask, strict=True) if stays] for row, mask in rows]
    kept = entries.select_heads(torch.tensor(keep)[None])
    assert listed(kept) == want and kept.is_packed and kept.lengths == tuple(map(len, want))
    assert (kept.total, len(kept)) == (sum(map(len, want)),) * 2 and kept.per_head == mean_length(kept.lengths)
    assert kept.nbytes == kept.total * (2 * 4 * SIZE + 4 * weighed)
    again = data.draw(st.lists(st.booleans(), min_size=kept.total, max_size=kept.total))
    twice = kept.select_heads(torch.tensor(again, dtype=torch.bool)[None, None])
    flags = iter(again)
    assert listed(twice) == [[s for s in row if next(flags)] for row in want]
    assert CacheEntries.of_heads(twice.heads()).lengths == twice.lengths
    assert listed(CacheEntries.of_heads(twice.heads())) == listed(twice)
    assert listed(kept.last(2)) == [row[-2:] for row in want]


@given(masks, st.booleans(), st.booleans(), st.booleans())
def test_both_sides_may_be_packed(keep, packed, weighed, new_weighed):
    first, new = alike(len(keep[0]), weighed), alike(2, new_weighed, start=50)
    first = first.select_heads(torch.tensor(keep)[None])
    out = first.extend(new.packed() if packed else new)
    assert listed(out) == [a + b for a, b in zip(listed(first), listed(new), strict=True)]
    before = new.extend(first)
    assert listed(before) == [a + b for a, b in zip(listed(new), listed(first), strict=True)]
    assert (out.log_mass is None) == (not weighed and not new_weighed)
    if out.log_mass is not None:
        for head, old in zip(out.heads(), first.heads(), strict=True):
            masses = [0.0] * len(old) if old.log_mass is None else old.log_mass[0, 0].tolist()
            assert head.log_mass[0, 0].tolist()[: len(old)] == masses
            assert bool((head.log_mass[0, 0, len(old) :] != 0).any()) == new_weighed


def test_packed_and_unpacked():
    entries = alike(5, weighed=True)
    packed = entries.packed()
    assert packed.lengths == (5, 5, 5) and packed.keys.shape == (1, 1, 15, SIZE) and packed.packed() is packed
    assert all(torch.equal(x, packed.unpacked().columns[n]) for n, x in entries.columns.items() if x is not None)
    assert entries.unpacked() is entries and entries.weighed() is entries
    uneven = entries.select_heads(torch.arange(15).reshape(1, 3, 5) > 2)
    for work in (uneven.unpacked, lambda: uneven.select(torch.zeros(1, 1, 1, dtype=torch.int64))):
        with pytest.raises(ValueError, match=r"\(2, 5, 5\)"):
            work()


def kept_by(by_head, found, given):
    """What `checked_entries` makes of it."""

    class Made(CacheTechnique, register=False):
        def apply(self, view):
            return found

    Made.by_head = by_head
    return checked_entries(Made(), found, given)


def test_what_a_technique_by_head_gives_is_checked():
    entries = alike(5)
    packed = entries.select_heads(torch.arange(15).reshape(1, 3, 5) > 2)
    weighed = replace(packed, log_mass=torch.zeros(1, 1, 12))
    assert kept_by(True, packed, entries) is packed and kept_by(True, weighed, entries) is weighed
    assert kept_by(True, entries, packed) is entries
    nan = torch.full((1, 1, 12), torch.nan)
    for found, wanted in (
        (replace(packed, head_lengths=(2, 5, 4)), "3 whole numbers that add up to its 12 entries"),
        (replace(packed, head_lengths=(7, 5)), "3 whole numbers"),
        (replace(packed, head_lengths=(-1, 8, 5)), "3 whole numbers"),
        (replace(packed, head_lengths=(2.0, 5, 5)), "3 whole numbers"),
        (replace(packed, head_lengths=[2, 5, 5]), "3 whole numbers"),
        (replace(entries, head_lengths=(5, 5, 5)), r"wanted \[1, 1, S, 4\]"),
        (replace(packed, head_lengths=None), r"wanted \[1, 3, S, 4\]"),
        (replace(packed, log_mass=nan), "finite float32"),
        (replace(packed, log_mass=nan[..., :3]), "finite float32"),
        (replace(packed, log_mass=torch.zeros(1, 1, 12, dtype=torch.float64)), "finite float32"),
        (replace(packed, source=None), "lost the column source"),
        (entries.select_heads(torch.zeros(1, 3, 5, dtype=torch.bool)), "S of 1 or more"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            kept_by(True, found, entries)
    with pytest.raises(ConfigError, match="lost the column log_mass"):
        kept_by(True, packed, weighed)
    for found, what in ((packed, "heads of different lengths"), (replace(entries, log_mass=nan), "log-masses")):
        with pytest.raises(ConfigError, match=rf"Made gave {what}.*by_head: ClassVar"):
            kept_by(False, found, entries)
