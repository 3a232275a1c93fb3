"""Conditional training: learn to answer under two control texts, one for right answers and one for wrong ones, and ask for right ones.

    S_pk = 1 where y is right, else 0,    y ~ p0
    loss = -mean_pk [ g S_pk log q(y_pk | good) + b (1 - S_pk) log q(y_pk | bad) ]                       g = b = 1
    E[grad loss] = a g grad KL(p0(.|S=1) || q(.|good)) + (1 - a) b grad KL(p0(.|S=0) || q(.|bad)),   a = P_p0(S=1)

Optimum: its own, q(.|good) = p0(.|S=1), Bayes' rule and nothing besides; beta is not read. No wrong answer keeps any mass, so KL(q || own)
is infinite on the way.  Source: Korbak et al. 2023, arXiv:2302.08582 (which drops the control from 1 % of the data; here none is dropped).
Switches good, bad: g and b, weights of the two classes (Wang et al. 2023, OpenChat, arXiv:2309.11235: 1 and .1). They leave the optimum
where it is and move what the controls share: a policy that cannot tell them apart ends at p0 (g S + b (1 - S)) / norm.
Pitfalls: before training neither control means anything; a rare right answer is learnt from few draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw


@final
@dataclass(frozen=True)
class ConditionalTraining(AbstractObjective):
    """good: weight of right answers, above 0.  bad: of wrong ones, 0 or more."""

    good: float = 1.0
    bad: float = 1.0

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2302.08582"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "success"
    needs_prior: ClassVar[bool] = False
    controls: ClassVar[tuple[str, str] | None] = ("good", "bad")

    def __post_init__(self) -> None:
        if not (self.good > 0 and self.bad >= 0):
            raise UserError(f"conditional_training: weights above 0 (good) and 0 or more (bad), got {self.good} and {self.bad}")

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats a sequence. Reads log_q, other_log_q [P, K, T] (None: the term of the wrong is left out), reward [P, K], top [P]."""
        right = batch.success()
        told = self.good * right * batch.total(batch.log_q)
        if batch.other_log_q is not None:
            told = told + self.bad * (1 - right) * batch.total(batch.other_log_q)
        return -told.mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """a KL(p0(.|S=1) || q(.|good)) of one prompt up to q's absence, all answers [S] enumerated."""
        return -(log_p0.exp() * (reward == reward.max()) * log_q).sum()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log p0(.|S=1)/p0 of `reward`: -inf where it is wrong."""
        return law.log_success(reward)
