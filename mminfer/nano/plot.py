"""Draw the training curves from the log that training writes: `python -m mminfer.nano.plot`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Record = dict[str, Any]
TASKS = ("q1", "q1_none", "q2_digit", "q2_colour", "q3")


def minutes(records: list[Record]) -> list[float]:
    """Minutes of training at each record, runs put one after the other."""
    out, offset, last = [], 0.0, 0.0
    for record in records:
        if record["t"] < last:
            offset += last
        last = record["t"]
        out.append((offset + last) / 60)
    return out


def draw(records: list[Record], out: Path) -> None:
    """Accuracy of the vision stage, then loss and accuracy on the answers, as one picture."""
    vision = [r for r in records if r["stage"] == "vision" and "loss" in r]
    answers = [r for r in records if r["stage"] in ("lm", "joint") and "loss" in r]
    x = minutes(answers)
    figure, (reading, loss, accuracy) = plt.subplots(1, 3, figsize=(16, 4.5))
    for key in ("digit", "colour"):
        reading.plot(minutes(vision), [r[key] for r in vision], label=key)
    reading.set_title("vision stage: training accuracy")
    _draw_loss(loss, x, answers)
    for task in TASKS:
        points = [(m, r[task]) for m, r in zip(x, answers, strict=True) if task in r]
        accuracy.plot(*zip(*points, strict=True), label=task, linewidth=1)
    accuracy.set_title("lm + joint stages: training accuracy")
    for axis in (reading, accuracy):
        axis.legend()
        axis.set_ylim(0, 1.02)
    joint = next((m for m, r in zip(x, answers, strict=True) if r["stage"] == "joint"), None)
    for axis in (reading, loss, accuracy):
        axis.set_xlabel("minutes")
        axis.grid(alpha=0.3)
        if joint is not None and axis is not reading:
            axis.axvline(joint, color="black", linestyle="--", linewidth=0.8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def _draw_loss(axis: Axes, x: list[float], answers: list[Record]) -> None:
    axis.plot(x, [r["loss"] for r in answers], color="tab:red")
    axis.set_yscale("log")
    axis.set_title("lm + joint stages: loss on the answers")
    size = axis.twinx()
    size.step(x, [r["images"] for r in answers], color="tab:gray", where="post")
    size.set_ylabel("largest number of images (grey)")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=Path("log.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    plt.switch_backend("Agg")
    draw([json.loads(line) for line in args.log.read_text().splitlines()], args.out)


if __name__ == "__main__":
    main()
