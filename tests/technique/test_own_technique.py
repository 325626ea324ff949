"""A technique of a user's own works wherever the library's do, and nothing in the package names it."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mminfer import ConfigError, Engine, InferenceConfig, patched
from mminfer.bench.contexts import Context
from mminfer.bench.plan import Plan, measure
from mminfer.bench.protocols import Protocol
from mminfer.bench.sweeps import cache_sweeps
from mminfer.cli.main import app
from mminfer.config import PRESETS, TECHNIQUES
from mminfer.inspection import inspect_chat, page_html
from mminfer.inspection.support import YES, support_table
from mminfer.inspection.words import sentences
from mminfer.layout import TokenLayout
from mminfer.nano import sample_messages
from mminfer.technique import (
    CacheEntries,
    CacheTechnique,
    LayerView,
    MergeTechnique,
    PositionTechnique,
    PruneTechnique,
    Technique,
)
from tests.tiny import IMAGE, tiny_inputs, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "add_a_technique.py"


@pytest.fixture(scope="module")
def example():
    """The example's module, as the program of a user would have it."""
    spec = importlib.util.spec_from_file_location("add_a_technique", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain():
    return Engine.from_pretrained("nano")


@pytest.fixture
def engine(example, plain):
    return Engine(plain.model, plain.processor, InferenceConfig(cache=example.KeyNorm(0.3)))


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert out.startswith("WB - ") and "KeyNorm: behind the prompt" in out


def test_it_stands_in_configurations(example):
    config = InferenceConfig(cache=example.KeyNorm(0.3))
    assert InferenceConfig.from_json(config.to_json()) == config
    assert InferenceConfig.from_preset("key-norm-20").cache == example.KeyNorm(0.2)
    assert "key-norm-50" in PRESETS and "KeyNorm" in TECHNIQUES
    assert config.cache.describe().startswith("Keeps 30 %")
    with pytest.raises(ConfigError, match="KeyNorm"):
        InferenceConfig(prune=example.KeyNorm())


def test_it_works_at_the_engines_door(engine):
    whole = engine.generate(sample_messages(), 4)
    assert {round(n / whole.stats.prompt_tokens, 1) for n in whole.stats.layer_entries} == {0.3}
    chunked = engine.generate(sample_messages(), 4, prefill_chunk_size=100)
    assert all(n <= 0.3 * chunked.stats.prompt_tokens + 1 for n in chunked.stats.layer_entries)


def test_its_chats_can_be_saved(engine, tmp_path):
    chat = engine.chat()
    chat.read(sample_messages()[0]["content"][:-1])
    chat.save(tmp_path / "chat.safetensors")
    again = engine.load_chat(tmp_path / "chat.safetensors")
    assert again.send("Which image shows a blue 1?").token_ids == chat.send("Which image shows a blue 1?").token_ids


def test_it_works_in_a_patched_batch(example):
    model = tiny_model("qwen2_5_vl")
    with patched(model, InferenceConfig(cache=example.KeyNorm(0.5))) as handle:
        model.generate(**tiny_inputs("qwen2_5_vl", [[20, IMAGE, 9], [30]]), max_new_tokens=3)
    (record,) = handle.records
    assert all(e == n // 2 for layer in record.layers for e, n in zip(layer.entries, record.prompt, strict=True))


def test_it_is_refused_where_a_window_slides(example):
    with pytest.raises(ConfigError, match=r"KeyNorm: .* sliding window"):
        patched(tiny_model("gemma3"), InferenceConfig(cache=example.KeyNorm())).__enter__()
    assert support_table()["llava"]["KeyNorm"] == YES and "sliding" in support_table()["gemma3"]["KeyNorm"]


@pytest.mark.slow
def test_it_is_measured(engine):
    content = tuple(sample_messages()[0]["content"][:-1])
    plan = Plan([Context(content, ("Which image shows a blue 1?",))], 1, 4, 1, list(Protocol), None)
    timed, compared, _ = measure(plan, {"own": engine})
    assert [row.setting for row in timed] == ["host", "own"]
    assert [row.protocol for row in compared] == ["in-prompt", "next-turn", "streamed"]
    assert all(29 < row.cache_kept < 31 for row in compared if row.protocol != "streamed")
    assert "KeyNorm" not in [sweep.rule for sweep in cache_sweeps()]  # it brings no sweep


def test_commands_take_the_file(tmp_path, example):
    """`bench` and `inspect` by the file's preset and by a configuration that names its class."""
    (tmp_path / "config.json").write_text(InferenceConfig(cache=example.KeyNorm(0.4)).to_json())
    file = ["--technique-file", str(EXAMPLE)]
    settings = ["--preset", "key-norm-50", "--config", str(tmp_path / "config.json")]
    few = ["--images", "2", "--contexts", "1", "--questions", "1", "--repeats", "0", "--new-tokens", "2", "--json"]
    run = CliRunner().invoke(app, [*file, "bench", *settings, *few])
    assert run.exit_code == 0, run.output
    rows = json.loads(run.stdout)["rows"]
    assert [round(row["cache_kept"], -1) for row in rows] == [50, 40]
    run = CliRunner().invoke(app, [*file, "inspect", "--preset", "key-norm-20", "--out", str(tmp_path)])
    assert run.exit_code == 0 and "KeyNorm: behind the prompt" in run.output, run.output


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "no such Python file"),
        ("1 / 0", "it raised ZeroDivisionError"),
        ("raise SystemExit(3)", "it raised SystemExit"),
        ("x = 1", "it defines no technique"),
    ],
)
def test_files_without_a_technique_are_refused(tmp_path, text, wanted):
    path = tmp_path / "own.py"
    if text is not None:
        path.write_text(text)
    run = CliRunner().invoke(app, ["--technique-file", str(path), "doctor"], env={"COLUMNS": "400"})
    assert run.exit_code == 2 and wanted in " ".join(run.output.split())


