"""Needle rows by question: what the cache forgets, what fewer tokens lose, how techniques get along.

No table mixes protocols. Accuracies are percent of right answers; KL is to the uncompressed model over continuations of
32 tokens, in nats.
"""

from collections.abc import Sequence

from benchmarks.common import RESULTS, read_rows
from benchmarks.quality.settings import GROUPS, OFF
from benchmarks.tables.markdown import markdown, origin
from benchmarks.tables.smol import SHARES, beside
from mminfer.bench.protocols import Protocol
from mminfer.bench.sweeps import cache_sweeps
from mminfer.technique import CACHE_SHARES

Row = dict[str, str]
LENGTH = 16  # pictures, where one length must do
REPLAYED = (8, 16)  # pictures that Replay was taken apart with
REAL = "real model, kept"
TOLD = {
    Protocol.IN_PROMPT: "in-prompt (the question stands in the prompt)",
    Protocol.NEXT_TURN: "next-turn (context read and compressed, then the question)",
    Protocol.STREAMED: "streamed (context compressed behind every 512 tokens, then the question)",
}


def cells(name: str = "needle") -> dict[tuple[str, str, int], Row]:
    """Rows of a file by setting, protocol and number of pictures."""
    return {(r["setting"], r["protocol"], int(r["images"])): r for r in read_rows(name)}


def budgets(protocol: Protocol) -> str:
    """Eviction rules at equal budgets; in-prompt by KL alone, since one-token answers never see a compressed cache."""
    found = cells()
    names = [sweep.rule for sweep in cache_sweeps()]
    by_answer = protocol is not Protocol.IN_PROMPT
    shares = [s for s in CACHE_SHARES if any((f"{rule} {s} %", protocol, LENGTH) in found for rule in names)]
    header = ["rule", *(f"right, {s} %" for s in shares if by_answer), *(f"KL, {s} %" for s in shares)]
    off = found["off", protocol, LENGTH]
    table = [["nothing evicted", *([off["accuracy"]] * len(shares) if by_answer else []), *["0"] * len(shares)]]
    told, rules = [found["H2O 20 %", protocol, LENGTH], off], []
    for rule in names:
        rows = [found.get((f"{rule} {s} %", protocol, LENGTH)) for s in shares]
        measured = [row for row in rows if row is not None]
        if not measured:
            continue  # a rule that was not measured yet
        told, rules = told + measured, [*rules, rule]
        right = [row["accuracy"] if row else "" for row in rows] if by_answer else []
        table.append([rule, *right, *(row["kl_long"] if row else "" for row in rows)])
    real = {f"real model, {s} %": ["off", *(f"{rule} {s} %" for rule in rules)] for s in SHARES}
    header, table, beside_it = beside(header, table, real, protocol)
    return f"{markdown(header, table)}\n\n{_note(protocol, told)} {beside_it}"


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
    header, table, beside_it = beside(header, table, {REAL: [line[0] for line in table]}, protocol)
    return f"{markdown(header, table)}\n\n{_note(protocol, told)} {beside_it}"


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
    real = {f"real model, {share} %": [f"{name} {share} %" for name in names] for share in (20, 10)}
    header, table, beside_it = beside(header, table, real, protocol)
    return f"{markdown(header, table)}\n\n{_note(protocol, told, asked)} {beside_it}"


def replayed() -> str:
    """Replay's budgets beside the other rules', and what each of its parts adds; next-turn, 8 and 16 pictures."""
    if not (RESULTS / "replay.csv").exists():
        return "No rows of Replay on the bundled model yet."
    protocol, lengths, rows = Protocol.NEXT_TURN, REPLAYED, read_rows("replay")
    seed = min(_seeds_of_all(rows))
    found = {(r["setting"], r["protocol"], int(r["images"])): r for r in rows if r["seed"] == seed}
    table, told = [], []
    for name in dict.fromkeys(name for name, _, _ in found):
        own = [found[name, protocol, n] for n in lengths]
        told += own
        kept = f"{float(own[1]['cache_kept']):.0f} %"
        table.append([name, kept, *(r["accuracy"] for r in own), *(r["kl_answer"] for r in own), own[1]["kl_long"]])
    header = [
        "setting",
        "entries kept",
        "right, 8",
        "right, 16",
        "KL of answers, 8",
        "KL of answers, 16",
        "KL, long, 16",
    ]
    asked = ", ".join(f"{found['off', protocol, n]['questions']} over {n}" for n in lengths)
    header, table, beside_it = beside(header, table, {REAL: [line[0] for line in table]}, protocol)
    return f"{markdown(header, table)}\n\n{_note(protocol, told, asked)} {beside_it}"


