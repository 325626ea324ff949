"""The command line: answers with figures, one JSON object, wrong requests told plainly with exit code 2."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import av
import mminfer_kernels
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mminfer import AIMMerge, AIMPrune, InferenceConfig, LookM, OperatorSkip, nano
from mminfer.cli.main import app, main
from mminfer.cli.settings import DEFAULT_PRESET
from mminfer.config import PRESETS
from mminfer.measured import Measured, measured_presets
from mminfer.models.registry import supported_families

ROOT = Path(__file__).parents[2]
ASK = ["--prompt", "What digit is it?"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def answer(*args):
    """What `--json` prints, which is one line and nothing else."""
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("}\n") and result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def refused(*args):
    """The message of a wrong request; a defect would have raised past the command and exited with 1."""
    result = invoke(*args)
    assert result.exit_code == 2, (result.exit_code, result.exception)
    assert isinstance(result.exception, SystemExit) and result.stdout == ""
    assert "Traceback" not in result.stderr
    told = " ".join(result.stderr.split())
    error = re.search(r"\w+Error: .*", told)  # behind the bar of loading weights
    return error.group() if error else told


@pytest.fixture(scope="module")
def sample():
    return next(part["image"] for part in nano.sample_messages()[0]["content"] if part["type"] == "image")


def test_with_no_arguments_it_answers_and_says_what_that_took():
    result = invoke("generate")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == nano.sample_messages()[0]["content"][-1]["text"]
    assert lines[1] == "WB"
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for cells in (line.strip("│┃").replace("┃", "│").split("│") for line in lines[2:] if line[:1] in "│┃")
        if len(cells) == 4
    }
    assert rows["prompt tokens"][:2] == ["576", "576"]
    assert rows["visual"][:2] == ["512", "512"]
    for name in ("tokens after merging", "rows per layer", "cache", "prompt FLOPs (language model)"):
        this_run, full, kept = rows[name]
        assert this_run and full and this_run != full
        assert 0 < float(kept.removesuffix(" %")) < 100
    assert rows["cache entries per layer"][0] == rows["rows per layer"][0]
    for name in ("time to first token", "prompt pass", "time per token"):
        assert float(rows[name][0].removesuffix(" ms")) > 0
    assert rows["vision tower FLOPs"][0] == rows["vision tower FLOPs"][1] and "FLOP" in rows["vision tower FLOPs"][0]
    assert rows["peak memory"][0].endswith("iB")
    assert "decode_step" in rows["backends"][0]


def test_json_with_compare_holds_both_runs(sample):
    args = ["--image", sample, "--preset", "aim-prune", "--max-new-tokens", 2, *ASK]
    report = answer("generate", "--compare", *args)
    assert report["model"] == "nano" and report["text"] and report["uncompressed"]["text"]
    assert InferenceConfig.from_dict(report["config"]) == PRESETS["aim-prune"]
    stats, full = report["stats"], report["uncompressed"]["stats"]
    tokens = full["prompt_tokens"]
    assert stats["prompt_tokens"] == tokens and stats["visual_tokens"] == 64
    assert full["layer_rows"] == [tokens] * 6 and full["cache_bytes"] == full["full_cache_bytes"]
    assert stats["layer_rows"][0] == tokens and stats["layer_rows"][-1] == tokens - 64
    assert stats["prompt_flops"] < full["prompt_flops"] == full["full_prompt_flops"]
    assert stats["vision_flops"] == full["vision_flops"] > 0
    assert 0 < report["first_token_kl"] < 5


def test_compare_prints_both_answers_and_ratios(sample):
    args = ["--image", sample, "--preset", "aim-merge", "--max-new-tokens", 2, *ASK]
    result = invoke("generate", "--compare", *args)
    assert result.exit_code == 0, result.stderr
    question, compressed, uncompressed = result.stdout.splitlines()[:3]
    assert question == ASK[1] and compressed.strip() and uncompressed.startswith("uncompressed: ")
    lines = [line.strip("│").split("│") for line in result.stdout.splitlines()]
    measured = {cells[0].strip(): cells[1:] for cells in reversed(lines) if len(cells) == 4}
    assert float(measured["cache"][2]) < 0.75 and float(measured["prompt FLOPs (language model)"][2]) < 0.75
    for name in ("prompt pass", "time to first token", "time per token"):
        assert float(measured[name][2]) > 0
    assert float(measured["vision tower FLOPs"][2]) == 1
    assert measured["KL divergence of the first token"][0].strip().endswith("nats")


TABLE = {
    "digest-20": Measured("digest-20", 3, 100, 20.0, "abc1234"),
    "replay-30": Measured("replay-30", 95, 100, 30.2, "abc1234"),
}


@pytest.mark.parametrize(
    ("args", "told", "kept"),
    [
        (["--preset", "digest-20"], "digest-20 kept 3 % of the right answers of a real model that reads pages", 3),
        (["--preset", "replay-30"], "replay-30 kept 95 % of the right answers of a real model that reads pages", 95),
        (["--preset", "aim-prune"], "aim-prune was not measured on a real model; measure it on yours: ", None),
        (["--preset", "digest-20", "--delta", "1/16"], "digest-20, a part of this setting, kept 3 % of ", 3),
        (["--preset", "off"], None, None),
    ],
)
def test_what_a_real_model_kept_is_told_in_a_line(monkeypatch, sample, args, told, kept):
    monkeypatch.setattr("mminfer.measured.measured_presets", lambda: TABLE)
    args = ["generate", "--image", sample, *ASK, "--max-new-tokens", 1, *args]
    last = invoke(*args).stdout.splitlines()[-1]
    assert last.startswith(told) and "mminfer bench --model PATH --" in last if told else "real model" not in last
    measured = answer(*args)["measured"]
    assert measured is None if kept is None else measured["kept"] == kept


def test_the_default_is_no_preset_that_fails():
    preset = measured_presets().get(DEFAULT_PRESET)
    assert DEFAULT_PRESET in PRESETS and (preset is None or not preset.fails)
    assert f"(default: {DEFAULT_PRESET})" in invoke("generate", "--help").output


def test_a_config_file_takes_the_presets_place(tmp_path):
    config = InferenceConfig(merge=AIMMerge(0.5), skip=OperatorSkip(ffn=[5]), cache=LookM(budget=200))
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    report = answer("generate", "--config", path)
    assert InferenceConfig.from_dict(report["config"]) == config
    assert report["stats"]["merged_tokens"] == 64 + 256
    assert report["stats"]["layer_entries"] == [200] * 6


@pytest.mark.slow
def test_the_installed_entry_prints_one_json_object():
    """In a process of its own, as the console script calls it: standard output is JSON and nothing else."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", "from mminfer.cli.main import main; main()", "generate", "--json"]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["text"] == "WB" and report["stats"]["new_tokens"] == 2
    assert "Traceback" not in process.stderr


