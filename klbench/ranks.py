"""Who is nearer to the posterior, whatever log Z is; and what is certain of a figure that no interval can be given for.

free_p = KL(q‖p0) − E_q[r]/β  at prompt p, nats        reverse_kl = free + log Z, and log Z is the prompt's, not the policy's
a < b     where the t test (P − 1 dof) of mean_p free_p(a) − free_p(b) = 0 is refused, Holm over all pairs at 95 %
rank(q) = [1 + #{significantly better}, K − #{significantly worse}]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from klbench.estimate import BLOCKS, Array, Estimate, t_quantile

LEVEL: Final = 0.95


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)), p_(1) ≤ ... ≤ p_(m).

    Holm 1979, Scand. J. Statist. 6, 65-70.
    """
    adjusted, worst = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = worst
    return adjusted


def paired_p(d: Array) -> float:
    """Two-sided p of mean(d) = 0 by Student's t with P − 1 dof; d [P]. One prompt says nothing (1); equal policies do not differ (1)."""
    if len(d) < 2 or float(np.abs(d).max()) < 1e-12:
        return 1.0
    stderr = float(d.std(ddof=1)) / math.sqrt(len(d))
    if stderr <= 1e-12 * float(np.abs(d).max()):
        return 0.0  # the same difference at each prompt, up to rounding
    return float(2 * stdtr(len(d) - 1, -abs(float(d.mean())) / stderr))


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
    pairs = list(itertools.combinations(range(policies), 2))
    better: NDArray[np.int64] = np.zeros(policies, dtype=np.int64)  # how many are significantly better
    worse: NDArray[np.int64] = np.zeros(policies, dtype=np.int64)
    for (a, b), p in zip(pairs, holm([paired_p(free[a] - free[b]) for a, b in pairs]), strict=True):
        if p <= 1 - level:
            first, second = (a, b) if free[a].mean() < free[b].mean() else (b, a)
            better[second] += 1
            worse[first] += 1
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
    for other, error in zip(others, others_stderr, strict=True):
        half = t_quantile(dof, 1 - (1 - LEVEL) / len(others)) * (own + math.sqrt(float((error**2).sum())) / prompts)
        low = max(low, float((free - other).mean()) - half)
    return low, None if cap is None else float((free + cap).mean()) + t_quantile(dof) * own
