"""The bundled model answers, and everything made for it can be made again."""

import builtins
import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mminfer import nano
from mminfer.errors import ConfigError


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A model this small gains nothing from more, and loses much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(nano.checkpoint_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(nano.checkpoint_path(), dtype=torch.float32).eval()


def answer(model, processor, messages):
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def sample_context():
    return json.loads((nano.samples_path() / "context.json").read_text())


def test_bundled_question_is_answered_by_the_plain_host(model, processor):
    assert answer(model, processor, nano.sample_messages()) == sample_context()["answer"]


def test_other_questions_about_the_sample(model, processor):
    items = sample_context()["items"]
    picture = next(item for item in items if "image" in item)
    fact = next(item for item in items if "word" in item)
    question = f"What digit is in image {picture['label']}?"
    assert answer(model, processor, nano.sample_messages(question)) == str(picture["digit"])
    question = f"What is the code of {fact['word']}?"
    assert answer(model, processor, nano.sample_messages(question)) == fact["code"]


def test_sample_messages_interleave_existing_pictures():
    (message,) = nano.sample_messages("Why?")
    assert message["role"] == "user"
    assert message["content"][-1] == {"type": "text", "text": "Why?"}
    pictures = [part["image"] for part in message["content"] if part["type"] == "image"]
    assert len(pictures) == 8
    assert {Image.open(path).size for path in pictures} == {(32, 32)}


def test_samples_are_made_again(tmp_path):
    pytest.importorskip("sklearn")
    from training.nano.samples import write_samples

    write_samples(tmp_path)
    bundled = sorted(path.name for path in nano.samples_path().iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == bundled
    assert json.loads((tmp_path / "context.json").read_text()) == sample_context()
    for name in bundled:
        if name.endswith(".png"):  # pixels: file bytes depend on the zlib in use
            pixels = (np.asarray(Image.open(folder / name)) for folder in (tmp_path, nano.samples_path()))
            np.testing.assert_array_equal(*pixels)


def test_unseen_pictures_are_read(model, processor):
    pytest.importorskip("sklearn")
    from training.nano.evaluate import evaluate, table

    rows = evaluate(model, processor, num_images=4, deltas=[1.0, 1 / 16], questions=12)
    for row in rows:
        for task in ("Q1", "Q2", "Q3"):
            assert row[task] > 0.85, row
            assert row[task + "_n"] >= 12
    assert table(rows).count("\n") == 4


def test_shared_prefill_answers_as_generate_does(model, processor):
    pytest.importorskip("sklearn")
    from training.nano.evaluate import evaluate

    shared, single = (
        evaluate(model, processor, num_images=2, deltas=[1 / 16], questions=2, generate=generate)[0]
        for generate in (False, True)
    )
    assert shared | {"seconds": 0} == single | {"seconds": 0}


def test_contexts_depend_on_the_seed_alone():
    from mminfer.nano import data

    first, again, other = (data.sample_context(random.Random(seed), 8) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("seed", range(20))
def test_questions_have_one_right_answer(seed):
    from mminfer.nano import data

    tasks = ["q1", "q1_none", "q2_digit", "q2_colour", "q3"]
    context = data.sample_context(random.Random(seed), 12, 3, tasks)
    shown = [f"Which image shows a {i.colour_name} {i.digit}?" for i in context.images]
    q1, q1_none, digit, colour, q3 = context.questions
    assert shown.count(q1.text) == 1
    assert context.images[shown.index(q1.text)].label == q1.answer
    assert q1_none.text not in shown
    by_label = {i.label: i for i in context.images}
    assert digit.answer == str(by_label[digit.text.split()[-1][:-1]].digit)
    assert colour.answer == by_label[colour.text.split()[-1][:-1]].colour_name
    assert f"{q3.text[12:-1]} is {q3.answer}." in " ".join(f.text for f in context.facts)


@pytest.mark.parametrize("arguments", [(0,), (401,), (4, 65), (4, 0, ["q3"]), (4, 2, ["q4"])])
def test_impossible_contexts_are_refused(arguments):
    from mminfer.nano import data

    with pytest.raises(ConfigError, match="wanted"):
        data.sample_context(random.Random(0), *arguments)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    from mminfer.nano import data

    real = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match=r"pip install mminfer\[nano\]"):
        data.load_digit_split.__wrapped__("test")


def test_checkpoint_is_what_the_code_builds(model, processor):
    from mminfer.nano import build

    built = build.build_processor()
    assert built.chat_template == processor.chat_template
    assert built.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    fresh = build.build_model(built.tokenizer)
    shapes, saved = ({n: p.shape for n, p in m.named_parameters()} for m in (fresh, model))
    assert shapes == saved


@pytest.mark.slow
def test_training_runs_from_stage_to_stage(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from training.nano import train

    monkeypatch.setattr(train, "reading_accuracy", partial(train.reading_accuracy, n=20))
    log = tmp_path / "log.jsonl"
    shared = f"--out {tmp_path / 'checkpoint'} --log {log} --threads {torch.get_num_threads()} "
    shared += "--minutes 0.001 --bank 2 --batch-tokens 300"
    for stage in ("vision", "lm", "joint", "frames"):
        monkeypatch.setattr("sys.argv", ["train", stage, *shared.split()])
        train.main()
    assert (tmp_path / "probe.safetensors").is_file()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["stage"] for r in records if "test_digit" in r] == ["vision", "lm", "joint"]
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    assert all(torch.isfinite(p).all() for p in trained.parameters())
