"""An interval for log Z that is exact at any sample size, from prior draws alone: betting against every candidate mean.

    w_i = exp(tilt_i) independent in [0, W], W = exp(ceiling), mean Z      v_i = w_i / W      nu = mu / W      16 stakes c_k in (1e-4, .99)
    against mu from above    K(mu) = mean_k prod_i (1 + c_k (nu - v_i) / (1 - nu))      needs W; rises with mu
    against mu from below    K(mu) = mean_k prod_i (1 + c_k (w_i / mu - 1))             needs no W; falls with mu

Were mu the mean, each factor would be independent, non-negative and of mean 1, so E K = 1 and P(K >= 2/alpha) <= alpha/2 (Markov). Hence
the largest mu with K <= 2/alpha from above and the smallest from below enclose Z with probability at least 1 - alpha at every N and
for every law on [0, W]. Nothing overflows: v lies in [0, 1] however large W, and mu is sought by its logarithm.

Shapes [P prompts, N draws]; nats. Source: Waudby-Smith and Ramdas 2024, JRSS B 86(1), arXiv:2010.09686, with stakes fixed in advance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from klbench.estimate import Array

STAKES: Final = np.geomspace(1e-4, 0.99, 16)
LEVEL: Final = 0.95
ROUNDING: Final = 1e-6  # by which a float32 reward may lie above its ceiling, relative
CLOSE: Final = 1e-10  # nats: how closely an end is solved; it is moved outwards by as much
STEPS: Final = 100
LEAST: Final = -700.0  # log nu below which exp underflows; an upper end this low would need e^700 draws


def log_z_interval(tilt: Array, ceiling: Array, level: float = LEVEL) -> tuple[Array, Array]:
    """(low [P], high [P]) around log Z of each prompt, each at `level`, from tilts [P, N] of prior draws and their ceilings [P].

    high is inf where the ceiling is; low is -inf where every weight is 0. Raises ValueError for shapes that disagree, no draws, a level
    outside (0, 1), NaN, or a tilt above its ceiling: the upper end holds for no other W than one that bounds every weight.
    """
    tilt, ceiling = np.asarray(tilt, dtype=np.float64), np.asarray(ceiling, dtype=np.float64)
    if tilt.ndim != 2 or ceiling.shape != tilt.shape[:1] or not tilt.size:
        raise ValueError(f"tilt [P, N >= 1] and ceiling [P] expected: {tilt.shape}, {ceiling.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level in (0, 1) expected, got {level}")
    if np.isnan(tilt).any() or np.isnan(ceiling).any() or np.isposinf(tilt).any():
        raise ValueError("tilts below infinity and no NaN expected")
    if (tilt > (ceiling + ROUNDING * np.maximum(1.0, np.abs(ceiling)))[:, None]).any():
        raise ValueError("a tilt lies above its ceiling: the upper end needs a bound on every weight")
    limit = math.log(2 / (1 - level))
    ends = [_ends(*_counted(row), top, limit) for row, top in zip(tilt, ceiling, strict=True)]
    return np.array([low for low, _ in ends]), np.array([high for _, high in ends])


def mean_log_z(tilt: Array, ceiling: Array, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) around the mean over prompts of log Z: each prompt at 1 - (1 - level)/P (Bonferroni), then the means of the ends.

    Exact for these prompts at any N; the price is a width that grows with log P. high is inf where a ceiling is, low -inf where every
    weight of a prompt is 0. Says nothing of prompts like these.
    """
    low, high = log_z_interval(tilt, ceiling, 1 - (1 - level) / max(len(tilt), 1))
    return float(low.mean()), float(high.mean())


def _counted(tilt: Array) -> tuple[Array, Array]:
    """Different values and how often each came: rewards often take few."""
    values, counts = np.unique(tilt, return_counts=True)
    return values, counts.astype(np.float64)


def _ends(tilt: Array, counts: Array, ceiling: float, limit: float) -> tuple[float, float]:
    """Both ends of one prompt, from different tilts, rising, and their counts."""
    top, draws = float(tilt[-1]), float(counts.sum())
    low, high = -math.inf, math.inf
    if math.isfinite(top):  # some weight is above 0
        gap = tilt - top
        least = float(STAKES[0])
        # the smallest stake alone, on one draw of the largest weight, wins enough at e^floor max w, whatever the rest loses
        floor = math.log(least) + draws * math.log1p(-least) - limit - math.log(len(STAKES)) - 1.0
        mean, spread = _log_mean(gap, counts)
        low = top + _root(lambda x: _from_below(gap, counts, x), floor, mean, mean - 3 * spread, limit, -1.0) - CLOSE
    if math.isfinite(ceiling):
        v = np.minimum(tilt - ceiling, 0.0)
        mean, spread = _log_mean(v, counts)
        high = ceiling + min(_root(lambda x: _from_above(np.exp(v), counts, x), mean, 0.0, mean + 3 * spread, limit, 1.0) + CLOSE, 0.0)
    return low, high


def _root(f: Callable[[float], tuple[float, float]], low: float, high: float, start: float, limit: float, sign: float) -> float:
    """x in (low, high) where f = limit, f rising for sign 1 and falling for -1, by Newton steps kept inside the bracket."""
    low = max(low, LEAST)
    if low >= high:  # every weight at the ceiling
        return high
    x = start if low < start < high else (low + high) / 2
    for _ in range(STEPS):
        value, slope = f(x)
        low, high = (x, high) if sign * (value - limit) < 0 else (low, x)
        step = x - (value - limit) / slope if slope and math.isfinite(value) else math.nan
        new = step if low < step < high else (low + high) / 2
        if abs(new - x) <= CLOSE / 4:
            return new
        x = new
    return x


def _log_mean(x: Array, counts: Array) -> tuple[float, float]:
    """log mean exp(x), x rising, and its standard error. At that mean no bet has won: mean log(1 + c a) is at most c mean(a) = 0."""
    if math.isinf(x[-1]):
        return -math.inf, 0.0
    e, n = np.exp(x - x[-1]), float(counts.sum())
    mean = float(e @ counts) / n
    spread = math.sqrt(float((e - mean) ** 2 @ counts) / n**2) / mean
    return float(x[-1]) + math.log(mean), spread


def _from_above(v: Array, counts: Array, x: float) -> tuple[float, float]:
    """log K and its slope in x = log nu: d/dx log(1 + c (nu - v)/(1 - nu)) = c nu (1 - v) / ((1 - nu) (1 - nu + c (nu - v)))."""
    nu, rest = math.exp(x), -math.expm1(x)
    gain = STAKES[:, None] * (nu - v)
    return _mixed(np.log1p(gain / rest) @ counts, (STAKES[:, None] * nu * (1 - v) / (rest * (rest + gain))) @ counts)


def _from_below(gap: Array, counts: Array, x: float) -> tuple[float, float]:
    """log K and its slope in x = log mu - log max w: with e = w/mu, d/dx log(1 - c + c e) = -c e / (1 - c + c e)."""
    e = np.exp(gap - x)
    paid = 1 - STAKES[:, None] + STAKES[:, None] * e
    return _mixed(np.log(paid) @ counts, -(STAKES[:, None] * e / paid) @ counts)


def _mixed(logs: Array, slopes: Array) -> tuple[float, float]:
    """log mean_k exp(logs_k), and its slope."""
    top = logs.max()
    if math.isinf(top):
        return float(top), 0.0
    share = np.exp(logs - top)
    return float(top + math.log(share.mean())), float((share * slopes).sum() / share.sum())
