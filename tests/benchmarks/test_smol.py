"""The yardstick's cells: what is asked, how it is compared, and what stands in a row."""

import sys
from types import SimpleNamespace

import pytest

from benchmarks import common
from benchmarks.quality import lost, smol, smol_cells
from benchmarks.quality.smol_cells import ALL, EMBEDDINGS, PIXELS, Answer, Reading, Told, answer_tokens
from benchmarks.quality.smol_settings import Setting, chosen_settings, known_settings, preset_settings
from benchmarks.reader.books import DENSE, JOB, PAGE_KINDS, Book, Question, books
from benchmarks.tables import lost as lost_table
from mminfer import AIMMerge, Digest, InferenceConfig, InputError, LookM
from mminfer.bench.fidelity import Fidelity
from mminfer.bench.protocols import Protocol
from mminfer.bench.sweeps import cache_sweeps, token_sweeps
from mminfer.config import PRESETS
from tests.benchmarks.reader_checkpoint import write_checkpoint

COLUMNS = (
    "model setting rule budget protocol seed chunk pages kind questions right full_right stayed kept kept_low "
    "kept_high same kl cache_kept cache_bytes context_s books_of cell_s"
)
LAYERS = ("every other layer", "the upper half", "the last quarter")
HALF = InferenceConfig(cache=LookM(0.25, 0.25, text_prior=False))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    write_checkpoint(folder)
    return smol.loaded(folder)


@pytest.mark.parametrize(
    ("model", "protocol"),
    [(PIXELS, Protocol.NEXT_TURN), (EMBEDDINGS, Protocol.STREAMED), (EMBEDDINGS, Protocol.IN_PROMPT)],
)
def test_rows_of_a_cell(engine, model, protocol, monkeypatch):
    """Of a random language model: nobody is right, but nothing evicted says what the full model says."""
    monkeypatch.setattr("benchmarks.reader.books.PAGES", 2)
    monkeypatch.setattr(smol_cells, "CHUNK", 80)
    monkeypatch.setattr(smol_cells, "LONG", 4)
    monkeypatch.setattr(smol_cells, "ANSWER", 2)
    settings = [Setting("same", "none", "", InferenceConfig()), Setting("half", "LOOK-M", "50 %", HALF)]
    off, same, half = (list(rows) for rows in smol.rows(engine, settings, model, protocol, 1, 1))
    assert {tuple(row) for rows in (off, same, half) for row in rows} == {tuple(COLUMNS.split())}
    assert (half[0]["pages"], half[0]["kind"]) == (ALL, ALL)
    assert {row["pages"] for row in half} == {ALL, *PAGE_KINDS}
    assert sum(row["questions"] for row in half[1:]) == half[0]["questions"] == off[0]["questions"] > 10
    for row in (off[0], same[0]):
        assert row["same"] == 100 and row["cache_kept"] == 100 and row["kl"] == pytest.approx(0, abs=1e-4)
    assert half[0]["kl"] > 1e-4 and 45 < half[0]["cache_kept"] < 75


