"""Log-weights: log-mean-exp that survives all -inf, effective sample size, tail index. float64 numpy, last axis reduced."""

from __future__ import annotations

import numpy as np

from klbench.estimate import Array


def log_mean_exp(x: Array) -> Array:
    """log mean exp(x) over the last axis; -inf where every entry is -inf."""
    x = np.asarray(x, dtype=np.float64)
    top = x.max(-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(x - safe).mean(-1)) + safe[..., 0])


def ess(weights: Array) -> Array:
    """(sum w)^2 / sum w^2 over the last axis; 0 where all weights are 0. Descriptive: it certifies nothing."""
    square = (weights**2).sum(-1)
    return np.divide(weights.sum(-1) ** 2, square, out=np.zeros_like(square), where=square > 0)


def khat(weights: Array) -> float:
    """Shape of a generalised Pareto law fitted to the largest min(n/5, 3 sqrt n) weights [n] (Zhang and Stephens 2009).

    Small is bad news for nobody: a missed mode leaves flat weights. nan-free: 0.0 when the tail is constant.
    """
    n = len(weights)
    size = int(min(0.2 * n, 3 * np.sqrt(n)))
    ordered = np.sort(np.asarray(weights, dtype=np.float64))
    tail = ordered[n - size :] - ordered[n - size - 1] if size < n else ordered
    if size < 5 or tail[-1] <= 0 or tail[0] == tail[-1]:
        return 0.0
    tail = np.maximum(tail, 1e-12 * tail[-1])
    grid = 30 + int(np.sqrt(size))
    b = 1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))
    b = b / (3 * tail[int(size / 4 + 0.5) - 1]) + 1 / tail[-1]
    k = np.log1p(-b[:, None] * tail).mean(1)
    flat = np.abs(k) < 1e-300  # the limit of -b/k where b times the tail vanishes
    score = size * (np.log(np.where(flat, 1 / tail.mean(), -b / np.where(flat, 1.0, k))) - k - 1)
    share = np.exp(score - score.max())
    share /= share.sum()
    best = float((b * share).sum())
    shape = float(np.log1p(-best * tail).mean())
    return (size * shape + 5.0) / (size + 10.0)  # weak prior towards 0.5, as Vehtari et al. 2024 use
