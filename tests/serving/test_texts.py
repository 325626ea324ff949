"""Text of an answer while its tokens come: what is told is what the whole answer says, cut before a stop word."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mminfer.serving.answering import AnswerOptions, TextListener
from mminfer.serving.texts import Detokenizer, StopWords


class Bytes:
    """A tokenizer whose tokens are single bytes, so that characters are cut."""

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode("utf-8", "replace")


@given(st.text(max_size=20))
def test_characters_are_told_whole(text):
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text


def listener(pieces, options):
    found = []
    one = TextListener(0, Bytes(), options, found.append, lambda *_: None)
    logits = torch.zeros(256)
    for byte in pieces:
        if one.take(byte, logits):
            break
    one.end(None, 0)
    return one.text, [entry for piece in found for entry in piece.logprobs]


@pytest.mark.parametrize(("least", "text"), [(0, ""), (2, "a"), (3, "aba"), (4, "aba"), (5, "ababc")])
def test_no_stop_word_ends_an_answer_too_early(least, text):
    assert listener(b"ababc", AnswerOptions(["ab"] if least < 2 else ["b"], (), least_tokens=least))[0] == text


def test_a_part_of_a_character_has_no_bytes_to_tell():
    _, told = listener("é".encode() + b"!", AnswerOptions([], (), logprobs=0))
    assert [entry["bytes"] for entry in told] == [None, None, [33]]


def told(pieces, words):
    stop, out = StopWords(words), ""
    for piece in pieces:
        out += stop.add(piece)
        if stop.found:
            return out, True
    return out + stop.rest(), False


@given(
    st.lists(st.text("ab \n", max_size=4), max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=2)
)
def test_stop_words_end_an_answer_wherever_they_are_cut(pieces, words):
    whole = "".join(pieces)
    places = [whole.index(word) for word in words if word in whole]
    out, found = told(pieces, words)
    if not places:
        assert (out, found) == (whole.strip(), False)
    else:
        assert found
        first = min(whole.index(word) + len(word) for word in words if word in whole)
        assert whole.strip().startswith(out) and len(out) <= first


@pytest.mark.parametrize(("pieces", "out"), [(["a E", "ND b"], "a"), (["a E", "nd"], "a End"), (["END"], "")])
def test_what_may_be_a_stop_word_is_held_back(pieces, out):
    assert told(pieces, ["END"]) == (out, out != "a End")
