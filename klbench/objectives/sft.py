"""Filtered SFT: clone the best of each prompt's K prior draws (rejection-sampling fine-tuning with a filter that ties cannot empty).

    loss = -mean_p mean_{k in best_p} log q(y_pk),   best_p = { k : r_pk = max_j r_pj },   y ~ p0
    E[grad loss] = grad KL(b_K || q),   b_K(x) = p0(x) [F(r)^K - F(r-)^K] / P0(r)   the law of best-of-K

Optimum: its own, best-of-K of the prior; beta is not read, K sets the tilt.  Source: Dong et al. 2023, RAFT, arXiv:2304.06767.
Switch prompt_weight w: adds -w mean_p log q(c_p), the prompt's own tokens behind its first, which moves what is shared between prompts and
no optimum of a policy given its prompt (Huerta-Enochian and Ko 2024, arXiv:2401.13586).
Pitfall: a mean over tokens in place of the sum would reweight answers by 1/length.
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
class SFT(AbstractObjective):
    """prompt_weight: w, 0 or more."""

    prompt_weight: float = 0.0

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2304.06767"
    draws: ClassVar[str] = "prior"
    needs_prior: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.prompt_weight >= 0:
            raise UserError(f"sft: prompt_weight is 0 or more, got {self.prompt_weight}")
        object.__setattr__(self, "needs_prompt", self.prompt_weight > 0)

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats a sequence. Reads log_q [P, K, T] and reward [P, K]; prompt_log_q [P] where prompts have a weight."""
        best = (batch.reward == batch.reward.amax(1, keepdim=True)).to(batch.log_q.dtype)
        share = best / best.sum(1, keepdim=True)  # tied draws share the clone: the same expectation as a tie broken at random
        cloned = (share * batch.total(batch.log_q)).sum(1)
        if batch.prompt_log_q is not None:
            cloned = cloned + self.prompt_weight * batch.prompt_log_q
        return -cloned.mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-E_{b_K}[log q] of one prompt, all answers [S] enumerated."""
        p0 = log_p0.exp()
        upto, below = ((reward[None, :] <= reward[:, None]) * p0).sum(1), ((reward[None, :] < reward[:, None]) * p0).sum(1)
        return -(p0 * (upto**draws - below**draws) / (upto - below) * log_q).sum()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log b_K/p0 of `reward`, K = draws."""
        return law.log_best_of(reward, draws)
