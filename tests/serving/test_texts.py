"""Text of an answer while its tokens come: what is told is what the whole answer says, cut before a stop word."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mminfer.serving.texts import Detokenizer, StopWords


class Bytes:
    """A tokenizer whose tokens are single bytes, so that characters are cut."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


@given(st.text(max_size=20))
def test_characters_are_told_whole(text):
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text


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
