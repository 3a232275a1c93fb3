"""95 % intervals of shares, means and differences whose items come in clusters: draws of a prompt, pairs of a prompt, twins of a text.

    a figure theta with influences z_i:   var = C/(C-1) sum_c (sum_{i in c} z_i)^2         C clusters, t with C - 1 degrees of freedom
    a share:  Wilson's interval at the size n* = theta (1 - theta) / var of the independent sample that would be as sure
    a correlation:  on Fisher's scale atanh rho, sd / (1 - rho^2)
    what no sum of influences gives:  delete-a-group jackknife over clusters;  a figure that cannot be negative and is biased upwards
    (ECE, the widest gap between groups):  [2 theta - q97.5, theta + t sd] of a bootstrap over clusters: the lower end takes off the bias,
    and is 0 where noise alone would show as much; the upper end need not

With each item a cluster of its own the share's interval is Wilson's, and AUC's influences are DeLong's (1988). Where nothing varies, n* is
the number of independent items that saw it. Sources: Wilson 1927; Korn and Graubard 1998 for n*; Obuchowski 1997 for clustered AUC.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from klbench import estimate
from klbench.estimate import BLOCKS, Array, Estimate

Index = NDArray[np.int64]
Flags = NDArray[np.bool_]

GROUPS: Final = 50  # of clusters, in a jackknife
RESAMPLES: Final = 300
DOF: Final = 30  # most degrees of freedom of an interval over draws, as everywhere in klbench


def clusters(keys: list[str]) -> Index:
    """[n] number of each item's cluster, in the order in which the keys first come."""
    found: dict[str, int] = {}
    return np.array([found.setdefault(key, len(found)) for key in keys], dtype=np.int64)


def variance(influence: Array, cluster: Index) -> tuple[float, int]:
    """(variance of the figure, C) from influences [n] about it; infinite for a single cluster."""
    count = int(cluster.max()) + 1
    sums = np.bincount(cluster, weights=influence, minlength=count)
    return (count / (count - 1) * float(sums @ sums), count) if count > 1 else (math.inf, 1)


def wilson(value: float, size: float, t: float) -> tuple[float, float]:
    """Ends of Wilson's interval of a share seen in `size` independent items."""
    middle = (value + t * t / (2 * size)) / (1 + t * t / size)
    half = t / (1 + t * t / size) * math.sqrt(max(value * (1 - value), 0.0) / size + (t / (2 * size)) ** 2)
    return max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half))


def share(value: float, spread: float, dof: float, n: int, least: float) -> Estimate:
    """A share in [0, 1] with its variance. least: independent items that stand behind one that did not vary."""
    if not (math.isfinite(spread) and dof >= 1):
        return Estimate(value, n=n, status="uncertified", reason="one cluster alone: nothing says how much others differ")
    inside = spread > 1e-18 and 0 < value < 1
    low, high = wilson(value, value * (1 - value) / spread if inside else max(least, 1.0), estimate.t_quantile(dof))
    return Estimate(value, low, high, math.sqrt(spread), n, population=(low, high))


def share_of(values: Array, cluster: Index) -> Estimate:
    """Mean of values in [0, 1], a tie counted as 1/2, over clustered items."""
    if not len(values):
        return estimate.undefined("nothing to count")
    value = float(values.mean())
    spread, count = variance((values - value) / len(values), cluster)
    return share(value, spread, count - 1, len(values), count)


def mean_of(values: Array, cluster: Index) -> Estimate:
    """Mean of unbounded values over clustered items; an infinite value is one."""
    if not len(values):
        return estimate.undefined("nothing to average")
    if np.isinf(values).any():
        return estimate.exactly(float(values.mean()), len(values), "an item has an infinite value")
    value = float(values.mean())
    return around(value, *variance((values - value) / len(values), cluster), len(values))


def around(value: float, spread: float, count: int, n: int) -> Estimate:
    """value -+ t sd with count - 1 degrees of freedom."""
    if count < 2:
        return Estimate(value, n=n, status="uncertified", reason="one cluster alone: nothing says how much others differ")
    half = estimate.t_quantile(count - 1) * math.sqrt(spread)
    return Estimate(value, value - half, value + half, math.sqrt(spread), n, population=(value - half, value + half))


def correlation(value: float, spread: float, dof: float, n: int) -> Estimate:
    """A correlation with its variance, on Fisher's scale."""
    if abs(value) >= 1 - 1e-12:
        return Estimate(value, value, value, 0.0, n, population=(value, value), reason="the same order at every item")
    half = estimate.t_quantile(dof) * math.sqrt(spread) / (1 - value * value)
    low, high = math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half)
    return Estimate(value, low, high, math.sqrt(spread), n, population=(low, high))


def over_prompts(full: Array, spread: Array, n: int, least: float) -> Estimate:
    """A share: mean over prompts [P] of shares with variances [P] over draws. `population` from the spread between prompts."""
    count, value = len(full), float(full.mean())
    figure = share(value, float(spread.sum()) / count**2, min((BLOCKS - 1) * count, DOF), n, least)
    if count < 2:
        return replace(figure, population=None)
    between = float(full.var(ddof=1)) / count
    return replace(figure, population=share(value, between, count - 1, n, count).population)


def jackknifed(figure: Callable[[Flags], float], cluster: Index) -> tuple[float, int]:
    """(variance, groups) of figure(items kept) by leaving out groups of clusters in turn; items whose figure is NaN do not count."""
    count = int(cluster.max()) + 1
    group = cluster % min(GROUPS, count)
    left = np.array([figure(group != g) for g in range(min(GROUPS, count))])
    left = left[np.isfinite(left)]
    return ((len(left) - 1) / len(left) * float(((left - left.mean()) ** 2).sum()), len(left)) if len(left) > 1 else (math.inf, 1)


def above_noise(figure: Callable[[Array], float], cluster: Index, null: Callable[[np.random.Generator], float], seed: int) -> Estimate:
    """figure(weights [n]) at weights of one, a figure in [0, 1] whose noise counts upwards, with a bootstrap over clusters.

    null: the figure of one draw from a world in which it is truly 0; a value that 1 in 40 of those reach has 0 for its low end.
    """
    count, rng = int(cluster.max()) + 1, np.random.default_rng(seed)
    value = figure(np.ones(len(cluster)))
    again = np.array([figure(rng.multinomial(count, np.full(count, 1 / count)).astype(np.float64)[cluster]) for _ in range(RESAMPLES)])
    again = again[np.isfinite(again)]
    noise = np.quantile([null(rng) for _ in range(RESAMPLES)], 0.975)
    sd = float(again.std())
    low = 0.0 if value <= noise else min(max(2 * value - float(np.quantile(again, 0.975)), 0.0), value)
    high = min(value + estimate.t_quantile(count - 1) * sd, 1.0)
    return Estimate(value, low, high, sd, len(cluster), population=(low, high))
