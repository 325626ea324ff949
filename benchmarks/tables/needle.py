"""Needle rows by question: what the cache forgets, what fewer tokens lose, how techniques get along.

No table mixes protocols. Accuracies are percent of right answers; KL is to the uncompressed model over continuations of
32 tokens, in nats.
"""

from collections.abc import Sequence

from benchmarks.common import read_rows
from benchmarks.quality.settings import GROUPS, OFF
from benchmarks.tables.markdown import markdown, origin
from mminfer.bench.protocols import Protocol
from mminfer.bench.sweeps import cache_sweeps
from mminfer.technique import CACHE_SHARES

Row = dict[str, str]
LENGTH = 16  # pictures, where one length must do
TOLD = {
    Protocol.IN_PROMPT: "in-prompt (the question stands in the prompt)",
    Protocol.NEXT_TURN: "next-turn (context read and compressed, then the question)",
    Protocol.STREAMED: "streamed (context compressed behind every 512 tokens, then the question)",
}


def cells() -> dict[tuple[str, str, int], Row]:
    """Rows by setting, protocol and number of pictures."""
    return {(r["setting"], r["protocol"], int(r["images"])): r for r in read_rows("needle")}


def budgets(protocol: Protocol) -> str:
    """Eviction rules at equal budgets; in-prompt by KL alone, since one-token answers never see a compressed cache."""
    found = cells()
    names = {sweep.rule: list(sweep.settings) for sweep in cache_sweeps()}
    by_answer = protocol is not Protocol.IN_PROMPT
    header = ["rule", *(f"right, {s} %" for s in CACHE_SHARES if by_answer), *(f"KL, {s} %" for s in CACHE_SHARES)]
    off = found["off", protocol, LENGTH]
    table = [["nothing evicted", *([off["accuracy"]] * 4 if by_answer else []), *["0"] * 4]]
    told = [found["H2O 20 %", protocol, LENGTH], off]
    for rule, settings in names.items():
        rows = [found[setting, protocol, LENGTH] for setting in settings if (setting, protocol, LENGTH) in found]
        if len(rows) < len(settings):
            continue  # a rule that was not measured yet
        told += rows
        right = [row["accuracy"] for row in rows] if by_answer else []
        table.append([rule, *right, *(row["kl_long"] for row in rows)])
    return f"{markdown(header, table)}\n\n{_note(protocol, told)}"


def at_equal_entries() -> str:
    """A fifth and a half of all entries, by eviction or by bringing images down before the model; next-turn."""
    found, protocol = cells(), Protocol.NEXT_TURN
    table, told = [], [found["off", Protocol.NEXT_TURN, LENGTH]]
    for share in (50, 20):
        names = [f"{sweep.rule} {share} %" for sweep in cache_sweeps()]
        names += [f"LOOK-M weighted {share} %"] * (share == 20)
        for name in [*names, f"AIM merge to {share} %", f"down-sampling to {share} %"]:
            row = found.get((name, protocol, LENGTH))
            if row is None:
                continue
            told.append(row)
            table.append([name, f"{float(row['cache_kept']):.0f} %", row["accuracy"], *_tasks(row), row["kl_long"]])
    header = ["setting", "entries kept", "right", "Q1 labels", "Q2 contents", "Q3 facts", "KL"]
    return f"{markdown(header, table)}\n\n{_note(protocol, told)}"


def parts() -> str:
    """What each part of Digest adds; next-turn, 8 and 16 pictures."""
    found, protocol, lengths = cells(), Protocol.NEXT_TURN, (8, 16)
    names = dict.fromkeys(name.rpartition(" ")[0].rpartition(" ")[0] for name in GROUPS["digest"])
    header = ["setting", *(f"right, {s} %, {n} pictures" for s in (20, 10) for n in lengths), "KL, 20 %", "KL, 10 %"]
    table = []
    for name in names:
        own = {share: [found[f"{name} {share} %", protocol, n] for n in lengths] for share in (20, 10)}
        right = [row["accuracy"] for share in (20, 10) for row in own[share]]
        table.append([name, *right, *(own[share][1]["kl_long"] for share in (20, 10))])
    told = [found[f"{name} {share} %", protocol, n] for name in names for share in (20, 10) for n in lengths]
    asked = ", ".join(f"{found['Digest 20 %', protocol, n]['questions']} over {n}" for n in lengths)
    return f"{markdown(header, table)}\n\n{_note(protocol, told, asked)}"


def by_length(group: str, protocol: Protocol) -> str:
    """Accuracy of a group's settings by number of pictures, with what they keep at 16."""
    found = cells()
    names = [name for name in (*OFF, *GROUPS[group]) if (name, protocol, LENGTH) in found]
    lengths = sorted({n for name, p, n in found if p == protocol and name == names[-1]})
    header = ["setting", "FLOPs kept", "entries kept", *(f"{n} pictures" for n in lengths), "KL", "same token"]
    table = []
    for name in names:
        row = found[name, protocol, LENGTH]
        flops = found.get((name, Protocol.IN_PROMPT, LENGTH), row)["flops_kept"]
        right = [found[name, protocol, n]["accuracy"] if (name, protocol, n) in found else "" for n in lengths]
        kept = [f"{float(flops):.0f} %" if flops else "", f"{float(row['cache_kept']):.0f} %"]
        table.append([f"`{name}`", *kept, *right, row["kl_long"], row["top1_long"]])
    asked = ", ".join(f"{found[names[0], protocol, n]['questions']} over {n}" for n in lengths)
    told = _note(protocol, [row for (name, p, _), row in found.items() if name in names and p == protocol], asked)
    return f"{markdown(header, table)}\n\n{told} FLOPs of the prompt, entries, KL and same token at {LENGTH} pictures."


def by_task(protocol: Protocol) -> str:
    """Every setting at 16 pictures, task by task."""
    found = cells()
    table = [
        [f"`{name}`", row["accuracy"], *_tasks(row), row["kl_answer"], row["top1_answer"], row["kl_long"]]
        for (name, p, n), row in found.items()
        if p == protocol and n == LENGTH
    ]
    header = ["setting", "right", "Q1 labels", "Q2 contents", "Q3 facts", "KL, answer", "same answer", "KL, long"]
    told = [row for (_, p, n), row in found.items() if p == protocol and n == LENGTH]
    return f"{markdown(header, table)}\n\n{_note(protocol, told)}"


def _tasks(row: Row) -> Sequence[str]:
    return [row[task] for task in ("Q1", "Q2", "Q3")]


def _note(protocol: Protocol, rows: Sequence[Row], asked: str | None = None) -> str:
    questions = f"{rows[0]['questions']} questions over {rows[0]['images']}" if asked is None else f"questions: {asked}"
    return f"{TOLD[protocol]}; {questions} pictures; {origin(list(rows))}."
