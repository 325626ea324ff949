"""Comparisons with peers: what is exchanged, how it is scored, and what a run says of a peer that is not there."""

import sys

import pytest
import torch

from benchmarks.peers import kvpress, openvino
from benchmarks.peers.exchange import COLUMNS, WORKERS, PeerError, Worker, peer_python, row, sample_prompts, score
from benchmarks.peers.workers.wire import Prompt, read_prompts, save_prompts
from mminfer import Engine
from mminfer.nano import checkpoint_path

FAKE = f"""
import os, sys
sys.path.insert(0, {str(WORKERS)!r})
from pathlib import Path
import torch
from safetensors.torch import save_file
from wire import read_prompts, serve

def load(checkpoint, prompts, threads):
    print("a library that talks")
    global asked
    asked = read_prompts(Path(prompts))
    return {{"fake": "1.0"}}

def answer(prompt, press, arguments, out):
    if press == "KnormPress":
        raise ValueError("no norm\\nsecond line")
    answers = torch.tensor(asked[prompt].answers)
    save_file({{"logits": 9.0 * torch.nn.functional.one_hot(answers, 1187).float()}}, out)
    return {{"tokens": len(asked[prompt].input_ids), "entries": 5 if press else len(asked[prompt].input_ids)}}

def decode(prompt, press, arguments, steps):
    return {{"tokens": 10, "entries": 5, "read_ms": 7.0, "step_ms": [2.0] * steps}}

def export(model, out):
    raise ValueError("no such architecture")

def die():
    print("last words", file=sys.stderr)
    os._exit(3)

serve({{f.__name__: f for f in (load, answer, decode, export, die)}})
"""


def started(folder):
    script = folder / "fake_worker.py"
    script.write_text(FAKE)
    return Worker(sys.executable, script, 1)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with started(tmp_path_factory.mktemp("worker")) as worker:
        yield worker


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture(scope="module")
def prompts(engine):
    pytest.importorskip("sklearn")
    return sample_prompts(engine.processor, 2, 1, seed=0)


def test_prompts_come_back_as_they_went(prompts, tmp_path):
    gone = [*prompts, Prompt([3, 4], torch.randn(1, 3, 2, 2), [[5]], [[6, 1]], ["q3"])]
    save_prompts(gone, tmp_path)
    back = read_prompts(tmp_path)
    assert len(back) == len(gone) > 1
    for a, b in zip(gone, back, strict=True):
        assert [a.input_ids, a.questions, a.answers, a.kinds] == [b.input_ids, b.questions, b.answers, b.kinds]
        assert torch.equal(a.pixel_values, b.pixel_values)


def test_prompts_are_those_of_a_chat(engine, prompts):
    """Context and question together are what the chat template makes of them, without what follows."""
    asked = prompts[0]
    tokenizer = engine.processor.tokenizer
    text = tokenizer.decode(asked.input_ids + asked.questions[0])
    assert text.count("<IMG_CONTEXT>") == 2 * 64 and text.endswith("?<|end|><|assistant|>")
    assert all(len(tokens) == 2 and tokens[1] == tokenizer.eos_token_id for tokens in asked.answers)
    assert len(asked.questions) == len(asked.answers) == len(asked.kinds) > 1


