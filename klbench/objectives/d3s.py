"""D3S down-sampling: of a prompt's draws only those with the most different returns are trained on.

    g_pk = r_pk - beta log(q/p0)_pk                              held constant under the gradient
    S_p  = the m of K draws whose g has the largest variance: always some of the lowest and some of the highest
    loss = -mean_p mean_{k in S_p} (g_pk - mean_{j in S_p} g_pj) log q(y_pk)

The expected gradient is not that of E_q[g]: draws in the middle count for nothing. With right or wrong, beta = 0 and m = 2 it is that of
-logit p, p = P_q(right), times a quarter of the chance that a group holds both; all K draws kept give p itself.
Optimum: the target p*, reached with zero noise: there g is constant and so is every subset; at any other policy with full support the
answer of the largest g is pushed up.  Source: Wang et al. 2025, arXiv:2509.22115.
Not here: its choice of tokens by |A| times entropy, and its schedule that keeps more and more.
Pitfall: with the KL charged outside g the subset would change the optimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class D3S(AbstractObjective):
    """share: m / K, rounded up to at least 2 draws; ours, as the paper's moves on a schedule."""

    share: float = 0.5

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2509.22115"

    def kept(self, gain: Tensor) -> Tensor:
        """[P, m] indices of the draws kept, gain [P, K]: of all unions of the k lowest and m - k highest that of the largest variance."""
        draws = gain.shape[1]
        keep = min(draws, max(2, math.ceil(self.share * draws)))
        order = gain.argsort(1)
        place = torch.arange(keep, device=gain.device)
        lowest = torch.arange(keep + 1, device=gain.device)[:, None]  # [m + 1, 1] how many of the lowest
        at = torch.where(place < lowest, place, place + draws - keep)  # [m + 1, m] ranks
        best = gain.gather(1, order)[:, at].var(2, correction=0).argmax(1)
        return order.gather(1, at[best])

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"d3s compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        log_q = batch.total(batch.log_q)  # [P, K] nats
        gain = batch.reward - beta * (log_q - batch.total(batch.log_p0)).detach()
        kept = self.kept(gain)
        chosen = gain.gather(1, kept)
        return -((chosen - chosen.mean(1, keepdim=True)) * log_q.gather(1, kept)).mean()
