"""Figures of the page as SVG text: drawn by matplotlib, coloured by the page's own CSS variables, the same bytes every time.

Conventions: KL in nats on a square-root axis. Near the prior KL*(R) grows like the square of the reward gained, so that axis
draws the frontier nearly straight, and a collapsed policy at 30 nats leaves room for those at 0.3.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import IdentityTransform

from klbench.estimate import Array
from klbench.page.axes import ticks

# Colours nobody would choose: each is exchanged for the CSS variable beside it, and so follows light and dark.
INK: Final = "#000001"
MUTED: Final = "#000002"
GRID: Final = "#000003"
ACCENT: Final = "#000004"
REFERENCE: Final = "#000005"
PAPER: Final = "#000006"
VARIABLES: Final = {INK: "ink", MUTED: "muted", GRID: "line", ACCENT: "accent", REFERENCE: "reference", PAPER: "paper"}

SOLID: Final = 30.0  # reach at which the frontier is drawn solid
DASHED: Final = 1.0  # reach below which it is not drawn

STYLE: Final[Any] = {  # Any: matplotlib types every key of its settings by hand
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,  # a method may be called `$x$`
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}


class Point(NamedTuple):
    """Of the frontier: the posterior at one lambda; low, high the band of kl; reach prior draws that rejection would accept."""

    reward: float
    kl: float
    low: float
    high: float
    reach: float


@final
@dataclass(frozen=True)
class Place:
    """A policy on the plane: (value, low, high) of its reward and of its KL to the prior. role as on the board."""

    label: str
    role: str
    reward: tuple[float, float, float]
    kl: tuple[float, float, float]


def segments(frontier: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Points of reach >= 30 (solid) and of 1 <= reach < 30 (dashed), by reward; the dashed part starts where the solid one ends."""
    ordered = sorted(frontier)
    solid = [p for p in ordered if p.reach >= SOLID]
    dashed = [p for p in ordered if DASHED <= p.reach < SOLID]
    return solid, ([solid[-1], *dashed] if solid and dashed else dashed)


def least_kl(frontier: Sequence[Point], reward: float) -> float | None:
    """KL*(reward) nats, interpolated; 0 below the first point (the prior), None beyond the last one that is drawn."""
    drawn = sorted(p for p in frontier if p.reach >= DASHED)
    if not drawn or reward > drawn[-1].reward:
        return None
    return float(np.interp(reward, [p.reward for p in drawn], [p.kl for p in drawn], left=0.0))


def plane(places: Sequence[Place], frontier: Sequence[Point], name: str) -> str:
    """The reward-KL plane: frontier with its band, each policy with error bars, and its wasted nats as the drop to the curve."""
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(9.6, 5.6), dpi=72)
        canvas = FigureCanvasAgg(fig)
        ax = fig.add_subplot()
        fig.subplots_adjust(left=0.065, right=0.99, bottom=0.09, top=0.985)
        solid, dashed = segments(frontier)
        for part, dashes in ((solid, "-"), (dashed, (0, (4, 3)))):
            x = [p.reward for p in part]
            ax.fill_between(x, [max(p.low, 0) for p in part], [max(p.high, 0) for p in part], color=ACCENT, alpha=0.13, linewidth=0)
            ax.plot(x, [max(p.kl, 0) for p in part], color=ACCENT, linewidth=1.6, linestyle=dashes)
        for place in places:
            (x0, x_low, x_high), (y0, y_low, y_high) = place.reward, place.kl
            colour = ACCENT if place.role in ("objective", "policy") else REFERENCE
            foot = least_kl(frontier, x0)
            if foot is not None:
                ax.plot([x0, x0], [max(foot, 0), max(y0, 0)], color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
            ax.plot([x_low, x_high], [max(y0, 0)] * 2, color=colour, linewidth=1)
            ax.plot([x0, x0], [max(y_low, 0), max(y_high, 0)], color=colour, linewidth=1)
            marker = {"target": "D", "null": "s", "sampler": "^"}.get(place.role, "o")
            ax.plot(
                [x0],
                [max(y0, 0)],
                marker,
                color=PAPER if place.role in ("target", "null") else colour,
                mec=colour,
                mew=1.4,
                ms=5.5,
                clip_on=False,
                zorder=3,
            )
        tops = [p.kl[2] for p in places] + [p.high for p in (*solid, *dashed)]
        top = max((t for t in tops if math.isfinite(t)), default=1.0) or 1.0
        _root_axis(ax, top, 0.12)
        ax.margins(x=0.07)
        ax.grid(axis="y")
        ax.set_axisbelow(True)
        ax.tick_params(length=0)
        ax.set_xlabel("reward E_q[r]")
        ax.set_ylabel("KL to the prior, nats (square-root axis)")
        _label(ax, canvas, places)
        return svg(fig, f"plane {name}", f"Reward against KL to the prior on {name}, with the optimal frontier")


def _root_axis(ax: Any, top: float, gap: float) -> None:
    """The square-root axis of nats, from 0 to a little above `top`."""
    top = 1.12 * top if top > 0 else 1.0
    ax.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0.0)), np.square))
    ax.set_ylim(0, top)
    ax.set_yticks(ticks(top, gap))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(mpl.ticker.NullLocator())


