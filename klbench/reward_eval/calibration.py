"""Is the reward a probability, once it is mapped to one? Brier, log loss, ECE, reliability.

    Platt map     p = s(a r + b),  s the logistic function;  a, b maximise  sum_i t_i log p_i + (1 - t_i) log(1 - p_i),
                  t_i = l + (h - l) y_i,   h = (N+ + 1)/(N+ + 2),  l = 1/(N- + 2),   N+ = sum y, N- = sum (1 - y):  finite for any data
    cross-fitted  the clusters are halved by lot; each text's p comes from the map fitted on the half that it is not in
    Brier         mean (p - y)^2                       log loss   mean -y log p - (1 - y) log(1 - p)          y in [0, 1]
    ECE           sum_b n_b/n |mean p - mean y|        15 bins of equal mass, equal p never parted; biased upwards at small n
    slope         of y in a logistic fit on logit p: 1 calibrated, below 1 too sure

`a` itself says how much log-odds of "good" one unit of reward is worth: at beta = 1/a the tilt r/beta is the reward's own evidence. Labels
are 1 = good, or shares in between. Rewards float64 [n]. Sources: Platt 1999; DeGroot and Fienberg 1983; OBJECTIVES.md E8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np
from scipy.special import expit, logit, xlogy

from klbench import estimate
from klbench.estimate import Array, Estimate
from klbench.record import EstimateField, Strict
from klbench.reward_eval import intervals
from klbench.reward_eval.intervals import Flags, Index

BINS: Final = 15
LEAST: Final = 20  # labelled texts below which no map is fitted
SEEN: Final = 1e-6  # a logit is taken of p in [SEEN, 1 - SEEN]


@final
@dataclass(frozen=True)
class Logistic:
    """p = s(slope r + offset). stderr: of the slope, by clusters; count: clusters."""

    slope: float
    offset: float
    stderr: float
    count: int

    def __call__(self, reward: Array) -> Array:
        return np.asarray(expit(self.slope * reward + self.offset))


class Bin(Strict):
    """Of a reliability curve: mean p, and the share of good texts with its interval."""

    p: float
    good: EstimateField


def fit(reward: Array, label: Array, cluster: Index) -> Logistic:
    """Newton's method in two unknowns on the standardised reward; a reward that does not vary gets slope 0."""
    centre, scale = float(reward.mean()), float(reward.std()) or 1.0
    x = np.stack([(reward - centre) / scale, np.ones(len(reward))], 1)
    yes, no = float(label.sum()), float((1 - label).sum())
    low, high = 1 / (no + 2), (yes + 1) / (yes + 2)
    t = low + (high - low) * label

    def loss(at: Array) -> float:
        z = x @ at
        return float((np.logaddexp(0.0, z) - t * z).sum())

    at = np.array([0.0, logit((yes + 1) / (yes + no + 2))])
    for _ in range(100):
        p = expit(x @ at)
        curvature = (x * (p * (1 - p))[:, None]).T @ x
        step = np.linalg.pinv(curvature, rcond=1e-12, hermitian=True) @ (x.T @ (t - p))
        while loss(at + step) > loss(at) + 1e-12 * abs(loss(at)) and np.abs(step).max() > 1e-14:
            step /= 2
        at = at + step
        if np.abs(step).max() < 1e-12:
            break
    p = expit(x @ at)
    bread = np.linalg.pinv((x * (p * (1 - p))[:, None]).T @ x, rcond=1e-12, hermitian=True)
    spread, count = intervals.variance((x * (t - p)[:, None]) @ bread[:, 0], cluster)
    slope = float(at[0]) / scale
    return Logistic(slope, float(at[1]) - slope * centre, math.sqrt(spread) / scale, count)


def halves(cluster: Index, seed: int) -> Flags:
    """[n] which half each item is in; a cluster stays whole."""
    count = int(cluster.max()) + 1
    order = np.random.default_rng(seed).permutation(count)
    return np.asarray(order[cluster] % 2 == 0)


def cross_fitted(reward: Array, label: Array, cluster: Index, seed: int) -> Array:
    """[n] P(good) by the Platt map of the other half."""
    half = halves(cluster, seed)
    out = np.empty(len(reward))
    for side in (half, ~half):
        out[~side] = fit(reward[side], label[side], intervals.clusters([str(c) for c in cluster[side]]))(reward[~side])
    return out


