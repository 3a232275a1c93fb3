"""Estimates beside truths: what a table of `klbench run exact` says of each interval, and how many of them hold.

    held      low <= truth <= high, up to 1e-6 relative: what is scored in single precision is not known more closely
    by chance the middle 95 % of Binomial(n, 0.95): what as many independent 95 % intervals would do

An end that is None is open (a bound). A figure without both has no interval and is not counted, nor is one that is exact by construction;
one that every method of a task repeats, as the target's entropy, counts once. Intervals of one run share draws, so that the range is
narrower than what they do together; a share below it is still the place to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np
from scipy.special import bdtr

from klbench.estimate import Estimate
from klbench.measure import COLUMNS

if TYPE_CHECKING:
    from rich.console import Console

LEVEL: Final = 0.95
SLACK: Final = 1e-6
SHOWN: Final = ("reverse_kl", "forward_kl", "log_z", "wasted_nats", "kl_prior", "entropy", "tv", "js")  # in a terminal, as many as fit
HEAD: Final = ("task", "method", "column", "value", "low", "high", "truth", "status", "held")


@final
@dataclass(frozen=True)
class Beside:
    """One column of one policy and its exact value."""

    task: str
    method: str
    column: str
    estimate: Estimate
    truth: float

    @property
    def counts(self) -> bool:
        """Whether there is an interval that could miss."""
        return self.estimate.status != "exact" and (self.estimate.low is not None or self.estimate.high is not None)

    @property
    def held(self) -> bool | None:
        """Whether the interval, or what is exact by construction, holds the truth; None where there is neither."""
        low, high = self.estimate.low, self.estimate.high
        if low is None and high is None:
            return None
        slack = SLACK * max(1.0, abs(self.truth)) if math.isfinite(self.truth) else 0.0
        return (low is None or low - slack <= self.truth) and (high is None or self.truth <= high + slack)

    @property
    def mark(self) -> str:
        return {True: "", False: "✗", None: "?"}[self.held]


def beside(task: str, method: str, columns: Mapping[str, Estimate], truths: Mapping[str, float]) -> list[Beside]:
    """A policy's columns that have a truth and a value, in the order of COLUMNS."""
    order = [*COLUMNS, *sorted(set(truths) - set(COLUMNS))]
    there = [name for name in order if name in truths and name in columns and columns[name].value is not None]
    return [Beside(task, method, name, columns[name], truths[name]) for name in there]


def by_chance(n: int) -> tuple[int, int]:
    """How many of n independent 95 % intervals hold, in 95 of 100 times."""
    below = np.asarray(bdtr(np.arange(n + 1, dtype=np.float64), n, LEVEL))
    low, high = np.searchsorted(below, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return int(low), int(high)


def once(found: Iterable[Beside]) -> list[Beside]:
    """Without what other methods of the task repeat."""
    return list({(b.task, b.column, b.estimate, b.truth): b for b in reversed(list(found))}.values())[::-1]


def verdict(found: Sequence[Beside]) -> str:
    """One line: how many intervals hold their truth, and what chance allows."""
    found = once(found)
    counted = [b for b in found if b.counts]
    held, (low, high) = sum(b.held is True for b in counted), by_chance(len(counted))
    least = "" if held >= low else ": FEWER THAN CHANCE ALLOWS"
    rest = sum(b.held is None for b in found)
    open_ = f"; {rest} more figures have no interval" if rest else ""
    return f"{held} of {len(counted)} intervals (95 %) hold their truth; by chance {low} to {high}{least}{open_}."


def lines(found: Sequence[Beside]) -> list[str]:
    """A heading, one line a figure, and the verdict: columns aligned by spaces, cells without spaces, `-` where there is nothing."""
    word = {True: "yes", False: "NO", None: "-"}
    cells = [list(HEAD)]
    for b in found:
        e = b.estimate
        cells.append([b.task, b.method, b.column, *map(_number, (e.value, e.low, e.high, b.truth)), e.status, word[b.held]])
    cells = [["_".join(cell.split()) or "-" for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    made = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return [*made, verdict(found)]


def render(found: Sequence[Beside], console: Console) -> None:
    """In a terminal a table a task, `estimate / truth` of the columns that fit, and below it every interval that misses; else `lines`."""
    if not found:
        return
    if not console.is_terminal:
        for line in lines(found):
            console.out(line, highlight=False)
        return
    from rich.table import Table
    from rich.text import Text

    for task in dict.fromkeys(b.task for b in found):
        at = {(b.method, b.column): b for b in found if b.task == task}
        methods, names = dict.fromkeys(m for m, _ in at), [c for c in SHOWN if any(column == c for _, column in at)]
        text = {key: f"{_short(b.estimate.value)}{b.mark} / {_short(b.truth)}" for key, b in at.items()}
        width = {c: max(len(c), *(len(text.get((m, c), "")) for m in methods)) for c in names}
        left = console.width - max(map(len, ["method", *methods]))
        kept = [c for i, c in enumerate(names) if sum(width[n] + 2 for n in names[: i + 1]) <= left]
        made = Table(title=Text(f"{task}: estimate / truth", style="bold"), title_justify="left", box=None, pad_edge=False)
        made.add_column(Text("method", style="dim"), no_wrap=True)
        for name in kept:
            made.add_column(Text(name, style="dim"), justify="right", no_wrap=True)
        for m in methods:
            cells = [Text(text.get((m, c), ""), style="red" if (b := at.get((m, c))) and b.held is False else "") for c in kept]
            made.add_row(m, *cells)
        console.print(made)
        console.print()
    for b in once(found):
        if b.held is False:
            e = b.estimate
            where = f"✗ {b.task} {b.method} {b.column}: {_short(e.value)} in [{_short(e.low)}, {_short(e.high)}], truth {_short(b.truth)}"
            console.print(where, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{verdict(found)} board.csv and index.html have every column.", style="bold", markup=False, highlight=False, soft_wrap=True
    )


def views(found: Iterable[Beside]) -> list[dict[str, str]]:
    """Texts for the page, a dict a figure."""
    return [
        {
            "method": b.method,
            "column": b.column,
            "value": _short(b.estimate.value),
            "interval": "" if b.held is None else f"[{_short(b.estimate.low)}, {_short(b.estimate.high)}]",
            "truth": _short(b.truth),
            "status": b.estimate.status,
            "mark": b.mark,
        }
        for b in found
    ]


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.6g}"


def _short(x: float | None) -> str:
    """As many digits as the interval of a figure needs on a board."""
    if x is None:
        return "…"
    if not math.isfinite(x):
        return "∞" if x > 0 else "−∞"
    x = x if abs(x) >= 5e-5 else 0.0
    return f"{x:.4f}" if abs(x) < 1 else f"{x:.3f}" if abs(x) < 100 else f"{x:.1f}" if abs(x) < 1e5 else f"{x:.2e}"
