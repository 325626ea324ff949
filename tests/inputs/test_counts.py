"""How often a prompt's template is rendered and its media are opened: at most twice, and once."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mminfer import Engine, nano
from mminfer.cli.main import app
from mminfer.inputs import content, videos
from mminfer.inputs import images as image_files
from mminfer.inputs.parts import EmbeddingPart


class Counts:
    """Renderings of the processor's chat template, opened media and checked embeddings since `clear`."""

    def __init__(self, monkeypatch, processor_type):
        self.clear()
        render, source, check = processor_type.apply_chat_template, image_files.open_source, EmbeddingPart.__post_init__

        def rendering(*args, **kwargs):
            self.rendered += 1
            return render(*args, **kwargs)

        def opening(*args, **kwargs):
            self.opened += 1
            return source(*args, **kwargs)

        def checking(part):
            self.checked += 1
            check(part)

        monkeypatch.setattr(processor_type, "apply_chat_template", rendering)
        for loader in (image_files, videos):
            monkeypatch.setattr(loader, "open_source", opening)
        monkeypatch.setattr(EmbeddingPart, "__post_init__", checking)

    def clear(self):
        self.rendered = self.opened = self.checked = 0


@pytest.fixture
def engine():
    """A new one for each test: what is found of a processor is found again."""
    return Engine.from_pretrained("nano")


@pytest.fixture
def counts(monkeypatch, engine):
    return Counts(monkeypatch, type(engine.processor))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Forty pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    names = [str(folder / f"{n}.png") for n in range(40)]
    for n, name in enumerate(names):
        Image.fromarray(np.full((16, 16, 3), 6 * n, np.uint8)).save(name)
    return names


def images(paths):
    return [{"type": "image", "image": path} for path in paths]


def embeddings(engine, count):
    rows = torch.randn(count, 4, engine.adapter.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    return [{"type": "embedding", "embedding": part} for part in rows]


@pytest.mark.parametrize("size", [None, 300])
def test_ten_embeddings_are_checked_once_and_rendered_once(engine, counts, size):
    """Beside that, the template is asked once for what it writes of its own."""
    parts = [*embeddings(engine, 10), "What?"]
    engine.generate(parts, 1, prefill_chunk_size=size)
    assert counts.rendered <= 2 and counts.checked == 10
    counts.clear()
    engine.generate(parts, 1, prefill_chunk_size=size)
    assert counts.rendered == 1 and counts.checked == 10


def test_ten_images_are_opened_once(engine, counts, paths):
    engine.generate([*images(paths[:10]), "What?"], 1)
    assert (counts.rendered, counts.opened) == (1, 10)


def test_a_list_in_chunks_is_rendered_whole(engine, counts, paths):
    engine.generate([*images(paths), "What?"], 1, prefill_chunk_size=200)
    assert counts.rendered <= 2 and counts.opened == 40
    counts.clear()
    run = {"type": "images", "images": paths}
    list(engine.stream([run, "What?"], 1, prefill_chunk_size=200))
    assert (counts.rendered, counts.opened) == (1, 40)


def test_images_of_a_list_are_opened_when_their_piece_comes(engine, counts, paths):
    reading = engine.prepare_request([*images(paths), "What?"], prefill_chunk_size=140).readings[0]()
    assert counts.opened == 0
    opened = []
    for _ in reading:
        opened.append(counts.opened)
    assert opened[:3] == [1, 3, 5] and opened[-1] == 40


@pytest.mark.parametrize("size", [None, 200])
def test_a_chat_renders_each_turn_once(engine, counts, paths, size):
    chat = engine.chat(prefill_chunk_size=size)
    chat.read(images(paths[:12]))
    assert counts.rendered <= 2 and counts.opened == 12
    counts.clear()
    chat.send("What?", 1)
    assert (counts.rendered, counts.opened) == (1, 0)


def test_videos_of_one_size_are_limited_by_one_probe(engine, counts):
    clip = {"type": "video", "video": str(nano.samples_path() / "clip.mp4")}
    outputs = engine.generate([clip, clip, "What?"], 1, max_video_tokens=130)
    assert outputs.stats.visual_tokens == 4 * 64
    assert counts.rendered == 2 and counts.opened == 2
    counts.clear()
    engine.generate([clip, "What?"], 1, max_video_tokens=200)
    assert counts.rendered == 1 and counts.opened == 1


def test_a_typed_chat_is_asked_again_without_opening_anything(engine, counts, paths):
    chat = engine.check([*images(paths[:5]), *embeddings(engine, 2), "What?"])
    assert counts.opened == 5 and counts.checked == 2
    counts.clear()
    first, second = (engine.generate(chat, 2, prefill_chunk_size=size, output_logits=True) for size in (None, 100))
    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=1e-4)
    assert counts.opened == counts.checked == 0


@pytest.mark.parametrize("size", [(), ("--prefill-chunk-size", "300")])
@pytest.mark.slow
def test_compare_prepares_the_prompt_once_for_both(counts, paths, size, monkeypatch):
    """And the time that took counts for both."""
    load = content.load_image
    monkeypatch.setattr(content, "load_image", lambda *args, **kwargs: (time.sleep(0.1), load(*args, **kwargs))[1])
    args = ["generate", "--json", "--compare", "--preset", "off", "--prompt", "What?", "--max-new-tokens", "1", *size]
    result = CliRunner().invoke(app, [*args, *(arg for path in paths[:10] for arg in ("--image", path))])
    assert result.exit_code == 0, result.stderr
    assert counts.rendered <= 2 and counts.opened == 10
    report = json.loads(result.stdout)
    assert report["first_token_kl"] < 1e-6
    for stats in (report["stats"], report["uncompressed"]["stats"]):
        assert stats["ttft_ms"] - stats["prompt_ms"] > 1000


def test_the_time_of_preparation_counts_for_every_answer(engine, paths):
    request = engine.prepare_request([*images(paths[:3]), "What?"])
    assert 0 < request.preparation_s < 60
    late = type(request)(request.is_batch, request.inputs, preparation_s=1000.0)
    for asked in (engine, Engine(engine.model, engine.processor)):
        (output,) = asked.answer(late, 1)
        assert 1_000_000 < output.stats.ttft_ms < 1_060_000
