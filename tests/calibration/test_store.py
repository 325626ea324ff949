"""What was measured is kept, and taken up by the calibration that it belongs to alone."""

import json

import pytest

from mminfer import AIMMerge, InferenceConfig, InputError
from mminfer.calibration.judging import Outcome
from mminfer.calibration.store import Store

OUTCOME = Outcome(0.25, 100, 10, 1.5, (3, 2))


def never():
    raise AssertionError("measured twice")


def test_it_goes_on_where_it_stopped(tmp_path):
    path, merged = tmp_path / "state", InferenceConfig(merge=AIMMerge(0.5))
    store = Store(path, {"model": "a", "tokens": (1, 2)})
    assert store.outcome(merged, "s", lambda: OUTCOME) == OUTCOME == store.outcome(merged, "s", never)
    assert store.numbers("n", lambda: [1.0, 2.0]) == [1.0, 2.0]
    store.write()
    again = Store(path, {"model": "a", "tokens": (1, 2)})
    assert again.outcome(merged, "s", never) == OUTCOME and again.numbers("n", never) == [1.0, 2.0]
    assert again.outcome(InferenceConfig(), "s", Outcome.refused) == Outcome.refused()
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_calibration_does_not_take_it(tmp_path):
    path = tmp_path / "state"
    Store(path, {"model": "a", "tokens": 16}).write()
    with pytest.raises(InputError, match="the state of a calibration with another tokens: remove it"):
        Store(path, {"model": "a", "tokens": 8})
    assert json.loads(path.read_text())["identity"]["tokens"] == 16


def test_numbers_that_somebody_changed_are_not_taken(tmp_path):
    path = tmp_path / "state"
    store = Store(path, {})
    store.outcome(InferenceConfig(), "s", lambda: OUTCOME)
    store.write()
    path.write_text(path.read_text().replace("0.25", "0.01"))
    with pytest.raises(InputError, match="it was changed since it was written"):
        Store(path, {})


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "{}", "[1]", '{"kind": "x"}', '{"kind": "state of an mminfer calibration"}']
)
def test_damaged_files(tmp_path, text):
    path = tmp_path / "state"
    path.write_text(text)
    with pytest.raises(InputError, match="no state of a calibration"):
        Store(path, {})
    with pytest.raises(InputError, match="path"):
        Store(3, {})
