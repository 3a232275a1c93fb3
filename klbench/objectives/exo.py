"""EXO: the group as a distribution; the policy's softmax over K completions is brought to the reward's.

    g_k = softmax_k(beta_pi u_pk),   t_k = softmax_k(r_pk / beta_r),   u = log(q/p0),   y_1 .. y_K ~ p0
    loss = mean_p KL(g || t)             grad = beta_pi mean_p sum_k g_k (log g_k - log t_k - KL(g || t)) s_k,   s = grad log q
    loss = mean_p KL(t || g)             the forward twin, InfoNCA's

Optimum: the target p* at beta = beta_pi beta_r, both ways; there g = t in every group, so no noise is left.
beta_pi = beta^split, beta_r = beta^(1 - split): the paper sets both alike, split = 1/2. At split = 1 and K = 2 the forward twin is DPO.
Source: Ji et al. 2024, arXiv:2402.00856 (beta_pi = beta_r = .1 and .5).
Pitfalls: completions must come from p0, or g is no estimate of q; the temperature is the product of the two betas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class EXO(AbstractObjective):
    """split: share of log beta that is the policy's. forward: KL(t || g) in place of KL(g || t)."""

    split: float = 0.5
    forward: bool = False

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2402.00856"
    draws: ClassVar[str] = "prior"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats a group. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"exo compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        return self._divergence(batch.total(batch.log_q - batch.log_p0), batch.reward, beta).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The population loss of one prompt: all groups of K answers, drawn from the prior."""
        group = torch.cartesian_prod(*[torch.arange(len(reward))] * draws)  # [S^K, K]
        return (log_p0[group].sum(1).exp() * self._divergence((log_q - log_p0)[group], reward[group], beta)).sum()

    def _divergence(self, u: Tensor, reward: Tensor, beta: float) -> Tensor:
        """[P] between the two laws on each group; u, reward [P, K]."""
        policy, wanted = (float(beta**self.split) * u).log_softmax(1), (reward / float(beta ** (1 - self.split))).log_softmax(1)
        first, second = (wanted, policy) if self.forward else (policy, wanted)
        return (first.exp() * (first - second)).sum(1)
