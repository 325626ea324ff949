"""Numbers beyond all measure are refused while options are read: nothing is made, drawn or loaded for them."""

import re

import pytest
from typer.testing import CliRunner

from mminfer.cli.main import app

HUGE = str(10**20)
OPTIONS = {
    "generate": ["--frames", "--max-new-tokens", "--prefill-chunk-size", "--num-frames", "--max-video-tokens"],
    "inspect": ["--frames", "--num-frames"],
    "bench": ["--images", "--picture-size", "--batch", "--new-tokens", "--num-frames"],
    "bench needle": ["--per-cell", "--max-new-tokens"],
}


def known(command):
    """The options of a command that are there, by its help."""
    text = CliRunner().invoke(app, [*command.split(), "--help"], terminal_width=200).output
    return set(re.findall(r"--[a-z-]+", text))


@pytest.mark.parametrize("command", OPTIONS)
def test_huge_numbers_are_refused_at_once(command):
    there = known(command)
    tried = [option for option in OPTIONS[command] if option in there]
    assert tried
    for option in tried:
        for number in (HUGE, "-1"):
            result = CliRunner().invoke(app, [*command.split(), option, number])
            assert result.exit_code == 2 and "Traceback" not in result.output, (option, number, result.output)
            assert "Invalid value for" in re.sub(r"\W+", " ", result.output), (option, number)
