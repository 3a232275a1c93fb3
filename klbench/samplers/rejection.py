"""Rejection sampling: the posterior, exact by construction.

    accept x ~ p0 with probability exp((r(x) - r_max) / beta);   the accepted ones follow p*(x) = p0(x) exp(r(x)/beta) / Z
    log q/p0 = r/beta - log Z,   log Z from the law of the reward;   cost = exp(r_max/beta) / Z prior draws a draw

Exact only while no reward exceeds r_max, which is therefore refused, not clipped.
Source: von Neumann 1951, "Various techniques used in connection with random digits".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractSampler, RewardLaw


@final
@dataclass(frozen=True)
class Rejection(AbstractSampler):
    """One uniform number a prior draw, in order: more prior draws extend the picks and never change the earlier ones."""

    source: ClassVar[str] = "von Neumann 1951"
    draws_target: ClassVar[bool] = True

    def log_ratio(self, reward: Array, law: RewardLaw, beta: float, reward_max: float) -> Array:
        """[N] reward/beta - log Z, nats; noise: that of log Z from the law's draws."""
        return np.asarray(reward / beta - law.log_mean_exp(law.levels / beta))

    def pick(self, reward: Array, beta: float, reward_max: float, draws: int, seed: int) -> tuple[NDArray[np.int64], int]:
        """Indices of the first `draws` accepted. Raises UserError without a finite bound, above it, or when too few are accepted."""
        if not math.isfinite(reward_max):
            raise UserError("rejection needs a finite reward_max: without a ceiling no acceptance probability exists")
        if len(reward) and float(np.max(reward)) > reward_max + 1e-9 * max(1.0, abs(reward_max)):
            raise UserError(f"rejection: reward {float(np.max(reward)):g} above reward_max {reward_max:g}")
        accept = np.exp((reward - reward_max) / beta)
        accepted = np.flatnonzero(np.random.default_rng(seed).random(len(reward)) < accept)
        if len(accepted) < draws:
            raise UserError(f"rejection accepted {len(accepted)} of {len(reward)} prior draws; {draws} are wanted")
        kept = accepted[:draws]
        return kept, int(kept[-1]) + 1 if draws else 0

    def cost(self, law: RewardLaw, beta: float, reward_max: float) -> float:
        """exp(reward_max/beta) / Z; infinite where no bound is declared."""
        if not math.isfinite(reward_max):
            return math.inf
        return math.exp(-law.log_mean_exp((law.levels - reward_max) / beta))
