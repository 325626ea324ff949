"""Draw the training curves from the log that training writes: `python -m training.nano.plot`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Record = dict[str, Any]
TASKS = ("q1", "q1_none", "q2_digit", "q2_colour", "q3")
STAGES = ("lm", "joint", "frames")


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
    answers = [r for r in records if r["stage"] in STAGES and "loss" in r]
    x = minutes(answers)
    figure, (reading, loss, accuracy) = plt.subplots(1, 3, figsize=(16, 4.5))
    for key in ("digit", "colour"):
        reading.plot(minutes(vision), [r[key] for r in vision], label=key)
    reading.set_title("vision stage: training accuracy")
    _draw_loss(loss, x, answers)
    for n, task in enumerate(TASKS):
        for key, line in ((task, "-"), ("frames_" + task, ":")):  # dotted: among frames
            with_key = [(m, r[key]) for m, r in zip(x, answers, strict=True) if key in r]
            xs, ys = [m for m, _ in with_key], [value for _, value in with_key]
            accuracy.plot(xs, ys, line, color=f"C{n}", label=task if line == "-" else None, linewidth=1)
    accuracy.set_title("training accuracy (dotted: among frames)")
    for axis in (reading, accuracy):
        axis.legend()
        axis.set_ylim(0, 1.02)
    firsts = {r["stage"]: m for m, r in reversed(list(zip(x, answers, strict=True)))}
    for axis in (reading, loss, accuracy):
        axis.set_xlabel("minutes")
        axis.grid(alpha=0.3)
        for stage in ("joint", "frames"):
            if stage in firsts and axis is not reading:
                axis.axvline(firsts[stage], color="black", linestyle="--", linewidth=0.8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def _draw_loss(axis: Axes, x: list[float], answers: list[Record]) -> None:
    axis.plot(x, [r["loss"] for r in answers], color="tab:red")
    axis.set_yscale("log")
    axis.set_title("lm, joint, frames: loss on the answers")
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
