"""Videos through the engine: files of both common kinds, by number, rate and cap; long ones in bounded memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from mminfer import AIMMerge, Engine, InferenceConfig, InputError, nano
from mminfer.media import frames, load_video, read_video
from mminfer.metrics.memory import peak_memory
from training.nano.samples import CLIP_FPS, write_clip

CLIP = nano.samples_path() / "clip.mp4"


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


def ask(path):
    return [{"role": "user", "content": [{"type": "video", "video": str(path)}, {"type": "text", "text": "What?"}]}]


def visual_tokens(engine, path, **media):
    return engine.generate(ask(path), max_new_tokens=1, **media).stats.visual_tokens


def test_the_bundled_clip_shows_the_bundled_pictures():
    frames, facts = read_video(CLIP, fps=1)
    assert facts["total_num_frames"] == 8 * CLIP_FPS and facts["fps"] == CLIP_FPS
    names = [item["image"] for item in nano_context()["items"] if "image" in item]
    for frame, name in zip(frames, names, strict=True):
        shown = np.asarray(Image.open(nano.samples_path() / name).resize((128, 128), Image.Resampling.NEAREST), float)
        assert np.abs(frame - shown).mean() < 25  # lossy


def nano_context():
    import json

    return json.loads((nano.samples_path() / "context.json").read_text())


@pytest.mark.parametrize(
    ("media", "frames"),
    [
        ({}, 8),
        ({"num_frames": 3}, 3),
        ({"fps": 2}, 16),
        ({"num_frames": 99}, 32),
        ({"fps": 4, "max_video_tokens": 700}, 10),
    ],
)
def test_frames_by_number_rate_and_cap(engine, media, frames):
    assert visual_tokens(engine, CLIP, **media) == 64 * frames


def test_a_cap_below_one_frame_is_refused(engine):
    with pytest.raises(InputError, match="64 tokens"):
        engine.generate(ask(CLIP), max_video_tokens=63)


@pytest.mark.slow
def test_webm_and_mp4_give_the_same_prompt(engine, tmp_path):
    pictures = [Image.new("RGB", (32, 32), (30 * n, 200 - 20 * n, 90)) for n in range(8)]
    for name in ("clip.webm", "clip.mp4"):
        write_clip(tmp_path / name, pictures)
        frames, _ = read_video(tmp_path / name, fps=1)
        np.testing.assert_allclose(frames.mean((1, 2)), [np.asarray(p).mean((0, 1)) for p in pictures], atol=12)
        assert visual_tokens(engine, tmp_path / name) == 512


def test_merging_a_video_and_turns_about_it(engine):
    engine = Engine(engine.model, engine.processor, InferenceConfig(merge=AIMMerge(0.25)))
    output = engine.generate(ask(CLIP), max_new_tokens=1)
    assert output.stats.visual_tokens - 512 == 0
    assert output.stats.prompt_tokens - output.stats.merged_tokens == 512 - 128
    chat = engine.chat(fps=1)
    chat.read(ask(CLIP)[0]["content"][:1])
    assert chat.send("What?", max_new_tokens=1).stats.prompt_tokens < 20


@pytest.mark.slow
def test_ten_thousand_frames_stay_in_bounded_memory(tmp_path):
    """10,000 frames of 128 x 128 are 469 MiB of pixels; only the sampled ones are kept."""
    path = tmp_path / "long.mp4"
    write_clip(path, [Image.new("RGB", (32, 32), (n % 256, 0, 0)) for n in range(2500)])
    with peak_memory(torch.device("cpu")) as before:
        read_video(path, num_frames=1)
    with peak_memory(torch.device("cpu")) as after:
        frames, facts = read_video(path, num_frames=50)
    assert facts["total_num_frames"] == 10_000 and len(frames) == 50
    assert after.bytes - before.bytes < 64 * 2**20


def test_frames_come_one_by_one_and_are_those_of_the_sampled_video(tmp_path):
    path = tmp_path / "clip.mp4"
    write_clip(path, [Image.new("RGB", (32, 32), (40 * k, 0, 0)) for k in range(6)])
    for how in ({"num_frames": 5}, {"fps": 2}, {"num_frames": 1000}):
        whole = load_video(path, **how)
        singly = [np.asarray(image) for image in frames(path, **how)]
        assert np.array_equal(np.stack(singly), whole)
    assert sum(1 for _ in frames(path)) == 6 * 4
    first = next(frames(path))
    assert first.mode == "RGB"


@pytest.mark.parametrize(("how", "says"), [({"num_frames": 0}, "num_frames is 0"), ({"fps": -1}, "fps is -1")])
def test_frames_refuse_what_a_video_refuses(tmp_path, how, says):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video at all")
    with pytest.raises(InputError, match=says):
        next(frames(path, **how))
    with pytest.raises(InputError, match="not a video that PyAV can read"):
        next(frames(path))
    with pytest.raises(InputError, match="No such file"):
        next(frames(tmp_path / "none.mp4"))
