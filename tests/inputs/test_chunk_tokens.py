"""Chunks hold the tokens of the whole prompt, whatever stands beside a medium; compared with the host's rendering."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mminfer import Engine, InputError
from mminfer.inputs.content import MediaOptions
from tests.processors import PROCESSORS, model_and_processor, reader_of

VIDEO_FAMILIES = ["internvl", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm"]
TEXTS = st.one_of(
    st.sampled_from(
        [
            "x",
            "Then comes a clip:",
            "a=",
            "1",
            "12",
            " ",
            "\n",
            "\n\n",
            "a\n\n",
            "\n\nb",
            " a ",
            "Frame1: ",
            "<",
            "<0.2 s",
            "?",
        ]
    ),
    st.text(alphabet="aF1<=.? \n\té漢", max_size=6),
    st.just("<|user|>"),
)
MEDIA = st.sampled_from(["IMAGE", "VIDEO", "VIDEO", "ROWS", ""])
PARTS = st.lists(st.tuples(MEDIA, TEXTS), min_size=1, max_size=6).map(
    lambda pairs: [part for pair in pairs for part in pair]
)


def content_of(kinds, width):
    generator = torch.Generator().manual_seed(1)
    made = {
        "IMAGE": lambda k: {"type": "image", "image": Image.new("RGB", (32, 32), (10 * k, 0, 90))},
        "VIDEO": lambda k: {"type": "video", "video": np.full((2, 32, 32, 3), 10 * k, np.uint8)},
        "ROWS": lambda k: {"type": "embedding", "embedding": torch.randn(2, width, generator=generator)},
    }
    return [made[kind](k) if kind in made else kind for k, kind in enumerate(kinds)]


def whole_and_pieces(family, kinds, size, before=()):
    """Model inputs of a chat at once and in pieces; the parts before stand in an earlier turn."""
    reader = reader_of(family)
    chat = [{"role": "user", "content": [*content_of(kinds, 64), "What?"]}]
    if before:
        chat = [{"role": "system", "content": "Look. "}, *turns(content_of(before, 64)), *chat]
    pieces = list(reader.readings(chat, MediaOptions(), size)())
    return reader.inputs([chat], MediaOptions()), pieces


def turns(content):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": " It is\n7 "}]


def ids_of(pieces):
    return torch.cat([piece["input_ids"] for piece in pieces], 1)


@pytest.mark.parametrize("family", PROCESSORS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(kinds=PARTS, before=st.one_of(st.just([]), PARTS), size=st.sampled_from([1, 40, 10_000]))
def test_pieces_hold_the_tokens_of_the_whole(family, kinds, before, size):
    if family not in VIDEO_FAMILIES:
        kinds, before = ([kind for kind in given if kind != "VIDEO"] for given in (kinds, before))
    if family == "smolvlm" and {"IMAGE", "VIDEO"} <= {*kinds, *before}:
        return  # this processor takes the one or the other
    whole, pieces = whole_and_pieces(family, kinds, size, before)
    assert ids_of(pieces).tolist() == whole["input_ids"].tolist()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(kinds=PARTS, before=st.one_of(st.just([]), PARTS), size=st.sampled_from([70, 200, 10_000]))
def test_the_bundled_model_answers_chunks_as_the_whole(kinds, before, size):
    engine = _nano()
    chat = [*turns(content_of(before, 192)), {"role": "user", "content": [*content_of(kinds, 192), "Which?"]}]
    whole, pieces = (engine.generate(chat, 2, output_logits=True, prefill_chunk_size=s) for s in (None, size))
    assert pieces.stats.prompt_tokens == whole.stats.prompt_tokens
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)
    turn = engine.chat(prefill_chunk_size=size, output_logits=True).send(chat[-1]["content"], 2)
    at_once = engine.generate(chat[-1:], 2, output_logits=True)
    torch.testing.assert_close(turn.logits, at_once.logits, rtol=0, atol=1e-4)


@cache
def _nano():
    return Engine.from_pretrained("nano")


@pytest.mark.parametrize("family", PROCESSORS)
def test_pieces_stay_small_where_text_stands_beside_media(family):
    """Moving the cut is no way round cutting: each piece but the last two holds one medium."""
    kind = "VIDEO" if family in VIDEO_FAMILIES and family != "llava_onevision" else "IMAGE"
    whole, pieces = whole_and_pieces(family, ["a", kind, "x", kind, kind, "b=", kind, "\n\n", kind, "1"], 1)
    least = 2 if family == "llava_onevision" else 1
    assert len(pieces) >= 5 // least
    assert ids_of(pieces).tolist() == whole["input_ids"].tolist()
    assert max(piece["input_ids"].shape[1] for piece in pieces) < 0.7 * whole["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl", "gemma3"])
def test_the_answer_in_chunks_is_that_of_the_whole(family):
    engine = Engine(*model_and_processor(family))
    kinds = ["IMAGE", "x", "IMAGE", "ROWS", "a=", "IMAGE", "IMAGE", "\n\n", "IMAGE", "1"]
    if family != "gemma3":
        kinds = [*kinds, "VIDEO", "Then comes a clip:", "VIDEO", "<", "VIDEO"]
    chat = [{"role": "user", "content": [*content_of(kinds, 64), "Which?"]}]
    whole, pieces = (engine.generate(chat, 2, output_logits=True, prefill_chunk_size=size) for size in (None, 90))
    assert whole.stats.prompt_tokens == pieces.stats.prompt_tokens
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("counts", [(2, 4), (4, 2), (2, 4, 4), (4, 2, 4), (4, 4, 4)])
def test_videos_of_several_lengths_are_the_whole_or_refused(family, counts):
    """One processor writes the number of frames of the longest video for all of them."""
    reader = reader_of(family)
    videos = [{"type": "video", "video": np.full((count, 32, 32, 3), 10 * count, np.uint8)} for count in counts]
    chat = [{"role": "user", "content": [*videos, "What?"]}]
    try:
        whole = reader.inputs([chat], MediaOptions())["input_ids"]
    except InputError:
        return  # this processor takes no two lengths at once
    if family == "smolvlm" and len(set(counts)) > 1:
        with pytest.raises(InputError, match=r"a video of \d frames after one of \d: .* prefill_chunk_size"):
            list(reader.readings(chat, MediaOptions(), 1)())
    else:
        assert ids_of(list(reader.readings(chat, MediaOptions(), 1)())).tolist() == whole.tolist()


def test_an_iterator_is_cut_as_a_list_is():
    reader = reader_of("qwen3_vl")
    content = [*content_of(["a=", "VIDEO", "x", "VIDEO", "<", "IMAGE", "VIDEO"], 64), "What?"]
    given = (
        list(reader.readings([{"role": "user", "content": c}], MediaOptions(), 1)()) for c in (content, iter(content))
    )
    assert [piece["input_ids"].tolist() for piece in next(given)] == [p["input_ids"].tolist() for p in next(given)]


def test_a_processor_that_writes_another_text_behind_a_medium_is_refused():
    """What a piece leaves to the next one is what the processor was asked about before."""
    reader = reader_of("gemma3")
    reader._joints.cut(reader.processor.boi_token, "", reader.processor.boi_token)
    known = reader._joints._expansions[reader.processor.boi_token]
    reader._joints._expansions[reader.processor.boi_token] = known._replace(rest_ids=(5, 6))
    chat = [{"role": "user", "content": [*content_of(["IMAGE", "IMAGE", "IMAGE"], 64), "What?"]}]
    try:
        with pytest.raises(InputError, match="another text behind this medium"):
            list(reader.readings(chat, MediaOptions(), 1)())
    finally:
        reader._joints._expansions.clear()
