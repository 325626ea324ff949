"""Canaries as they are kept beside the rows, one a line, and compared with what they come to now."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import common
from benchmarks.canaries.files import FILES, Row, canaries_of
from benchmarks.canaries.outcome import differences

Stored = dict[str, dict[str, dict[str, Any]]]  # by file and name: commit and outcome
FILE = "canaries.json"
SHOWN = 3  # names in a finding


def read() -> Stored:
    """All of them; none where there is no file."""
    path = common.RESULTS / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def write(stored: Stored) -> None:
    """One a line, in the order of their names."""
    files = []
    for file, canaries in sorted(stored.items()):
        lines = [f"{json.dumps(name)}: {json.dumps(canary)}" for name, canary in sorted(canaries.items())]
        files.append(f"{json.dumps(file)}: {{\n" + ",\n".join(lines) + "\n}")
    (common.RESULTS / FILE).write_text("{\n" + ",\n".join(files) + "\n}\n")


def note(file: str, rows: Iterable[Row]) -> None:
    """Runs the canaries of rows that are being written, and keeps them; those of their commit are there already.

    Args:
        file: of the rows; nothing is noted of one that has no canaries.
        rows: with the commit of the code that runs, all of them.
    """
    if file not in FILES:
        return
    stored = read()
    own = stored.setdefault(file, {})
    canaries = canaries_of(file)
    wanted = {name: commit for name, commits in canaries.names(rows).items() for commit in commits}
    new = [
        n for n, commit in wanted.items() if n not in own or own[n]["commit"] != commit or commit.endswith(common.DIRTY)
    ]
    for name, outcome in canaries.outcomes(new).items():
        own[name] = {"commit": wanted[name], "outcome": outcome}
    write(stored)


def stale(file: str, rows: Sequence[Row]) -> list[str]:
    """What is wrong with the rows of a file: they have no canary, or theirs comes to something else now."""
    stored, canaries = read().get(file, {}), canaries_of(file)
    commits = canaries.names(rows)
    missing = [name for name in commits if name not in stored]
    others = [name for name in commits if name in stored and commits[name] != {stored[name]["commit"]}]
    now = canaries.outcomes(name for name in commits if name in stored)
    gone = [name for name in commits if name in stored and name not in now]
    told = {
        "rows without a canary: ": missing,
        "rows of another commit than their canary: ": others,
        "rows of what is not there any more: ": gone,
    }
    findings = [f"{file}.csv: {what}{_listed(names)}" for what, names in told.items() if names]
    wrong = {name: found for name in now if (found := differences(stored[name]["outcome"], json_of(now[name])))}
    if wrong:
        first = next(iter(wrong))
        findings.append(f"{file}.csv: stale: {_listed(list(wrong))}; {first!r}: {'; '.join(wrong[first][:SHOWN])}")
    return findings


def all_stale() -> list[str]:
    """The same of all files."""
    names = sorted(path.stem for path in common.RESULTS.glob("*.csv"))
    unknown = [
        f"{name}.csv: it has no canaries: add some to benchmarks.canaries.files" for name in names if name not in FILES
    ]
    return unknown + [found for name in names if name in FILES for found in stale(name, common.read_rows(name))]


def json_of(outcome: Any) -> Any:
    """As it comes back from the file."""
    return json.loads(json.dumps(outcome))


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} others"
