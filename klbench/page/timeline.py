"""A metric over versions, a panel a task: as SVG inside a page, or as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Final, NamedTuple

import jinja2
import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klbench.page import figures
from klbench.page.figures import ACCENT, GRID, INK, MUTED, PAPER, REFERENCE, STYLE

PRINTED: Final = {INK: "#1d1f21", MUTED: "#63666a", GRID: "#dddbd4", ACCENT: "#1f5c99", REFERENCE: "#6b6f76", PAPER: "#fdfdfb"}
LABELS: Final = 16  # commits named below a panel, at most


class Spot(NamedTuple):
    """A version. linked: whether the line goes on from the one before; mark: what is said of it, "" for nothing."""

    commit: str
    date: str
    subject: str
    policies: int
    value: float
    low: float | None
    high: float | None
    linked: bool
    mark: str


def page(drawn: Mapping[str, Sequence[Spot]], label: str, file: str, rate: float) -> str:
    """One self-contained HTML page: without scripts, nothing fetched."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        files("klbench.page").joinpath("history.html.j2").read_text(encoding="utf-8")
    )
    style = files("klbench.page").joinpath("style.css").read_text(encoding="utf-8")
    tasks = [(task, svg(task, spots, label), spots) for task, spots in drawn.items()]
    return template.render(file=file, label=label, tasks=tasks, rate=rate, style=style)


def svg(task: str, spots: Sequence[Spot], label: str) -> str:
    """One panel, in the page's own colours."""
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(9.6, 3.6), dpi=72, layout="constrained")
        FigureCanvasAgg(fig)
        _panel(fig.add_subplot(), spots, label, lambda colour: colour)
        marks = "; ".join(f"{spot.commit} {spot.mark}" for spot in spots if spot.mark)
        return figures.svg(fig, f"history {task}", f"{label} on {task} over {len(spots)} versions. {marks or 'No change is marked'}.")


def png(drawn: Mapping[str, Sequence[Spot]], label: str) -> bytes:
    """All panels below each other, on paper."""
    style = {key: PRINTED.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    with mpl.rc_context(style):
        fig = Figure(figsize=(9.6, 3.6 * len(drawn)), dpi=144, layout="constrained", facecolor=PRINTED[PAPER])
        FigureCanvasAgg(fig)
        for ax, (task, spots) in zip(fig.subplots(len(drawn), 1, squeeze=False)[:, 0], drawn.items(), strict=True):
            ax.set_facecolor(PRINTED[PAPER])
            _panel(ax, spots, label, PRINTED.__getitem__)
            ax.set_title(task[:80], loc="left", fontsize=11)
        out = io.BytesIO()
        fig.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()


def _panel(ax: Any, spots: Sequence[Spot], label: str, colour: Any) -> None:
    """Points with their intervals, joined where they can be compared; a marked version has a filled point and its words."""
    starts = [i for i, spot in enumerate(spots) if not i or not spot.linked]
    for start, end in zip(starts, [*starts[1:], len(spots)], strict=True):
        ax.plot(range(start, end), [spot.value for spot in spots[start:end]], color=colour(REFERENCE), linewidth=1)
    for i, spot in enumerate(spots):
        if spot.low is not None and spot.high is not None and math.isfinite(spot.high - spot.low):
            ax.plot([i, i], [spot.low, spot.high], color=colour(ACCENT), linewidth=1.2)
        ax.plot([i], [spot.value], "o", ms=6, mew=1.3, color=colour(ACCENT if spot.mark else PAPER), mec=colour(ACCENT), zorder=3)
    ax.margins(x=0.04, y=0.18)
    low, high = ax.get_ylim()
    for i, spot in enumerate(spots):
        if spot.mark:
            ax.axvline(i, color=colour(MUTED), linewidth=0.7, linestyle=(0, (2, 3)), zorder=0)
            before = i > len(spots) / 2
            words = spot.mark if spot.linked else "not comparable"
            ax.text(
                i,
                high - 0.02 * (high - low),
                f"{words} " if before else f" {words}",
                va="top",
                ha="right" if before else "left",
                fontsize=9,
            )
    ax.set_ylim(low, high)
    every = max(1, math.ceil(len(spots) / LABELS))
    ax.set_xticks(range(0, len(spots), every), [f"{spot.commit[:7]}\n{spot.date[5:]}" for spot in spots[::every]], fontsize=8)
    ax.tick_params(length=0)
    ax.set_ylabel(label)
    ax.grid(axis="y")
    ax.set_axisbelow(True)
