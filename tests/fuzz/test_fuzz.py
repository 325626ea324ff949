"""A few examples of every target, the same in every run; `python -m tests.fuzz` draws more."""

import pytest

from mminfer import InputError
from tests.fuzz.running import SHARES, TARGETS, run_target, shares
from tests.fuzz.watching import Refused, ask, check_equal, check_words, engine_of

EXAMPLES = 200


@pytest.mark.parametrize("name", SHARES)
def test_drawn_examples(name):
    count = shares(EXAMPLES, list(SHARES))[name]
    found = run_target(name, count, first=1)
    assert not found.failure, found.failure
    assert found.examples >= count and found.outcomes["answered"] + found.outcomes["loaded"] > 0
    assert sum(found.outcomes[what] for what in found.outcomes if "refused" in what) > 0


def test_the_shares_are_of_all_targets():
    assert SHARES.keys() == {*TARGETS, "kernels"} and sum(SHARES.values()) == 100
    assert sum(shares(EXAMPLES, list(SHARES)).values()) == EXAMPLES


def test_what_is_watched_for_is_seen():
    engine = engine_of("off")

    def late():
        engine.generate("a", 1)
        raise InputError("too late")

    with pytest.raises(AssertionError, match="behind the first layer"):
        ask(engine, late)
    assert isinstance(ask(engine, late, late=True), Refused)
    with pytest.raises(AssertionError, match="without a pass"):
        ask(engine, lambda: 3)
    for words in ("x" * 201, "ab" * 501):
        with pytest.raises(AssertionError, match="a message"):
            check_words(InputError(words))
    one, other = (engine.generate(text, 2, output_logits=True) for text in ("a", "b"))
    with pytest.raises(AssertionError, match="two texts: logits of token 0"):
        check_equal(one, other, "two texts")
