import importlib
import inspect
import json
import re
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from mminfer_kernels import cuda, launching, tune, tuned
from mminfer_kernels.launching import (
    Configured,
    checked_grid,
    configured,
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


@pytest.mark.parametrize("grid", [(1, 65_536), lambda meta: (1, 1, 65_536)])
def test_grids_that_no_gpu_has_are_refused_by_name(grid):
    x = torch.zeros(16)
    with pytest.raises(ValueError, match=r"copy_kernel would take a grid of 1 x .*65536, wanted at most 65535"):
        launch(copy_kernel, grid, {"x": x, "out": x.clone()}, BLOCK=16)
    variant = SimpleNamespace(kernel="merge")
    with pytest.raises(ValueError, match="merge would take a grid of 1 x 1 x 70000"):
        cuda.launch(variant, (1, 1, 70_000), None, 0)
    assert checked_grid("any", (2**31 - 1, 65_535, 65_535)) == (2**31 - 1, 65_535, 65_535)


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


def on_a_gpu(monkeypatch, backend="cuda"):
    """As on a GPU, as far as configs are chosen."""
    monkeypatch.setattr(launching, "interpreted", lambda: False)
    target = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend=backend)))
    monkeypatch.setattr(triton.runtime, "driver", target)


CONFIGS = [({"BLOCK": 64}, 4, 2), ({"BLOCK": 32}, 8, 3), ({"BLOCK": 16}, 4, 2)]


def test_interpreted_kernels_have_one_config():
    kernel = configured(CONFIGS, (), {"BLOCK": 16}, lambda arguments: True)(copy_kernel)
    assert [config.kwargs for config in kernel.configs] == [{"BLOCK": 16}]
    x, out = torch.randn(16), torch.zeros(16)
    launch(kernel, (1,), {"x": x, "out": out})
    assert torch.equal(out, x)


def test_the_first_config_that_fits_is_taken(monkeypatch):
    on_a_gpu(monkeypatch, "hip")
    seen = []

    def fits(arguments):
        seen.append(arguments)
        return arguments["BLOCK"] <= arguments["limit"]

    kernel = configured(CONFIGS, ("limit",), {"BLOCK": 16}, fits)(copy_kernel)
    fitting = [[x.kwargs["BLOCK"] for x in kernel.fitting({"limit": y})] for y in (100, 40, 1)]
    assert fitting == [[64, 32, 16], [32, 16], [16]]  # where nothing fits, the last
    assert seen[1]["backend"] == "hip" and (seen[1]["num_warps"], seen[1]["num_stages"]) == (8, 3)
    x = torch.randn(16)
    assert [kernel.chosen({"x": x, "limit": y}).kwargs["BLOCK"] for y in (100, 40, 1)] == [64, 32, 16]


def test_what_was_measured_comes_first_and_is_decided_once(monkeypatch):
    on_a_gpu(monkeypatch)
    x, asked = torch.randn(16), []
    monkeypatch.setattr(tuned, "architecture", lambda index: "sm_90")
    told = {"sm_90": {"copy_kernel": {"float32 no out BLOCK_D=8 <=128": 1, "float32 BLOCK_D=8 <=128": 7}}}
    monkeypatch.setattr(tuned, "table", lambda: told)

    def fits(arguments):
        asked.append(arguments["BLOCK"])
        return arguments["BLOCK"] > 16

    kernel = configured(CONFIGS, ("N",), {"BLOCK": 16}, fits)(copy_kernel)
    kernel._constants = ["BLOCK_D"]
    arguments = {"x": x, "out": None, "N": 100, "BLOCK_D": 8}
    assert kernel.chosen(arguments).kwargs == {"BLOCK": 32}
    before = len(asked)
    assert kernel.chosen(arguments | {"N": 128}).kwargs == {"BLOCK": 32} and len(asked) == before  # the same class
    assert kernel.chosen(arguments | {"N": 129}).kwargs == {"BLOCK": 64}  # another class, not measured
    assert kernel.chosen(arguments | {"out": x}).kwargs == {"BLOCK": 64}  # a place that is none
    told["sm_90"]["copy_kernel"]["float32 no out BLOCK_D=8 <=512"] = 2
    assert kernel.chosen(arguments | {"N": 512}).kwargs == {"BLOCK": 64}  # measured, and it does not fit


def test_the_fastest_config_is_the_first_of_those_that_are_about_as_fast(monkeypatch):
    on_a_gpu(monkeypatch)
    kernel = configured(CONFIGS, (), {"BLOCK": 16}, lambda arguments: True)(copy_kernel)

    def place(times):
        left = iter(times)

        def clock(run):
            took = next(left)
            if took is None:
                raise RuntimeError("out of shared memory")
            return took

        return tune.fastest(kernel, (1,), {}, clock)

    assert [place(x) for x in ([1.0, 0.99, 1.2], [1.0, 0.9, 0.88], [1.0, 0.5, 0.2], [None, 2.0, 1.0])] == [0, 1, 2, 2]


def test_a_table_keeps_what_it_knew():
    old = {"sm_80": {"a": {"x": 1}}, "sm_90": {"a": {"x": 1, "y": 2}}}
    new = {"sm_90": {"a": {"y": 3}, "b": {"z": 0}}}
    assert tuned.merged(old, new) == {"sm_80": {"a": {"x": 1}}, "sm_90": {"a": {"x": 1, "y": 3}, "b": {"z": 0}}}
    assert tuned.merged({}, {}) == {} and json.loads(tuned.TABLE.read_text()) == tuned.table()


def test_launches_to_tune_are_every_configured_kernels_at_every_length(monkeypatch):
    monkeypatch.setattr(tune, "LENGTHS", (64, 128))
    found = list(tune.launches("packed_decode_attention"))
    assert {word.rsplit(" ", 1)[1] for word, _ in found} == {"64", "128"} and tune.cases.TOKENS == 8192
    assert all(isinstance(launch.kernel, Configured) for _, launch in found)
    filled, asked = tune.on_device(found[0][1], "cpu"), found[0][1].arguments
    assert filled["q"].abs().max() > 0 and torch.equal(filled["lengths"], asked["lengths"])
    assert all(x.stride() == asked[name].stride() for name, x in filled.items() if isinstance(x, torch.Tensor))


LENGTHS = {"S", "N", "T", "votes"} | {f"stride_{x}" for x in ("lb", "lh", "wt", "wb", "wh", "mb", "mg", "ot")}
FEW = {"S", "stride_lb", "stride_lh", "stride_ob", "stride_oh"}  # of a decoding step: queries, about 1


@pytest.mark.parametrize("folder", ["prompt_attention", "row_lse", "column_mass", "best_match", "decode_attention"])
def test_one_compiled_kernel_serves_every_length(folder):
    """What a length is divisible by, or that it is 1, compiles nothing anew."""
    module = importlib.import_module(f"mminfer_kernels.{folder}.triton_kernel")
    found = [x for x in vars(module).values() if isinstance(x, Configured)]
    (function,) = [x.fn.fn for x in found if x.fn.fn.__module__ == module.__name__]
    told = re.search(r"do_not_specialize=\[(.*?)\]", inspect.getsource(function), re.DOTALL)
    left = LENGTHS & set(inspect.signature(function).parameters) - set(re.findall(r'"(\w+)"', told.group(1)))
    assert left <= (FEW if folder == "decode_attention" else set())
