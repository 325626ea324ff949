"""Rows of a pass that look at its entries once more: what a cache technique may ask for, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ReplayPlan:
    """How the rows of a pass are looked at once more, behind the entries that they made.

    Rows go by groups, a picture or a piece of text each, and no group sees another's second time: a head that looks for
    the last token like its own would find it there, and never ask for the entry.

    Args:
        stretch: entries that a row looks at: those of its own stretch of so many rows and the first of all; where it is
            shorter, others that were held before fill it up.
        references: queries of a stretch that are handed over, in each query head; of rows evenly spread, and of others
            for each of the heads that share entries; 0: none.
        text: whether rows of text are replayed too where a stretch has visual ones.
        alike: visual rows whose embedding is as like the row's before them, by cosine, are left out; 1: none is.
        fast: whether every layer looks with the rows as they entered it the first time, so that no FFN runs again.
        outputs: whether it is told what the entries write, too.
    """

    stretch: int = 1024
    references: int = 0
    text: bool = True
    alike: float = 1.0
    fast: bool = False
    outputs: bool = False


@dataclass(frozen=True, eq=False)
class EarlierEntries:
    """Entries that rows of a stretch look at beside the stretch's own, so that shares are of about as many everywhere.

    Args:
        keys: [G, m, D].
        values: [G, m, D].
        log_mass: [G, m] float32: 0, or `NOTHING` where a head has fewer; None: 0 for all.
    """

    keys: Tensor
    values: Tensor
    log_mass: Tensor | None


NOTHING = -1e9  # added to a logit, it leaves nothing of the entry


@dataclass(frozen=True, eq=False)
class ReplayedStretch:
    """What one stretch of a sequence's entries in one layer was asked for.

    Args:
        first: the first of its entries, among those of this pass.
        peaks: [G, n] float32, the largest share of its attention that any replayed query gave to each.
        queries: [H, R, D], some of those queries, rotated, as they stood behind the stretch.
        earlier: what the queries looked at beside them; None: nothing.
        scale: factor of the attention's logits.
        written: [G, n] float32, how much each entry writes to a row that gives it all attention, by the query head that
            makes most of it, in units of the layer. None: nobody asked, or nobody knows its output projection.
    """

    first: int
    peaks: Tensor
    queries: Tensor
    earlier: EarlierEntries | None
    scale: float
    written: Tensor | None = None

    @property
    def last(self) -> int:
        """One past the last of its entries."""
        return self.first + self.peaks.shape[1]
