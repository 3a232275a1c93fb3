"""REINFORCE without KL: the score-function gradient of the reward alone.

    J    = E_{y~q}[ r(y) ]
    loss = -mean_pk (r_pk - b_pk) log q(y_pk)      E[grad loss] = -grad J  for every b that does not depend on y_pk

Optimum: any law on the maxima of r, so none is declared; on the way the softmax gradient gives ties to whichever leads: it collapses.
beta is not read.  Source: Williams 1992, doi:10.1007/BF00992696.  Pitfall: with b = 0 and rewards of one sign noise drives the collapse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class Reinforce(AbstractObjective):
    """baseline: the constant b.  leave_one_out: b_pk is the mean reward of the prompt's other draws instead (K >= 2)."""

    baseline: float = 0.0
    leave_one_out: bool = False

    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "doi:10.1007/BF00992696"
    needs_prior: ClassVar[bool] = False

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q [P, K, T] and reward [P, K]. Raises ValueError when leave_one_out meets K < 2."""
        draws = batch.reward.shape[1]
        if self.leave_one_out and draws < 2:
            raise ValueError(f"reinforce: leave_one_out needs K >= 2 draws of a prompt, got {draws}")
        advantage = batch.reward - self.baseline
        if self.leave_one_out:
            advantage = (batch.reward - batch.reward.mean(1, keepdim=True)) * draws / (draws - 1)
        return -(advantage * batch.total(batch.log_q)).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * reward).sum()
