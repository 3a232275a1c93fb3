"""Ancestral sampling: the prior itself, token by token at temperature 1.

    q(x) = p0(x),   log q/p0 = 0,   one prior draw a draw

The row against which every other one is read.  Source: the prior's own chain rule; no paper.
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
class Ancestral(AbstractSampler):
    """Returns prior draws in the order in which they come."""

    source: ClassVar[str] = "the prior"

    def log_ratio(self, reward: Array, law: RewardLaw, beta: float, reward_max: float) -> Array:
        """[N] zeros."""
        return np.zeros(len(reward))

    def pick(self, reward: Array, beta: float, reward_max: float, draws: int, seed: int) -> tuple[NDArray[np.int64], int]:
        """The first `draws` prior draws. Raises UserError when there are fewer."""
        if len(reward) < draws:
            raise UserError(f"ancestral needs {draws} prior draws, got {len(reward)}")
        return np.arange(draws), draws

    def cost(self, law: RewardLaw, beta: float, reward_max: float) -> float:
        """1."""
        return 1.0
