"""Fidelity against what it costs: Pareto plots of rules and the baselines they must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mminfer.errors import InputError

BEST, FULL = "best at its cost", "uncompressed"
SAVES_NOTHING = 99.0  # percent; rules that do not save a cost are no part of its panel


@dataclass(frozen=True)
class Point:
    """One setting.

    Args:
        rule: settings of one rule are joined by a line.
        cost: percent of the uncompressed model's, by the name of the cost.
        loss: what is lost; less is better.
        baseline: whether the rule is there to be beaten.
    """

    rule: str
    cost: Mapping[str, float]
    loss: float
    baseline: bool = False


@dataclass(frozen=True)
class Panels:
    """A row of panels, one for each cost.

    Args:
        title: what all of them share.
        points: settings.
        loss: name of what is lost, with its unit.
        full: what the uncompressed model loses; None: nothing.
    """

    title: str
    points: Sequence[Point]
    loss: str
    full: float | None = None


def check_drawable(path: Path) -> None:
    """Raises `InputError` if matplotlib is not installed or does not know a picture of this name."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise InputError("plots are drawn by matplotlib: pip install mminfer[plots]") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise InputError(f"--plot {path}: no kind of picture: wanted a name that ends in {', '.join(sorted(known))}")


def frontier(points: Sequence[Point], cost: str) -> list[Point]:
    """The points that no other one beats in cost and loss, from cheap to dear."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost[cost], p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def pareto_plot(rows: Sequence[Panels], costs: Sequence[str], path: Path, log: bool = True) -> None:
    """Draws every row of panels into one picture.

    Args:
        rows: one for each protocol or length.
        costs: names of the costs, one column of panels each.
        path: of the picture; its ending is the format.
        log: whether losses are drawn by their logarithm (down to a thousandth of the largest).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(rows), len(costs), figsize=(5.6 * len(costs) + 2.6, 4.3 * len(rows)), squeeze=False, sharey="row"
    )
    styles = _styles([point for row in rows for point in row.points])
    for row, panels in zip(axes, rows, strict=True):
        for column, (panel, cost) in enumerate(zip(row, costs, strict=True)):
            _draw(panel, panels, cost, styles, log)
            if column == 0:
                panel.set_ylabel(f"{panels.loss}  (lower is better)")
    handles = {label: handle for row in axes for panel in row for handle, label in _legend(panel)}
    handles = {label: handles[label] for label in sorted(handles, key=[*styles, BEST, FULL].index)}
    figure.legend(handles.values(), handles.keys(), loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - 2.4 / figure.get_size_inches()[0], 1))
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure of matplotlib's, and lets it go.

    Raises:
        InputError: the file cannot be written.
    """
    import matplotlib.pyplot as plt

    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: {error}") from error
    finally:
        plt.close(figure)


def _legend(panel: Any) -> list[tuple[Any, str]]:
    return list(zip(*panel.get_legend_handles_labels(), strict=True))


def _draw(panel: Any, panels: Panels, cost: str, styles: Mapping[str, dict[str, Any]], log: bool) -> None:
    floor = max((p.loss for p in panels.points), default=1.0) / 1000 if log else None
    for rule, style in styles.items():
        own = sorted((p.cost[cost], p.loss) for p in panels.points if p.rule == rule)
        if any(x < SAVES_NOTHING for x, _ in own):
            x, y = zip(*own, strict=True)
            panel.plot(x, [max(v, floor) if floor else v for v in y], label=rule, **style)
    best = frontier([p for p in panels.points if p.cost[cost] < SAVES_NOTHING], cost)
    panel.step(
        [p.cost[cost] for p in best],
        [max(p.loss, floor) if floor else p.loss for p in best],
        where="post", color="black", lw=5, alpha=0.12, label=BEST,
    )  # fmt: skip
    if panels.full is not None:
        panel.axhline(panels.full, color="black", lw=0.8, ls=":", label=FULL)
    if log:
        panel.set_yscale("log")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis(lambda value, place: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")
    panel.set_xlabel(f"{cost}, % of the uncompressed model's")
    panel.set_xlim(0, 105)
    panel.set_title(panels.title, fontsize=10)
    panel.grid(alpha=0.3)


def _styles(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Colours for the rules; baselines are thin and dashed."""
    colours = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#e377c2", "#8c564b", "#bcbd22")
    greys = ("#555555", "#888888", "#a0785a", "#6b8e9f", "#7a7a3a", "#b08fb0", "#333333", "#9aa58c")
    markers = "osD^vP*Xp"
    rules = {p.rule: p.baseline for p in points}
    styles, counts = {}, {True: 0, False: 0}
    for rule, baseline in sorted(rules.items(), key=lambda item: item[1]):
        n = counts[baseline]
        palette = greys if baseline else colours
        look = {"ls": "--", "lw": 1.0, "ms": 4.5} if baseline else {"ls": "-", "lw": 1.8, "ms": 6}
        styles[rule] = {"color": palette[n % len(palette)], "marker": markers[n % len(markers)], **look}
        counts[baseline] += 1
    return styles
