"""Implicit PRM: a classifier of right answers whose logit is the policy's own log-ratio, so that it judges every prefix for free.

    u = log(q/p0),   S = 1 where the answer is right;   with labels that are flipped at a rate e, seen = (1 - e) S + e (1 - S) and
    l(v) = -log sigma(v) becomes [ (1 - e) l(v) - e l(-v) ] / (1 - 2e), whose mean over flips is l(v)
    loss = -mean_pk [ S_pk log sigma(beta u_pk) + (1 - S_pk) log sigma(-beta u_pk) ],   y ~ p0
    E[grad loss] = beta E_p0[ (sigma(beta u) - S) s ],   s = grad log q
    process reward of a prefix:  beta sum_{i <= t} u_i          = beta (log E_p0[exp(r/beta) | y_<=t] - log Z) where q = p*

Optimum: none that a policy attains. A free u would be the classifier's logit over beta, and p0 e^u need not sum to 1. Over laws q the
loss falls with all mass moved to right answers and is convex in q/p0 among them: its infimum a log(1 + a^beta), a = p0(right), is
approached by p0(. | right), the prior conditioned on success, at every beta.
Source: Yuan et al. 2024, arXiv:2412.01981 (beta .05); the correction: Natarajan et al. 2013, Learning with noisy labels.
Pitfall: as a policy it forgets beta, and where right answers are rarely drawn the mass that leaves the wrong ones goes to answers that
nobody draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn.functional import logsigmoid

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class ImplicitPRM(AbstractObjective):
    """flip: e, in [0, 1/2)."""

    flip: float = 0.0

    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "arXiv:2412.01981"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "success"

    def __post_init__(self) -> None:
        if not 0 <= self.flip < 0.5:
            raise UserError(f"implicit_prm: flip is a rate in [0, 1/2), got {self.flip}")

    def process_reward(self, batch: Batch, beta: float) -> Tensor:
        """[P, K, T] reward of each prefix, its last token included; the last value goes on where masked. Reads log_q, log_p0."""
        return (beta * (batch.log_q - batch.log_p0) * batch.mask).cumsum(2)

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats a draw. Reads log_q, log_p0 [P, K, T], reward [P, K] and top [P]. Raises ValueError without a ceiling."""
        return self._cost(beta * batch.total(batch.log_q - batch.log_p0), batch.success()).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The population loss of one prompt, all answers [S] enumerated, those with the most reward right."""
        return (log_p0.exp() * self._cost(beta * (log_q - log_p0), (reward == reward.max()).to(log_q.dtype))).sum()

    def _cost(self, logit: Tensor, right: Tensor) -> Tensor:
        seen = (1 - self.flip) * right + self.flip * (1 - right)
        return seen * self.told(logit) + (1 - seen) * self.told(-logit)

    def told(self, logit: Tensor) -> Tensor:
        """Loss of an answer whose label, perhaps flipped, says that it is right."""
        return -((1 - self.flip) * logsigmoid(logit) - self.flip * logsigmoid(-logit)) / (1 - 2 * self.flip)
