"""Reward dropout: rewards below a threshold count as 0, the rest as they are.

    r'_pk = r_pk where r_pk >= tau, else 0,    g_pk = r'_pk - beta log(q/p0)_pk held constant under the gradient
    loss  = -mean_pk (g_pk - mean_{j != k} g_pj) log q(y_pk)
    E[grad loss] = -grad J',    J' = E_q[r'] - beta KL(q || p0)

Optimum: its own, p0(x) exp(r'(x)/beta) / norm: the posterior of the thresholded reward.
Source: Lee, Lim 2023, arXiv:2310.04483, which keeps the top quantile of each batch: that threshold moves with the policy and no optimum
is known for it, so ours is fixed. The baseline and the KL are those of rloo.
Pitfall: not invariant to a shift of the reward; a dropped draw counts as 0, so a kept one below 0 would rank under it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from torch import Tensor

from klbench.batch import Batch
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw


@final
@dataclass(frozen=True)
class RewardDropout(AbstractObjective):
    """threshold: tau, in reward units; at 0 only bad answers are dropped and the order of the rewards is kept."""

    threshold: float = 0.0

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2310.04483"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        draws = batch.reward.shape[1]
        if draws < 2:
            raise ValueError(f"reward_dropout compares draws of one prompt: K >= 2 needed, got {draws}")
        log_q = batch.total(batch.log_q)  # [P, K] nats
        gain = batch.reward * (batch.reward >= self.threshold) - beta * (log_q - batch.total(batch.log_p0)).detach()
        advantage = (gain - gain.mean(1, keepdim=True)) * draws / (draws - 1)  # = gain minus the mean of the rest
        return -(advantage * log_q).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J' of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward * (reward >= self.threshold) - beta * (log_q - log_p0))).sum()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log of the optimum over p0 of `reward`; the norm is over the levels of the law."""
        kept, levels = (np.where(r >= self.threshold, r, 0.0) / beta for r in (reward, law.levels))
        return np.asarray(kept - law.log_mean_exp(levels))
