"""Methods, where policies are one checkpoint each: the figures of an objective over its training seeds, and ranks of methods.

    value = mean_s x_s        half = hypot(t_{S-1} sd_s(x) / sqrt(S), the half-width that the records themselves have on average)

The seeds share a bank and so its error of log Z, which no spread over seeds shows: it is in the records' own intervals. Methods are
ranked by free_s = mean_p [KL(q_s||p0) - E_q_s r/beta], in which log Z cancels: Welch's t test between the seeds of two methods, Holm over
all pairs of a table. One seed says something about a checkpoint, not about a method: SEEDS of them are the least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from klbench.estimate import Array, Estimate, t_quantile
from klbench.measure import bounded
from klbench.ranks import LEVEL, holm
from klbench.record import Record, Score, Train

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


def standings(records: Mapping[str, Record], columns: dict[str, dict[str, Estimate]], free: dict[str, Array]) -> tuple[Standing, ...]:
    """Methods with at least SEEDS seeds among comparable records, in order of reverse_kl.

    records: by id.  columns: of each, pooled where the table has a pool.  free [P]: of each.
    """
    groups: dict[tuple[str, Train | None, Score], list[str]] = {}
    for own, record in records.items():
        if record.run.kind == "objective":
            groups.setdefault((record.run.method, record.run.train, record.run.score), []).append(own)
    seed = {own: record.run.seed for own, record in records.items()}
    whole = [sorted(group, key=lambda own: seed[own]) for group in groups.values() if len({seed[own] for own in group}) >= SEEDS]
    places = _places([np.array([free[own].mean() for own in group]) for group in whole])
    found = [
        Standing(
            records[group[0]].run.method,
            tuple(seed[own] for own in group),
            _over_seeds([columns[own] for own in group]),
            place,
            _curve([records[own] for own in group]),
        )
        for group, place in zip(whole, places, strict=True)
    ]
    return tuple(sorted(found, key=lambda s: (_value(s, "reverse_kl"), s.method)))


def _value(standing: Standing, column: str) -> float:
    figure = standing.columns.get(column)
    return math.inf if figure is None or figure.value is None else figure.value


def _over_seeds(figures: Sequence[dict[str, Estimate]]) -> dict[str, Estimate]:
    shared = [name for name in figures[0] if all(name in f for f in figures)]
    found = over_seeds([[f[name] for f in figures] for name in shared])
    return {name: bounded(name, figure) for name, figure in zip(shared, found, strict=True)}


def over_seeds(columns: Sequence[Sequence[Estimate]]) -> list[Estimate]:
    """Of each column one figure of a method from those of its seeds [C][S], with the least trusted status among them; no value where one
    has none."""
    given = np.array([[(f.value, f.low, f.high) for f in figures] for figures in columns], dtype=np.float64).reshape(len(columns), -1, 3)
    seeds = given.shape[1]
    given = np.ascontiguousarray(given.transpose(2, 0, 1))  # [3, C, S], None as NaN
    known = ~np.isnan(given[0]).any(axis=1)
    finite = np.isfinite(given[0]).all(axis=1)
    values = np.where(finite[:, None], given[0], 0.0)
    means, stderr = values.mean(axis=1), values.std(axis=1, ddof=1) / math.sqrt(seeds)
    with np.errstate(invalid="ignore"):
        below, above = np.hypot(t_quantile(seeds - 1) * stderr, given[1:].mean(axis=2) - means)  # NaN where a seed has no interval
    lows, highs = ([None if x != x else x for x in ends.tolist()] for ends in (means - below, means + above))
    found = []
    for c, (figures, value, error) in enumerate(zip(columns, means.tolist(), stderr.tolist(), strict=True)):
        worst = max({f.status for f in figures}, key=TRUST.index)
        n, reason = sum([f.n for f in figures]), next(f.reason for f in figures if f.status == worst)
        if finite[c]:
            found.append(Estimate(value, lows[c], highs[c], error, n, None, worst, reason))
        else:
            x = math.inf if known[c] else None
            found.append(Estimate(x, x, x, n=n, status=worst, reason=reason))
    return found


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
    own, other = spread**2 / a[2], b[1] ** 2 / b[2]  # variances of the means
    dof = (own + other) ** 2 / (own**2 / (a[2] - 1) + other**2 / (b[2] - 1))
    p = 2 * stdtr(dof, -np.abs(a[0] - b[0]) / np.sqrt(own + other))
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
