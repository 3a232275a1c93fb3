"""INPO: online play against itself, each step a mirror-descent step to the Nash policy of the regularised preference game.

    pi_t: the policy that drew the batch (old_log_q),   tau = beta,   P_ij = sigma(r_i - r_j)
    H_i  = log q - (tau/eta) log p0 - (1 - tau/eta) log pi_t,   h_ij = H_i - H_j
    loss = mean over prompts and pairs i < j of [ P_ij (h_ij - 1/(2 eta))^2 + (1 - P_ij) (h_ij + 1/(2 eta))^2 ],   y ~ pi_t
    E[grad loss] = 4 (tau/eta) E_q[ (u - P(y > q)/tau) s ] at q = pi_t,   u = log(q/p0), s = grad log q

A step fitted to the end gives p0^(tau/eta) pi_t^(1 - tau/eta) exp(P(y > pi_t)/eta) / norm. Optimum: its own, the fixed point of the
steps p0(x) exp(P(x > q)/tau) / norm = q(x), the Nash policy: IPO's form with the policy itself as the opponent. A win rate is in
[0, 1], so its tilt is at most 1/tau.
Source: Zhang et al. 2024, arXiv:2407.00617 (public re-implementations: eta .0075, tau/eta 1/3).
Pitfalls: at q = pi_t eta is a factor on the learning rate, so one step a batch is online IPO and the mirror term works from the second
on; eta = tau drops it, and steps fitted to the end may then circle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
from scipy.special import expit
from torch import Tensor

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw
from klbench.preferences import bradley_terry, pairs

CLOSE: Final = 1e-10  # nats between two rounds
ROUNDS: Final = 5000


@final
@dataclass(frozen=True)
class INPO(AbstractObjective):
    """ratio: tau/eta, in (0, 1]."""

    ratio: float = 1 / 3

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2407.00617"
    feedback: ClassVar[str] = "pairs"
    epochs: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"inpo: ratio is tau/eta, above 0 and at most 1, got {self.ratio}")

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, squared nats a pair. Reads log_q, old_log_q, log_p0 [P, K, T], reward [P, K]. ValueError if K < 2 or no old_log_q."""
        if batch.reward.shape[1] < 2 or batch.old_log_q is None:
            raise ValueError(f"inpo needs old_log_q and K >= 2 draws of a prompt, got {batch.reward.shape[1]}")
        H = batch.total(batch.log_q - self.ratio * batch.log_p0 - (1 - self.ratio) * batch.old_log_q.detach())  # [P, K] nats
        i, j = pairs(H.shape[1])
        wins, h, margin = bradley_terry(batch.reward), H[:, i] - H[:, j], self.ratio / (2 * beta)
        return (wins * (h - margin) ** 2 + (1 - wins) * (h + margin) ** 2).mean()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log of the Nash policy over p0 of `reward`, by rounds of play at the levels of the law."""
        wins = expit(law.levels[:, None] - law.levels)
        tilt, share, last = np.zeros(len(law.levels)), 0.5, np.inf  # half-way steps: the game turns, it does not pull
        for _ in range(ROUNDS):
            q = law.mass * np.exp(tilt - law.log_mean_exp(tilt))
            move = wins @ q / beta - tilt
            if (far := float(np.ptp(move))) < CLOSE * max(1.0, 1 / beta):
                break
            share, last = (max(share / 2, 0.01), far) if far > last else (share, far)
            tilt = tilt + share * move

        def best(r: Array) -> Array:
            return np.asarray(expit(np.asarray(r)[:, None] - law.levels) @ q / beta)

        return np.asarray(best(reward) - law.log_mean_exp(best(law.levels)))