def test_it_is_inspected(engine):
    found = inspect_chat(engine, sample_messages(), 2)
    assert found.evicts and found.importance_from.startswith("score by KeyNorm")
    assert "KeyNorm" in page_html(found, "own") and "the rest was dropped" in "".join(sentences(found))


@pytest.mark.slow
def test_a_file_in_a_room_is_found(tmp_path):
    """A technique added to the library is its file and its test: presets, plots and tables find it."""
    above = ("import mminfer\n", "from mminfer.inspection", "from mminfer.nano")  # which a room may not know
    example = EXAMPLE.read_text().partition("\n\ndef main()")[0].splitlines(keepends=True)
    own = "".join(line for line in example if not line.startswith(above))
    (tmp_path / "own_rule.py").write_text(own.replace("KeyNorm", "OwnRule").replace("key-norm", "own"))
    program = f"""
import mminfer.cache
mminfer.cache.__path__.append({str(tmp_path)!r})
from mminfer.config import PRESETS, TECHNIQUES
from mminfer.inspection.support import technique_variants
assert TECHNIQUES["OwnRule"].__module__ == "mminfer.cache.own_rule"
assert "own-20" in PRESETS and "OwnRule" in technique_variants()
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(EXAMPLE.parents[1] / part) for part in ("", "kernels"))}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def own():
    """Techniques of other stages, defined when a test asks for them."""

    @dataclass(frozen=True)
    class DropEverySecond(PruneTechnique):
        """Every second visual token leaves behind the first layer."""

        def check(self, spec):
            """Any model will do."""

        def prunes(self, layer_idx, num_layers):
            return layer_idx == 0

        def apply(self, view: LayerView) -> torch.Tensor:
            visual = view.is_visual.nonzero()[:, 0]
            stays = torch.ones(len(view.is_visual), dtype=torch.bool)
            stays[visual[1::2]] = False
            return stays.nonzero()[:, 0]

    @dataclass(frozen=True)
    class DropTheLastHalf(MergeTechnique):
        """Of each image only the first half enters the language model; nothing is merged."""

        def check(self, spec):
            """Any model will do."""

        def apply(self, inputs_embeds: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, TokenLayout]:
            place = torch.arange(len(layout))
            for image in layout.image_id[layout.is_visual].unique():
                rows = (layout.image_id == image).nonzero()[:, 0]
                place[rows[len(rows) // 2 :]] = -1
            index = (place >= 0).nonzero()[:, 0]
            return inputs_embeds[index], layout.select(index)

    @dataclass(frozen=True)
    class HalfSpeed(PositionTechnique):
        """Every token advances the position by a half."""

        @property
        def fractional(self):
            return True

        def check(self, spec):
            """Any model will do."""

        def apply(self, layout: TokenLayout, max_positions: int) -> TokenLayout:
            return layout.at(layout.position / 2, layout.next_position / 2)

    return InferenceConfig.of(DropEverySecond(), DropTheLastHalf(), HalfSpeed())


def test_own_techniques_of_other_stages_work_too(plain, own):
    engine = Engine(plain.model, plain.processor, own)
    stats = engine.generate(sample_messages(), 2).stats
    removed = stats.visual_tokens // 2
    assert stats.merged_tokens == stats.prompt_tokens - removed
    assert stats.layer_rows[1:] == (stats.merged_tokens - removed // 2,) * (len(stats.layer_rows) - 1)
    found = inspect_chat(engine, sample_messages(), 2)
    assert [s.partition(":")[0] for s in sentences(found)] == ["HalfSpeed", "DropTheLastHalf", "DropEverySecond"]
    assert found.layers[0].left == removed // 2
    assert found.last_position == pytest.approx(found.full_last_position / 2, abs=1)


def test_two_techniques_of_a_stage_are_refused(own):
    with pytest.raises(ConfigError, match="both work in prune"):
        InferenceConfig.of(own.prune, own.prune)


def test_classes_that_cannot_be_saved_are_refused():
    class Loose(MergeTechnique):
        def check(self, spec):
            """Any model will do."""

        def apply(self, inputs_embeds, layout):
            return inputs_embeds, layout

    with pytest.raises(ConfigError, match=r"Loose is no frozen dataclass.*@dataclass\(frozen=True\)"):
        InferenceConfig(merge=Loose())


def test_names_are_told_apart():
    """A notebook may define its class again; another class of a known name is refused."""

    def define():
        @dataclass(frozen=True)
        class Again(CacheTechnique):
            def apply(self, view):
                return view.entries

        return Again

    first, second = define(), define()
    assert first is not second and TECHNIQUES["Again"] is second
    with pytest.raises(ConfigError, match=r"a technique named LookM is defined already, in mminfer\.cache\.lookm"):
        type("LookM", (CacheTechnique,), {"apply": lambda self, view: view.entries})
    assert TECHNIQUES["LookM"].__module__ == "mminfer.cache.lookm"


def test_what_is_no_technique_is_not_listed():
    class _Private(CacheTechnique):
        def apply(self, view):
            return view.entries

    class Wrapper(CacheTechnique, register=False):
        def apply(self, view):
            return view.entries

    class Unfinished(CacheTechnique):
        """Without `apply`."""

    assert not {"_Private", "Wrapper", "Unfinished", "CacheTechnique", "Technique"} & set(TECHNIQUES)
    assert all(issubclass(found, Technique) for found in TECHNIQUES.values())


def test_presets_and_sweeps_are_not_inherited():
    """A class made from LookM does not claim LookM's names."""

    @dataclass(frozen=True)
    class QuietLookM(TECHNIQUES["LookM"]):
        """LOOK-M under another name."""

    assert PRESETS["lookm-20"].cache == TECHNIQUES["LookM"](0.1, 0.1)
    assert type(PRESETS["lookm-20"].cache) is TECHNIQUES["LookM"]
    assert [sweep.rule for sweep in cache_sweeps()].count("LOOK-M pivot") == 1
    assert QuietLookM().describe().startswith("Keeps 20 %")


