"""Methods, where policies are one checkpoint each: the figures of an objective over its training seeds, and ranks of methods.

    value = mean_s x_s        half = hypot(t_{S-1} sd_s(x) / sqrt(S), the half-width that the records themselves have on average)

The seeds share a bank and so its error of log Z, which no spread over seeds shows: it is in the records' own intervals. Methods are
ranked by free_s = mean_p [KL(q_s||p0) - E_q_s r/beta], in which log Z cancels: Welch's t test between the seeds of two methods, Holm over
all pairs of a table. One seed says something about a checkpoint, not about a method: SEEDS of them are the least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_ind_from_stats

from klbench.estimate import Array, Estimate, t_quantile
from klbench.measure import bounded
from klbench.ranks import LEVEL, holm
from klbench.record import Record, digest

SEEDS: Final = 5
TRUST: Final = ("exact", "certified", "wide", "lower", "upper", "infeasible", "uncertified")  # most trusted first


@final
@dataclass(frozen=True)
class Standing:
    """An objective on one table. seeds: of the records behind it.  rank: least and greatest place among the methods of the table.

    curve: (samples, mean over seeds of reverse_kl, of wasted_nats) where the records measured them on the way.
    """

    method: str
    seeds: tuple[int, ...]
    columns: dict[str, Estimate]
    rank: tuple[int, int]
    curve: tuple[tuple[float, float, float], ...]


def standings(records: Sequence[Record], columns: dict[str, dict[str, Estimate]], free: dict[str, Array]) -> tuple[Standing, ...]:
    """Methods with at least SEEDS seeds among comparable records, in order of reverse_kl.

    columns: of each record by id, pooled where the table has a pool.  free [P]: of each record by id.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.run.kind == "objective":
            settings = record.run.train.model_dump() if record.run.train else None
            groups.setdefault(digest([record.run.method, settings, record.run.score.model_dump()]), []).append(record)
    whole = [sorted(group, key=lambda r: r.run.seed) for group in groups.values() if len({r.run.seed for r in group}) >= SEEDS]
    ids = [[r.run.id for r in group] for group in whole]  # an id is a hash: each is made once
    places = _places([np.array([free[i].mean() for i in own]) for own in ids])
    found = [
        Standing(
            group[0].run.method,
            tuple(r.run.seed for r in group),
            _over_seeds([columns[i] for i in own]),
            place,
            _curve(group),
        )
        for group, own, place in zip(whole, ids, places, strict=True)
    ]
    return tuple(sorted(found, key=lambda s: (_value(s, "reverse_kl"), s.method)))


def _value(standing: Standing, column: str) -> float:
    figure = standing.columns.get(column)
    return math.inf if figure is None or figure.value is None else figure.value


def _over_seeds(figures: Sequence[dict[str, Estimate]]) -> dict[str, Estimate]:
    shared = [name for name in figures[0] if all(name in f for f in figures)]
    return {name: bounded(name, over_seeds([f[name] for f in figures])) for name in shared}


def over_seeds(figures: Sequence[Estimate]) -> Estimate:
    """One figure of a method from those of its seeds, with the least trusted status among them; no value where one has none."""
    worst = max((f.status for f in figures), key=lambda s: TRUST.index(s))
    n, reason = sum(f.n for f in figures), next((f.reason for f in figures if f.status == worst), "")
    values = [f.value for f in figures if f.value is not None]
    if len(values) < len(figures):
        return Estimate(None, n=n, status=worst, reason=reason)
    if not all(map(math.isfinite, values)):
        return Estimate(math.inf, math.inf, math.inf, n=n, status=worst, reason=reason)
    value = float(np.mean(values))
    stderr = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    lows, highs = [f.low for f in figures if f.low is not None], [f.high for f in figures if f.high is not None]
    spread = t_quantile(len(values) - 1) * stderr
    low = value - math.hypot(spread, value - float(np.mean(lows))) if len(lows) == len(values) else None
    high = value + math.hypot(spread, float(np.mean(highs)) - value) if len(highs) == len(values) else None
    return Estimate(value, low, high, stderr, n, None, worst, reason)


def _places(free: Sequence[Array]) -> list[tuple[int, int]]:
    """Least and greatest place of each method from its seeds' free energies [S]."""
    first, second = np.triu_indices(len(free), 1)
    means = np.array([x.mean() for x in free])
    differ = holm(_welch(free, first, second)) <= 1 - LEVEL
    lower = means[first] < means[second]
    better = np.bincount(np.where(lower, second, first)[differ], minlength=len(free))
    worse = np.bincount(np.where(lower, first, second)[differ], minlength=len(free))
    return [(1 + int(better[k]), len(free) - int(worse[k])) for k in range(len(free))]


def _welch(free: Sequence[Array], first: NDArray[np.intp], second: NDArray[np.intp]) -> Array:
    """Two-sided p of equal means for pairs of methods; infinite free energies differ from finite ones and not from each other."""
    finite = np.array([np.isfinite(x).all() for x in free], dtype=bool)
    mean, sd = (np.array([f(x) if ok else 0.0 for x, ok in zip(free, finite, strict=True)]) for f in (np.mean, lambda x: np.std(x, ddof=1)))
    seeds = np.array([len(x) for x in free])
    a, b = (mean[first], sd[first], seeds[first]), (mean[second], sd[second], seeds[second])
    flat = np.maximum(a[1], b[1]) <= 1e-12 * np.maximum(1.0, np.abs(a[0]))  # seeds that agree up to rounding
    spread = np.where(flat, 1.0, a[1])  # any: not looked at
    p = np.asarray(ttest_ind_from_stats(a[0], spread, a[2], *b, equal_var=False).pvalue)
    p = np.where(flat, np.where(np.isclose(a[0], b[0], rtol=1e-9), 1.0, 0.0), p)
    both, neither = finite[first] & finite[second], ~finite[first] & ~finite[second]
    return np.where(both, p, np.where(neither, 1.0, 0.0))


def _curve(group: Sequence[Record]) -> tuple[tuple[float, float, float], ...]:
    rows: dict[float, list[tuple[float, float]]] = {}
    for record in group:
        for point in record.curve:
            if "reverse_kl" in point and "samples" in point:
                rows.setdefault(point["samples"], []).append((point["reverse_kl"], point["wasted_nats"]))
    whole = {samples: found for samples, found in rows.items() if len(found) == len(group)}
    return tuple((samples, *(float(np.mean(x)) for x in zip(*found, strict=True))) for samples, found in sorted(whole.items()))  # type: ignore[misc]
