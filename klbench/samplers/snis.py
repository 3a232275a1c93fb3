"""Self-normalised importance resampling (SNIS, SIR): of N prior draws one, with probability in proportion to exp(r/beta).

    w = exp(r/beta),   phi(t) = E_p0[exp(-w t)]
    q(x)/p0(x) = N E[ w(x) / (w(x) + w_2 + ... + w_N) ] = N int_0^inf w(x) exp(-w(x) t) phi(t)^(N-1) dt

by 1/s = int exp(-s t) dt. The mean of q/p0 under p0 is -int d(phi^N) = 1 at every law of the reward. With t = exp(u) the trapezoid rule
on a grid of step h errs by about exp(-pi^2/h) of the value, as the integrand is analytic for |Im u| < pi/2 and decays on both sides.
N draws of the prior give one draw: a second one of the same N would not be independent of it. TV(p*, q) falls as 1/N.
Pitfall: q/p0 <= N, so an output that p* holds more than N times as dear as p0 cannot be reached. The law of the reward is the bank's, and
its N-th power lives on N of its draws.  Source: Rubin 1987, "The calculation of posterior distributions by data augmentation: comment".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractSampler, RewardLaw

STEP: Final = 0.3  # of the grid in log t: exp(-pi^2/.3) = 5e-15
LEFT: Final = 1e-12  # share of the integral below the grid
RIGHT: Final = 40.0  # exp(-40) of it above
FAR: Final = 40.0  # nats beyond every level, from where w(x) adds nothing to the sum of the others, or they nothing to it
CHUNK: Final = 1_000_000  # entries of one table of exponentials
NODES: Final = 1000  # and rows


@final
@dataclass(frozen=True)
class SNIS(AbstractSampler):
    """particles: N, prior draws a draw."""

    particles: int = 32

    source: ClassVar[str] = "Rubin 1987"

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise UserError(f"snis: at least 1 particle expected, got {self.particles}")

    def log_ratio(self, reward: Array, law: RewardLaw, beta: float, reward_max: float) -> Array:
        """[N] nats. Raises UserError when the law rests on fewer than 8N draws: the N-th power of phi would then live on a few of them."""
        if self.particles > law.draws / 8:
            raise UserError(f"snis:{self.particles} needs a bank of at least {8 * self.particles} draws a prompt, got {law.draws:g}")
        if len(reward) == 0:
            return np.zeros(0)
        top, n = float(law.levels.max()), self.particles
        levels = (law.levels - top) / beta
        own = np.minimum((np.asarray(reward, dtype=np.float64) - top) / beta, FAR)
        near = np.maximum(own, float(levels.min()) - FAR)
        first, last = math.log(LEFT / n) - max(float(near.max()), 0.0), math.log(RIGHT) - float(near.min())
        total = np.full(len(own), -math.inf)
        size = min(NODES, 1 + CHUNK // (len(levels) + len(own)))
        grid = np.arange(first, last + STEP, STEP)
        for u in (grid[i : i + size] for i in range(0, len(grid), size)):
            with np.errstate(divide="ignore"):
                log_phi = np.log(np.exp(-_times(u, levels)) @ law.mass)
            rest = u + (n - 1) * np.maximum(log_phi, -1e300)  # finite, so that a single particle's 0 times it is 0
            total = np.logaddexp(total, logsumexp(rest[:, None] - _times(u, near), axis=0))
        return np.asarray(math.log(n * STEP) + own + total)

    def pick(self, reward: Array, beta: float, reward_max: float, draws: int, seed: int) -> tuple[NDArray[np.int64], int]:
        """One of each block of N, at one uniform number a block. Raises UserError when there are fewer than draws * N."""
        used = draws * self.particles
        if len(reward) < used:
            raise UserError(f"snis:{self.particles} needs {used} prior draws for {draws}, got {len(reward)}")
        tilt = np.reshape(reward[:used], (draws, self.particles)) / beta
        cumulative = np.exp(tilt - tilt.max(1, keepdims=True)).cumsum(1)
        point = np.random.default_rng(seed).random((draws, 1)) * cumulative[:, -1:]
        return np.arange(draws) * self.particles + (cumulative <= point).sum(1).clip(max=self.particles - 1), used

    def cost(self, law: RewardLaw, beta: float, reward_max: float) -> float:
        """N."""
        return float(self.particles)


def _times(log_t: Array, log_w: Array) -> Array:
    """[U, S] t w, from logarithms of which those of t span less than 700: neither factor overflows where the product is of account."""
    middle = float(log_t.mean())
    return np.exp(log_t - middle)[:, None] * np.exp(np.minimum(log_w + middle, 350.0))
