"""Hybrid policy gradient: the prior's draws beside the policy's in one batch, each weighed against the mixture that they came from.

    m    = a q + (1 - a) p0           a: share of own draws in the group           balance heuristic
    w_pk = q(y)/m(y) <= 1/a,    g_pk = r_pk - beta log(q/p0)_pk                    both held constant under the gradient
    loss = -mean_pk w_pk (g_pk - b_pk) log q(y_pk)         E[grad loss] = -grad J,  J = beta (log Z - KL(q || p*))

b_pk: mean of g over the group's other own draws, so that for the prior's draws and the policy's it has one expectation, without which
E[w s] = 0 over the whole group would not remove it; 0 where an own draw has no other.
Optimum: the target p*, reached with zero noise.  Source: Zhou et al. 2023, arXiv:2311.08384, of which this keeps the mix of data: their
critic, fitted on both, and their natural gradient are left out.  Pitfall: prior draws without w follow another objective's gradient.
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
class HNPG(AbstractObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2311.08384"
    draws: ClassVar[str] = "both"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, log_p0 [P, K, T], reward, own [P, K]. Raises ValueError without own."""
        if batch.own is None:
            raise ValueError("hnpg needs to know which draws are the policy's own")
        log_q, log_p0 = batch.total(batch.log_q), batch.total(batch.log_p0)  # [P, K] nats
        now, share = log_q.detach(), batch.own.to(log_q.dtype).mean(1, keepdim=True)
        weight = (now - torch.logaddexp(share.log() + now, torch.log1p(-share) + log_p0)).exp()
        gain = batch.reward - beta * (now - log_p0)
        itself = torch.eye(gain.shape[1], dtype=torch.bool, device=gain.device)
        others = (batch.own[:, None, :] & ~itself).to(gain.dtype)  # [P, k, j]
        count = others.sum(2)
        enough = count.amin(1, keepdim=True) > 0
        baseline = torch.where(enough, (others * gain[:, None, :]).sum(2) / count.clamp(min=1), 0.0)
        return -(weight * (gain - baseline) * log_q).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward - beta * (log_q - log_p0))).sum()
