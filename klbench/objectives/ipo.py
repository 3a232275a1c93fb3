"""IPO: the log-ratio gap regressed on the label, so that certain labels cannot drive it to infinity.

    u = log(q/p0),   h_ij = u(y_i) - u(y_j),   P_ij = sigma(r_i - r_j),   tau = beta
    loss = mean over prompts and pairs i < j of [ P_ij (h_ij - 1/(2 tau))^2 + (1 - P_ij) (h_ij + 1/(2 tau))^2 ],   y ~ p0
    E[grad loss] = 2 E_{i,j~p0}[ (h_ij - (2 P_ij - 1)/(2 tau)) (s_i - s_j) ],   s = grad log q

Optimum: its own, p0(x) exp(P(x beats a prior draw)/tau) / norm: the tilt is a win rate in [0, 1], not the reward.
Source: Azar et al. 2023, arXiv:2310.12036 (tau .1).  Pitfall: a mean over tokens changes what tau means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from scipy.special import expit
from torch import Tensor

from klbench.batch import Batch
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw
from klbench.preferences import bradley_terry, pairs


@final
@dataclass(frozen=True)
class IPO(AbstractObjective):
    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2310.12036"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "pairs"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, squared nats a pair. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"ipo compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        u = batch.total(batch.log_q - batch.log_p0)  # [P, K] nats
        i, j = pairs(u.shape[1])
        wins, h, margin = bradley_terry(batch.reward), u[:, i] - u[:, j], 1 / (2 * beta)
        return (wins * (h - margin) ** 2 + (1 - wins) * (h + margin) ** 2).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The population loss of one prompt: all pairs of answers [S, S], both drawn from the prior."""
        u, pair = log_q - log_p0, log_p0[:, None] + log_p0[None, :]
        wins, h = (reward[:, None] - reward[None, :]).sigmoid(), u[:, None] - u[None, :]
        return (pair.exp() * (wins * (h - 1 / (2 * beta)) ** 2 + (1 - wins) * (h + 1 / (2 * beta)) ** 2)).sum()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log of the optimum over p0 of `reward`; win rates and norm over the levels of the law."""
        rate = lambda r: expit(np.asarray(r)[:, None] - law.levels) @ law.mass / beta  # noqa: E731
        return np.asarray(rate(reward) - law.log_mean_exp(rate(law.levels)))
