"""The table of cases: every op at the sizes of long prompts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.kernels import calls
from benchmarks.kernels.call import Call


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Args:
        op: the op's registered name.
        label: what sets the case apart from others of the op, from its sizes.
        make: the call on tensors of the device and dtype of its first argument.
        sizes: for measuring.
        quick: for trying and for tests.
    """

    op: str
    label: str
    make: Callable[..., Call]
    sizes: dict[str, int]
    quick: dict[str, int]

    def name(self, quick: bool = False) -> str:
        return f"{self.op}, {self.label.format(**(self.quick if quick else self.sizes))}"

    def build(self, quick: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call:
        like = torch.empty(0, device=device, dtype=dtype)
        return self.make(like, **(self.quick if quick else self.sizes))


TOKENS, FEW, MORE = "{tokens:,} tokens", {"tokens": 160}, {"tokens": 320}
ROWS, FEW_ROWS = {"tokens": 6272, "kept": 1568, "columns": 896}, {"tokens": 64, "kept": 16, "columns": 96}
MATRIX, FEW_BY_FEW = "{rows:,} x {columns:,}", {"rows": 96, "columns": 80}
OF_ROWS, KEYS = "{kept:,} of {tokens:,} x {columns:,}", "{keys:,} keys, {groups} groups"
GRID, SMALL_GRID = {"lines": 24, "columns": 896}, {"lines": 6, "columns": 48}
STEP = {"layers": 8, "entries": 8192, "hidden": 896, "inner": 4864, "vocabulary": 151_936}
SMALL_STEP = {"layers": 2, "entries": 96, "hidden": 64, "inner": 160, "vocabulary": 320}
CASES: tuple[Case, ...] = (
    Case("prompt_attention", TOKENS, calls.prompt_attention, {"tokens": 2048}, FEW),
    Case("prompt_attention", TOKENS, calls.prompt_attention, {"tokens": 16_384}, MORE),
    Case("prompt_attention_mass", TOKENS, calls.prompt_attention_mass, {"tokens": 2048}, FEW),
    Case("prompt_attention_mass", TOKENS, calls.prompt_attention_mass, {"tokens": 16_384}, MORE),
    Case("prompt_attention_peak", TOKENS, calls.prompt_attention_peak, {"tokens": 2048}, FEW),
    Case("prompt_attention_peak", TOKENS, calls.prompt_attention_peak, {"tokens": 16_384}, MORE),
    Case("replay_attention", TOKENS, calls.replay_attention, {"tokens": 6272}, FEW),
    Case(
        "fit_masses",
        "{heads} x {kept} entries x {queries} queries",
        calls.fit_masses,
        {"heads": 48, "kept": 200, "queries": 448},
        {"heads": 2, "kept": 20, "queries": 30},
    ),
    Case("top_places", TOKENS, calls.top_places, {"tokens": 6272}, FEW),
    Case("column_mass", TOKENS, calls.column_mass, {"tokens": 16_384}, FEW),
    Case(
        "column_mass",
        "1 in {stride} of {tokens:,} tokens",
        calls.column_mass,
        {"tokens": 16_384, "stride": 8},
        {"tokens": 320, "stride": 8},
    ),
    Case("power_iterate", TOKENS, calls.power_iterate, {"tokens": 2048}, FEW),
    Case("power_iterate", TOKENS, calls.power_iterate, {"tokens": 16_384}, MORE),
    Case("best_match", MATRIX, calls.best_match, {"rows": 6272, "columns": 3584}, FEW_BY_FEW),
    Case(
        "k_centres",
        "{pieces:,} pieces of {points}",
        calls.k_centres,
        {"pieces": 512, "points": 98},
        {"pieces": 6, "points": 20},
    ),
    Case("merge_rows", MATRIX, calls.merge_rows, {"rows": 3136, "columns": 3584}, FEW_BY_FEW),
    Case("gather_rows", OF_ROWS, calls.gather_rows, ROWS, FEW_ROWS),
    Case("gather_rms_norm", OF_ROWS, calls.gather_rms_norm, ROWS, FEW_ROWS),
    Case("add_rows", "{kept:,} to {tokens:,} x {columns:,}", calls.add_rows, ROWS, FEW_ROWS),
    Case("row_dots", "{lines} x {lines} tokens x {columns:,}", calls.row_dots, GRID, SMALL_GRID),
    Case("grow_regions", "{lines} x {lines} tokens x {columns:,}", calls.grow_regions, GRID, SMALL_GRID),
    Case("swiglu", MATRIX, calls.swiglu, {"rows": 1568, "columns": 4864}, FEW_BY_FEW),
    Case("rotary_table", TOKENS, calls.rotary_table, {"tokens": 6372}, FEW),
    Case("apply_rotary", TOKENS, calls.apply_rotary, {"tokens": 6372}, FEW),
    Case("rotary", TOKENS, calls.rotary, {"tokens": 6372}, FEW),
    Case(
        "decode_attention",
        KEYS,
        calls.decode_attention,
        {"keys": 32_768, "heads": 16, "groups": 16},
        {"keys": 256, "heads": 4, "groups": 4},
    ),
    Case(
        "decode_attention",
        KEYS,
        calls.decode_attention,
        {"keys": 32_768, "heads": 14, "groups": 2},
        {"keys": 256, "heads": 14, "groups": 2},
    ),
    Case(
        "packed_prompt_attention",
        "{tokens:,} tokens behind {keys:,} keys, {groups} groups",
        calls.packed_prompt_attention,
        {"tokens": 1024, "keys": 16_384, "heads": 14, "groups": 2},
        {"tokens": 40, "keys": 120, "heads": 6, "groups": 3},
    ),
    Case(
        "packed_decode_attention",
        KEYS,
        calls.packed_decode_attention,
        {"keys": 65_536, "heads": 16, "groups": 8},
        {"keys": 600, "heads": 12, "groups": 4},
    ),
    Case("decode_step", "{layers} layers, {entries:,} entries", calls.decode_step, STEP, SMALL_STEP),
)


def case_named(name: str, quick: bool = False) -> Case:
    """The case of this name.

    Raises:
        ValueError: there is none.
    """
    found = {case.name(quick): case for case in CASES}
    if name not in found:
        raise ValueError(f"no case is called {name!r}; there are {'; '.join(found)}")
    return found[name]
