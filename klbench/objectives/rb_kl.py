"""Rao-Blackwellised KL: the reward by the score function, the KL by exact sums over the next token.

    KL_t  = KL(q(.|y_<t) || p0(.|y_<t)),  summed over the vocabulary at each drawn prefix;   KL(q || p0) = E_q[ sum_t KL_t ]
    A_pk  = r_pk - mean_{j != k} r_pj,    F_pkt = sum_{u > t} KL_u - its mean over the prompt's other draws       both held constant
    loss  = mean_pk [ -A_pk log q(y_pk) + beta sum_t ( KL_t + F_pkt log q(y_t) ) ]        E[grad loss] = -grad J at every K

J = E_q[r] - beta KL(q || p0). The second term of the KL pays for what a token leads to; the paper differentiates it, codes that put
sum_t KL_t into the loss forget it and are myopic. The baseline in F is ours.
Optimum: the target p*.  Source: Amini, Vieira, Cotterell 2025, arXiv:2504.10637.
Pitfall: the noise does not vanish at p*: there r and the drawn log-ratio cancel draw by draw, and r and the exact KL do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class RBKL(AbstractObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2504.10637"
    needs_kl: ClassVar[bool] = True

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, kl_token [P, K, T] and reward [P, K]. Raises ValueError when K < 2 or without kl_token."""
        draws = batch.reward.shape[1]
        if draws < 2 or batch.kl_token is None:
            raise ValueError(f"rb_kl needs kl_token and K >= 2 draws of a prompt, got {draws}")
        beyond = draws / (draws - 1)  # x minus the mean of the rest is this times x minus the mean of all
        advantage = (batch.reward - batch.reward.mean(1, keepdim=True)) * beyond
        ahead = (batch.kl_token * batch.mask).detach().flip(2).cumsum(2).flip(2)  # [P, K, T] from this token on
        later = ahead - batch.kl_token.detach() * batch.mask
        follows = (later - later.mean(1, keepdim=True)) * beyond
        cost = batch.total(batch.kl_token + follows * batch.log_q)
        return (beta * cost - advantage * batch.total(batch.log_q)).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward - beta * (log_q - log_p0))).sum()
