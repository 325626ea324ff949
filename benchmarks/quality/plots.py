"""Draws what the needle rows say; `python -m benchmarks.report` calls it."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common import RESULTS, read_rows
from mminfer.bench.plots import Panels, Point, pareto_plot
from mminfer.bench.protocols import Protocol
from mminfer.bench.sweeps import cache_sweeps, token_sweeps

NEXT_TURN, PARETO_IMAGES = Protocol.NEXT_TURN, "16"
CURVES = {  # positions -> colour, dash
    "1": ("tab:red", "-"),
    "1/4": ("tab:orange", "-"),
    "1/16": ("tab:olive", "-"),
    "1/64": ("tab:green", "-"),
    "1/256": ("tab:blue", "-"),
    "linear": ("tab:purple", "--"),
    "ntk": ("tab:brown", "--"),
}
NAMES = {"1": "plain (1)", "linear": "linear scaling", "ntk": "dynamic NTK"}


def length() -> Path:
    """Accuracy by number of pictures, a panel for each cache, a curve for each kind of positions."""
    rows = read_rows("length")
    caches = list(dict.fromkeys(r["cache"] for r in rows))
    figure, panels = plt.subplots(1, len(caches), figsize=(4.6 * len(caches), 3.8), sharey=True, squeeze=False)
    for panel, cache in zip(panels[0], caches, strict=True):
        for positions, (colour, dash) in CURVES.items():
            own = sorted((int(r["images"]), float(r["accuracy"])) for r in rows if _is(r, cache, positions))
            if own:
                panel.plot(*zip(*own, strict=True), dash, color=colour, marker="o", ms=3, label=_name(positions))
        window = int(rows[0]["window"])
        panel.axvline(window / 67, color="grey", lw=0.8, ls=":")
        panel.text(window / 67, 3, " plain positions\n leave the window", fontsize=7, color="grey")
        panel.set_xscale("log", base=4)
        ticks = sorted({int(r["images"]) for r in rows})
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
        panel.minorticks_off()
        panel.set_title(f"{cache} cache" if cache == "full" else cache, fontsize=10)
        panel.set_xlabel("pictures in the context (64 tokens each)", fontsize=9)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("right answers, %", fontsize=9)
    panels[0][0].set_ylim(0, 102)
    panels[0][0].legend(fontsize=7, title="step of a visual token", title_fontsize=7, loc="lower left")
    figure.tight_layout()
    path = RESULTS / "length.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _is(row: dict[str, str], cache: str, positions: str) -> bool:
    return row["cache"] == cache and row["positions"] == positions


def _name(positions: str) -> str:
    return NAMES.get(positions, f"V2PE {positions}")


def pareto() -> Path:
    """What rules lose against what they leave, a row of panels for right answers and one for KL; next-turn."""
    rows = {r["setting"]: r for r in read_rows("needle") if (r["protocol"], r["images"]) == (NEXT_TURN, PARETO_IMAGES)}
    flops = {
        r["setting"]: r["flops_kept"]
        for r in read_rows("needle")
        if (r["protocol"], r["images"]) == (Protocol.IN_PROMPT, PARETO_IMAGES)
    }
    points: dict[str, list[Point]] = {"wrong": [], "kl_long": []}
    for sweep in (*token_sweeps(), *cache_sweeps()):
        for setting in filter(rows.__contains__, sweep.settings):  # a step may not be measured yet
            row = rows[setting]
            cost = {"prompt FLOPs": float(flops[setting]), "cache entries": float(row["cache_kept"])}
            losses = {"wrong": 100 - float(row["accuracy"]), "kl_long": float(row["kl_long"])}
            for name, loss in losses.items():
                points[name].append(Point(sweep.rule, cost, loss, sweep.baseline))
    title = f"nano, {PARETO_IMAGES} pictures, next-turn"
    path = RESULTS / "pareto.png"
    panels = [
        Panels(title, points["wrong"], "wrong answers, %", 100 - float(rows["off"]["accuracy"])),
        Panels(title, points["kl_long"], "KL over 32 tokens, nats"),
    ]
    pareto_plot(panels, ["prompt FLOPs", "cache entries"], path)
    return path


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for draw in (length, pareto):
        print(draw())


if __name__ == "__main__":
    main()
