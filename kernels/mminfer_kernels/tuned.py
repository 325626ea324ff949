"""Which config of a kernel was the fastest where it was measured: a table that comes with the package.

`python -m mminfer_kernels.tune` measures on the GPU at hand and adds to it; nothing is measured in front of a user.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("configs.json")
Table = dict[str, dict[str, dict[str, int]]]  # by architecture, kernel and kind of launch: the place among its configs


def measured_place(kernel: str, kind: tuple[Any, ...]) -> int | None:
    """The place of the fastest config among a kernel's; None: nobody measured this kind of launch on this card.

    Args:
        kernel: its name.
        kind: of launch, as `Configured.kind` tells it, the device's index first.
    """
    index, *rest = kind
    own = table().get(architecture(index), {}).get(kernel, {})
    return own.get(named(rest)) if own else None


def named(kind: list[Any]) -> str:
    """A kind of launch as a key of the table: type, what is left out, constants, classes of lengths."""
    dtype, left_out, constants, sizes = kind
    parts = [str(dtype).removeprefix("torch."), *(f"no {name}" for name in left_out)]
    parts += [f"{name}={value}" for name, value in constants]
    return " ".join([*parts, *(f"<={size}" for size in sizes)])


@functools.cache
def table() -> Table:
    """What was measured; nothing where the file is not there."""
    found: Table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    return found


@functools.cache
def architecture(index: int | None) -> str:
    """As "sm_90" or "gfx942"; "" without a GPU."""
    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(index or 0)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def merged(old: Table, new: Table) -> Table:
    """Both tables; where both know a kind of launch, the new one holds. Sorted, so that the file changes little."""
    out: Table = {}
    for arch in sorted(old | new):
        kernels = old.get(arch, {}), new.get(arch, {})
        out[arch] = {
            kernel: dict(sorted((kernels[0].get(kernel, {}) | kernels[1].get(kernel, {})).items()))
            for kernel in sorted(kernels[0] | kernels[1])
        }
    return out
