"""Parity with the methods' published code on every stored case."""

from pathlib import Path

import pytest
import torch
from mminfer_kernels import column_mass, rotary_table
from safetensors.torch import load_file

from mminfer.cache import lookm_compress, lookm_keep
from mminfer.positions import v2pe_positions
from mminfer.tokens import aim_importance, aim_merge, aim_schedule

VECTORS = load_file(Path(__file__).parent / "golden" / "reference_vectors.safetensors")
VISUAL_ID, IMAGE_TOKENS = 900, 576


def cases(method: str) -> list[str]:
    return sorted({key.split(".")[1] for key in VECTORS if key.startswith(f"{method}.")})


def assert_close(found: torch.Tensor, stored: torch.Tensor) -> None:
    """1e-5 of the largest value; float16 storage itself rounds to 5e-4."""
    tolerance = 1e-3 if stored.dtype == torch.float16 else 1e-5
    assert found.shape == stored.shape
    error = (found.double() - stored.double()).abs().max()
    assert error <= tolerance * stored.double().abs().max()


@pytest.mark.parametrize("case", cases("aim_merge"))
def test_merging(case):
    start = VECTORS[f"aim_merge.{case}.input"]
    half, _ = aim_merge(start, start.shape[0] // 2, reference_order=True)
    assert_close(half, VECTORS[f"aim_merge.{case}.half"])
    quarter, _ = aim_merge(half, start.shape[0] // 4, reference_order=True)
    assert_close(quarter, VECTORS[f"aim_merge.{case}.quarter"])


@pytest.mark.parametrize("case", cases("aim_importance"))
def test_importance_and_what_it_keeps(case):
    q, k = (VECTORS[f"aim_importance.{case}.{name}"][None] for name in "qk")
    stored = VECTORS[f"aim_importance.{case}.score"]
    score = aim_importance(q, k)[0]
    assert_close(score, stored)
    quota = stored.shape[0] * 7 // 8
    assert set(score.topk(quota).indices.tolist()) == set(stored.topk(quota).indices.tolist())


@pytest.mark.parametrize("case", cases("column_mass"))
def test_column_mass(case):
    q, k = (VECTORS[f"aim_importance.{case}.{name}"][None] for name in "qk")
    assert_close(column_mass(q, k)[0], VECTORS[f"column_mass.{case}.score"])


def test_schedule():
    assert aim_schedule(28, 14, 22) == VECTORS["aim_schedule.retain_rate_28"].tolist()


def lookm_inputs(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
    k, v, score = (VECTORS[f"lookm.{case}.{name}"][None] for name in ("k", "v", "score"))
    visual = torch.zeros(1, k.shape[2], dtype=torch.bool)
    for start in VECTORS[f"lookm.{case}.image_starts"].tolist():
        visual[:, start : start + IMAGE_TOKENS] = True
    important, recent = VECTORS[f"lookm.{case}.ratios"].tolist()
    return k, v, score, visual, important, recent


@pytest.mark.parametrize("merge", ["average", "weighted", "pivot"])
@pytest.mark.parametrize("text_prior", [True, False])
@pytest.mark.parametrize("case", cases("lookm"))
def test_cache_compression(case, text_prior, merge):
    stored = f"lookm.{case}.{'text_prior_' if text_prior else ''}{merge}"
    k, v, _ = lookm_compress(*lookm_inputs(case), merge, text_prior)
    assert_close(k[0], VECTORS[f"{stored}.k"])
    assert_close(v[0], VECTORS[f"{stored}.v"])


@pytest.mark.parametrize("text_prior", [True, False])
@pytest.mark.parametrize("case", cases("lookm"))
def test_kept_entries_are_the_authors(case, text_prior):
    """A kept entry nothing merged into is stored as it was: those tell which places the authors kept."""
    k, _, score, visual, important, recent = lookm_inputs(case)
    entries = k.shape[2]
    counts = int(entries * important), int(entries * recent)
    kept = lookm_keep(score, visual, *counts, text_prior)[0]
    stored = VECTORS[f"lookm.{case}.{'text_prior_' if text_prior else ''}weighted.k"]
    untouched = 0
    for head in range(kept.shape[0]):
        same = (stored[head][:, None] == k[0, head][None]).all(-1)  # [S, N]
        slot, place = same.nonzero(as_tuple=True)
        assert torch.equal(kept[head][slot], place)
        untouched += slot.shape[0]
    assert kept.shape[1] == stored.shape[1] and untouched > 0


def strides(case: str) -> list[int]:
    keys = [key.split(".") for key in VECTORS if key.startswith(f"v2pe.{case}.stride")]
    return sorted({int(part[2].removeprefix("stride")) for part in keys})


@pytest.mark.parametrize(("case", "stride"), [(c, s) for c in cases("v2pe") for s in strides(c)])
def test_positions(case, stride):
    visual = VECTORS[f"v2pe.{case}.input_ids"][None] == VISUAL_ID
    found = v2pe_positions(visual, stride / 256)[0]
    assert torch.equal(found, VECTORS[f"v2pe.{case}.stride{stride}.positions"].double())


@pytest.mark.parametrize("case", cases("v2pe"))
def test_rotary_tables(case):
    visual = VECTORS[f"v2pe.{case}.input_ids"][None] == VISUAL_ID
    inv_freq = 1 / 1e6 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    tables = rotary_table(v2pe_positions(visual, 16 / 256)[0], inv_freq)
    for name, found in zip(("cos", "sin"), tables, strict=True):
        assert_close(found, VECTORS[f"v2pe.{case}.stride16.{name}"])


def test_no_case_is_left_out():
    methods = {"aim_merge", "aim_importance", "aim_schedule", "column_mass", "lookm", "v2pe"}
    assert {key.split(".")[0] for key in VECTORS} == methods
