"""`mminfer inspect`: a folder with a page and pictures, and refusals before weights are loaded."""

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mminfer import Engine, InferenceConfig, LookM, nano
from mminfer.cli.main import app


def inspect(*args):
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def no_weights(monkeypatch):
    def loads(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Engine, "from_pretrained", loads)


def test_a_page_and_a_picture_of_each_image(tmp_path):
    out = tmp_path / "new" / "folder"
    result = inspect("--preset", "balanced", "--out", out)
    assert result.exit_code == 0, result.output
    pictures = sorted(out.glob("*.png"))
    assert [path.name for path in pictures] == [f"image-{n:03}.png" for n in range(1, 9)]
    assert all(Image.open(path).size == (384, 384) for path in pictures)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<h1>mminfer inspect: balanced <small>on nano</small></h1>" in page
    lines = result.stdout.splitlines()
    assert lines[:2] == ["WB", "uncompressed: WB"]
    assert any(line.startswith("- AIMMerge: ") and "512 visual tokens became 168" in line for line in lines)
    assert lines[-1] == f"{out / 'index.html'} and 8 PNG files beside it"


def test_images_settings_and_a_question_of_ones_own(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(InferenceConfig(cache=LookM(0.2, 0.1)).to_json())
    image = tmp_path / "wide.png"
    Image.new("RGB", (120, 60), (200, 30, 30)).save(image)
    args = ["--image", image, "--image", image, "--prompt", "<b>What</b> [bold]digit[/b] is it?", "--config", config]
    result = inspect(*args, "--out", tmp_path, "--delta", "1/16", "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert [Image.open(path).size for path in sorted(tmp_path.glob("image-*.png"))] == [(384, 192)] * 2
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<b>What" not in page and "V2PE: visual tokens stand closer together" in page


@pytest.mark.slow
def test_frames_and_videos_go_in(tmp_path):
    assert inspect("--frames", 3, "--out", tmp_path / "a", "--max-new-tokens", 1).exit_code == 0
    assert len(list((tmp_path / "a").glob("*.png"))) == 11
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for k in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * k, np.uint8))))
        container.mux(stream.encode())
    args = ["--video", clip, "--num-frames", 3, "--prompt", "What digit is it?", "--max-new-tokens", 1]
    assert inspect(*args, "--out", tmp_path / "b").exit_code == 0
    assert len(list((tmp_path / "b").glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--preset", "turbo"], "ConfigError: unknown preset 'turbo'"),
        (["--preset", "aim", "--config", "x.json"], "InputError: --preset aim and --config x.json"),
        (["--config", "/nowhere/config.json"], "InputError: --config /nowhere/config.json"),
        (["--delta", "x"], "InputError: --delta x"),
        (["--image", "x.png"], "InputError: no question"),
        (["--image", "/nowhere.png", "--prompt", "x"], "/nowhere.png"),
        (["--image", "https://a.example/b.png", "--prompt", "x"], "InputError: "),
        (["--max-new-tokens", "0"], "max-new-tokens"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_loaded(no_weights, tmp_path, args, says):
    result = inspect(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2 and says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused(no_weights, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = inspect("--out", out)
        assert result.exit_code == 2
        assert f"InputError: --out {out}: " in " ".join(result.stderr.split())
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_that_do_not_fit_the_model_are_refused(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"skip": {"technique": "OperatorSkip", "ffn": [6]}}')
    result = inspect("--config", config, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "a model of 6 layers" in result.stderr


def test_other_options_are_those_of_generate():
    names = [set(_options(command)) for command in ("generate", "inspect")]
    assert names[1] - names[0] == {"--out"}
    assert {"--model", "--preset", "--dtype", "--device", "--allow-remote"} <= names[0] & names[1]


def _options(command):
    text = CliRunner().invoke(app, [command, "--help"]).stdout
    return [word for word in text.replace("│", " ").split() if word.startswith("--")]


@pytest.mark.slow
def test_the_bundled_pictures_are_drawn_from_the_files(tmp_path):
    """Without marks to hide it, a picture is the file, enlarged."""
    assert inspect("--preset", "off", "--out", tmp_path, "--max-new-tokens", 1).exit_code == 0
    path = next(part["image"] for part in nano.sample_messages()[0]["content"] if part["type"] == "image")
    with Image.open(path) as picture:
        small = np.asarray(picture.convert("RGB").resize((16, 16))).astype(int)
    drawn = np.asarray(Image.open(tmp_path / "image-001.png").resize((16, 16))).astype(int)
    assert np.corrcoef(small.ravel(), drawn.ravel())[0, 1] > 0.97
