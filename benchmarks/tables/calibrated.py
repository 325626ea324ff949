"""What calibrations promise, what becomes of it on samples that nobody saw, and what presets do on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.common import RESULTS, read_rows
from benchmarks.tables.markdown import markdown, origin

Row = dict[str, str]
NO_ROWS = "No rows of calibrations yet: `python -m benchmarks.quality.calibrated` makes them."
BY_TARGET = {"flops": "flops", "latency": "time", "cache": "cache"}


def _rows() -> list[Row]:
    return read_rows("calibrated") if (RESULTS / "calibrated.csv").exists() else []


def promises() -> str:
    """Of each model, target and loss that is allowed: how many promises were kept, and what they save."""
    rows = [row for row in _rows() if row["target"]]
    if not rows:
        return NO_ROWS
    header = ["model", "makes less", "KL allowed", "seeds", "kept", "bound", "KL unseen, mean", "most", "cost", "right"]
    table = []
    for key in dict.fromkeys((row["model"], row["target"], row["kl"]) for row in rows):
        own = [row for row in rows if (row["model"], row["target"], row["kl"]) == key]
        losses = [float(row["unseen_kl"]) for row in own]
        kept, bounds = sum(int(row["kept"]) for row in own), [float(row["bound"]) for row in own]
        figures = [f"{mean(bounds):.2g}", f"{mean(losses):.2g}", f"{max(losses):.2g}"]
        cost = f"{mean(float(row[BY_TARGET[key[1]]]) for row in own):.0f} %"
        table.append([*key, str(len(own)), f"{kept} of {len(own)}", *figures, cost, _right(own)])
    about = (
        f"Unseen: samples of another seed, {_told(rows, 'unseen')} of them; {_told(rows, 'samples')} samples for a "
        f"calibration, of which {_told(rows, 'held_out')} contents were held out. Cost: of what was to become less, "
        "percent of the uncompressed model's. Right: answers, of those that the uncompressed model gets right; random "
        "models have none"
    )
    return f"{markdown(header, table)}\n\n{about}. {origin(rows)}."


def beside(target: str) -> str:
    """Of each model, calibrations for a target among the presets, the cheapest first."""
    rows = [row for row in _rows() if row["target"] in ("", target)]
    if not any(row["target"] for row in rows):
        return NO_ROWS
    protocols = {(row["model"], row["protocol"]) for row in rows if row["target"]}
    first = {(r["model"], r["setting"]): r for r in reversed(rows) if (r["model"], r["protocol"]) in protocols}
    shown = sorted(first.values(), key=lambda row: (row["model"], float(row[BY_TARGET[target]])))
    table = []
    for row in shown:
        name = f"**{row['setting']}**" if row["target"] else f"`{row['setting']}`"
        figures = [f"{float(row['unseen_kl']):.2g}", *(row[column] for column in BY_TARGET.values())]
        table.append([row["model"], name, *figures, _right([row])])
    header = ["model", "setting", "KL", *(f"{name}, %" for name in BY_TARGET), "right"]
    return f"{markdown(header, table)}\n\nThe cheapest in {target} first. {origin(list(first.values()))}."


def verdicts() -> str:
    """Of each preset, whether a calibration that loses no more on the same samples costs less."""
    rows = _rows()
    found = []
    for target, column in BY_TARGET.items():
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            calibrated = [row for row in own if row["target"] == target]
            protocols = {row["protocol"] for row in calibrated}
            presets = [r for r in own if not r["target"] and r["protocol"] in protocols and r["setting"] != "off"]
            if not calibrated or not presets:
                continue
            beaten, cheaper = [], []
            for row in presets:
                rivals = [r for r in calibrated if float(r["unseen_kl"]) <= max(float(row["unseen_kl"]), 1e-4)]
                won = any(float(r[column]) <= float(row[column]) for r in rivals)
                (beaten if won else cheaper).append(row["setting"])
            names = ", ".join(f"`{name}`" for name in cheaper)
            found.append([model, target, f"{len(beaten)} of {len(presets)}", names])
    if not found:
        return NO_ROWS
    header = ["model", "makes less", "presets that cost no less at their own KL", "the others"]
    about = (
        "A preset is matched where some calibration loses no more than it on the same samples, or no more than 0.0001, "
        "and costs no more; the others lose less than any calibration, or cost less at what they lose"
    )
    return f"{markdown(header, found)}\n\n{about}. {origin(rows)}."


def _told(rows: Sequence[Row], column: str) -> str:
    return " or ".join(dict.fromkeys(row[column] for row in rows))


def _right(rows: Sequence[Row]) -> str:
    if not rows[0]["full_right"]:
        return ""
    return f"{sum(int(row['right']) for row in rows)} of {sum(int(row['full_right']) for row in rows)}"
