"""Columns of a layout: where a token came from, what the host knows of rows elsewhere, and how columns lie on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Modality(IntEnum):
    """Where a token came from."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2


@dataclass(frozen=True, eq=False)
class RowCounts:
    """What the host knows of rows on another device, so that it need not wait for that to ask.

    Args:
        lengths: rows of each sequence.
        visual_lengths: visual ones among them.
        ends_visual: of each sequence, whether its last row is visual.
        is_visual: [T] bool, on the CPU; None: which rows are visual is not known, only how many.
    """

    lengths: tuple[int, ...]
    visual_lengths: tuple[int, ...]
    ends_visual: tuple[bool, ...]
    is_visual: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Columns of a layout as they lie in one tensor, so that one gather, or one copy, takes them all.

    Args:
        data: [K, T] int64, a row or more for each column; smaller types take the first bytes of theirs.
        names: of the columns, in the rows' order; `position` has the rows that are left.
        columns: these, as views.
        is_visual: [T] bool, a view as well.
    """

    data: Tensor
    names: tuple[str, ...]
    columns: dict[str, Tensor]
    is_visual: Tensor

    @classmethod
    def of(cls, columns: dict[str, Tensor]) -> SideBySide:
        """From columns that lie anywhere."""
        names = (*(name for name in columns if name != "position"), "position")
        modality = columns["modality"].long()
        parts = {
            "modality": modality + ((modality != Modality.TEXT) << 8),  # its second byte
            "size": columns["size"].view(torch.int32).long(),
            "position": columns["position"].view(torch.int64),
        }
        rows = [parts.get(name, columns[name]) for name in names]
        return cls.read(torch.cat([x if x.dim() == 2 else x[None] for x in rows]), names)

    @classmethod
    def read(cls, data: Tensor, names: tuple[str, ...]) -> SideBySide:
        columns = dict(zip(names, data, strict=False)) | {"position": data[len(names) - 1 :].view(torch.float64)}
        columns["size"] = columns["size"].view(torch.float32)[::2]
        bytes_of_modality = columns["modality"].view(torch.int8)
        columns["modality"] = bytes_of_modality[::8]
        return cls(data, names, columns, bytes_of_modality[1::8].view(torch.bool))

    def select(self, index: Tensor) -> SideBySide:
        return self.read(self.data.index_select(1, index), self.names)
