from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from mminfer_kernels import launching
from mminfer_kernels.launching import (
    autotuned,
    dense_rows,
    interpretable,
    launch,
    power_of_two,
    recorded_launches,
    strides,
)


@triton.jit
def copy_kernel(x, out, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(out + places, tl.load(x + places))


def test_a_launch_runs_or_is_recorded():
    x, out = torch.randn(16), torch.zeros(16)
    with recorded_launches() as launches:
        launch(copy_kernel, (1,), {"x": x, "out": out}, BLOCK=16)
    assert not out.any() and [(y.kernel, y.grid) for y in launches] == [(copy_kernel, (1,))]
    assert launches[0].arguments["x"] is x and launches[0].arguments["BLOCK"] == 16
    launch(copy_kernel, (1,), {"x": x, "out": out}, BLOCK=16)
    assert torch.equal(out, x) and len(launches) == 1


def test_the_interpreter_is_given_no_bfloat16():
    x = torch.randn(16).bfloat16()
    with pytest.raises(TypeError, match="silently wrong in bfloat16"):
        launch(copy_kernel, (1,), {"x": x, "out": None}, BLOCK=16)
    (turned,) = interpretable(x)
    assert turned.dtype == torch.float32 and torch.equal(turned.bfloat16(), x)
    assert interpretable(turned)[0] is turned


def test_on_a_gpu_bfloat16_stays(monkeypatch):
    monkeypatch.setattr(launching, "interpreted", lambda: False)
    x = torch.randn(16).bfloat16()
    assert interpretable(x)[0] is x


def test_dense_rows_copies_only_where_it_must():
    x = torch.randn(4, 6)
    assert dense_rows(x) is x and dense_rows(x[:, :3]).data_ptr() == x.data_ptr()
    assert dense_rows(x.mT).stride() == (4, 1) and torch.equal(dense_rows(x.mT), x.mT)


def test_strides_and_powers_of_two():
    assert strides(torch.empty(2, 3, 4), "qbh") == {"stride_qb": 12, "stride_qh": 4}
    assert strides(None, "lbh") == {"stride_lb": 0, "stride_lh": 0}
    assert [power_of_two(n) for n in (0, 1, 16, 17, 64)] == [16, 16, 16, 32, 64]
    assert [power_of_two(n, 1) for n in (0, 1, 3, 4)] == [1, 1, 4, 4]


def test_interpreted_kernels_have_one_config():
    tuned = autotuned([({"BLOCK": 64}, 4, 2), ({"BLOCK": 32}, 4, 2)], ["x"], {"BLOCK": 16}, lambda arguments: True)
    assert [config.kwargs for config in tuned(copy_kernel).configs] == [{"BLOCK": 16}]


def test_configs_are_pruned_by_shape_and_what_they_add_to_is_put_back(monkeypatch):
    monkeypatch.setattr(launching, "interpreted", lambda: False)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    target = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend="hip")))
    monkeypatch.setattr(triton.runtime, "driver", target)
    seen = []

    def fits(arguments):
        seen.append(arguments)
        return arguments["BLOCK"] <= arguments["limit"]

    configs = [({"BLOCK": 64}, 4, 2), ({"BLOCK": 32}, 8, 3), ({"BLOCK": 16}, 4, 2)]
    tuned = autotuned(configs, ["x"], {"BLOCK": 16}, fits, restored=("out",))(copy_kernel)
    left = [[x.kwargs["BLOCK"] for x in tuned.early_config_prune(tuned.configs, {}, limit=y)] for y in (100, 40, 1)]
    assert left == [[64, 32, 16], [32, 16], [16]]  # where nothing fits, the last
    assert seen[1]["backend"] == "hip" and (seen[1]["num_warps"], seen[1]["num_stages"]) == (8, 3)
    assert tuned.restore_value == ["out"]
