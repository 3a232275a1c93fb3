"""lambda of the exponential-family target p0 exp(lambda . phi) / Z that has E[phi] = mu, from draws of any mixture, with its error.

    w_i = p0(x_i) / m(x_i) exp(lambda . phi_i)     mean w = Z     u = w / Z      lambda solves  mean u (phi - mu) = 0
    by damped Newton on the convex F(lambda) = log mean (p0/m) exp(lambda . (phi - mu)):  grad F = mean u (phi - mu),  Hess F = C
    stderr of lambda   sqrt diag(C^-1 S C^-1)     C: covariance of phi under u;  S = sum_j n_j cov_j[u (phi - mu)] / n^2, j: strata
    least KL that buys mu    lambda . mu - log Z = -F,   its error (envelope) sqrt(sum_j n_j var_j[u]) / n

A mu outside the hull of the sample's phi has no finite lambda that these draws can see: status `infeasible`, and no large number in its
place. What can hide is judged as for log Z, with r_max / beta := max lambda . phi over the box that phi is known to lie in:

    A = N0 Z exp(-max lambda . phi),  N0 the draws of stratum 0, the prior's        least KL in [est - t se - log(1 + 3/A), est + t se]

Prior draws alone are fine while the least KL is small (.1: stderr as stated); at 1 and more lambda is biased by +.1 (ESTIMATORS.md
section 5): bring draws of a policy part of the way there. One prompt; phi [n] or [n, d]; nats; float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from klbench import estimate
from klbench.estimate import Array, Estimate

STEPS: Final = 200
SOLVED: Final = 1e-12  # of the Newton decrement, nats; one more whole step then squares it
INSIDE: Final = 1e-9  # of the hull, relative to the spread of phi


@final
@dataclass(frozen=True)
class Moment:
    """lam, stderr [d]: the tilt and its standard error.  log_z: of p0 exp(lam . phi).  least_kl: KL(p*||p0).  reach: A, 0 without a box.

    Where `status` is `infeasible` the first three and reach are None and least_kl has no value; otherwise it is least_kl's.
    """

    lam: Array | None
    stderr: Array | None
    log_z: float | None
    least_kl: Estimate
    reach: float | None
    status: str
    reason: str


def fit(
    phi: Array, wanted: Array | float, log_weight: Array | None = None, stratum: NDArray[np.int64] | None = None,
    box: tuple[Array | float, Array | float] | None = None,
) -> Moment:  # fmt: skip
    """phi [n] or [n, d] of draws; wanted mu, a number or [d]; log_weight [n] = log p0/m (0: draws of the prior; -inf: not drawn by it).

    stratum [n]: 0 for the prior's draws, 1.. for others' (all 0 when left out); m is the mixture in the proportions drawn.
    box: least and largest possible phi, a number or [d] each; without it nothing bounds the tilt and the least KL is uncertified.
    Raises ValueError for shapes that disagree, values that are not finite, fewer than 16 draws, or a phi outside its box.
    """
    phi = np.asarray(phi, dtype=np.float64)
    phi = phi[:, None] if phi.ndim == 1 else phi
    n, d = phi.shape
    mu = np.broadcast_to(np.asarray(wanted, dtype=np.float64), (d,))
    log_w = np.zeros(n) if log_weight is None else np.asarray(log_weight, dtype=np.float64)
    strata = np.zeros(n, dtype=np.int64) if stratum is None else np.asarray(stratum)
    if n < estimate.LEAST_DRAWS or log_w.shape != (n,) or strata.shape != (n,):
        raise ValueError(f"phi, log_weight and stratum of the same n >= {estimate.LEAST_DRAWS}: {phi.shape}, {log_w.shape}, {strata.shape}")
    if not (np.isfinite(phi).all() and np.isfinite(mu).all()) or np.isnan(log_w).any() or np.isposinf(log_w).any():
        raise ValueError("phi, wanted: finite; log_weight: finite or -inf")
    sides = None if box is None else tuple(np.broadcast_to(np.asarray(side, dtype=np.float64), (d,)) for side in box)
    if sides is not None and ((phi < sides[0]) | (phi > sides[1])).any():
        raise ValueError(f"a phi lies outside its box {box}")
    seen = np.isfinite(log_w)
    if not _inside(phi[seen], mu):
        reason = f"{_words(mu)} lies outside what {int(seen.sum())} draws of phi span: no finite lambda balances them"
        return Moment(None, None, None, estimate.undefined(reason, "infeasible", n), None, "infeasible", reason)
    lam = _newton(phi - mu, log_w)
    log_u = log_w + phi @ lam
    top = log_u.max()
    u = np.exp(log_u - top)
    log_z = float(top + math.log(u.mean()))
    u /= u.mean()
    centred = phi - mu
    C = (u[:, None] * centred).T @ centred / n
    inverse = np.linalg.pinv(C, rcond=1e-10, hermitian=True)
    S = _stratified(u[:, None] * centred, strata)
    stderr = np.sqrt(np.maximum(np.diag(inverse @ S @ inverse), 0.0))
    least = float(lam @ mu) - log_z
    error = math.sqrt(float(_stratified(u[:, None], strata)[0, 0]))
    reach = 0.0
    if sides is not None:
        ceiling = float(np.maximum(lam * sides[0], lam * sides[1]).sum())
        reach = float((strata == 0).sum()) * math.exp(min(log_z - ceiling, 0.0))
    half = estimate.t_quantile(30) * error
    figure = Estimate(least, least - half - float(estimate.widening(np.array(reach))), least + half, error, n)
    if sides is None:
        reason = "no box was declared for phi: nothing bounds what the prior draws missed"
        figure = replace(figure, low=None, high=None, status="uncertified", reason=reason)
    else:
        figure = estimate.by_reach(figure, np.array([reach]))
    figure = replace(figure, low=None if figure.low is None else max(0.0, figure.low))
    return Moment(lam, stderr, log_z, figure, reach, figure.status, figure.reason)


def _words(mu: Array) -> str:
    return "the wanted " + ", ".join(f"{x:g}" for x in mu)


def _stratified(g: Array, strata: NDArray[np.int64]) -> Array:
    """[d, d] covariance of the mean of rows g [n, d], allocation fixed: sum_j n_j cov_j / n^2."""
    total = np.zeros((g.shape[1], g.shape[1]))
    for j in np.unique(strata):
        part = g[strata == j]
        dev = part - part.mean(0)
        total += dev.T @ dev * len(part) / max(len(part) - 1, 1)
    return total / len(g) ** 2


def _inside(phi: Array, mu: Array) -> bool:
    """Whether mu lies in the relative interior of the hull of phi: then, and only then, F has a minimum.

    It does not where some direction v has v . (phi - mu) >= 0 for all draws and > 0 for one: a linear programme in v, |v| <= 1.
    """
    if not len(phi):
        return False
    x = np.unique(phi - mu, axis=0)
    scale = np.abs(x).max(0)
    x = x / np.where(scale > 0, scale, 1.0)
    if x.shape[1] == 1:
        return bool((x.min() < -INSIDE and x.max() > INSIDE) or np.abs(x).max() <= INSIDE)
    best = linprog(-x.mean(0), A_ub=-x, b_ub=np.zeros(len(x)), bounds=[(-1.0, 1.0)] * x.shape[1], method="highs")
    return bool(best.status == 0 and -best.fun <= INSIDE)


def _newton(centred: Array, log_w: Array) -> Array:
    """argmin of log mean exp(log_w + lambda . (phi - mu)), which exists; halved steps where F would not fall enough."""
    lam = np.zeros(centred.shape[1])

    def value(at: Array) -> tuple[float, Array]:
        x = log_w + centred @ at
        top = float(x.max())
        e = np.exp(x - top)
        return top + math.log(e.sum()), e / e.sum()

    f, share = value(lam)
    for _ in range(STEPS):
        grad = share @ centred
        hess = (share[:, None] * centred).T @ centred - np.outer(grad, grad)
        step = -np.linalg.pinv(hess, rcond=1e-12, hermitian=True) @ grad
        fall = float(-grad @ step)
        if fall <= SOLVED:
            return lam + step
        for _ in range(60):
            new_f, new_share = value(lam + step)
            if new_f <= f - 0.25 * fall:
                break
            step, fall = step / 2, fall / 2
        lam, f, share = lam + step, new_f, new_share
    return lam
