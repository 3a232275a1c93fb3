"""TOPR: REINFORCE on fixed draws, tapered: a wrong one loses its pull as the policy leaves it.

    u = log(q/p0),  S = 1 where y is right,  R = 2S - 1,  y ~ p0 (mu of the paper)
    loss = mean_pk [ -(1 - c) S u + (1 + c) (1 - S) g(u) ],    g(u) = e^u for u <= 0, 1 + u above
    d loss / d log q = -(R - c) on right draws,   -(R - c) clip(q/p0, 0, 1) on wrong ones

c, the baseline, makes the effective share of right draws p (1 - c) / (1 + c (1 - 2p)), p that of the prior; |c| < 1.
Optimum: its own, p0(.|S=1) for every such c; beta is not read and the prior counts among right answers only.
Source: Le Roux et al. 2025, arXiv:2503.14286 (clip [0, 1], c = 0; recommends effective shares of 10-20 %).
Pitfalls: without the taper (u in place of g) the loss has no lower bound and wrong answers are pushed down for ever. No wrong answer keeps
any mass at the optimum, so KL(q || own) is infinite on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw


@final
@dataclass(frozen=True)
class TOPR(AbstractObjective):
    """baseline: c. Raises ValueError unless |c| < 1."""

    baseline: float = 0.0

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2503.14286"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "success"

    def __post_init__(self) -> None:
        if not abs(self.baseline) < 1:
            raise ValueError(f"topr: a baseline between -1 and 1 expected, got {self.baseline}")

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar. Reads log_q, log_p0 [P, K, T], reward [P, K], top [P]."""
        right, u = batch.success(), batch.total(batch.log_q - batch.log_p0)
        tapered = u.clamp(max=0).exp() + u.relu()  # relu, not clamp: of the two branches one has the slope at 0
        return ((1 + self.baseline) * (1 - right) * tapered - (1 - self.baseline) * right * u).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The expected loss of one prompt, all answers [S] enumerated."""
        u, right, p0 = log_q - log_p0, reward == reward.max(), log_p0.exp()
        taper = (u <= 0) * (u.exp() - 1 - u) + 1 + u
        return (p0 * ~right * taper).sum() * (1 + self.baseline) - (p0 * right * u).sum() * (1 - self.baseline)

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log p0(.|S=1)/p0 of `reward`: -inf where it is wrong."""
        return law.log_success(reward)