def test_steps_that_a_model_does_not_say_it_was_trained_with_are_told_in_a_line(tmp_path, monkeypatch, capsys):
    """A copy of the bundled model whose configuration is silent; the bundled one says so itself."""
    silent = tmp_path / "silent"
    shutil.copytree(nano.checkpoint_path(), silent)
    config = json.loads((silent / "config.json").read_text())
    config.pop("rope_pos_id_version")
    (silent / "config.json").write_text(json.dumps(config))
    for model, lines in ((silent, 1), ("nano", 0)):
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` puts its own there
        arguments = ["generate", "--model", model, "--preset", "v2pe-16", "--max-new-tokens", 2, *ASK]
        monkeypatch.setattr(sys, "argv", list(map(str, ["mminfer", *arguments])))
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            warnings.simplefilter("always")
            main()
        told = " ".join(capsys.readouterr().err.split())
        assert ended.value.code == 0, told
        assert told.count("warning: V2PE(delta=0.0625): nothing in the configuration of this internvl model") == lines


def test_a_video_goes_in(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for k in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * k, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    args = ["--video", path, "--preset", "off", "--max-new-tokens", 1, *ASK]
    two, three = (answer("generate", *args, "--num-frames", n)["stats"]["visual_tokens"] for n in (2, 3))
    assert two * 3 == three * 2 > 0


def test_an_image_of_ones_own_goes_in(sample):
    stats = answer("generate", "--image", sample, "--image", sample, "--max-new-tokens", 1, *ASK)["stats"]
    assert stats["visual_tokens"] == 128


def test_doctor_lists_what_there_is():
    result = invoke("doctor")
    assert result.exit_code == 0
    for name in (*supported_families(), *PRESETS, *mminfer_kernels.OPS, "reference", "native kernels"):
        assert name in result.stdout
    lines = [line.split("│") for line in result.stdout.splitlines()]
    rows = {cells[1].strip(): cells[3].strip() for cells in lines if len(cells) == 5}
    assert rows["off"] == "" and rows["v2pe-auto"] == "not measured on a real model"
    assert {name: rows[name] for name in measured_presets()} == {n: m.told() for n, m in measured_presets().items()}


def broken_images(folder):
    """Files that are no images, by what is wrong with them."""
    text = folder / "notes.png"
    text.write_text("just some notes")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = folder / "whole.png"
    Image.fromarray(pixels).save(whole)
    cut = folder / "cut.png"
    cut.write_bytes(whole.read_bytes()[:3000])
    empty = folder / "empty.png"
    empty.write_bytes(b"")
    missing = folder / "nowhere.png"
    return {"missing": missing, "text": text, "truncated": cut, "empty": empty, "folder": folder}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "No such file"),
        ("text", "not an image"),
        ("truncated", "damaged or cut short"),
        ("empty", "not an image"),
        ("folder", "a folder"),
    ],
)
def test_broken_images_are_refused(tmp_path, kind, says):
    path = broken_images(tmp_path)[kind]
    message = refused("generate", "--image", path, *ASK)
    assert message.startswith("InputError: ") and says in message
    assert path.name in message


def test_a_remote_image_needs_leave():
    message = refused("generate", "--image", "http://127.0.0.1:9/x.png", *ASK)
    assert message.startswith("InputError: ") and "allow" in message and "remote" in message


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--preset", "turbo"], "ConfigError: unknown preset 'turbo'"),
        (["--image", "x.png"], "InputError: no question"),
        (["--image", "x.png", "--prompt", "  "], "InputError: no question"),
        (["--model", "elsewhere/model"], "InputError: no question"),
        (["--config", "/nowhere/config.json"], "InputError: --config /nowhere/config.json"),
        (["--config", "/"], "InputError: --config /"),
        (["--delta", "7"], "ConfigError: delta is 7.0"),
        (["--delta", "x"], "InputError: --delta x"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--num-frames", "0"], "num-frames"),
        (["--prompt", "what is <IMG_CONTEXT> here"], "InputError: "),
    ],
)
def test_wrong_arguments_are_refused(args, says):
    assert says in refused("generate", *args)


def test_other_model_families_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    message = refused("generate", "--model", tmp_path, *ASK)
    assert message.startswith("UnsupportedModelError: model type 'gpt2'")
    assert "qwen2_5_vl" in message


OUT_OF_RANGE = InferenceConfig(prune=AIMPrune(start=14, end=22)).to_json()
BAD_CONFIGS = {
    "not JSON": ("{positions: ", "not JSON"),
    "a list": ("[]", "wanted an object"),
    "an unknown stage": ('{"attention": null}', "wanted an object with the keys"),
    "an unknown technique": ('{"merge": {"technique": "ToMe"}}', "unknown technique 'ToMe'"),
    "an unknown field": ('{"merge": {"technique": "AIMMerge", "rate": 1}}', "rate"),
    "a ratio out of range": ('{"merge": {"technique": "AIMMerge", "ratio": 25}}', "AIMMerge.ratio=25"),
    "another stage's technique": ('{"merge": {"technique": "LookM"}}', "no merge technique"),
    "layers the model does not have": (OUT_OF_RANGE, "a model of 6 layers"),
    "a skipped layer the model does not have": (
        '{"skip": {"technique": "OperatorSkip", "ffn": [6]}}',
        "a model of 6 layers",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_are_refused(tmp_path, name):
    text, says = BAD_CONFIGS[name]
    path = tmp_path / "config.json"
    path.write_text(text)
    message = refused("generate", "--config", path)
    assert message.startswith("ConfigError: ") and says in message


@pytest.mark.parametrize(
    "text",
    [
        '{"merge": "AIMMerge"}',
        '{"merge": [1]}',
        '{"merge": 5}',
        '{"merge": {"technique": ["AIMMerge"]}}',
        '{"skip": {"technique": "OperatorSkip", "ffn": {"first": 1}}}',
        '{"prune": {"technique": "AIMPrune", "start": NaN}}',
    ],
)
def test_malformed_configs_are_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert refused("generate", "--config", path).startswith("ConfigError: ")


def test_brackets_in_a_question_are_text():
    result = invoke("generate", "--prompt", "what is [bold] and [/b] here", "--max-new-tokens", 1)
    assert result.exit_code == 0, repr(result.exception)
    assert result.stdout.startswith("what is [bold] and [/b] here\n")


@pytest.mark.parametrize("args", [["--device", "banana"], ["--dtype", "float33"]])
def test_unknown_devices_and_dtypes_are_refused(args):
    assert args[1] in refused("generate", *args)


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    for path in nano.checkpoint_path().glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    message = refused("generate", "--model", tmp_path, *ASK)
    assert message.startswith("InputError: ") and "safetensors" in message


@pytest.mark.slow
def test_frames_go_between_the_bundled_images():
    """In chunks or at once, the question is answered over them."""
    whole, pieces = (
        answer("generate", "--preset", "v2pe-256", "--frames", 20, *size)
        for size in ((), ("--prefill-chunk-size", 200))
    )
    assert whole["text"] == pieces["text"] == "WB"
    assert InferenceConfig.from_dict(whole["config"]) == InferenceConfig.from_preset("v2pe-256")
    assert whole["stats"]["visual_tokens"] == pieces["stats"]["visual_tokens"] == 28 * 64
    assert whole["stats"]["prompt_tokens"] == pieces["stats"]["prompt_tokens"]


@pytest.mark.slow
def test_images_come_from_a_list(tmp_path):
    folder = nano.samples_path()
    paths = [str(path) for path in sorted(folder.glob("*.png"))]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(["", *paths, ""]))
    args = ["--prompt", "What digit is it?", "--preset", "off", "--max-new-tokens", 1]
    singly = answer("generate", *args, *(arg for path in paths for arg in ("--image", path)))
    for size in ((), ("--prefill-chunk-size", 100)):
        found = answer("generate", *args, "--images-from", listed, *size)
        assert found["stats"]["visual_tokens"] == 8 * 64
        assert found["text"] == singly["text"]
        command = ["generate", "--json", *map(str, args), "--images-from", "-", *map(str, size)]
        given = CliRunner().invoke(app, command, input=listed.read_text())
        assert json.loads(given.stdout)["text"] == singly["text"]
    listed.write_text(f"{paths[0]}\n/nowhere.png\n")
    assert "item 1: /nowhere.png" in refused("generate", *args, "--images-from", listed, "--prefill-chunk-size", 100)


def test_wrong_long_requests_are_refused():
    assert "--images-from /nowhere: no such file" in refused("generate", "--prompt", "x", "--images-from", "/nowhere")
    image = next(nano.samples_path().glob("*.png"))
    assert "--frames 3: they go between" in refused("generate", "--frames", 3, "--prompt", "x", "--image", image)
    assert "prefill_chunk_size=40" in refused("generate", "--frames", 3, "--preset", "off", "--prefill-chunk-size", 40)


@pytest.mark.slow
def test_a_long_reading_shows_a_bar_and_ends_plainly_on_ctrl_c():
    """Tokens a second and the time left are shown; then a stop gives one line and exit code 130."""
    command = [sys.executable, "-c", "from mminfer.cli.main import main; main()", "generate", "--frames", "100000"]
    command += ["--preset", "v2pe-256", "--prefill-chunk-size", "500"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    process = subprocess.Popen(
        command,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background of a shell it is ignored
    )
    seen = b""
    try:
        while seen.count(b"tokens/s") < 8:
            chunk = process.stderr.read1(4096)
            assert chunk, seen
            seen += chunk
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert re.search(rb"reading: +\d+%.*/[\d.]+M \[\d\d:\d\d<[\d:]+, .*tokens/s", seen)
    assert process.returncode == 130
    assert rest.strip().endswith(b"stopped") and b"Traceback" not in rest and not out
