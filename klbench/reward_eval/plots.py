"""Figures of the reward page: reliability, sharpness over 1/beta, gold reward against the KL spent. Colours are the page's."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klbench.estimate import CERTIFIED, WIDE, Estimate
from klbench.page import figures
from klbench.page.figures import ACCENT, INK, MUTED, PAPER, REFERENCE, STYLE
from klbench.reward_eval.board import Card, Table
from klbench.reward_eval.over_optimisation import Curve, columns

ACROSS = 3  # panels in a row


def _panels(count: int, tall: float) -> tuple[Figure, list[Any], int]:
    """Figure, its panels, and how many stand in a row."""
    across = min(ACROSS, count)
    rows = math.ceil(count / across)
    fig = Figure(figsize=(9.6, tall * rows), dpi=72, layout="constrained")
    FigureCanvasAgg(fig)
    axes = np.asarray(fig.subplots(rows, across, squeeze=False)).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[:count]:
        ax.tick_params(length=0)
        ax.set_axisbelow(True)
    return fig, list(axes[:count]), across


def reliability(table: Table) -> str:
    """Share of good texts against the mapped probability, a panel a reward and labelled file. "" without any."""
    found = [(card, name, curve) for name in sorted(table.sizes) for card in table.cards if (curve := card.reliability.get(name))]
    found = [x for x in found if x[0].role != "null"]
    if not found:
        return ""
    with mpl.rc_context(STYLE):
        fig, axes, across = _panels(len(found), 2.9)
        for ax, (card, name, curve) in zip(axes, found, strict=True):
            ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
            for point in curve:
                _bar(ax, point.p, point.good)
            ax.plot([p.p for p in curve], [p.good.value for p in curve], "o", color=ACCENT, ms=3.5)
            ax.set_xlim(-0.03, 1.03)
            ax.set_ylim(-0.03, 1.03)
            ax.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
            ax.set_yticks([0, 0.5, 1], ["0", ".5", "1"])
            ax.set_title(f"{card.reward} on {name.replace('_', ' ')}", loc="left", fontsize=9.5, color=INK)
        for ax in axes[::across]:
            ax.set_ylabel("share of good texts")
        axes[0].set_xlabel("P(good), mapped on the other half")
        return figures.svg(fig, f"reliability {table.task}", f"Reliability of the rewards of {table.task}")


def _bar(ax: Any, x: float, e: Estimate) -> None:
    if e.low is not None and e.high is not None:
        ax.plot([x, x], [e.low, e.high], color=ACCENT, linewidth=1, alpha=0.5)


def sharpness(table: Table) -> str:
    """KL*(p* || p0) over 1/beta, a line a reward, filled where certified, open where stretched, faint where the draws cannot say."""
    cards = [card for card in table.cards if card.sharpness]
    if not cards:
        return ""
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(9.6, 3.6), dpi=72, layout="constrained")
        FigureCanvasAgg(fig)
        ax = fig.add_subplot()
        ax.set_xscale("log", base=2)
        ends = []
        for card in cards:
            colour = ACCENT if card.role == "reward" else REFERENCE
            x = np.array([1 / s.beta for s in card.sharpness])
            y = np.array([s.kl.value or 0.0 for s in card.sharpness])
            ax.plot(x, y, color=colour, linewidth=1.2, alpha=0.8)
            for at, level, s in zip(x, y, card.sharpness, strict=True):
                reach = s.reach if s.reach is not None else 0.0
                if s.kl.low is not None and s.kl.high is not None:
                    ax.plot([at, at], [s.kl.low, s.kl.high], color=colour, linewidth=1)
                full = reach >= CERTIFIED
                ax.plot([at], [level], "o", ms=5, mec=colour, color=colour if full else PAPER, alpha=1.0 if reach >= WIDE else 0.4)
            ends.append((float(y[-1]), card.reward, float(x[-1])))
        low, high = ax.get_ylim()
        last = -math.inf
        for level, name, at in sorted(ends):
            last = max(level, last + 0.07 * (high - low))
            ax.annotate(name, (at, level), xytext=(at * 1.12, last), fontsize=9.5, color=INK, va="center", annotation_clip=False)
        ticks = [1 / s.beta for s in cards[0].sharpness]
        ax.set_xticks(ticks, [f"{t:.3g}" for t in ticks])
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        ax.set_xlim(ticks[0] / 1.2, ticks[-1] * 2.2)
        ax.set_ylim(0, max(high, last))
        ax.tick_params(length=0)
        ax.grid(axis="y")
        ax.set_axisbelow(True)
        ax.set_xlabel("1/β (logarithmic axis)")
        ax.set_ylabel("KL(p*‖p0), nats")
        return figures.svg(fig, f"sharpness {table.task}", f"KL of the posterior to the prior over 1/beta on {table.task}")


def over_optimisation(table: Table) -> str:
    """Gold reward against d, a panel a reward: best-of-n, posterior, trained policies, each with its better fit."""
    cards = [card for card in table.cards if card.curves]
    if not cards:
        return ""
    start = _prior_gold(cards[0])
    with mpl.rc_context(STYLE):
        fig, axes, across = _panels(len(cards), 3.6)
        for ax, card in zip(axes, cards, strict=True):
            near = max(_d(p.kl) for c in card.curves if c.kind != "policies" for p in c.points)
            edge = 1.6 * near
            for curve in card.curves:
                _curve(ax, curve, start, edge)
            ax.set_xlim(-0.03 * edge, edge)
            ax.set_title(card.reward, loc="left", fontsize=9.5, color=INK)
            ax.grid(axis="y")
            ax.set_xlabel("d = √KL(q‖p0)")
        for ax in axes[::across]:
            ax.set_ylabel("gold reward")
        return figures.svg(fig, f"over-optimisation {table.task}", f"Gold reward against the root of the KL spent on {table.task}")


def _prior_gold(card: Card) -> float:
    return next((c.points[0].gold.value or 0.0 for c in card.curves if c.kind == "best_of_n"), 0.0)


def _d(kl: Estimate) -> float:
    return math.sqrt(max(kl.value or 0.0, 0.0))


def _curve(ax: Any, curve: Curve, start: float, edge: float) -> None:
    colour, marker = {"best_of_n": (ACCENT, "o"), "posterior": (REFERENCE, "D"), "policies": (INK, "^")}[curve.kind]
    shown = [p for p in curve.points if _d(p.kl) <= edge]
    for p in shown:
        if p.gold.low is not None and p.gold.high is not None:
            ax.plot([_d(p.kl)] * 2, [p.gold.low, p.gold.high], color=colour, linewidth=1, alpha=0.6)
        certain = p.gold.status in ("certified", "exact")
        ax.plot([_d(p.kl)], [p.gold.value], marker, ms=4, mec=colour, color=colour if certain else PAPER)
    best = max(curve.fits, key=lambda f: f.r2, default=None)
    if best is not None and shown:
        d = np.linspace(0.03, max(_d(p.kl) for p in shown), 80)
        line = start + columns(d, best.form) @ np.array([best.a.value, best.b.value])
        ax.plot(d, line, color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