def made(**methods):
    """A cache technique of one method or more."""
    return dataclass(frozen=True)(
        type("Made", (CacheTechnique,), {"apply": lambda self, view: view.entries, **methods})
    )


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ({"apply": lambda self, view: None}, "Made gave NoneType, wanted CacheEntries"),
        ({"apply": lambda self, view: view.keys}, "Made gave Tensor, wanted CacheEntries"),
        ({"apply": lambda self, view: view.entries.last(0)}, r"with S of 1 or more"),
        ({"apply": lambda self, view: CacheEntries(view.keys, view.keys)}, "Made lost the column is_visual"),
        ({"across_layers": True, "compress_layers": lambda self, layers, *_: layers[:2]}, "gave 2 layers of 6"),
    ],
)
def test_what_a_cache_gives_back_is_checked(plain, method, wanted):
    engine = Engine(plain.model, plain.processor, InferenceConfig(cache=made(**method)()))
    chat = engine.chat()
    with pytest.raises(ConfigError, match=wanted):
        chat.send("hello", 2)
    assert not chat.cache.layers
    with pytest.raises(ConfigError, match=wanted):
        inspect_chat(engine, "hello", 2)


@pytest.mark.parametrize("columns", [("nope",), "score", ("keys",)])
def test_columns_that_do_not_exist_are_refused(columns):
    with pytest.raises(ConfigError, match=r"Made\.columns=.*wanted a tuple of is_visual, score, size, source"):
        InferenceConfig(cache=made(columns=columns)())


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (lambda n: torch.ones(n, dtype=torch.bool), r"gave torch\.bool of shape .*mask\.nonzero"),
        (lambda n: [0, n - 1], "gave list"),
        (lambda n: torch.tensor([2, 1, n - 1]), "wanted them ascending"),
        (lambda n: torch.tensor([1, 1, n - 1]), "each once"),
        (lambda n: torch.arange(n - 1), "the last row among them"),
        (lambda n: torch.tensor([-1, n - 1]), "wanted them ascending"),
        (lambda n: torch.empty(0, dtype=torch.int64), "wanted them ascending"),
    ],
)
def test_what_a_pruning_rule_gives_back_is_checked(plain, rows, wanted):
    """A mask would be taken for the rows 0 and 1."""

    @dataclass(frozen=True)
    class Prunes(PruneTechnique):
        def check(self, spec):
            """Any model will do."""

        def prunes(self, layer_idx, num_layers):
            return layer_idx == 1

        def apply(self, view):
            return rows(len(view.is_visual))

    with pytest.raises(ConfigError, match=f"Prunes.apply {wanted}" if wanted.startswith("gave") else wanted):
        Engine(plain.model, plain.processor, InferenceConfig.of(Prunes())).generate("hello there", 2)


