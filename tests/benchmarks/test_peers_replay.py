"""The comparison with kvpress's KVzip: what is exported, how both sides are counted, and the worker's own door."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.peers import replay
from benchmarks.peers.cases import Case, Take, cases_of, chunk_lengths, exported
from benchmarks.peers.exchange import COLUMNS, WORKERS, PeerError
from benchmarks.peers.workers.wire import save_prompts
from benchmarks.quality import smol_cells
from benchmarks.tables import peers as tables
from mminfer import Engine, InputError
from mminfer.nano import checkpoint_path


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture(scope="module")
def case(engine):
    pytest.importorskip("sklearn")
    return cases_of(engine, "nano", 2, 1, seed=0)[0]


@pytest.fixture(scope="module")
def ours(engine, case):
    return replay.Ours(engine, [case], [50])


class FakePress:
    """What the worker's press takes from kvpress's: weights of queries at a chunk, and what goes by the scores."""

    n_sink, start_idx, end_idx = 1, 2, 5

    def _compute_cross_attention(self, module, weights):
        self._mask_causal(weights, 0)
        return weights

    def _mask_causal(self, attn_weights, window_size):
        attn_weights += 1

    def compress_post(self, model):
        self.scores = self.score_val.clone()


@pytest.fixture
def worker(monkeypatch):
    """The worker's module beside a kvpress that does nothing."""
    kvpress, presses = ModuleType("kvpress"), ModuleType("kvpress.presses")
    presses.kvzip_press = SimpleNamespace(AutoTokenizer=None)
    kvpress.presses, kvpress.KVzipPress = presses, FakePress
    kvpress.Other = type("Other", (), {"__init__": lambda self, **arguments: vars(self).update(arguments)})
    for name, module in (("kvpress", kvpress), ("kvpress.presses", presses)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(WORKERS))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])  # as it was, afterwards
    for name in ("kvzip_worker", "kvpress_worker", "wire"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("kvzip_worker")
    monkeypatch.setattr(module, "metadata", SimpleNamespace(version=lambda name: "1.0"))
    yield module
    for name in ("kvzip_worker", "kvpress_worker", "wire"):
        sys.modules.pop(name, None)


def test_chunks_split_no_picture():
    flags = [n in (2, 3, 4, 7, 8, 9) for n in range(12)]
    assert chunk_lengths(flags, 12) == [12] and chunk_lengths(flags, 6) == [6, 6]
    assert chunk_lengths(flags, 5) == [5, 5, 2] and chunk_lengths(flags, 4) == [2, 4, 4, 2]


def test_a_context_is_exported_as_a_chat_reads_it(engine, case):
    prompt = exported(engine, case)
    text = engine.processor.tokenizer.decode(prompt.input_ids + prompt.questions[0])
    assert text.count("<IMG_CONTEXT>") == 2 * 64 and text.endswith("?<|end|><|assistant|>")
    assert sum(case.chunks) == len(prompt.input_ids) and prompt.answers == case.forced
    assert prompt.pixel_values.shape[0] == 2 and len(prompt.questions) == len(case.questions)


def test_our_side_answers_and_holds_what_it_says(ours, case):
    full, half = (ours.tell(name, 0, False) for name in ("off", "Replay 50 %"))
    assert sum(case.judged(full.said)) == len(case.questions)
    assert full.entries == full.tokens and abs(half.entries / half.tokens - 0.5) < 0.02
    assert half.logits.shape == full.logits.shape == (len(case.questions), 2, full.logits.shape[-1])
    assert not torch.equal(half.logits, full.logits)
    row = replay.counts([case], [full], [full]) | replay.sizes([full])
    assert (row["kept"], row["kl"], row["cache_kept"], row["attended"]) == (100.0, 0.0, 100.0, 100.0)


def test_answers_are_forced_in_as_many_batches_as_it_takes(ours, engine, case, monkeypatch):
    monkeypatch.setattr(smol_cells, "ROWS_OF_ANSWERS", max(len(case.forced) - 1, 1))
    told = Take(engine, case.content, None).foretold(case)
    torch.testing.assert_close(told, ours.tell("off", 0, False).logits, atol=1e-4, rtol=0)


def test_the_workers_language_model_says_what_ours_says(engine, ours, case, worker, tmp_path):
    """Pictures as more words of the table give the same logits as pixels, behind questions of different lengths."""
    save_prompts([exported(engine, case)], tmp_path)
    worker.load(str(checkpoint_path()), str(tmp_path), 1, True)
    process = SimpleNamespace(ask=lambda command, **arguments: getattr(worker, command)(**arguments))
    theirs = replay.Theirs(process, [case], [50], tmp_path / "logits.safetensors")
    full = ours.tell("off", 0, False)
    told = theirs.tell("no press", 0, False)
    torch.testing.assert_close(told.logits, full.logits, atol=1e-3, rtol=0)
    again = theirs.tell("no press", 0, True)
    assert again.said == told.said == full.said and (told.entries, told.masked) == (told.tokens, 0)
    with pytest.raises(ValueError, match=r"^Other compresses behind the first forward alone$"):
        worker.read(torch.zeros(1, 4, dtype=torch.long), [2, 2], worker.made_press("Other", {"a": ["Other", {}]}))
    module = worker.attentions()[0]
    module.masked_key_indices = tuple(torch.tensor(x) for x in ([0, 0], [1, 1], [5, 7]))
    heads, layers = worker.state["model"].config.num_key_value_heads, len(worker.attentions())
    assert worker.masked_share() == 2 / (heads * layers)
    with worker.masked_for(3):
        assert [x.tolist() for x in module.masked_key_indices] == [[0, 0, 1, 1, 2, 2], [1] * 6, [5, 7] * 3]
    assert len(module.masked_key_indices[0]) == 2


def test_what_is_masked_is_as_if_it_were_not_there(engine, case, worker, tmp_path):
    """Of two questions in one batch, in which the shorter has places before it, and of a chunk of many queries."""
    save_prompts([exported(engine, case)], tmp_path)
    worker.load(str(checkpoint_path()), str(tmp_path), 1, True)
    questions, gone = [[7, 8, 9], [7, 8, 9, 10, 11]], torch.tensor([3, 20, 21])
    with torch.no_grad(), worker.known(0) as ids:
        cache = worker.read(ids, [ids.shape[1]], None)
        whole = worker.answer(cache, ids.shape[1], questions, 2, None)[1]
        less, heads = worker.copy.deepcopy(cache), worker.state["model"].config.num_key_value_heads
        held = [n for n in range(ids.shape[1]) if n not in gone]
        for layer in less.layers:
            layer.keys, layer.values = layer.keys[:, :, held], layer.values[:, :, held]
        expected = []
        for question in questions:
            positions = ids.shape[1] + torch.arange(len(question))[None]
            inputs = {"input_ids": torch.tensor([question]), "position_ids": positions}
            told = worker.state["model"](**inputs, past_key_values=worker.copy.deepcopy(less))
            expected.append(told.logits[0, -1])
        places = (torch.arange(heads).repeat_interleave(len(gone)), gone.repeat(heads))
        for module in worker.attentions():
            module.masked_key_indices = (torch.zeros(heads * len(gone), dtype=torch.long), *places)
        batch = worker.answer(cache, ids.shape[1], questions, 2, None)[1]
        torch.testing.assert_close(batch[:, 0], torch.stack(expected), atol=1e-3, rtol=0)
        assert (batch[:, 0] - whole[:, 0]).abs().amax(-1).min() > 0.01
        worker.read(ids, [ids.shape[1]], None)
    assert all(module.masked_key_indices is None for module in worker.attentions())


def test_what_is_masked_stays_masked_where_a_press_compresses_again(worker):
    module = SimpleNamespace(masked_key_indices=tuple(torch.tensor(x) for x in ([0, 0, 0], [0, 1, 1], [3, 1, 4])))
    worker.state["model"] = SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(self_attn=module)]))
    press = worker.made_press("KVzipPress", {})
    weights = press._compute_cross_attention(module, torch.zeros(1, 2, 1, 1, 6))  # a sink, places 2 to 4, queries
    low = torch.finfo(weights.dtype).min
    assert weights[0, :, 0, 0].tolist() == [[1, 1, low, 1, 1, 1], [1, 1, 1, low, 1, 1]]
    press.score_val = torch.zeros(1, 1, 2, 6)
    press.compress_post(None)
    assert press.scores[0, 0].tolist() == [[0, 0, 0, -1, 0, 0], [0, -1, 0, 0, -1, 0]]
    module.masked_key_indices = None
    assert press._compute_cross_attention(module, torch.zeros(1, 2, 1, 1, 6)).unique().tolist() == [1]