def test_a_setting_that_does_not_fit_is_told_and_left_out(engine, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.reader.books.PAGES", 1)
    settings = [Setting("merged", "AIM", "", InferenceConfig(merge=AIMMerge(0.5))), Setting("half", "", "", HALF)]

    def refuses(*arguments):
        raise InputError("no grid")

    monkeypatch.setattr(smol, "ask", refuses)
    assert [rows[0]["setting"] for rows in smol.rows(engine, settings, PIXELS, Protocol.NEXT_TURN, 1, 1)] == ["off"]
    assert "merged, next-turn: left out: no grid" in capsys.readouterr().err


def told(full, own, kind=JOB):
    book = Book(DENSE, 0, [], [Question(kind, "", "", 0)] * len(full))
    reading = Reading(book, [], [Answer((token, 9), right) for token, right in full])
    stats = SimpleNamespace(cache_bytes=50, full_cache_bytes=100)
    return Told(reading, [Answer((token, 7), right) for token, right in own], [Fidelity(0.5, 1.0, 4)], 2.0, stats)


def test_kept_is_of_what_the_full_model_gets_right():
    one = told([(1, True), (2, True), (3, True), (4, False)], [(1, True), (5, False), (3, True), (6, True)])
    row = next(iter(smol_cells.rows_of([one], {JOB: 1})))
    assert (row["questions"], row["right"], row["full_right"], row["stayed"]) == (4, 3, 3, 2)
    assert (row["kept"], row["same"], row["kl"], row["cache_kept"]) == (66.7, 50.0, 0.5, 50.0)
    assert row["kept_low"] < 66.7 < row["kept_high"] and row["context_s"] == 2.0
    longer = next(iter(smol_cells.rows_of([one], {JOB: 2})))
    assert longer["same"] == 0  # the second token differs
    nothing = next(iter(smol_cells.rows_of([told([(1, False)], [(1, True)])], {JOB: 1})))
    assert nothing["kept"] == "" and nothing["right"] == 1


def test_every_rule_and_preset_is_known():
    known = known_settings((50, 20))
    assert set(PRESETS) - {"off"} <= set(known)
    rules = {sweep.rule for sweep in (*cache_sweeps(), *token_sweeps())}
    assert rules <= {setting.rule for setting in known.values()}
    assert {"Digest 50 %", "Digest 20 %", "AIM merge 25 %"} <= set(known) and "Digest 10 %" not in known
    assert [s.name for s in chosen_settings(["h2o", "skip-ffn"], (50, 20))] == ["H2O 50 %", "H2O 20 %", "skip-ffn"]
    everything = chosen_settings(None, (50, 20))
    assert {s.config for s in everything} == {s.config for s in known.values()} and len(everything) < len(known)
    parts = [s.name for s in chosen_settings(["digest group"], (50,))]
    assert "Digest, layers alike 10 %" in parts and "Digest 20 %" not in parts
    with pytest.raises(InputError, match="'nothing': wanted some of Digest,"):
        chosen_settings(["nothing"], (50,))


def test_presets_and_what_papers_set_are_named_at_once():
    """By the name among the sweeps where there is one, each config once."""
    named = {name: setting.name for name, setting in preset_settings().items()}
    assert named["replay-30"] == "Replay 30 %" and named["balanced"] == "balanced" and named["aim"] == "AIM"
    assert set(PRESETS) - set(named) == {
        *("off", "linear-auto", "ntk-auto", "v2pe-auto"),
        *("digest-8k", "lookm-8k", "replay-8k"),
    }
    assert [s.name for s in chosen_settings(["Presets"], (50,))] == list(named.values())
    papers = chosen_settings(["papers"], (50, 20))
    assert len({s.config for s in papers}) == len(papers)
    skipped = [f"skip {what} of {layers}" for what in ("FFN", "attention") for layers in LAYERS]
    assert {*skipped, "AIM", "AIM merge 25 %", "FastV 50 %", "v2pe-16", "lookm-5"} <= {s.name for s in papers}
    assert {"LOOK-M pivot 50 %", "LOOK-M average 20 %", "down-sampling 25 %", "regions"} <= {s.name for s in papers}
    upper = next(s.config.skip for s in papers if s.name == "skip attention of the upper half")
    assert upper.ffn == () and upper.attention.layers(30) == tuple(range(15, 30))


def test_without_weights_the_command_ends_with_one_line(monkeypatch, tmp_path):
    def refused(cache):
        raise InputError(f"no weights in {cache}")

    monkeypatch.setattr(smol, "prepared", refused)
    monkeypatch.setattr(sys, "argv", ["smol", "--cache", str(tmp_path), "--rules", "H2O"])
    with pytest.raises(SystemExit, match=f"^smol: no weights in {tmp_path}$"):
        smol.main()


def test_a_budget_without_a_step_follows_the_others():
    """The sweeps have no step of 30 %: what differs between their steps is the budget's, or the rule has none."""
    between = {s.name: s.config.cache for s in chosen_settings(["Digest", "LOOK-M average"], (30,))}
    assert between == {
        "Digest 30 %": Digest(0.3),
        "LOOK-M average 30 %": LookM(0.15, 0.15, merge="average"),
    }

    class Stepwise(LookM):
        @classmethod
        def sweeps(cls):
            return {"Stepwise": {"50 %": cls(0.1, 0.4), "20 %": cls(0.1, 0.1)}}

    assert [s.name for s in chosen_settings(["stepwise"], (50, 30, 20))] == ["Stepwise 50 %", "Stepwise 20 %"]


def test_a_rule_that_comes_later_is_known_by_its_name():
    class Oldest(LookM):
        @classmethod
        def presets(cls):
            return {"oldest-50": cls(0.1, 0.4)}

        @classmethod
        def sweeps(cls):
            return {"Oldest": {"50 %": cls(0.1, 0.4), "20 %": cls(0.1, 0.1)}}

    assert [s.name for s in chosen_settings(["oldest", "oldest-50"], (50,))] == ["Oldest 50 %", "oldest-50"]


def test_answers_are_as_long_as_their_kind(engine):
    questions = [Question("code", "", "1234", 0), Question("job", "", "doctor", 0)]
    assert answer_tokens(engine.processor.tokenizer, questions) == {"code": 5, "job": 1}


def test_what_is_lost_where(engine, monkeypatch, tmp_path):
    """Every layer that is whole again brings the divergence down, and with all of them there is none."""
    monkeypatch.setattr("benchmarks.reader.books.PAGES", 1)
    monkeypatch.setattr(smol_cells, "LONG", 4)
    monkeypatch.setattr(smol_cells, "ANSWER", 2)
    made = [next(iter(books(1, 1, engine.processor.tokenizer)))]
    readings = [smol.refer(engine, book, EMBEDDINGS, Protocol.NEXT_TURN).reading for book in made]
    found = list(lost.rows(engine, readings, budget=20, heads_of=1))
    assert [row["what"] for row in found[:5]] == [
        "all compressed",
        *("layer restored", "layer alone compressed") * 2,
    ]
    of = {(row["what"], row["layer"], row["head"]): row["kl"] for row in found}
    assert len(found) == 5 + 3 and 0 < of["layer restored", 0, ""] < of["all compressed", "", ""]
    assert of["layer restored", 0, ""] == pytest.approx(of["layer alone compressed", 1, ""], abs=1e-4)
    every = frozenset((layer, head) for layer in range(2) for head in range(3))
    assert lost.told(engine, readings, lost.Partly(ratio=0.2, whole=every))["kl"] == pytest.approx(0, abs=1e-4)
    facts = {"model": EMBEDDINGS, "seed": 1, "books": 1}
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(lost_table, "RESULTS", tmp_path)
    assert "benchmarks.quality.lost" in lost_table.lost()
    common.write_rows("lost", [facts | row for row in found])
    lines = lost_table.lost().splitlines()
    assert lines[2].startswith("| all | 100 % |") and sum(", head" in line for line in lines) == 3
