"""Quasi-rejection: rejection under a bound that may be too low, so that draws are cheaper and not quite the posterior's.

    c' = c exp(r_max/beta),   0 < c <= 1
    accept x ~ p0 with probability min(1, exp(r/beta) / c');   q(x) = p0(x) min(exp(r/beta), c') / Z_c,   Z_c = E_p0 min(exp(r/beta), c')
    cost = c' / Z_c prior draws a draw;   TV(p*, q) <= 1 - Z_c / Z

c = 1 is rejection; as c falls cost falls, and both TV and KL to p* rise: rewards above r_max + beta log c are not told apart.
Source: Eikema et al. 2022, "An approximate sampler for energy-based models with divergence diagnostics", TMLR.
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
class QuasiRejection(AbstractSampler):
    """c: the bound as a share of the ceiling exp(reward_max/beta), in (0, 1]. One uniform number a prior draw, in order."""

    c: float = 0.1

    source: ClassVar[str] = "Eikema et al. 2022"

    def __post_init__(self) -> None:
        if not 0 < self.c <= 1:
            raise UserError(f"quasi_rejection: c in (0, 1] expected, got {self.c:g}")

    def log_accept(self, reward: Array, beta: float, reward_max: float) -> Array:
        """[N] log of the chance that a prior draw is kept. Raises UserError without a finite ceiling, and above it."""
        if not math.isfinite(reward_max):
            raise UserError("quasi_rejection needs a finite reward_max: its bound is a share of exp(reward_max/beta)")
        if len(reward) and float(np.max(reward)) > reward_max + 1e-9 * max(1.0, abs(reward_max)):
            raise UserError(f"quasi_rejection: reward {float(np.max(reward)):g} above reward_max {reward_max:g}")
        return np.minimum((np.asarray(reward) - reward_max) / beta - math.log(self.c), 0.0)

    def log_ratio(self, reward: Array, law: RewardLaw, beta: float, reward_max: float) -> Array:
        """[N] nats."""
        return self.log_accept(reward, beta, reward_max) - law.log_mean_exp(self.log_accept(law.levels, beta, reward_max))

    def pick(self, reward: Array, beta: float, reward_max: float, draws: int, seed: int) -> tuple[NDArray[np.int64], int]:
        """Indices of the first `draws` accepted. Raises UserError as `log_accept` does, and when too few are accepted."""
        accept = np.exp(self.log_accept(reward, beta, reward_max))
        accepted = np.flatnonzero(np.random.default_rng(seed).random(len(reward)) < accept)
        if len(accepted) < draws:
            raise UserError(f"quasi_rejection:{self.c:g} accepted {len(accepted)} of {len(reward)} prior draws; {draws} are wanted")
        kept = accepted[:draws]
        return kept, int(kept[-1]) + 1 if draws else 0

    def cost(self, law: RewardLaw, beta: float, reward_max: float) -> float:
        """c'/Z_c; infinite where no ceiling is declared."""
        if not math.isfinite(reward_max):
            return math.inf
        return math.exp(-law.log_mean_exp(self.log_accept(law.levels, beta, reward_max)))
