"""A stream ends with its loop, whoever holds it and however the loop is left; and with the program."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mminfer import Engine, InputError

LONG = {"max_new_tokens": 600, "min_new_tokens": 600}


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


def broken_off(stream):
    for _ in stream:
        break
    return stream


def raised_in(stream):
    try:
        for _ in stream:
            raise ValueError("of the reader")
    except ValueError as error:
        return error  # whose traceback holds this frame, and so the stream


def within_a_generator(stream):
    def pieces():
        for piece in stream:  # noqa: UP028
            yield piece

    unfinished = pieces()
    next(unfinished)
    unfinished.close()
    return unfinished, stream


def taken_by_zip(stream):
    return [piece for piece, _ in zip(stream, range(2), strict=False)], stream


def forgotten(stream):
    next(stream)


@pytest.mark.parametrize("leave", [broken_off, raised_in, within_a_generator, taken_by_zip, forgotten])
def test_a_stream_ends_with_its_loop(engine, leave):
    steps = []
    hook = engine.model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    held = leave(engine.stream("Which code?", **LONG))
    gc.collect()
    before = len(steps)
    engine.generate("Hi", max_new_tokens=1)  # waits for the model
    hook.remove()
    assert before < 300 and len(steps) - before < 20
    del held


def test_going_on_with_a_stream_whose_loop_was_left_is_refused(engine):
    stream = broken_off(engine.stream("Which code?", **LONG))
    with pytest.raises(InputError, match="loop over this stream was left"):
        next(stream)
    with pytest.raises(InputError, match="loop over this stream was left"):
        "".join(stream)
    stream.close()
    assert 0 < len(stream.output.token_ids) < 600


def test_an_iterator_that_is_kept_takes_a_stream_in_parts(engine):
    want = list(engine.stream("Which code?", 20, min_new_tokens=20))
    pieces = iter(engine.stream("Which code?", 20, min_new_tokens=20))
    got = []
    for piece in pieces:
        got.append(piece)
        if len(got) == 2:
            break
    assert got + list(pieces) == want
    assert next(pieces, None) is None


def test_a_stream_that_waits_for_the_model_is_closed_at_once(engine):
    with engine.stream("Which code?", 5000, min_new_tokens=5000) as first:
        next(first)
        second = engine.stream("Which code?", **LONG)
        second.close()
        assert second.output is None and first.output is None


@pytest.mark.slow
def test_the_end_of_the_program_stops_streams():
    """No hang, and no thread that computes while the interpreter goes away."""
    program = (
        "import mminfer\n"
        "engine = mminfer.Engine.from_pretrained('nano')\n"
        "stream = engine.stream('Which code?', 100_000, min_new_tokens=100_000)\n"
        "next(stream)\n"
        "raise SystemExit(3)"
    )
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 3, run.stderr
