"""NPO: gradient ascent on what is to be forgotten that slows down as it is forgotten, beside likelihood of what is to stay.

    u = log(q/p0),  S = 1 where y is right,  y ~ p0:  wrong draws are forgotten, right ones retained
    loss = mean_pk [ -(1 - S) (2/beta) log sigma(-beta u) - retain S log q ]
    d loss / d log q = W = 2 sigma(beta u) on wrong draws,  -retain on right ones

W = 1 at q = p0, and for beta -> 0: gradient ascent. Once u << 0, W = 2 e^(beta u), so that log q of a wrong answer falls by 1/beta per unit
of log steps, where gradient ascent falls by a constant a step.
Optimum: with retain > 0 its own, p0(.|S=1): beta sets the pace, not the end. With retain 0 there is none but the absence of wrong answers,
and what the right ones share is left to the path.  Source: Zhang et al. 2024, arXiv:2404.05868 (beta .1, retain 1).
Pitfalls: the paper averages forget and retain sets apart; here they come in the shares of the prior's draws. No wrong answer keeps any mass
at the optimum, so KL(q || own) is infinite on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn.functional import logsigmoid

from klbench.batch import Batch
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw


@final
@dataclass(frozen=True)
class NPO(AbstractObjective):
    """retain: weight of the likelihood of right draws."""

    retain: float = 1.0

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2404.05868"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "success"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats. Reads log_q, log_p0 [P, K, T], reward [P, K], top [P]."""
        right, log_q = batch.success(), batch.total(batch.log_q)
        forget = -2 / beta * logsigmoid(-beta * (log_q - batch.total(batch.log_p0)))
        return ((1 - right) * forget - self.retain * right * log_q).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The expected loss of one prompt, all answers [S] enumerated."""
        right, p0 = reward == reward.max(), log_p0.exp()
        forget = (p0 * ~right * (1 + (log_q - log_p0).exp() ** beta).log()).sum() * 2 / beta
        return forget - self.retain * (p0 * right * log_q).sum()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log p0(.|S=1)/p0 of `reward`: -inf where it is wrong."""
        return law.log_success(reward)