# Where a name may stand around its point, the best places first.
_ANGLES: Final = np.radians([0, 180, 40, -40, 140, -140, 90, -90, 65, -65, 115, -115, 20, -20, 160, -160])
_DISTANCES: Final = np.array([9, 16, 24, 34, 46, 60, 76, 94], dtype=np.float64)  # pixels
RINGS: Final = np.repeat(_DISTANCES, len(_ANGLES))
COSINES, SINES = (np.tile(f(_ANGLES), len(_DISTANCES)) for f in (np.cos, np.sin))


def _label(ax: Any, canvas: FigureCanvasAgg, places: Sequence[Place]) -> None:
    """Names beside the points: of the places around a point, the nearest free one; a thin line leads to names that stand off."""
    ax.autoscale_view()
    renderer = canvas.get_renderer()
    spots = [ax.transData.transform((p.reward[0], max(p.kl[0], 0.0))) for p in places]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    bars = []
    for place, (x, y) in zip(places, spots, strict=True):
        (left, low), (right, high) = (ax.transData.transform((place.reward[i], max(place.kl[i], 0.0))) for i in (1, 2))
        bars += [(left, y - 1, right, y + 1), (x - 1, low, x + 1, high)]
    inside, lines = ax.get_window_extent(renderer), np.array(bars)
    for place, (x, y) in zip(places, spots, strict=True):
        text = ax.text(0, 0, place.label, fontsize=9.5)
        size = text.get_window_extent(renderer)
        text.remove()
        lefts = RINGS * COSINES - size.width * (1 - COSINES) / 2
        lows = RINGS * SINES - size.height / 2
        boxes = np.stack([x + lefts - 1, y + lows, x + lefts + 1 + size.width, y + lows + size.height])
        fits = (boxes[0] >= inside.x0 + 2) & (boxes[2] <= inside.x1 - 2) & (boxes[1] >= inside.y0 + 2) & (boxes[3] <= inside.y1)
        cost = np.where(fits, RINGS + 400.0 * _hits(boxes, np.array(taken)) + 25.0 * _hits(boxes, lines), np.inf)
        best = int(np.argmin(cost))  # the first of equals: rings and angles stand in order of preference
        left, low, away = (float(lefts[best]), float(lows[best]), RINGS[best] > 16) if fits.any() else (7.0, -size.height / 2, False)
        taken.append((x + left - 1, y + low, x + left + 1 + size.width, y + low + size.height))
        ax.text(x + left, y + low, place.label, fontsize=9.5, va="bottom", transform=IdentityTransform())
        if away:
            end = (x + left + size.width / 2, y + low + (0 if low > 0 else size.height))
            ax.plot([x, end[0]], [y, end[1]], color=MUTED, linewidth=0.5, transform=IdentityTransform(), zorder=1)


def _hits(boxes: Array, others: Array) -> Array:
    """[M] how many of others [N, 4] = (left, low, right, high) each of boxes [4, M] touches."""
    left, low, right, high = boxes[..., None]
    return ((others[:, 0] <= right) & (others[:, 2] >= left) & (others[:, 1] <= high) & (others[:, 3] >= low)).sum(axis=1)


def learning(curves: Mapping[str, Sequence[tuple[float, float, float]]], name: str) -> str:
    """reverse_kl and wasted_nats of methods against samples: every method grey, the nearest eight in colour and named at their end."""
    last = sorted(curves, key=lambda method: curves[method][-1][1])
    named = last[:8]
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(9.6, 3.9), dpi=72)
        panels = fig.subplots(1, 2)
        fig.subplots_adjust(left=0.06, right=0.86, bottom=0.13, top=0.92, wspace=0.16)
        for i, (ax, title) in enumerate(zip(panels, ("reverse KL, nats", "wasted nats"), strict=True), start=1):
            top = max((min(c[0][i] * 1.3, max(p[i] for p in c)) for c in curves.values()), default=1.0) or 1.0
            for method in [m for m in last if m not in named] + named:
                points = [(p[0], min(p[i], top)) for p in curves[method]]
                colour = f"C{named.index(method)}" if method in named else MUTED
                width = 1.6 if method in named else 0.6
                ax.plot(*zip(*points, strict=True), color=colour, linewidth=width, alpha=1.0 if method in named else 0.5)
            _root_axis(ax, top, 0.2)
            ax.set_title(title, loc="left", fontsize=10, color=INK)
            ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
            ax.tick_params(length=0, pad=3)
        for place, method in enumerate(named):
            panels[1].text(1.03, 0.95 - 0.085 * place, method, transform=panels[1].transAxes, color=f"C{place}", fontsize=9.5, va="center")
        panels[0].set_xlabel("draws seen in training")
        return svg(fig, f"learning {name}", f"Learning curves on {name}: {', '.join(last)}")


def svg(fig: Figure, salt: str, says: str) -> str:
    """The figure as inline SVG: no prolog, date, size or unused id; colours by CSS variable; `says` for screen readers."""
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that matplotlib's font lacks is still there in the reader's
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    label = _attribute(says)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', lambda m: f'<svg viewBox="{m[1]}" role="img" aria-label="{label}">', text, count=1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text).strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
