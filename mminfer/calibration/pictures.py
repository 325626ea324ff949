"""A calibration as a picture: what was tried, beside presets and baselines, and what each operator is good for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mminfer.bench.plots import check_drawable, save_figure
from mminfer.calibration.result import Calibration
from mminfer.operators.skip import OperatorSkip

_LOOKS: dict[str, dict[str, Any]] = {
    "part": {"label": "single parts", "color": "#9ecae1", "marker": "."},
    "path": {"label": "put together", "color": "#1f77b4", "marker": "o"},
    "preset": {"label": "presets", "color": "#d62728", "marker": "s"},
    "baseline": {"label": "baselines", "color": "#888888", "marker": "x"},
}
FLOOR = 1e-6  # nats; less is drawn there


def draw(calibration: Calibration, path: Path) -> None:
    """Writes the picture; its ending is the format.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    check_drawable(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with_strip = bool(calibration.operators)
    figure, panels = plt.subplots(
        2 if with_strip else 1, 1, figsize=(8.6, 7.2 if with_strip else 5.2), squeeze=False,
        gridspec_kw={"height_ratios": [3, 1]} if with_strip else None,
    )  # fmt: skip
    _draw_curve(panels[0][0], calibration)
    if with_strip:
        figure.colorbar(_draw_strip(panels[1][0], calibration), ax=panels[1][0], label="KL, nats")
    figure.tight_layout()
    save_figure(figure, path)


def _draw_curve(panel: Any, calibration: Calibration) -> None:
    for kind, look in _LOOKS.items():
        points = [point for point in calibration.curve if point.kind == kind]
        if points:
            panel.scatter([p.cost for p in points], [max(p.kl, FLOOR) for p in points], s=36, **look)
        for point in points if kind in ("preset", "baseline") else ():
            panel.annotate(point.name, (point.cost, max(point.kl, FLOOR)), fontsize=6, alpha=0.8)
    promise = calibration.promise
    panel.axhline(promise.kl, color="black", lw=0.8, ls=":", label="allowed")
    panel.scatter(
        [calibration.cost], [max(promise.held_out_kl, FLOOR)], s=130, marker="*", color="#2ca02c", zorder=5,
        label="chosen, on held-out samples",
    )  # fmt: skip
    if math.isfinite(promise.bound):
        ends = [max(promise.held_out_kl, FLOOR), max(promise.bound, FLOOR)]
        panel.plot([calibration.cost] * 2, ends, color="#2ca02c", lw=1.2)
    panel.set_yscale("log")
    panel.set_xlim(0, max(105.0, *(point.cost + 5 for point in calibration.curve), 0))
    panel.set_xlabel(f"{calibration.target}, % of the uncompressed model's")
    panel.set_ylabel("KL to the uncompressed model, nats  (lower is better)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


def _draw_strip(panel: Any, calibration: Calibration) -> Any:
    """Layers by operators: how much leaving one out alone loses; what the settings leave out is framed."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    names = list(calibration.operators)
    depth = 1 + max(layer for own in calibration.operators.values() for layer in own)
    cells = [[max(calibration.operators[name].get(layer, math.nan), FLOOR) for layer in range(depth)] for name in names]
    highest = max(max(row) for row in cells)
    image = panel.imshow(cells, aspect="auto", cmap="YlOrRd", norm=LogNorm(FLOOR, max(highest, 10 * FLOOR)))
    for row, name in enumerate(names):
        for layer in left_out(calibration, name):
            panel.add_patch(Rectangle((layer - 0.46, row - 0.46), 0.92, 0.92, fill=False, lw=1.6, edgecolor="#2ca02c"))
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("layer; framed: visual tokens skip it")
    return image


def left_out(calibration: Calibration, operator: str) -> tuple[int, ...]:
    """Layers in which the settings leave an operator out."""
    skip = calibration.config.skip
    layers = getattr(skip, operator, ()) if isinstance(skip, OperatorSkip) else ()
    return tuple(layers) if isinstance(layers, (tuple, list)) else ()
