"""log(1 + chi2(p*||q)) = log E_m[u^2 / s], u = p*/m and s = q/m over the rows of a mixture m: a bound more often than an estimate.

Where the policy has left a part of p* behind, u^2/s on the rows that were drawn there carries the whole sum, and most of it was not
drawn: measured on collapsed policies, the mixture is 6 to 9 nats below the truth and the policy's own draws 20 to 22 (ESTIMATORS.md
section 5). So the figure is `lower` wherever the tail says that the mean may not exist (khat >= 1/2) or too few rows carry it (ESS < 100).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np
from scipy.special import logsumexp

from klbench.estimate import Array, Estimate, Jackknife

HEAVY: Final = 0.5  # khat from which the variance of the weights need not exist
FEW: Final = 100.0  # effective draws


def log_chi2(log_u: Array, log_s: Array, omega: Array) -> Array:
    """[P] nats from log u, log s [P, n] (-inf where a law has no mass) and row weights omega [n], [1, n] or [P, n] that sum to 1.

    omega = a_j / n_j for a row of stratum j, 0 for a row left out. inf, exactly, where q has no mass on a row with u > 0. Logarithms
    because a q of e^-800 is not 0. Raises ValueError for shapes that disagree and weights that do not sum to 1.
    """
    log_u, log_s = np.asarray(log_u, dtype=np.float64), np.asarray(log_s, dtype=np.float64)
    if log_s.shape != log_u.shape or log_u.ndim != 2:
        raise ValueError(f"[P, n] twice expected: {log_u.shape}, {log_s.shape}")
    omega = np.broadcast_to(np.atleast_2d(np.asarray(omega, dtype=np.float64)), log_u.shape)
    if (np.abs(omega.sum(1) - 1) > 1e-6).any() or (omega < 0).any():
        raise ValueError("row weights that are not negative and sum to 1 expected")
    there = (omega > 0) & np.isfinite(log_u)
    gone = there & np.isneginf(log_s)
    usable = there & ~gone
    terms = np.where(usable, 2 * np.where(usable, log_u, 0.0) - np.where(usable, log_s, 0.0), -np.inf)
    found = np.full(len(log_u), -np.inf)
    some = usable.any(1)
    found[some] = logsumexp(terms[some], b=omega[some], axis=1)
    return np.where(gone.any(1), np.inf, np.maximum(found, 0.0))  # chi2 >= 0


def guarded(figure: Jackknife, n: int, khat: float, ess: float) -> Estimate:
    """The mean over prompts as a bound: `lower` keeps the low end and has no high one, because nothing bounds what was not drawn.

    Where p* has an outcome that nobody drew, of mass e, and q next to none there, chi2 is e^2/q: as large as one likes at any reach.
    """
    if np.isposinf(figure.full).any():
        return Estimate(math.inf, math.inf, math.inf, 0.0, n, ess, "exact", "the policy has no mass where the posterior has some")
    out = figure.mean(n=n, ess=ess)
    out = replace(out, value=max(0.0, out.value or 0.0), low=max(0.0, out.low or 0.0))
    why = f"tail index {khat:.2f}: " if khat >= HEAVY else f"{ess:.0f} effective draws: " if ess < FEW else ""
    return replace(out, high=None, population=None, status="lower", reason=f"{why}what was not drawn may hold most of chi²")
