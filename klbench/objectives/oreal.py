"""OREAL: right draws are cloned, wrong ones pushed away by half, both as much as the rest of the group says the opposite.

    n right of the K draws of a prompt,  y ~ q;  prompts with n in {0, K} left out
    A+ = (K - n)/(K - 1),  A- = n/(K - 1)      1 less, or 0 less, the mean of the other draws
    k3_t = p0/q - 1 - log(p0/q)  of token t
    loss = mean_p [ -A+ <log q>_right + negative A- <log q>_wrong + (beta/2) (<sum_t k3_t>_right + <sum_t k3_t>_wrong) ]

<.> is the mean over the group's right or wrong draws: what keeping one of each at random gives on average, with less noise. The KL term
is therefore an expectation under half right and half wrong, not under q.  K -> inf, without it:
    E[grad loss] = -grad p ( (1-p)/p + negative p/(1-p) ),   p = P_q(right)
Optimum: none known, as k3 token by token forgets what a token leads to. With one-token answers it is p0 within the right and within the
wrong, and p solves  E[A+]/p + negative E[A-]/(1-p) = (beta/2) (p - p_0) (1/p^2 + 1/(1-p)^2),  means over groups with 0 < n < K.
Source: Lyu et al. 2025, arXiv:2502.06781 (KL .01, 16 draws, negative .5); its token weights, a reward model of prefixes, are 1 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class OREAL(AbstractObjective):
    """negative: weight of wrong draws."""

    negative: float = 0.5

    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "arXiv:2502.06781"
    feedback: ClassVar[str] = "success"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar. Reads log_q, log_p0 [P, K, T], reward [P, K], top [P]. Raises ValueError when K < 2."""
        draws = batch.reward.shape[1]
        if draws < 2:
            raise ValueError(f"oreal compares draws of one prompt: K >= 2 needed, got {draws}")
        right = batch.success()
        n = right.sum(1)
        mixed = (n > 0) & (n < draws)
        share_right = right / n.clamp(min=1)[:, None]
        share_wrong = (1 - right) / (draws - n).clamp(min=1)[:, None]
        pull = (self.negative * n[:, None] * share_wrong - (draws - n)[:, None] * share_right) / (draws - 1)
        back = batch.log_p0 - batch.log_q
        penalty = (share_right + share_wrong) / 2 * batch.total(back.exp() - 1 - back)
        return (mixed * (pull * batch.total(batch.log_q) + beta * penalty).sum(1)).mean()
