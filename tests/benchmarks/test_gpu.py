"""The command for a machine with a GPU: the same code, tried without one."""

import csv
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import engine, ops, parity, tests
from benchmarks.gpu.writing import Rows
from benchmarks.models.caches import random_cache


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def asked(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", ["gpu", *map(str, arguments)])
    module.main()


def test_every_kernel_that_runs_here_is_right(monkeypatch, tmp_path):
    asked(monkeypatch, parity, "--out", tmp_path, "--device", "cpu", "--tiny")
    rows = read(tmp_path / "parity.csv")
    ran = [row for row in rows if row["error"]]
    assert {row["status"] for row in ran} == {"right"}, [row for row in ran if row["status"] != "right"]
    assert {"prompt_attention", "prompt_attention_peak", "decode_attention"} <= {row["op"] for row in ran}
    assert all("no" in row["status"] for row in rows if not row["error"])  # no kernel, or no GPU


def test_a_wrong_kernel_is_told():
    exact = torch.randn(40, dtype=torch.float64)
    single, half = exact.float(), exact.bfloat16()
    assert parity.compared([single], [single], [exact])["status"] == "right"
    assert parity.compared([single * 1.001], [single], [exact])["status"] == "wrong"
    assert parity.compared([single * torch.nan], [single], [exact])["status"] == "wrong"
    assert parity.compared([half], [half], [exact])["status"] == "right"
    assert parity.compared([torch.arange(3)], [torch.arange(3)], [torch.tensor([0, 1, 1])])["status"].startswith(
        "1 of 3"
    )


def test_ops_are_timed_beside_torchs(monkeypatch, tmp_path):
    asked(monkeypatch, ops, "--out", tmp_path, "--device", "cpu", "--tiny", "--repeats", 1)
    rows = read(tmp_path / "ops.csv")
    ours = [row for row in rows if row["run"] == "ours"]
    assert not [row["error"] for row in rows if row["error"]]
    assert all(float(row["ms"]) > 0 and float(row["of_torch"]) > 0 for row in ours) and len(ours) > 10


def test_tests_are_rows_by_folder(monkeypatch, tmp_path):
    asked(monkeypatch, tests, "--out", tmp_path, "--device", "cpu", "--tiny")
    rows = read(tmp_path / "tests.csv")
    assert [(row["folder"], row["status"], row["failed"]) for row in rows] == [("operators/test_skip.py", "0", "0")]
    assert int(rows[0]["passed"]) > 10


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tests/a/test_b.py::test_c[x-1] PASSED [ 50%]", ("passed", "tests/a/test_b.py::test_c[x-1]")),
        ("[gw0] [ 50%] FAILED tests/a/test_b.py::test_c[x 1] ", ("failed", "tests/a/test_b.py::test_c[x 1]")),
        ("tests/a/test_b.py::test_c ERROR [ 50%]", ("failed", "tests/a/test_b.py::test_c")),
        ("tests/a/test_b.py::test_c SKIPPED (no GPU) [ 50%]", ("skipped", "tests/a/test_b.py::test_c")),
        ("FAILED tests/a/test_b.py::test_c - of the summary", None),
        ("collected 7 items", None),
    ],
)
def test_lines_of_pytest(line, found):
    assert tests.ended(line) == found


def test_a_folder_that_takes_too_long_is_stopped(monkeypatch):
    slow = "print('tests/a.py::b FAILED', flush=True); import time; time.sleep(60)"
    monkeypatch.setattr(tests, "command_of", lambda folder, device: [sys.executable, "-c", slow])
    failed, whole = tests.folder_rows("a", "cpu", 2.0)
    assert failed["test"] == "tests/a.py::b"
    assert (whole["status"], whole["failed"], whole["passed"]) == ("stopped", 1, 0)


def test_prompts_and_steps_are_timed_beside_the_hosts():
    model = engine.model_of("cpu", True)
    with torch.no_grad():
        rows = list(engine.prompt_passes(model, "cpu", True, 1))
        assert [row["setting"] for row in rows] == list(engine.PROMPT_SETTINGS)
        assert not [row["error"] for row in rows if "error" in row]
        for name, (around, make) in engine.steps(model, 2, 16).items():
            if "compiled" not in name:
                with around():
                    assert make()().logits.shape[:2] == (2, 1)


def test_a_cache_whose_heads_differ_holds_as_much_as_one_of_heads_alike():
    model = engine.model_of("cpu", True)
    alike, differing = (random_cache(model, 30, 64, heads_differ=differs) for differs in (False, True))
    own = [[sum(layer.head_lengths[0]) for layer in cache.layers] for cache in (alike, differing)]
    assert own[0] == own[1] and len(set(differing.layers[0].head_lengths[0])) > 1


def test_a_part_that_fails_stops_no_other(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "PARTS", {"nowhere": 0.5, "writing": 0.5})
    asked(monkeypatch, command, "--out", tmp_path, "--device", "cpu", "--tiny", "--minutes", 1)
    rows = read(tmp_path / "parts.csv")
    assert [(row["part"], row["status"]) for row in rows] == [("nowhere", "1"), ("writing", "0")]


def test_rows_are_there_as_soon_as_they_are_known(tmp_path):
    rows = Rows(tmp_path / "some.csv", ("a", "b"), "cpu")
    rows.add({"a": 1})
    (first,) = read(tmp_path / "some.csv")
    assert (first["a"], first["b"]) == ("1", "") and first["commit"] and first["torch"] == torch.__version__
    with pytest.raises(ValueError, match="c"):
        rows.add({"c": 1})
