"""DID: DPO on pairs whose losers carry the differential information: winners are prior draws, losers lean away from the target.

    y_w ~ p0,   y_l ~ p0 (p0/p*)^beta / norm = p0 exp(-r) / norm,   u = log(q/p0)
    loss = -mean_p sum_{i != j} w_j / (K - 1) log sigma( beta (u_i - u_j) ),   w = softmax_K(-r),   y_1 .. y_K ~ p0
    grad of a pair i < j:  -beta / (K - 1) (w_i + w_j) [ sigma(r_i - r_j) - sigma(beta (u_i - u_j)) ] (s_i - s_j)

w are the losers' self-normalised importance weights within the group, the winners are its other draws. That is Bradley-Terry's
probability with weight w_i + w_j on the pair, so every pair, and each group, is at rest where u = r/beta + const, at finite K too.
Optimum: the target p*. DPO with winners ~ A and losers ~ B, independent, has p0 (A/B)^(1/beta), and here A/B = e^r / const.
Source: Won et al. 2025, arXiv:2505.23761: the law of what is learned is q/p0, normalised over answers.
Pitfall: with rewards far apart one loser takes all the weight of its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class DID(AbstractObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2505.23761"
    draws: ClassVar[str] = "prior"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats a pair. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"did compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        return self._cost(batch.total(batch.log_q - batch.log_p0), batch.reward, beta).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The population loss of one prompt: all groups of K answers, drawn from the prior."""
        group = torch.cartesian_prod(*[torch.arange(len(reward))] * draws)  # [S^K, K]
        return (log_p0[group].sum(1).exp() * self._cost((log_q - log_p0)[group], reward[group], beta)).sum()

    def _cost(self, u: Tensor, reward: Tensor, beta: float) -> Tensor:
        """[P] loss of each group; u, reward [P, K]."""
        losing = (-reward).softmax(1)
        won = -logsigmoid(beta * (u[:, :, None] - u[:, None, :]))  # [P, winner, loser]
        others = won.sum(1) - won.diagonal(dim1=1, dim2=2)
        return (losing * others).sum(1) / (u.shape[1] - 1)
