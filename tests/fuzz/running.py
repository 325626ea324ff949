"""Drawn requests, settings, media, chat files and kernel calls, and what comes of them.

    python -m tests.fuzz --examples 10000
    python -m tests.fuzz --examples 500 --only requests,configs --seed 7

Each is answered rightly or refused by a typed error before any layer ran, and the engine goes on. A failure prints what
was drawn; the same numbers of examples, targets and seed draw it again.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.chat_files.fuzzing import fuzz_chat_file
from tests.fuzz.configs import fuzz_config
from tests.fuzz.turns import fuzz_conversation
from tests.fuzz.watching import OUTCOMES
from tests.fuzz.ways import fuzz_request
from tests.inputs.media_bytes import fuzz_media, media_files

# How many of a hundred examples a target has.
SHARES = {"requests": 15, "configs": 20, "media": 25, "chats": 20, "kernels": 20}


class Found(NamedTuple):
    """What a target's run found.

    Args:
        examples: that were drawn.
        outcomes: how often something came out.
        failure: what to read of the first failure; "" where there is none.
        seconds: it took.
    """

    examples: int
    outcomes: Counter[str]
    failure: str
    seconds: float


def fuzz_any_request(data: st.DataObject) -> None:
    """Two of three are requests, one is a conversation."""
    (fuzz_conversation if data.draw(st.integers(0, 2), "0: a conversation") == 0 else fuzz_request)(data)


def fuzz_any_media(data: st.DataObject) -> None:
    OUTCOMES[fuzz_media(data.draw(media_files(), "file"))] += 1


def fuzz_any_chat_file(data: st.DataObject) -> None:
    OUTCOMES[fuzz_chat_file(data)] += 1


TARGETS: dict[str, Callable[[st.DataObject], None]] = {
    "requests": fuzz_any_request,
    "configs": fuzz_config,
    "media": fuzz_any_media,
    "chats": fuzz_any_chat_file,
}


def run_target(name: str, examples: int, first: int) -> Found:
    """Draws examples of one target.

    Args:
        name: of the target.
        examples: to draw.
        first: the seed of the draws.
    """
    began = time.perf_counter()
    if name == "kernels":
        outcomes, failure = _run_kernels(examples, first)
        return Found(examples, outcomes, failure, time.perf_counter() - began)
    OUTCOMES.clear()
    drawn = 0

    @seed(first)
    @settings(
        max_examples=examples, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def every_example(data: st.DataObject) -> None:
        nonlocal drawn
        drawn += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[name](data)

    failure = ""
    logging.disable(logging.ERROR)  # of damaged files there is much to be said
    try:
        every_example()
    except Exception:
        failure = traceback.format_exc()
    finally:
        logging.disable(logging.NOTSET)
    return Found(drawn, OUTCOMES.copy(), failure, time.perf_counter() - began)


def _run_kernels(examples: int, first: int) -> tuple[Counter[str], str]:
    """In a process of their own, which a fault would end."""
    command = [sys.executable, "-m", "tests.kernels.hostile", "--examples", str(examples), "--seed", str(first)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    found = re.search(r"(\d+) calls answered, (\d+) refused", run.stdout)
    counts = (int(number) for number in found.groups()) if found else ()
    failure = "" if run.returncode == 0 and found else f"exit code {run.returncode}\n{run.stdout}{run.stderr[-8000:]}"
    return Counter(dict(zip(("answered", "refused"), counts, strict=False))), failure


def shares(examples: int, names: list[str]) -> dict[str, int]:
    """How many examples each of these targets has of so many in all."""
    whole = sum(SHARES[name] for name in names)
    return {name: max(1, round(examples * SHARES[name] / whole)) for name in names}


def run(examples: int, names: list[str], first: int) -> dict[str, Found]:
    """Draws so many examples, shared among the targets, and prints what comes of each."""
    found = {}
    for name, count in shares(examples, names).items():
        found[name] = one = run_target(name, count, first)
        outcomes = ", ".join(f"{count} {what}" for what, count in one.outcomes.most_common())
        print(f"{name}: {one.examples} examples, {outcomes}; {one.seconds:.0f} s", flush=True)
        if one.failure:
            print(one.failure)
            print(f"again: python -m tests.fuzz --examples {count} --only {name} --seed {first}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500, help="Examples in all, shared among the targets.")
    parser.add_argument("--only", default=",".join(SHARES), help="Targets, with commas between them.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - SHARES.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}: wanted some of {', '.join(SHARES)}")
    found = run(arguments.examples, names, arguments.seed)
    sys.exit(any(one.failure for one in found.values()))
