"""GRPO: advantages scaled by the group's own spread, a k3 penalty on each token.

    A_pk = (r_pk - mean_j r_pj) / (sd_j r_pj + delta)                         sd over the K draws, divisor K
    k3_t = p0/q - 1 - log(p0/q)  of token t,     rho_t = q/q_old of token t
    loss = -mean_pk mean_t [ min( rho_t A_pk, clip(rho_t, 1 - eps, 1 + eps) A_pk ) - beta k3_t ]

Optimum: none known. The spread makes beta depend on the prompt; on fixed draws k3 has the gradient of KL(p0 || q), not of
KL(q || p0), and per token it forgets what a token leads to; the mean over tokens favours short right and long wrong answers.
With one-token answers and a two-valued reward, p = P_q(the better):  E[grad loss] = -grad p E[s] / (p (1-p)) + beta grad KL(p0||q),
s = sd of the group's two-valued rewards over the draw of the group.  Source: Shao et al. 2024, arXiv:2402.03300 (beta .04, eps .2).
Switch least_spread: A = 0 in a group whose sd is at or below it, as in Edit-R1 (Li et al. 2025, arXiv:2510.16888): where the rewards
hardly differ, 1/sd blows up what may be noise. The group keeps its penalty and its place in the mean: its s in E[grad loss] is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class GRPO(AbstractObjective):
    """clip: eps.  delta: keeps a group without spread at advantage 0.  least_spread: a sd of rewards, 0 or more; see above."""

    clip: float = 0.2
    delta: float = 1e-4
    least_spread: float = 0.0

    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "arXiv:2402.03300"

    def __post_init__(self) -> None:
        if not self.least_spread >= 0:
            raise UserError(f"grpo: least_spread is a standard deviation, 0 or more, got {self.least_spread}")

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar. Reads log_q, log_p0 [P, K, T], reward [P, K]; old_log_q where the draws are not fresh. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"grpo compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        centred, spread = batch.reward - batch.reward.mean(1, keepdim=True), batch.reward.std(1, correction=0, keepdim=True)
        advantage = (centred / (spread + self.delta))[:, :, None]
        if self.least_spread:  # at 0 the quotient is 0 by itself
            advantage = advantage * (spread > self.least_spread)[:, :, None]
        old = batch.log_q if batch.old_log_q is None else batch.old_log_q
        ratio = (batch.log_q - old.detach()).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        back = batch.log_p0 - batch.log_q
        per_token = beta * (back.exp() - 1 - back) - gain
        return (batch.total(per_token) / batch.mask.sum(2)).mean()
