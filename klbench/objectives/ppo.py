"""PPO: a clipped per-token ratio, so that one batch of draws serves more than one step.

    rho_t  = q(y_t | y_<t) / q_old(y_t | y_<t)
    g_pk   = r_pk - beta log(q_old/p0)_pk,    A_pk = g_pk - mean_{j != k} g_pj          both fixed while the batch is reused
    loss   = -mean_pk sum_t min( rho_t A_pk, clip(rho_t, 1 - eps, 1 + eps) A_pk )
    E[grad loss] = -grad J at q = q_old, J = beta (log Z - KL(q || p*)); no gradient from tokens already moved past the clip

Optimum: the target p*.  Source: Schulman et al. 2017, arXiv:1707.06347; the advantage is leave-one-out in place of a critic.
Pitfall: clipping does not bound the KL; after the first step of a batch the gradient is no longer exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class PPO(AbstractObjective):
    """clip: eps."""

    clip: float = 0.2

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:1707.06347"
    epochs: ClassVar[int] = 2

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, old_log_q, log_p0 [P, K, T], reward [P, K]. ValueError when K < 2 or without old_log_q."""
        draws = batch.reward.shape[1]
        if draws < 2 or batch.old_log_q is None:
            raise ValueError(f"ppo needs old_log_q and K >= 2 draws of a prompt, got {draws}")
        old = batch.old_log_q.detach()
        gain = batch.reward - beta * batch.total(old - batch.log_p0)
        advantage = ((gain - gain.mean(1, keepdim=True)) * draws / (draws - 1))[:, :, None]  # [P, K, 1]
        ratio = (batch.log_q - old).exp()
        return -batch.total(torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward - beta * (log_q - log_p0))).sum()
