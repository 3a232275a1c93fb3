"""RLOO: the score-function gradient with a leave-one-out baseline, the KL charged inside the return.

    J    = E_{y~q}[ r(y) - beta log(q(y)/p0(y)) ] = beta (log Z - KL(q || p*))
    g_pk = r_pk - beta log(q/p0)_pk                  held constant under the gradient
    loss = -mean_pk (g_pk - mean_{j != k} g_pj) log q(y_pk)      E[grad loss] = -grad J  at every K

Optimum: the target p*, reached with zero noise, as g is constant there.  Source: Ahmadian et al. 2024, arXiv:2402.14740.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class RLOO(AbstractObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2402.14740"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        draws = batch.reward.shape[1]
        if draws < 2:
            raise ValueError(f"rloo compares draws of one prompt: K >= 2 needed, got {draws}")
        log_q = batch.total(batch.log_q)  # [P, K] nats
        gain = batch.reward - beta * (log_q - batch.total(batch.log_p0)).detach()
        advantage = (gain - gain.mean(1, keepdim=True)) * draws / (draws - 1)  # = gain minus the mean of the rest
        return -(advantage * log_q).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward - beta * (log_q - log_p0))).sum()
