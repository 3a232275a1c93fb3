"""Token-level DPO: the same logistic loss, read as one on rewards of tokens that the policy implies.

    a_t  = beta log( q(y_t | y_<t) / p0(y_t | y_<t) )           the implied reward of token t
    loss = -mean over prompts and pairs i < j of [ P_ij log sigma(D_ij) + (1 - P_ij) log sigma(-D_ij) ],   y ~ p0
    D_ij = sum_t a_t(y_i) - sum_t a_t(y_j),   P_ij = sigma(r_i - r_j)
    E[grad loss] = -beta E_{i,j~p0}[ (P_ij - sigma(D_ij)) (s_i - s_j) ],   s = grad log q

Optimum: the target p*, as DPO's, whose number the loss is. There a_t = V(y_<=t) - V(y_<t) with V(s) = beta log E_p0[exp(r/beta) | s]:
soft advantages, which telescope to r(y) - beta log Z. `token_reward` gives them: the credit of each token.
Source: Rafailov et al. 2024, From r to Q*, arXiv:2404.12358.
Pitfall: off the optimum the tokens' rewards are relative to the prior that u is measured from, and drift with it.
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
class TokenDPO(AbstractObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2404.12358"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "pairs"

    def token_reward(self, batch: Batch, beta: float) -> Tensor:
        """[P, K, T] implied reward of each token, 0 where masked. Reads log_q, log_p0 [P, K, T]."""
        return beta * (batch.log_q - batch.log_p0) * batch.mask

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats a pair. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"token_dpo compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        implied = self.token_reward(batch, beta).sum(2)  # [P, K]
        i, j = pairs(implied.shape[1])
        wins, margin = bradley_terry(batch.reward), implied[:, i] - implied[:, j]
        return -(wins * logsigmoid(margin) + (1 - wins) * logsigmoid(-margin)).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The population loss of one prompt: all pairs of answers [S, S], both drawn from the prior."""
        implied, pair = beta * (log_q - log_p0), log_p0[:, None] + log_p0[None, :]
        wins, margin = (reward[:, None] - reward[None, :]).sigmoid(), implied[:, None] - implied[None, :]
        return -(pair.exp() * (wins * logsigmoid(margin) + (1 - wins) * logsigmoid(-margin))).sum()
