"""Numbers of a device, of which the host asks for many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def fetched(values: Sequence[Any]) -> list[Any]:
    """The same with the number in place of each tensor of one, all of them of one type and fetched together."""
    there = [x for x in values if isinstance(x, Tensor)]
    if len(there) > 1:
        found = torch.stack([x.to(there[0].device) for x in there]).tolist()
    else:
        found = [x.item() for x in there]
    numbers = iter(found)
    return [next(numbers) if isinstance(x, Tensor) else x for x in values]
