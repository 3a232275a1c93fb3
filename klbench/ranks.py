"""Who is nearer to the posterior, whatever log Z is; and what is certain of a figure that no interval can be given for.

free_p = KL(q‖p0) − E_q[r]/β  at prompt p, nats        reverse_kl = free + log Z, and log Z is the prompt's, not the policy's
a < b     where the t test (P − 1 dof) of mean_p free_p(a) − free_p(b) = 0 is refused, Holm over all pairs at 95 %
rank(q) = [1 + #{significantly better}, K − #{significantly worse}]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from scipy.special import stdtr, stdtrit

from klbench.estimate import BLOCKS, Array, Estimate, t_quantile

LEVEL: Final = 0.95
BLOCK: Final = 1 << 16  # pairs at once: as many as stay near the processor
NEAR: Final = 1e-6  # of a squared difference beside what it is the difference of: below it, too few digits are left


def holm(p: Sequence[float] | Array, weights: Array | None = None) -> Array:
    """Holm's adjusted p values [m]: p̃_(i) = max_{j ≤ i} min(1, Σ_{k ≥ j} w_(k) / w_(j) · p_(j)), p_(1)/w_(1) ≤ ... ≤ p_(m)/w_(m).

    weights [m]: shares of the error rate, equal where None is given; then Σ w / w is m − j + 1.

    Holm 1979, Scand. J. Statist. 6, 65-70, with weights in its section 4.
    """
    given = np.asarray(p, dtype=np.float64)
    w = np.ones_like(given) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(given / w, kind="stable")
    left = np.cumsum(w[order][::-1])[::-1]
    adjusted = np.empty_like(given)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, left / w[order] * given[order]))
    return adjusted


def paired_t(d: Array) -> Array:
    """|t| [...] of mean(d) = 0, d [..., P]. One prompt says nothing (0); equal policies do not differ (0); the same difference at each
    prompt, up to rounding, is certain (infinite)."""
    prompts, most = d.shape[-1], np.abs(d).max(axis=-1)
    if prompts < 2:
        return np.zeros(d.shape[:-1])
    stderr = d.std(axis=-1, ddof=1) / math.sqrt(prompts)
    flat = stderr <= 1e-12 * most
    t = np.abs(d.mean(axis=-1)) / np.where(flat, 1.0, stderr)
    return np.where(most < 1e-12, 0.0, np.where(flat, np.inf, t))


def paired_difference(free_a: Array, stderr_a: Array, free_b: Array, stderr_b: Array) -> Estimate:
    """reverse_kl of a minus that of b, nats, from free [P] and its standard errors [P]: log Z cancels, whatever the reach.

    low, high: these prompts, the two standard errors added and not their squares, since in a pool they share draws.
    population: t with P - 1 dof on the paired differences.
    """
    d, prompts = free_a - free_b, len(free_a)
    stderr = sum(math.sqrt(float((x**2).sum())) for x in (stderr_a, stderr_b)) / prompts
    value, half = float(d.mean()), t_quantile(min((BLOCKS - 1) * prompts, 30)) * stderr
    population = None
    if prompts > 1:
        spread = t_quantile(prompts - 1) * float(d.std(ddof=1)) / math.sqrt(prompts)
        population = (value - spread, value + spread)
    return Estimate(value, value - half, value + half, stderr, reason="log Z cancels in a paired difference", population=population)


def rank_ranges(free: Array, level: float = LEVEL) -> list[tuple[int, int]]:
    """[K] places (least, greatest) of K policies from free [K, P] nats, smaller being better; see the module's formula.

    Holm refuses the largest |t| as long as p_(i) <= (1 - level)/(m - i + 1). With R of them below 1 - level, all below (1 - level)/m are
    refused and none above (1 - level)/(m - R + 1), so that few are left to sort. Policies with equal rows are one, counted as often.
    """
    policies, prompts = free.shape
    distinct, at, weight = np.unique(free, axis=0, return_inverse=True, return_counts=True)
    if prompts < 2 or len(distinct) < 2:
        return [(1, policies)] * policies
    order = np.argsort(distinct.mean(axis=1), kind="stable")  # of two policies the first is then the better one
    distinct, weight, at = distinct[order], weight[order].astype(np.float64), np.argsort(order)[at.ravel()]
    pairs = policies * (policies - 1) / 2
    critical = lambda p: -float(stdtrit(prompts - 1, p / 2))  # noqa: E731
    beyond = lambda row, t, end: float(weight[row : row + len(t)] @ ((t >= end) @ weight[row:]))  # noqa: E731

    possible = sum(beyond(row, t, critical(1 - level)) for row, t in _paired_t(distinct))
    least, sure = critical((1 - level) / (pairs - possible + 1)), critical((1 - level) / pairs)
    refused, band, counts = 0.0, [], []
    for row, t in _paired_t(distinct):
        refused += beyond(row, t, sure)
        first, second = np.nonzero((t >= least) & (t < sure))
        band.append(t[first, second])
        counts.append(weight[row + first] * weight[row + second])
    t, count = np.concatenate(band), np.concatenate(counts)
    order = np.argsort(-t)
    t, count = t[order], count[order]
    held = np.flatnonzero(2 * stdtr(prompts - 1, -t) > (1 - level) / (pairs - refused - (np.cumsum(count) - count)))
    last = held[0] if len(held) else len(t)
    end = float(t[last - 1]) if last else sure

    better, worse = np.zeros(len(distinct)), np.zeros(len(distinct))
    for row, t in _paired_t(distinct):
        differ = (t >= end).astype(np.float64)
        worse[row : row + len(t)] += differ @ weight[row:]
        better[row:] += weight[row : row + len(t)] @ differ
    return [(1 + int(better[k]), policies - int(worse[k])) for k in at]


def _paired_t(free: Array) -> Iterator[tuple[int, Array]]:
    """(row, |t| [rows, K - row]) of the mean difference between policies from `row` on and those behind each; -1 elsewhere.

    |a - b|^2 = |a|^2 + |b|^2 - 2ab of centred rows is one product of matrices; where that leaves too few digits it is summed."""
    policies, prompts = free.shape
    means = free.mean(axis=1)
    alike = free - free.mean(axis=0)  # of all policies at a prompt: no difference has it
    centred = alike - alike.mean(axis=1, keepdims=True)
    norms = np.einsum("kp,kp->k", centred, centred)
    row = 0
    while row < policies - 1:
        rows = slice(row, min(row + max(BLOCK // (policies - row), 1), policies))
        before = np.tril_indices(rows.stop - row)
        sizes = norms[rows, None] + norms[row:]
        squares = sizes - 2 * centred[rows] @ centred[row:].T
        near = squares <= NEAR * sizes
        near[before] = False
        squares[near] = squares[before] = 1.0
        t = np.abs(means[rows, None] - means[row:]) * math.sqrt(prompts * (prompts - 1)) / np.sqrt(squares)
        for k in np.flatnonzero(near.any(axis=1)):
            t[k, near[k]] = paired_t(free[row + k] - free[row:][near[k]])
        t[before] = -1.0
        yield row, t
        row = rows.stop


def certain_bracket(
    free: Array, stderr: Array, others: Array, others_stderr: Array, cap: Array | None, of: int | None = None
) -> tuple[float, float | None]:
    """[max_j (J_j − J_q)/β, KL(q‖p0) + (r_max − E_q r)/β] nats, which hold whatever log Z is: it lies between max_j J_j/β and r_max/β.

    In free [P], others [J, P] and cap = r_max/β [P]: low = max(0, max_j mean(free − free_j)), high = mean(free + cap), each replaced by
    its 97.5 % limit for these prompts, so that both hold together at 95 % (Bonferroni over j). The errors [P], [J, P] of two policies are
    added and not their squares: in a pool they share draws. No cap, no upper end. of: how many policies `others` were chosen from by
    `contenders`; None for all of them.
    """
    prompts = len(free)
    dof = min((BLOCKS - 1) * prompts, 30)
    own = math.sqrt(float((stderr**2).sum())) / prompts
    low = 0.0
    if len(others):
        half = t_quantile(dof, 1 - (1 - LEVEL) / (of or len(others))) * (own + np.sqrt((others_stderr**2).sum(axis=1)) / prompts)
        low = max(low, float(((free - others).mean(axis=1) - half).max()))
    return low, None if cap is None else float((free + cap).mean()) + t_quantile(dof) * own


def contenders(free: Array, stderr: Array) -> list[int]:
    """Of policies [K, P], those that can be the best other one in anybody's bracket: the least mean(free_j) + t·error_j, a few against
    rounding."""
    policies, prompts = free.shape
    if policies < 2:
        return list(range(policies))
    t = t_quantile(min((BLOCKS - 1) * prompts, 30), 1 - (1 - LEVEL) / (policies - 1))
    return [int(k) for k in np.argsort(free.mean(axis=1) + t * np.sqrt((stderr**2).sum(axis=1)) / prompts, kind="stable")[:4]]
