"""Who is nearer to the posterior, whatever log Z is; and what is certain of a figure that no interval can be given for.

free_p = KL(q‖p0) − E_q[r]/β  at prompt p, nats        reverse_kl = free + log Z, and log Z is the prompt's, not the policy's
a < b     where the t test (P − 1 dof) of mean_p free_p(a) − free_p(b) = 0 is refused, Holm over all pairs at 95 %
rank(q) = [1 + #{significantly better}, K − #{significantly worse}]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from scipy.special import stdtr

from klbench.estimate import BLOCKS, Array, Estimate, t_quantile

LEVEL: Final = 0.95


def holm(p: Sequence[float] | Array) -> Array:
    """Holm's adjusted p values [m]: p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)), p_(1) ≤ ... ≤ p_(m).

    Holm 1979, Scand. J. Statist. 6, 65-70.
    """
    given = np.asarray(p, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    adjusted = np.empty_like(given)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(given), 0, -1) * given[order]))
    return adjusted


def paired_p(d: Array) -> Array:
    """Two-sided p [...] of mean(d) = 0 by Student's t with P − 1 dof; d [..., P]. One prompt says nothing (1); equal policies do not
    differ (1); the same difference at each prompt, up to rounding, is one (0)."""
    prompts, most = d.shape[-1], np.abs(d).max(axis=-1)
    if prompts < 2:
        return np.ones(d.shape[:-1])
    stderr = d.std(axis=-1, ddof=1) / math.sqrt(prompts)
    flat = stderr <= 1e-12 * most
    t = np.abs(d.mean(axis=-1)) / np.where(flat, 1.0, stderr)
    return np.where(most < 1e-12, 1.0, np.where(flat, 0.0, 2 * stdtr(prompts - 1, -t)))


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
    """[K] places (least, greatest) of K policies from free [K, P] nats, smaller being better; see the module's formula."""
    policies = len(free)
    first, second = np.triu_indices(policies, 1)
    p = [paired_p(free[k] - free[k + 1 :]) for k in range(policies - 1)]  # a row at a time: all pairs at once would be K²P numbers
    differ = holm(np.concatenate(p) if p else np.zeros(0)) <= 1 - level
    means = free.mean(axis=1)
    lower = means[first] < means[second]
    better = np.bincount(np.where(lower, second, first)[differ], minlength=policies)  # how many are significantly better
    worse = np.bincount(np.where(lower, first, second)[differ], minlength=policies)
    return [(1 + int(better[k]), policies - int(worse[k])) for k in range(policies)]


def certain_bracket(free: Array, stderr: Array, others: Array, others_stderr: Array, cap: Array | None) -> tuple[float, float | None]:
    """[max_j (J_j − J_q)/β, KL(q‖p0) + (r_max − E_q r)/β] nats, which hold whatever log Z is: it lies between max_j J_j/β and r_max/β.

    In free [P], others [J, P] and cap = r_max/β [P]: low = max(0, max_j mean(free − free_j)), high = mean(free + cap), each replaced by
    its 97.5 % limit for these prompts, so that both hold together at 95 % (Bonferroni over j). The errors [P], [J, P] of two policies are
    added and not their squares: in a pool they share draws. No cap, no upper end.
    """
    prompts = len(free)
    dof = min((BLOCKS - 1) * prompts, 30)
    own = math.sqrt(float((stderr**2).sum())) / prompts
    low = 0.0
    if len(others):
        half = t_quantile(dof, 1 - (1 - LEVEL) / len(others)) * (own + np.sqrt((others_stderr**2).sum(axis=1)) / prompts)
        low = max(low, float(((free - others).mean(axis=1) - half).max()))
    return low, None if cap is None else float((free + cap).mean()) + t_quantile(dof) * own
