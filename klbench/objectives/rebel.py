"""REBEL: the difference of two rewards regressed on the difference of the log-ratios.

    u = log(q/p0),   h_ij = u(y_i) - u(y_j),   e_ij = beta h_ij - (r_i - r_j)
    loss = mean over prompts and pairs i < j of e_ij^2,   y ~ p0           E[grad loss] = 2 beta E_{i,j~p0}[ e_ij (s_i - s_j) ]
    huber d > 0:  e^2 where |e| <= d, d (2 |e| - d) beyond: an outlier among the rewards pulls with a bounded force

Optimum: the target p*, where every e is 0: no noise is left, and nothing runs to infinity as with certain labels.
Source: Gao et al. 2024, REBEL, arXiv:2404.16767, u measured from the last iterate; Fisch et al. 2024, arXiv:2405.19316, from the prior,
as here: only so is p* the zero. On the policy's own draws the squared loss is twice VarGrad's.
Pitfall: it needs the scale of the reward, not the order alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.method import AbstractObjective
from klbench.preferences import pairs


@final
@dataclass(frozen=True)
class REBEL(AbstractObjective):
    """huber: d, in units of the reward; 0 switches it off."""

    huber: float = 0.0

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2404.16767"
    draws: ClassVar[str] = "prior"

    def __post_init__(self) -> None:
        if not self.huber >= 0:
            raise UserError(f"rebel: huber is a distance, 0 for none, got {self.huber}")

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, squared reward units a pair. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"rebel compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        error = beta * batch.total(batch.log_q - batch.log_p0) - batch.reward  # [P, K]
        i, j = pairs(error.shape[1])
        return self._cost(error[:, i] - error[:, j]).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The population loss of one prompt: all pairs of answers [S, S], both drawn from the prior."""
        error, pair = beta * (log_q - log_p0) - reward, log_p0[:, None] + log_p0[None, :]
        return (pair.exp() * self._cost(error[:, None] - error[None, :])).sum()

    def _cost(self, error: Tensor) -> Tensor:
        if self.huber == 0:
            return error**2
        near = error.abs().clamp(max=self.huber)
        return near * (2 * error.abs() - near)
