"""KL-regularised REINFORCE: the KL charged inside the return, a baseline from the batch's other prompts.

    J    = E_{y~q}[ r(y) - beta log(q(y)/p0(y)) ] = beta (log Z - KL(q || p*))
    g_pk = r_pk - beta log(q/p0)_pk                  held constant under the gradient
    loss = -mean_pk (g_pk - b_p) log q(y_pk),        b_p = mean of g over the other prompts' draws, 0 where there are none
    E[grad loss] = -grad J

Optimum: the target p*; there g = beta log Z for every answer.  Source: Korbak, Perez, Buckley 2022, arXiv:2205.11275.
Pitfall: b_p misses what differs between prompts, so its noise is above that of a baseline from the same prompt's draws (rloo).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class KLRL(AbstractObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2205.11275"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, log_p0 [P, K, T] and reward [P, K]."""
        prompts, draws = batch.reward.shape
        log_q = batch.total(batch.log_q)  # [P, K] nats
        gain = batch.reward - beta * (log_q - batch.total(batch.log_p0)).detach()
        baseline = (gain.sum() - gain.sum(1, keepdim=True)) / max((prompts - 1) * draws, 1)  # P = 1: exactly 0
        return -((gain - baseline) * log_q).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward - beta * (log_q - log_p0))).sum()
