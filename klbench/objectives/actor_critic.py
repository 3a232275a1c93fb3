"""Actor-critic: each token is paid by what follows it, less a learned value of the prefix (GAE).

    r_t   = -beta log(q/p0) of token t, and the reward of the answer beside it at the last token       held constant
    V_t   = w . features of the prefix before token t, 0 behind the end
    d_t   = r_t + gamma V_{t+1} - V_t,    A_t = sum_{l >= 0} (gamma lam)^l d_{t+l}                   held constant
    loss  = mean_pk [ -sum_t A_t log q(y_t) + sum_t (V_t - sg(A_t + V_t))^2 ]
    E[grad loss] = -grad J in the policy:  at gamma = lam = 1 for every w,  at gamma = 1 and lam < 1 for the exact V alone

J = E_q[r] - beta KL(q || p0). Exact: V_t = E_q[ sum_{u >= t} r_u | y_<t ], which is also where the critic's own gradient vanishes.
Optimum: the target p*; with the exact critic, beta log E_p0[exp(r/beta) | y_<t], no noise is left there.
Source: Schulman et al. 2015, arXiv:1506.02438; on language models Ziegler et al. 2019, arXiv:1909.08593 (gamma 1, lam .95).
Pitfalls: lam < 1 with a wrong critic, or gamma < 1 with any, has another optimum; a mean over tokens in the critic's part would fit
another value, as long answers count for less; an answer cut at the limit ends there, as it does under p0 and p*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from klbench.batch import Batch
from klbench.method import AbstractStatefulObjective, State


@final
@dataclass(frozen=True)
class ActorCritic(AbstractStatefulObjective):
    """lam: 1 is unbiased whatever the critic.  gamma: discount."""

    lam: float = 1.0
    gamma: float = 1.0

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:1506.02438"
    needs_features: ClassVar[bool] = True
    state_lr: ClassVar[float] = 0.003  # on hidden states of the shipped prior: .001 was slow, .03 overshot

    def init(self, prompts: int, width: int) -> State:
        """critic [width]: w, trained, from 0. float64."""
        return {"critic": torch.zeros(width, dtype=torch.float64, requires_grad=True)}

    def loss(self, batch: Batch, beta: float, state: State) -> tuple[Tensor, State]:
        """Scalar. Reads log_q, log_p0 [P, K, T], reward [P, K], features [P, K, T, D]. Raises ValueError without features."""
        if batch.features is None:
            raise ValueError("actor_critic needs features: what its critic reads of a prefix")
        length = batch.mask.shape[2]
        value = (batch.features @ state["critic"].to(batch.features)) * batch.mask  # [P, K, T] reward units
        last = one_hot(batch.mask.sum(2) - 1, length)
        paid = batch.reward[:, :, None] * last - beta * (batch.log_q - batch.log_p0).detach()
        now = value.detach()
        delta = (paid + self.gamma * pad(now[:, :, 1:], (0, 1)) - now) * batch.mask
        steps = list(delta.unbind(2))
        for t in reversed(range(length - 1)):
            steps[t] = steps[t] + self.gamma * self.lam * steps[t + 1]
        advantage = torch.stack(steps, 2)
        per_token = (value - (advantage + now)) ** 2 - advantage * batch.log_q
        return batch.total(per_token).mean(), state

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward - beta * (log_q - log_p0))).sum()
