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
FAR: Final = 40.0  # nats below every level, from where w(x) has nothing to add to the sum
CHUNK: Final = 2_000_000  # entries of one table of exponentials


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
        """[N] nats. Raises UserError when the law rests on fewer than 8 draws a particle: its N-th power would then live on a few of them."""
        if self.particles > law.draws / 8:
            raise UserError(f"snis:{self.particles} needs a bank of at least {8 * self.particles} draws a prompt, got {law.draws:g}")
        if len(reward) == 0:
            return np.zeros(0)
        levels, own = law.levels / beta, np.asarray(reward, dtype=np.float64) / beta
        top = max(float(levels.max()), float(own.max()))
        levels, own = levels - top, own - top
        near = np.maximum(own, float(levels.min()) - FAR)
        first, last = math.log(LEFT / self.particles), math.log(RIGHT) - float(near.min())
        total = np.full(len(own), -math.inf)
        for u in np.array_split(np.arange(first, last + STEP, STEP), 1 + int(last - first) * (len(levels) + len(own)) // CHUNK):
            with np.errstate(divide="ignore"):
                log_phi = np.log(_gone(u[:, None] + levels) @ law.mass)
            rest = u + (self.particles - 1) * np.maximum(log_phi, -1e300)  # 0 times -inf, for a single particle, is 0
            total = np.logaddexp(total, logsumexp(rest - np.exp(np.minimum(near[:, None] + u, 700.0)), axis=1))
        return np.asarray(math.log(self.particles * STEP) + own + total)

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


def _gone(log_x: Array) -> Array:
    """exp(-exp(log_x)): 0, not an overflow, where x is beyond all numbers."""
    return np.asarray(np.exp(-np.exp(np.minimum(log_x, 700.0))))
