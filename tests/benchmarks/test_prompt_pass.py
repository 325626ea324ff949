"""The benchmark of the prompt pass finds what it times, wherever that has moved."""

import time

from benchmarks.models.prompt_pass import share_of_techniques, techniques_timed
from mminfer import Engine, InferenceConfig
from mminfer.nano import sample_messages


def test_what_techniques_do_is_timed_and_put_back():
    """Every preset spends some time of its own, none spends all of it, and nothing stays wrapped."""
    plain = Engine.from_pretrained("nano")
    for preset in ("aim", "lookm-20", "digest-20"):
        engine = Engine(plain.model, plain.processor, InferenceConfig.from_preset(preset))
        assert 0 < share_of_techniques(lambda: engine.generate(sample_messages(), 1), repeats=1) < 1  # noqa: B023
    with techniques_timed() as watch:
        time.sleep(0)
    plain.generate(sample_messages(), 1)
    assert watch.seconds == 0