def replayed_by_seed() -> str:
    """Of what the uncompressed model gets right, how much each setting measured with several seeds gets right."""
    rows = read_rows("replay") if (RESULTS / "replay.csv").exists() else []
    seeds = sorted({r["seed"] for r in rows})
    if len(seeds) < 2:
        return "Only one seed was measured yet."
    by_key = {(r["setting"], r["seed"], int(r["images"])): r for r in rows}
    names = [n for n in dict.fromkeys(r["setting"] for r in rows) if all((n, s, REPLAYED[0]) in by_key for s in seeds)]
    table, told = [], []
    for name in names:
        line = [name]
        for images in REPLAYED:
            own = [(by_key[name, seed, images], by_key["off", seed, images]) for seed in seeds]
            told += [row for row, _ in own]
            shares = [100 * float(row["accuracy"]) / float(off["accuracy"]) for row, off in own]
            pooled = 100 * sum(_right(row) for row, _ in own) / sum(_right(off) for _, off in own)
            line += [f"{pooled:.1f}", f"{min(shares):.1f} to {max(shares):.1f}"]
        table.append(line)
    header = ["setting", *(f"{what}, {n}" for n in REPLAYED for what in ("of the uncompressed", "by seed"))]
    asked = ", ".join(f"{sum(int(by_key['off', s, n]['questions']) for s in seeds)} over {n}" for n in REPLAYED)
    about = "Right answers in percent of the uncompressed model's, all seeds together, and the seeds' range."
    return f"{markdown(header, table)}\n\n{about} {_note(Protocol.NEXT_TURN, told, asked)}"


def _right(row: Row) -> float:
    return float(row["accuracy"]) * int(row["questions"])


def _seeds_of_all(rows: Sequence[Row]) -> set[str]:
    """The seeds that every setting was measured with."""
    by_setting: dict[str, set[str]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], set()).add(row["seed"])
    return set.intersection(*by_setting.values())


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
    told += f" FLOPs of the prompt, entries, KL and same token at {LENGTH} pictures."
    header, table, beside_it = beside(header, table, {REAL: names}, protocol)
    return f"{markdown(header, table)}\n\n{told} {beside_it}"


def by_task(protocol: Protocol) -> str:
    """Every setting at 16 pictures, task by task."""
    found = cells()
    own = {name: row for (name, p, n), row in found.items() if p == protocol and n == LENGTH}
    table = [
        [f"`{name}`", row["accuracy"], *_tasks(row), row["kl_answer"], row["top1_answer"], row["kl_long"]]
        for name, row in own.items()
    ]
    header = ["setting", "right", "Q1 labels", "Q2 contents", "Q3 facts", "KL, answer", "same answer", "KL, long"]
    header, table, beside_it = beside(header, table, {REAL: list(own)}, protocol)
    return f"{markdown(header, table)}\n\n{_note(protocol, list(own.values()))} {beside_it}"


def _tasks(row: Row) -> Sequence[str]:
    return [row[task] for task in ("Q1", "Q2", "Q3")]


def _note(protocol: Protocol, rows: Sequence[Row], asked: str | None = None) -> str:
    questions = f"{rows[0]['questions']} questions over {rows[0]['images']}" if asked is None else f"questions: {asked}"
    return f"{TOLD[protocol]}; {questions} pictures; {origin(list(rows))}."
