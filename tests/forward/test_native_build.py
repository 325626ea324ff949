"""Building the native kernels is in no latency: each way to an answer builds them before its clock starts."""

import time

import mminfer_kernels
import pytest
import torch
from mminfer_kernels import build

from mminfer import Engine, InferenceConfig, nano, patched
from mminfer.bench import speed
from mminfer.forward.native_build import prepare_kernels
from mminfer.inspection import inspect_chat
from mminfer.needle import Labels
from mminfer.needle.runner import Asking, run

BUILD_MS = 1e6  # far beyond whatever a request to nano takes


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture
def builds(monkeypatch):
    """The kernels are not there yet, and a clock that builds put forward; one entry for each build."""
    library, clock, done = build.library(), time.perf_counter, []

    def load(isa, on_progress):
        done.append(isa)
        if on_progress is not None:
            on_progress(1, 1)
        return library

    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_load", load)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + len(done) * BUILD_MS / 1e3)
    return done


def generated(engine):
    return engine.generate(nano.sample_messages(), max_new_tokens=2).stats


def generated_in_chunks(engine):
    return engine.generate(nano.sample_messages(), max_new_tokens=2, prefill_chunk_size=200).stats


def streamed(engine):
    stream = engine.stream(nano.sample_messages(), max_new_tokens=2)
    list(stream)
    return stream.output.stats


def sent(engine):
    return engine.chat().send("What digit is it?", max_new_tokens=2).stats


def inspected(engine):
    return inspect_chat(engine, nano.sample_messages(), 2).full_stats


@pytest.mark.parametrize("ask", [generated, generated_in_chunks, streamed, sent, inspected])
def test_no_figure_of_an_answer_has_it(engine, builds, ask):
    stats = ask(engine)
    assert len(builds) == 1
    assert 0 < stats.prompt_ms <= stats.ttft_ms < BUILD_MS and stats.tpot_ms < BUILD_MS


def test_what_is_read_ahead_of_a_question_builds(engine, builds):
    chat = engine.chat()
    chat.read("The sky is green.")
    assert len(builds) == 1


def test_a_patched_model_builds_before_its_prompt_pass(engine, builds):
    inputs = engine.prepare([nano.sample_messages()])
    with patched(engine.model, InferenceConfig()) as handle, torch.no_grad():
        assert builds == []
        engine.model(**inputs)
    assert len(builds) == 1 and 0 < handle.prompt_ms[0] < BUILD_MS


@pytest.mark.slow
def test_no_row_of_bench_has_it(engine, builds):
    rows = speed.measure(engine, {"off": InferenceConfig()}, [nano.sample_messages()], 2, 1)
    assert len(builds) == 1
    assert all(0 < row.warmup_ms < BUILD_MS for row in rows)


@pytest.mark.parametrize("next_turn", [False, True])
def test_no_needle_has_it(engine, builds, next_turn):
    pytest.importorskip("sklearn")
    answers = run({"off": engine}, Labels(depths=(0.0,)), [2], 1, 0, Asking(next_turn=next_turn, max_new_tokens=1))
    assert len(builds) == 1
    assert all(answer.ms < BUILD_MS and (answer.read_ms or 0) < BUILD_MS for answer in answers)


def test_on_other_devices_nothing_is_built(builds):
    prepare_kernels(torch.device("meta"))
    mminfer_kernels.prepare("cuda:0")
    assert builds == []


class Terminal:
    """A standard error that says it is one."""

    def __init__(self, shown):
        self.shown, self.text = shown, ""

    def isatty(self):
        return self.shown

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("shown", [False, True])
def test_a_terminal_shows_a_bar(builds, monkeypatch, shown):
    terminal = Terminal(shown)
    monkeypatch.setattr("sys.stderr", terminal)
    prepare_kernels("cpu")
    assert ("building native kernels: 100%" in terminal.text) == shown
    prepare_kernels("cpu")
    assert terminal.text.count("100%") == shown
