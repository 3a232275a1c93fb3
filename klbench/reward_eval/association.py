"""What a reward goes along with: Spearman's correlation with length, prior log-probability and other judges; Cohen's kappa.

    within    mean over prompts of Spearman's rho among a prompt's draws         error: 8-block jackknife over draws
    overall   rho of all draws together                                         error: jackknife over prompts
    kappa     (agree - chance) / (1 - chance) of the verdicts "above the threshold", all draws together

Draws [P, N]; a prompt at which either side is constant has no rho and is left out. Ranks of ties are their mean.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np
from scipy.stats import rankdata

from klbench import estimate
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife
from klbench.reward_eval import intervals
from klbench.reward_eval.intervals import Flags, Index

ITEMS: Final = 4  # clusters from which a correlation over them has an interval


def spearman(a: Array, b: Array) -> float:
    """rho of [n] and [n]; NaN where one is constant."""
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else math.nan


def within(a: Array, b: Array) -> Estimate:
    """Mean over prompts of rho among the draws [P, N] of each."""
    block = estimate.blocks_of(a.shape[1])
    full = np.array([spearman(x, y) for x, y in zip(a, b, strict=True)])
    seen = np.isfinite(full)
    if not seen.any():
        return estimate.undefined("one of the two is constant at every prompt", n=a.size)
    a, b, full = a[seen], b[seen], full[seen]
    left = np.array([[spearman(x[block != k], y[block != k]) for x, y in zip(a, b, strict=True)] for k in range(BLOCKS)])
    left = np.where(np.isfinite(left), left, full)
    figure = Jackknife(full, left).mean(n=a.size)
    clip = lambda x: None if x is None else min(max(x, -1.0), 1.0)  # noqa: E731
    ends = None if figure.population is None else (max(figure.population[0], -1.0), min(figure.population[1], 1.0))
    why = "" if seen.all() else f"{int(seen.sum())} of {len(seen)} prompts: at the others one of the two is constant"
    return replace(figure, value=clip(figure.value), low=clip(figure.low), high=clip(figure.high), population=ends, reason=why)


def overall(a: Array, b: Array, cluster: Index) -> Estimate:
    """rho of items [n] in clusters."""
    value = spearman(a, b)
    if not math.isfinite(value):
        return estimate.undefined("one of the two is constant", n=len(a))
    spread, count = intervals.jackknifed(lambda keep: spearman(a[keep], b[keep]), cluster)
    if count < ITEMS:
        return Estimate(value, n=len(a), status="uncertified", reason=f"{count} clusters: too few for an interval over them")
    return intervals.correlation(value, spread, count - 1, len(a))


def kappa(a: Flags, b: Flags, cluster: Index) -> Estimate:
    """Of two verdicts [n] (bool). Without interval where either always says the same."""
    value = _kappa(a, b)
    if not math.isfinite(value):
        return estimate.undefined("both judges always say the same", n=len(a))
    spread, count = intervals.jackknifed(lambda keep: _kappa(a[keep], b[keep]), cluster)
    if count < ITEMS:
        return Estimate(value, n=len(a), status="uncertified", reason=f"{count} clusters: too few for an interval over them")
    figure = intervals.around(value, spread, count, len(a))
    low, high = max(figure.low or -1.0, -1.0), min(figure.high if figure.high is not None else 1.0, 1.0)
    return replace(figure, low=low, high=high, population=(low, high))


def _kappa(a: Flags, b: Flags) -> float:
    p, q = float(np.mean(a)), float(np.mean(b))
    chance = p * q + (1 - p) * (1 - q)
    return (float(np.mean(a == b)) - chance) / (1 - chance) if chance < 1 else math.nan