def bins(p: Array) -> Index:
    """[n] bin of each p: 15 of equal mass, equal ones together."""
    _, code, count = np.unique(p, return_inverse=True, return_counts=True)
    return np.asarray(_bins(count.astype(np.float64))[code])


def _bins(mass: Array) -> Index:
    """Bin of each distinct value, in order, from how many items have it: that of their mean rank."""
    middle = np.cumsum(mass) - mass / 2
    return np.asarray(np.minimum(middle * BINS / mass.sum(), BINS - 1).astype(np.int64))


@final
@dataclass(frozen=True)
class Error:
    """ECE of probabilities [n] and labels [n], at any weights of the items."""

    code: Index
    gap: Array

    @classmethod
    def of(cls, p: Array, label: Array) -> Error:
        return cls(np.unique(p, return_inverse=True)[1].reshape(-1), p - label)

    def at(self, weight: Array, gap: Array | None = None) -> float:
        """sum_b |sum_i w_i (p_i - y_i)| / sum w, with `gap` in place of p - y where it is given."""
        mass = np.bincount(self.code, weights=weight).astype(np.float64)
        sums = np.bincount(self.code, weights=weight * (self.gap if gap is None else gap))
        return float(np.abs(np.bincount(_bins(mass), weights=sums)).sum() / weight.sum())


def ece(p: Array, label: Array) -> float:
    """Of items that weigh alike."""
    return Error.of(p, label).at(np.ones(len(p)))


def figures(p: Array, label: Array, cluster: Index, seed: int) -> dict[str, Estimate]:
    """Of probabilities [n]: brier, log_loss, ece and slope, each with its interval."""
    with np.errstate(divide="ignore"):
        loss = -xlogy(label, p) - xlogy(1 - label, 1 - p)
    error, one = Error.of(p, label), np.ones(len(p))

    def calibrated(rng: np.random.Generator) -> float:  # y - p with a sign by lot: 0 on the average at every p
        return error.at(one, error.gap * rng.choice([-1.0, 1.0], int(cluster.max()) + 1)[cluster])

    rng = np.random.default_rng(seed)
    floor = float(np.mean([calibrated(rng) for _ in range(50)]))
    figure = intervals.above_noise(error.at, cluster, calibrated, seed)
    line = fit(logit(np.clip(p, SEEN, 1 - SEEN)), label, cluster)
    return {
        "brier": intervals.mean_of((p - label) ** 2, cluster),
        "log_loss": intervals.mean_of(loss, cluster),
        "ece": replace(figure, reason=f"{BINS} bins of equal mass; a calibrated reward would show {floor:.3f} by noise alone"),
        "slope": slope_of(line, len(p)),
    }


def slope_of(line: Logistic, n: int) -> Estimate:
    """The slope as an estimate."""
    if not math.isfinite(line.stderr):
        return estimate.undefined("one cluster alone", n=n)
    return intervals.around(line.slope, line.stderr**2, line.count, n)


def curve(p: Array, label: Array, cluster: Index) -> list[Bin]:
    """The reliability curve: one point a bin."""
    at = bins(p)
    found = []
    for b in np.unique(at):
        there = at == b
        mine = intervals.clusters([str(c) for c in cluster[there]])
        found.append(Bin(p=float(p[there].mean()), good=intervals.share_of(label[there], mine)))
    return found


def threshold(reward: Array, good: Flags) -> float | None:
    """Where texts are best parted: half-way between two neighbouring rewards, at the greatest share of good texts above plus bad ones
    below. Depends on no base rate and on no scale. None unless there are texts of both kinds and two rewards."""
    values = np.unique(reward)
    if len(values) < 2 or not good.any() or good.all():
        return None
    cuts = (values[1:] + values[:-1]) / 2
    yes, no = np.sort(reward[good]), np.sort(reward[~good])
    balanced = 1 - np.searchsorted(yes, cuts) / len(yes) + np.searchsorted(no, cuts) / len(no)
    best = np.flatnonzero(balanced >= balanced.max() - 1e-12)
    return float(cuts[best[len(best) // 2]])


def middle(reward: Array) -> float:
    """The cut between two neighbouring rewards that comes nearest to halving them; the one value there is where there is one alone."""
    values, count = np.unique(reward, return_counts=True)
    if len(values) < 2:
        return float(values[0])
    cuts = (values[1:] + values[:-1]) / 2
    return float(cuts[np.abs(np.cumsum(count)[:-1] / count.sum() - 0.5).argmin()])
