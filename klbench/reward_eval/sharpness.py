"""How sharp a likelihood is for a prior: log Z, KL*(p* || p0) and reach at each beta, from prior draws alone.

    w_i = exp(r_i / beta)      log Z = log mean w      E_p*[f] = sum w f / sum w      KL* = E_p*[r]/beta - log Z
    A(beta) = N0 Z exp(-r_max/beta): the draws that rejection would accept; falls as beta does, to the number of draws at the ceiling
    certified edge:  the largest 1/beta at which A >= 30 at every prompt

What no draw has seen may hold 3/(A + 3) of p* (95 %): there a term may be anything that was seen elsewhere, as in klbench.score. Draws
[P, N0] and ceilings [P] in the reward's unit; nats; mean over prompts. A reward without a declared ceiling is certified nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import brentq

from klbench import estimate, weights
from klbench.estimate import BLOCKS, CERTIFIED, Array, Estimate, Jackknife
from klbench.estimators.diversity import at_cap
from klbench.record import EstimateField, Strict


class Sharpness(Strict):
    """At one beta. reach: the least over prompts, None where no ceiling was declared."""

    beta: float
    log_z: EstimateField
    kl: EstimateField
    reward: EstimateField
    reach: float | None


def reach_of(reward: Array, ceiling: Array, inverse_beta: float) -> Array:
    """[P] A at this 1/beta; 0 where no ceiling is known."""
    if not np.isfinite(ceiling).all():
        return np.zeros(len(reward))
    return np.asarray(reward.shape[1] * np.exp(np.minimum(weights.log_mean_exp(inverse_beta * (reward - ceiling[:, None])), 0.0)))


def at(reward: Array, ceiling: Array, beta: float) -> Sharpness:
    """log Z, KL* and E_p*[r] at this beta."""
    tilt = reward / beta
    reach = reach_of(reward, ceiling, 1 / beta)
    log_z = Jackknife(*_both(lambda keep: weights.log_mean_exp(tilt[:, keep]), reward.shape[1]))
    with np.errstate(divide="ignore"):
        widened = log_z.mean(n=reward.size, widen=np.where(reach > 0, estimate.widening(reach), 0.0))
    spent = tilt - weights.log_mean_exp(tilt)[:, None]
    return Sharpness(
        beta=beta,
        log_z=guarded(widened, reach, ceiling, reward.shape[1]),
        kl=tilted(reward, ceiling, beta, spent, lambda keep: _mean(tilt, tilt, keep) - weights.log_mean_exp(tilt[:, keep])),
        reward=tilted(reward, ceiling, beta, reward),
        reach=float(reach.min()) if np.isfinite(ceiling).all() else None,
    )


def tilted(
    reward: Array, ceiling: Array, beta: float, terms: Array, mean: Callable[[slice | Array], Array] | None = None
) -> Estimate:  # fmt: skip
    """E_p*[terms], or `mean` of the columns kept whose terms these are, with what could hide inside the interval."""
    tilt = reward / beta
    reach = reach_of(reward, ceiling, 1 / beta)
    figure = Jackknife(*_both(mean or (lambda keep: _mean(tilt, terms, keep)), reward.shape[1])).mean(n=reward.size)
    if figure.low is not None and figure.high is not None:
        hidden = float((3.0 / (reach + 3.0)).mean())
        low, high = ((1 - hidden) * end + hidden * far for end, far in ((figure.low, terms.min()), (figure.high, terms.max())))
        figure = replace(figure, low=float(low), high=float(high), population=None)
    return guarded(figure, reach, ceiling, reward.shape[1])


def mean_at(reward: Array, beta: float, values: Array) -> Array:
    """[P] E_p*[values] of each prompt."""
    return _mean(reward / beta, values, slice(None))


def kl_at(reward: Array, beta: float) -> Array:
    """[P] KL(p* || p0) of each prompt."""
    tilt = reward / beta
    return _mean(tilt, tilt, slice(None)) - weights.log_mean_exp(tilt)


def _mean(tilt: Array, values: Array, keep: slice | Array) -> Array:
    share = np.exp(tilt[:, keep] - tilt[:, keep].max(1, keepdims=True))
    return np.asarray((share * values[:, keep]).sum(1) / share.sum(1))


def _both(figure: Callable[[slice | Array], Array], draws: int) -> tuple[Array, Array]:
    block = estimate.blocks_of(draws)
    return figure(slice(None)), np.stack([figure(np.asarray(block != b)) for b in range(BLOCKS)])


def guarded(figure: Estimate, reach: Array, ceiling: Array, draws: int) -> Estimate:
    """The status that reach allows."""
    if np.isfinite(ceiling).all():
        return estimate.by_reach(figure, reach, draws)
    return replace(figure, low=None, high=None, population=None, status="uncertified", reason="no reward_max was declared")


def edge(reward: Array, ceiling: Array, least: float = CERTIFIED) -> float | None:
    """The largest 1/beta with A >= least at every prompt: inf where enough draws sit at the ceiling, None where no ceiling is known."""
    top = at_cap(reward, ceiling)
    if top is None:
        return None
    if top.sum(1).min() >= least:
        return math.inf
    excess = lambda log_lam: math.log(max(float(reach_of(reward, ceiling, math.exp(log_lam)).min()), 1e-300) / least)  # noqa: E731
    low, high = -20.0, 20.0
    if excess(low) < 0:
        return 0.0
    return math.inf if excess(high) >= 0 else math.exp(brentq(excess, low, high, xtol=1e-10))
