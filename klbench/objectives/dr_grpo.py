"""Dr. GRPO: the group's mean alone is taken off the reward, and the tokens are summed and divided by a constant.

    A_pk = r_pk - mean_j r_pj,    u = log q_old/p0,    D_pk = A_pk - beta (u_pk - mean_{j != k} u_pj)       held constant
    rho_t = q/q_old of token t
    loss = -mean_pk (1/T) sum_t min( rho_t D_pk, clip(rho_t, 1 - eps, 1 + eps) D_pk ),        T: tokens that a draw may have at most
    E[grad loss] = -(1/T) [ (K-1)/K grad E_q[r] - beta grad KL(q || p0) ]      on fresh draws, for every length of answers

The mean holds the draw itself and so shrinks the reward's gradient; the paper lets it, as its beta is 0. Here the KL is the true reverse
one, charged in the return and not shrunk. With k3 in its place, rewards 0 and 1 and p = P_q(1), the fixed point is another:
beta (p - p_0) = p (1 - p) (K-1)/K.
Optimum: its own, p0 exp(r (K-1)/(K beta)) / norm: p* at a beta larger by K/(K-1).
Source: Liu et al. 2025, arXiv:2503.20783 (eps .2, K 8).  Pitfall: K changes the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw


@final
@dataclass(frozen=True)
class DrGRPO(AbstractObjective):
    """clip: eps."""

    clip: float = 0.2

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2503.20783"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar. Reads log_q, log_p0 [P, K, T], reward [P, K]; old_log_q where the draws are not fresh. Raises ValueError when K < 2."""
        draws = batch.reward.shape[1]
        if draws < 2:
            raise ValueError(f"dr_grpo compares draws of one prompt: K >= 2 needed, got {draws}")
        old = (batch.log_q if batch.old_log_q is None else batch.old_log_q).detach()
        u = batch.total(old - batch.log_p0)  # [P, K] nats
        charge = beta * (u - u.mean(1, keepdim=True)) * draws / (draws - 1)
        advantage = (batch.reward - batch.reward.mean(1, keepdim=True) - charge)[:, :, None]
        ratio = (batch.log_q - old).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        return -batch.total(gain).mean() / batch.mask.shape[2]

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-(K-1)/K E_q[r] + beta KL(q || p0) of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward * (draws - 1) / draws - beta * (log_q - log_p0))).sum()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log of the optimum over p0 of `reward`; the norm is over the levels of the law."""
        shrunk = (draws - 1) / (draws * beta)
        return np.asarray(reward * shrunk - law.log_mean_exp(law.levels * shrunk))