class Stub:
    """A side whose second setting loses an answer, and whose third fails."""

    def __init__(self, name, error, apart):
        self.name, self.versions, self._error, self._apart = name, "", error, apart
        self.settings = dict.fromkeys(("whole", "less", "none"))

    def tell(self, setting, number, chunked):
        if setting == "none":
            raise self._error
        said = [[1], [2], [9 if setting == "less" else 3], [9]]
        logits = torch.eye(4)[None] + self._apart
        return replay.Told(said, logits, 10, 10 if self._apart else 5, 4 if setting == "less" else 0, 2.0, 5.0)


def test_a_row_for_each_setting_of_both_sides():
    right = [[1], [2], [3], [4]]
    case = Case([], [""] * 4, [], 1, 1, {9}, lambda number, said: said == right[number])
    assert case.until_end([1, 9, 2]) == [1, 9] and case.until_end([1, 2]) == [1, 2]
    sides = [Stub("mminfer", InputError("too few"), 0.0), Stub("kvpress", PeerError("tell: no"), 0.5)]
    rows = list(replay.kept(sides, [case], True, model="nano", images=2))
    assert [r["status"] for r in rows] == ["measured", "measured", "too few", "measured", "measured", "tell: no"]
    assert all(tuple(r) == COLUMNS and r["measure"] == "kept" for r in rows)
    assert [r["logits_differ"] for r in rows] == ["", "", "", "5.0e-01", "", ""]
    less = rows[4]
    assert (less["full_right"], less["stayed"], less["kept"], less["accuracy"]) == (3, 2, 66.7, 50.0)
    assert less["kept_low"] < 66.7 < less["kept_high"] and less["kl"] == 0
    assert (less["cache_kept"], less["attended"], less["compress"]) == (100.0, 60.0, 1.5)


