"""Best-of-n: of n prior draws, the one with the highest reward.

    q(x) = p0(x) [F(r)^n - F(r-)^n] / P0(r),   r = r(x);   F: law of the reward under the prior; P0(r) = F(r) - F(r-)

Ties are broken uniformly: prior draws are exchangeable, so the first maximum of a block is a uniform one. Rewards that no level of the law
meets: `RewardLaw.log_best_of`. KL(q||p0) <= log n - (n-1)/n, less where rewards tie.
Reads no beta.  Source: Beirami et al. 2024, arXiv:2401.01879.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractSampler, RewardLaw


@final
@dataclass(frozen=True)
class BestOfN(AbstractSampler):
    """n: prior draws a draw."""

    n: int = 16

    source: ClassVar[str] = "arXiv:2401.01879"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"best_of_n: n must be at least 1, got {self.n}")

    def log_ratio(self, reward: Array, law: RewardLaw, beta: float, reward_max: float) -> Array:
        """[N] nats. Raises UserError when the law rests on fewer than 8n draws: the n-th power of F would then live on a few of them."""
        if self.n > law.draws / 8:
            raise UserError(f"best_of_n:{self.n} needs a bank of at least {8 * self.n} draws a prompt, got {law.draws:g}")
        return law.log_best_of(reward, self.n)

    def pick(self, reward: Array, beta: float, reward_max: float, draws: int, seed: int) -> tuple[NDArray[np.int64], int]:
        """The first maximum of each block of n. Raises UserError when there are fewer than draws * n."""
        used = draws * self.n
        if len(reward) < used:
            raise UserError(f"best_of_n:{self.n} needs {used} prior draws for {draws}, got {len(reward)}")
        return np.arange(draws) * self.n + np.reshape(reward[:used], (draws, self.n)).argmax(1), used

    def cost(self, law: RewardLaw, beta: float, reward_max: float) -> float:
        """n."""
        return float(self.n)
