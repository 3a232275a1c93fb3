"""VarGrad: the variance, over a prompt's draws, of the log-ratio that is constant at p* alone.

    d_pk = log q(y_pk) - log p0(y_pk) - r_pk / beta                   = log q/p* - log Z
    loss = mean_p sum_k (d_pk - mean_j d_pj)^2 / (K - 1),    y ~ q held fixed
    E[grad loss] = 2 grad KL(q || p*)

No constant is learned: the group's mean stands for -log Z (trajectory_balance learns it and takes the mean square). Divisor K in place
of K - 1 shrinks the gradient by (K - 1)/K and moves nothing. On fresh draws each batch has 2/beta times the gradient of rloo.
Optimum: the target p*, reached with zero noise.  Source: Richter et al. 2020, arXiv:2010.10436.
Pitfall: taken over prompts too, the variance has the same gradient in expectation and the differences in log Z as noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class VarGrad(AbstractObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2010.10436"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, squared nats. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"vargrad compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        gap = batch.total(batch.log_q - batch.log_p0) - batch.reward / beta  # [P, K] nats
        return gap.var(1, correction=1).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """KL(q || p*) of one prompt, all answers [S] enumerated."""
        return (log_q.exp() * (log_q - (log_p0 + reward / beta).log_softmax(0))).sum()
