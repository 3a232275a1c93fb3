"""NFT: maximum likelihood on right draws, and on wrong ones under the law of the wrong that the policy implies.

    R = q/p0,  S = 1 where y is right,  p = share of right ones among the prompt's K draws,  y ~ p0 (q_old of the paper)
    wrong(R) = (1 - p R) / (1 - p)       q(.|wrong)/p0, if p0 = p q + (1 - p) q(.|wrong)
    loss = -mean_pk omega(p) [ S log R + (1 - S) log wrong(R) ],   prompts with p in {0, 1} left out
    d loss / d log q = -omega on right draws,   omega p R / ((1 - p) max(wrong(R), eps)) on wrong ones

Below eps the logarithm goes on as its tangent: the gradient of the paper's straight-through clamp, and a loss it is the gradient of.
omega "dr_grpo": 1 - p;  "grpo": sqrt((1 - p)/p).  At q = p0 the gradient is that of Dr. GRPO or of GRPO, draw by draw.
Optimum: its own, p0(.|S=1); beta is not read. With the last policy's draws in place of the prior's, a full fit gives q_old(.|S=1); single
steps, which the paper takes, tend to right answers alone in proportions that their path decides. Prior draws pin them to the prior's.
Source: Chen et al. 2025, arXiv:2505.18116 (omega 1 - p, eps 1, log R cut at 10).  Pitfalls: the paper's ratio is per token, exact only for
one; here it is the answer's. No wrong answer keeps any mass at the optimum, so KL(q || own) is infinite on the way.
Switch least_spread: groups whose sqrt(p (1 - p)) is at or below it are left out too (Edit-R1, Li et al. 2025, arXiv:2510.16888), the others
count as before, and the optimum stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.errors import UserError, unknown
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw

OMEGA: Final[dict[str, Callable[[Tensor], Tensor]]] = {"dr_grpo": lambda p: 1 - p, "grpo": lambda p: ((1 - p) / p).sqrt()}


@final
@dataclass(frozen=True)
class NFT(AbstractObjective):
    """omega: dr_grpo or grpo.  floor: eps.  most: log R of a wrong draw counts up to here.  least_spread: see above."""

    omega: str = "dr_grpo"
    floor: float = 1.0
    most: float = 10.0
    least_spread: float = 0.0

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2505.18116"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "success"

    def __post_init__(self) -> None:
        if self.omega not in OMEGA:
            raise unknown("omega of nft", self.omega, OMEGA)
        if not 0 <= self.least_spread < 0.5:
            raise UserError(
                f"nft: least_spread is a standard deviation of right and wrong, 0 or more and below .5, got {self.least_spread}"
            )

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats. Reads log_q, log_p0 [P, K, T], reward [P, K], top [P]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"nft needs K >= 2 draws of a prompt, got {batch.reward.shape[1]}")
        right = batch.success()
        return self._of(batch.total(batch.log_q - batch.log_p0), right, right.mean(1, keepdim=True)).mean()

    def _of(self, log_ratio: Tensor, right: Tensor, p: Tensor) -> Tensor:
        """The loss of each draw."""
        mixed = (p * (1 - p)).sqrt() > self.least_spread
        p = torch.where(mixed, p, 0.5)
        wrong = (1 - p * log_ratio.clamp(max=self.most).exp()) / (1 - p)
        log_wrong = wrong.clamp(min=self.floor).log() - (self.floor - wrong).relu() / self.floor
        return mixed * -OMEGA[self.omega](p) * torch.where(right > 0, log_ratio, log_wrong)

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The expected loss of one prompt: all answers [S], beside m right ones among the other K - 1 draws."""
        right, p0 = (reward == reward.max()).to(log_q), log_p0.exp()
        share, total = float(p0 @ right), torch.zeros((), dtype=log_q.dtype)
        for m in range(draws):
            chance = math.comb(draws - 1, m) * share**m * (1 - share) ** (draws - 1 - m)
            total = total + chance * p0 @ self._of(log_q - log_p0, right, (m + right) / draws)
        return total

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log p0(.|S=1)/p0 of `reward`: -inf where it is wrong."""
        return law.log_success(reward)