def test_an_answer_is_right_if_all_its_tokens_are():
    asked = [Prompt([0], torch.zeros(0), [[0]] * 3, [[1, 4], [2, 4], [3, 4]], ["q1", "q2_digit", "q3"])]
    logits = torch.zeros(3, 2, 5)
    for question, tokens in enumerate(([1, 4], [2, 0], [0, 4])):  # right, does not end, wrong
        for place, token in enumerate(tokens):
            logits[question, place, token] = 10
    figures = score(asked, [logits], [logits])
    assert figures == {"questions": 3, "accuracy": 33.3, "Q1": 100.0, "Q2": 0.0, "Q3": 0.0, "kl": 0.0}
    other = logits.clone()
    other[0, 0] = 0  # the first token of one answer is anybody's guess
    p = torch.tensor([0.0, 10, 0, 0, 0]).softmax(0)
    expected = (p * (p * 5).log()).sum().item() / 3
    assert score(asked, [other], [logits])["kl"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_workers_errors_and_end_are_told(tmp_path):
    with started(tmp_path) as worker:
        with pytest.raises(PeerError, match=r"^export: ValueError: no such architecture$"):
            worker.ask("export", model="", out="")
        with pytest.raises(PeerError, match=r"^unheard: KeyError"):
            worker.ask("unheard")
        for _ in range(2):
            with pytest.raises(PeerError, match=r"^die: ended with 3: last words$"):
                worker.ask("die")


@pytest.mark.slow
def test_both_sides_are_asked_and_scored_alike(engine, prompts, worker, tmp_path):
    save_prompts(prompts, tmp_path)
    ours, theirs = kvpress.Ours(engine.model, prompts), kvpress.Theirs(worker, tmp_path, 1)
    ours.settings = {name: ours.settings[name] for name in ("off", "lookm-20", "lookm-20-no-text-prior")}
    rows = {r["setting"]: r for r in kvpress.quality([ours, theirs], prompts, [0], images=2, seed=0)}
    assert all(tuple(r) == COLUMNS for r in rows.values())
    tokens, asked = len(prompts[0].input_ids), len(prompts[0].questions)
    assert rows["off"]["cache_kept"] == 100 and rows["off"]["kl"] == 0 and rows["off"]["questions"] == asked
    assert rows["lookm-20-no-text-prior"]["entries"] == int(0.2 * tokens) and rows["lookm-20"]["kl"] > 0
    assert rows["no press"]["accuracy"] == 100 and float(rows["no press"]["logits_differ"]) > 1
    assert rows["SnapKVPress 20 %"]["entries"] == 5 and rows["SnapKVPress 20 %"]["status"] == "measured"
    assert rows["KnormPress 5 %"]["status"] == "answer: ValueError: no norm"
    timed = list(kvpress.decoding([ours, theirs], 0, 3, 1, images=2))
    assert [r["system"] for r in timed[:4]] == ["mminfer", "kvpress"] * 2
    assert timed[0]["median_ms"] > 0 and timed[1]["median_ms"] == 2 and timed[1]["read_ms"] == 7


def test_the_patched_forward_answers_as_a_chat_does(engine, prompts):
    """The exported token ids, by the door that the comparison takes, give what `model.generate` gives."""
    asked = prompts[0]
    held = kvpress.Ours(engine.model, prompts).answer("off", 0)
    ids = torch.tensor([asked.input_ids + asked.questions[0]])
    plain = engine.model(input_ids=ids, pixel_values=asked.pixel_values, logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(held.logits[0, 0], plain, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_a_row(monkeypatch, capsys, tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(PeerError, match=r"^not installed: .*python3 -m venv .* -m pip install -q kvpress"):
        peer_python(tmp_path / "none", kvpress.PACKAGES, install=False)
    args = ["--images", "2", "--questions", "1", "--repeats", "0", "--decode-images", "1", "--out", "-"]
    monkeypatch.setattr(sys, "argv", ["kvpress", *args, "--env", str(tmp_path / "none")])
    kvpress.main()
    lines = capsys.readouterr().out.splitlines()
    missing = [line for line in lines if "'system': 'kvpress'" in line]
    assert len(missing) == 9 and all("'status': 'not installed: " in line for line in missing)
    assert sum("'status': 'measured'" in line for line in lines) == len(lines) - 9 > 0


def test_a_model_that_a_peer_does_not_load_is_a_row(worker):
    model = openvino.Model("nano", checkpoint_path(), 32)
    args = type("Arguments", (), {"images": 1, "threads": 1, "tokens": 2, "repeats": 1})
    rows = list(openvino.compare(model, worker, "", args))
    theirs = [r["status"] for r in rows if r["system"] == "openvino"]
    assert theirs == ["not loadable: export: ValueError: no such architecture"] * 2
    ours = {r["setting"]: r for r in rows if r["system"] == "mminfer"}
    assert list(ours) == list(openvino.OURS) and all(r["ttft_ms"] > 0 for r in ours.values())
    assert ours["aim"]["tokens"] == ours["off"]["tokens"] - 48


def test_small_parts():
    assert openvino._common("ab ", "abc") == "2 of 3" and openvino._common("abc", "abc") == "3 of 3"
    with pytest.raises(ValueError, match="no column for speed"):
        row(speed=1)
