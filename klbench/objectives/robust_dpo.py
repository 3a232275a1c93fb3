"""Robust DPO: labels that are flipped at a known rate e, and a loss that takes the flips out again; cDPO smooths instead.

    l(h) = -log sigma(beta h),   h_ij = u(y_i) - u(y_j),   u = log(q/p0),   seen_ij = (1 - e) P_ij + e (1 - P_ij),   P_ij = sigma(r_i - r_j)
    told(h) = [ (1 - e) l(h) - e l(-h) ] / (1 - 2e)     unbiased: its mean over flips is l(h)
    told(h) = (1 - e) l(h) + e l(-h)                    cDPO
    loss = mean over prompts and pairs i < j of [ seen_ij told(h_ij) + (1 - seen_ij) told(h_ji) ],   y ~ p0
    E[grad loss] = -beta E_{i,j~p0}[ (M_ij - sigma(beta h_ij)) (s_i - s_j) ],   M = P, or for cDPO 1/2 + (1 - 2e)^2 (P - 1/2)

Optimum: the target p* if unbiased. cDPO's log-ratio u solves sum_j p0_j sigma(beta (u_i - u_j)) = sum_j p0_j M_ij: a tilt that a certain
label leaves finite. Both are functions of the reward, hence "own".
Source: Chowdhury, Kini, Natarajan 2024, arXiv:2403.00409 (e .1); Mitchell 2023, A note on DPO with noisy preferences.
Pitfalls: a label's probability stands in for a drawn label, so the unbiased loss is DPO's to the last digit, and the noise that the
correction costs on drawn labels, where one pair's loss has no lower bound, does not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import logsigmoid

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw
from klbench.preferences import bisected, bradley_terry, pairs

CLOSE: Final = 1e-13  # of a win rate
STEPS: Final = 60  # of either search, at most


@final
@dataclass(frozen=True)
class RobustDPO(AbstractObjective):
    """flip: e, in [0, 1/2). unbiased: False is cDPO."""

    flip: float = 0.1
    unbiased: bool = True

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2403.00409"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        if not 0 <= self.flip < 0.5:
            raise UserError(f"robust_dpo: flip is a rate in [0, 1/2), got {self.flip}")

    def told(self, margin: Tensor) -> Tensor:
        """Loss of pairs whose label, perhaps flipped, says that the first is the better; margin: beta h."""
        right, wrong, e = -logsigmoid(margin), -logsigmoid(-margin), self.flip
        return ((1 - e) * right - e * wrong) / (1 - 2 * e) if self.unbiased else (1 - e) * right + e * wrong

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats a pair. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"robust_dpo compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        u = batch.total(batch.log_q - batch.log_p0)  # [P, K] nats
        i, j = pairs(u.shape[1])
        seen, margin = self._flipped(bradley_terry(batch.reward)), beta * (u[:, i] - u[:, j])
        return (seen * self.told(margin) + (1 - seen) * self.told(-margin)).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The population loss of one prompt: all pairs of answers [S, S], both drawn from the prior, their labels flipped or not."""
        u, pair = log_q - log_p0, log_p0[:, None] + log_p0[None, :]
        seen, margin = self._flipped((reward[:, None] - reward[None, :]).sigmoid()), beta * (u[:, None] - u[None, :])
        return (pair.exp() * (seen * self.told(margin) + (1 - seen) * self.told(-margin))).sum()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log of the optimum over p0 of `reward`: cDPO's by Newton's method at the levels of the law, by bisection anywhere."""
        if self.unbiased or self.flip == 0:
            return np.asarray(reward / beta - law.log_mean_exp(law.levels / beta))
        kept = (1 - 2 * self.flip) ** 2

        def beats(at: Array, to: Array) -> Array:
            return np.asarray(expit(at[:, None] - to) @ law.mass)

        goal, u = 0.5 + kept * (beats(law.levels, law.levels) - 0.5), np.zeros(len(law.levels))  # beta times the u of the formula
        for _ in range(STEPS):
            gap = goal - beats(u, u)
            if (worst := float(np.abs(gap).max())) < CLOSE:
                break
            slope = law.mass * expit(u[:, None] - u) * expit(u - u[:, None])
            step = np.linalg.solve(np.diag(slope.sum(1)) - slope + law.mass, gap)  # the constant is free: law.mass pins it
            while np.abs(goal - beats(u + step, u + step)).max() > worst:
                step = step / 2
            u = u + step

        def at(r: Array) -> Array:
            wanted = 0.5 + kept * (beats(r, law.levels) - 0.5)
            low, high = u[0] + np.log(wanted), u[-1] - np.log1p(-wanted)
            return np.asarray(bisected(lambda middle: beats(middle, u) < wanted, low, high, STEPS) / beta)

        return np.asarray(at(np.asarray(reward)) - law.log_mean_exp(at(law.levels)))

    def _flipped(self, wins: Tensor) -> Tensor:
        return (1 - self.flip) * wins + self.flip * (1 - wins)
