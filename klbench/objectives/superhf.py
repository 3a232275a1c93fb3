"""SuperHF: clone the best of each prompt's K own draws, with the KL to the prior beside it.

    best_p = { k : r_pk = max_j r_pj },   y ~ q held fixed
    loss = mean_p mean_{k in best_p} [ -log q(y_pk) + beta sum_t KL(q(.|y_<t) || p0(.|y_<t)) ]
    E[grad loss] = -E_{b_K}[s] + beta times the gradient of the next-token KLs at best_p's prefixes,   b_K: best of K draws of q

Optimum: none known. Of the reward only the order counts, so beta is no temperature; a KL at given prefixes forgets what a token leads to.
With one-token answers every resting point has log(q/p0) = (b_K/q)/beta + const, with b_K/q between 0 and K.
Source: Mukobi et al. 2023, arXiv:2310.16763; the public code takes KL(p0 || q) at each prefix, and means over tokens.
Pitfall: without the KL every round is another best-of-K, and q collapses on the best answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class SuperHF(AbstractObjective):
    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "arXiv:2310.16763"
    needs_prior: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = True

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats. Reads log_q, kl_token [P, K, T] and reward [P, K]. Raises ValueError without kl_token."""
        if batch.kl_token is None:
            raise ValueError("superhf needs kl_token")
        best = (batch.reward == batch.reward.amax(1, keepdim=True)).to(batch.log_q.dtype)
        share = best / best.sum(1, keepdim=True)  # tied draws share the clone: the same expectation as a tie broken at random
        return (share * batch.total(beta * batch.kl_token - batch.log_q)).sum(1).mean()
