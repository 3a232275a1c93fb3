"""DPO: logistic regression of the labels on the policy's log-ratio gaps.

    u = log(q/p0),   h_ij = u(y_i) - u(y_j),   P_ij = sigma(r_i - r_j)   (Bradley-Terry, temperature 1)
    loss = -mean over prompts and pairs i < j of [ P_ij log sigma(beta h_ij) + (1 - P_ij) log sigma(-beta h_ij) ],   y ~ p0
    E[grad loss] = -beta E_{i,j~p0}[ (P_ij - sigma(beta h_ij)) (s_i - s_j) ],   s = grad log q

Optimum: the target p*, where beta h_ij = r_i - r_j.  Source: Rafailov et al. 2023, arXiv:2305.18290 (beta .1).
Switch length_normalised: u over the number of tokens n, as several successors write it. Then u = n (r/beta + c), one c a prompt that makes
q sum to 1: a tilt that pays by the token, hence no longer p* unless all answers are equally long, and none that is declared.
The label's probability stands in for a drawn label: the same expectation, less noise. Pitfalls: sums of token log-probabilities,
never means; with rewards far apart the labels are nearly certain and the fit of the gap is slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn.functional import logsigmoid

from klbench.batch import Batch
from klbench.method import AbstractObjective
from klbench.preferences import bradley_terry, pairs


@final
@dataclass(frozen=True)
class DPO(AbstractObjective):
    """length_normalised: log-ratios are means over tokens."""

    length_normalised: bool = False

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2305.18290"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        if self.length_normalised:
            object.__setattr__(self, "optimum", "none")

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats a pair. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"dpo compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        u = batch.total(batch.log_q - batch.log_p0)  # [P, K] nats
        if self.length_normalised:
            u = u / batch.mask.sum(2)
        i, j = pairs(u.shape[1])
        wins, margin = bradley_terry(batch.reward), beta * (u[:, i] - u[:, j])
        return -(wins * logsigmoid(margin) + (1 - wins) * logsigmoid(-margin)).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The population loss of one prompt: all pairs of answers [S, S], both drawn from the prior."""
        u, pair = log_q - log_p0, log_p0[:, None] + log_p0[None, :]
        wins, margin = (reward[:, None] - reward[None, :]).sigmoid(), beta * (u[:, None] - u[None, :])
        return -(pair.exp() * (wins * logsigmoid(margin) + (1 - wins) * logsigmoid(-margin))).sum()
