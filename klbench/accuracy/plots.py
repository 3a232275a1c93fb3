"""Two figures of the accuracy page: how wrong each estimator of reverse KL is, and how often the intervals hold the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klbench.accuracy.cells import ADVERSARIES, Row
from klbench.accuracy.rivals import OURS
from klbench.page import figures
from klbench.page.figures import ACCENT, INK, MUTED, REFERENCE, STYLE

RIVALS: Final = ("disco", "self IS", "prior IS", "parts", "klbench", "board")  # from the bottom
LEAST: Final = 30  # intervals, for a cell to have a coverage


def _spread(values: Sequence[float], bins: int) -> list[float]:
    """Height in -1 .. 1 of each point, so that points of one bin stand apart; the order of the values decides, and nothing random."""
    counts: dict[int, int] = {}
    out = []
    low, high = min(values), max(values)
    for x in values:
        at = int((x - low) / ((high - low) or 1.0) * bins)
        seen = counts.get(at, 0)
        counts[at] = seen + 1
        out.append((1 if seen % 2 else -1) * ((seen + 1) // 2) * 0.11)
    return [max(-1.0, min(1.0, y)) for y in out]


def _strips(ax: Any, strips: dict[str, list[float]]) -> None:
    """A row of points an estimator, its median as a bar; klbench's own in the accent."""
    for at, (name, values) in enumerate(strips.items()):
        colour = ACCENT if name in OURS else REFERENCE
        heights = [at + 0.38 * y for y in _spread(values, 90)]
        ax.plot(values, heights, "o", color=colour, ms=3.2, alpha=0.55, mew=0)
        middle = float(np.median(values))
        ax.plot([middle, middle], [at - 0.42, at + 0.42], color=INK, linewidth=1.6, solid_capstyle="butt")
    ax.set_yticks(range(len(strips)), list(strips))
    ax.set_ylim(-0.6, len(strips) - 0.4)
    ax.tick_params(length=0)
    for label, name in zip(ax.get_yticklabels(), strips, strict=True):
        label.set_color(INK if name in OURS else MUTED)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    ax.set_axisbelow(True)


def _drawn(strips: dict[str, list[float]], label: str, says: str, salt: str, dress: Any) -> str:
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(9.6, 0.9 + 0.55 * max(1, len(strips))), dpi=72, layout="constrained")
        FigureCanvasAgg(fig)
        ax = fig.add_subplot()
        dress(ax)
        _strips(ax, strips)
        ax.set_xlabel(label)
        return figures.svg(fig, salt, says)


def errors(rows: Sequence[Row]) -> str:
    """RMSE of reverse_kl, a point a cell of 1000 + 1000 draws, logarithmic axis. "" where nothing was measured."""
    strips = {}
    for name in RIVALS:
        mine = [
            row.rmse
            for row in rows
            if row.key.column == "reverse_kl" and row.key.estimator == name and row.key.setting.endswith(" 1000+1000") and row.rmse
        ]
        mine = [x for x in mine if x is not None]
        if mine:
            strips[name] = sorted(math.log10(x) for x in mine)

    def dress(ax: Any) -> None:
        low, high = math.floor(min(min(x) for x in strips.values())), math.ceil(max(max(x) for x in strips.values()))
        ax.set_xlim(low, high)
        ax.set_xticks(range(low, high + 1), [f"{10.0**i:g}" for i in range(low, high + 1)])

    says = "RMSE of reverse KL by estimator, a point for each target and policy, logarithmic axis"
    return _drawn(strips, "RMSE of reverse_kl, nats (logarithmic axis)", says, "accuracy errors", dress) if strips else ""


def coverage(rows: Sequence[Row]) -> str:
    """Coverage of 95 % intervals of reverse_kl, a point a cell. "" where nothing was measured."""
    strips = {}
    for name in RIVALS:
        mine = [
            row.coverage
            for row in rows
            if row.key.column == "reverse_kl" and row.key.estimator == name and row.intervals >= LEAST
            and not row.key.setting.startswith(ADVERSARIES)
        ]  # fmt: skip
        if mine:
            strips[name] = sorted(x for x in mine if x is not None)

    def dress(ax: Any) -> None:
        ax.set_xlim(min(0.5, *(x[0] for x in strips.values())) - 0.02, 1.01)
        ax.axvline(0.95, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))

    says = "Coverage of nominal 95 % intervals of reverse KL by estimator, a point for each target and policy"
    return _drawn(strips, "share of intervals that hold the truth; nominal 0.95 dashed", says, "accuracy coverage", dress) if strips else ""