def test_the_table_tells_what_is_held_and_what_is_read(monkeypatch):
    right = [[1], [2], [3], [4]]
    case = Case([], [""] * 4, [], 1, 1, {9}, lambda number, said: said == right[number])
    sides = [Stub("mminfer", InputError("too few"), 0.0), Stub("kvpress", PeerError("tell: no"), 0.5)]
    origin = dict.fromkeys(("device", "threads", "torch", "transformers", "commit"), "some")
    rows = [{k: str(v) for k, v in r.items()} | origin for r in replay.kept(sides, [case], False, model="nano")]
    monkeypatch.setattr(tables, "read_rows", lambda name: rows)
    lines = tables.kept().splitlines()
    assert len(lines) == 2 + 4 + 2 and "differ from ours by 0.5 at most" in lines[-1]
    assert lines[5].endswith("| `less` | 60.0 % | 100.0 % | 66.7 | 20.8 to 93.9 | 3 of 4 | 0.0 | 1.5 |")
    assert [line.count("`none`") for line in tables.times().splitlines()[2:4]] == [1, 1]
    monkeypatch.setattr(tables, "read_rows", lambda name: [])
    assert tables.kept() == "None was measured."


@pytest.mark.slow
def test_a_run_without_the_peer(monkeypatch, capsys, tmp_path):
    pytest.importorskip("sklearn")
    args = ["--models", "nano", "--images", "2", "--questions", "1", "--budgets", "50", "--protocols", "streamed"]
    monkeypatch.setattr(sys, "argv", ["replay", *args, "--out", "-", "--env", str(tmp_path / "none")])
    replay.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum("'status': 'measured'" in line for line in lines) == 4
    assert sum("'status': 'not installed: " in line for line in lines) == 7 == len(lines) - 4


def test_without_the_peer_every_row_of_it_says_so():
    theirs = replay.Theirs("not installed", [], [50], Path())
    theirs.load(Path(), Path(), 1, False)
    with pytest.raises(PeerError, match=r"^not installed$"):
        theirs._ask("tell")
    assert list(replay.chosen(theirs.settings, ["kvzippress"])) == ["no press", "KVzipPress 50 %"]
    assert replay.chosen(theirs.settings, None) == theirs.settings
    assert len(theirs.settings) == 7 and set(replay.our_settings([20])) >= {"off", "Replay, fast 20 %"}