def test_presets_that_are_taken_are_refused_by_name():
    before = PRESETS["aim"]
    made(presets=classmethod(lambda cls: {"off": cls()}))
    with pytest.raises(ConfigError, match=r"Made\.presets\(\) names 'off', which is a preset already"):
        InferenceConfig.from_preset("off")
    made(presets=classmethod(lambda cls: 1 / 0))
    with pytest.raises(ConfigError, match=r"Made\.presets\(\) failed: division by zero"):
        InferenceConfig.from_preset("aim")
    made()
    assert PRESETS["aim"] == before


def test_settings_without_a_default_are_left_out_of_tables():
    @dataclass(frozen=True)
    class Required(CacheTechnique):
        share: float

        def apply(self, view):
            return view.entries

    assert "Required" not in support_table()["llava"]
    assert InferenceConfig.from_json(InferenceConfig(cache=Required(0.5)).to_json()).cache == Required(0.5)


def test_settings_that_would_be_lost_are_refused(example):
    class Undecorated(example.KeyNorm):
        extra: int = 3

    with pytest.raises(ConfigError, match=r"Undecorated\.extra is no setting.*@dataclass\(frozen=True\)"):
        InferenceConfig(cache=Undecorated())

    @dataclass(frozen=True)
    class Nested(example.KeyNorm):
        pairs: tuple = ((1, 2), (3, 4))

    assert InferenceConfig.from_json(InferenceConfig(cache=Nested()).to_json()) == InferenceConfig(cache=Nested())

    @dataclass(frozen=True)
    class Taken(example.KeyNorm):
        technique: str = "x"

    with pytest.raises(ConfigError, match=r"Taken\.technique: .* rename the field"):
        InferenceConfig(cache=Taken())
    with pytest.raises(ConfigError, match="'aim' is no technique"):
        InferenceConfig.of("aim")
