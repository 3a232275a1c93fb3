"""RPO: DPO plus a little of the chosen answer's own likelihood, the adversarial regulariser that SFT is.

    u = log(q/p0),   h_ij = u(y_i) - u(y_j),   P_ij = sigma(r_i - r_j)
    l_ij = log sigma(beta h_ij) + eta log q(y_i)
    loss = -mean over prompts and pairs i < j of [ P_ij l_ij + (1 - P_ij) l_ji ],   y ~ p0
    E[grad loss] = DPO's + eta grad KL(c || q),   c(x) = 2 p0(x) w(x),   w(x) = P(x beats a prior draw)

Optimum: its own, p0 e^u with   2 beta (w - sum_j p0_j sigma(beta (u - u_j))) + eta (2 w - e^u) = 0   at every answer, which makes it sum
to 1 and is solved by one function of the reward. eta -> 0 is the target p*, eta -> inf the law c of the winners, beta no longer read.
Between them  q/p0 < 2 (1 + beta/eta) w  everywhere: that is the bound on over-optimisation, and it does not ask how sure the labels are.
Source: Liu et al. 2024, arXiv:2405.16436 (beta .01, eta .005; log q summed over the tokens).
Pitfall: eta counts against beta, so the paper's .005 beside a larger beta is next to nothing.
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

NODES: Final = 128  # levels of the reward that are solved together; more are merged, at a cost of (range/128)^2/240 of a win rate
CLOSE: Final = 1e-13  # of a win rate
TINY: Final = 1e-300
STEPS: Final = 60  # of either search, at most


@final
@dataclass(frozen=True)
class RPO(AbstractObjective):
    """eta: weight of log q(chosen), above 0."""

    eta: float = 0.005

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2405.16436"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise UserError(f"rpo: eta above 0 expected, got {self.eta}; without it this is dpo")

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats a pair. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        if batch.reward.shape[1] < 2:
            raise ValueError(f"rpo compares draws of one prompt: K >= 2 needed, got {batch.reward.shape[1]}")
        log_q = batch.total(batch.log_q)  # [P, K] nats
        u = log_q - batch.total(batch.log_p0)
        i, j = pairs(u.shape[1])
        wins, margin = bradley_terry(batch.reward), beta * (u[:, i] - u[:, j])
        first, second = logsigmoid(margin) + self.eta * log_q[:, i], logsigmoid(-margin) + self.eta * log_q[:, j]
        return -(wins * first + (1 - wins) * second).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """The population loss of one prompt: all pairs of answers [S, S], both drawn from the prior, and the winners' law."""
        u, pair = log_q - log_p0, (log_p0[:, None] + log_p0[None, :]).exp()
        wins, margin = (reward[:, None] - reward[None, :]).sigmoid(), beta * (u[:, None] - u[None, :])
        return -2 * (pair * wins * logsigmoid(margin)).sum() - 2 * self.eta * ((pair * wins).sum(1) * log_q).sum()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log of the optimum over p0 of `reward`: Newton's method at the levels of the law, bisection anywhere."""
        merged = law.merged(NODES)
        levels, mass = merged.levels, merged.mass

        def beats(at: Array, to: Array) -> Array:
            return np.asarray(expit(at[:, None] - to) @ mass)

        def short(v: Array, u: Array, w: Array) -> Array:
            return 2 * beta * (w - beats(beta * v, beta * u)) + self.eta * (2 * w - np.exp(np.minimum(v, 700)))

        wins, u = beats(levels, levels), np.zeros(len(levels))
        for _ in range(STEPS):
            gap = short(u, u, wins)
            if (worst := float(np.abs(gap).max())) < CLOSE * (beta + self.eta):
                break
            slope = 2 * beta**2 * mass * expit(beta * (u[:, None] - u)) * expit(beta * (u - u[:, None]))
            step = np.linalg.solve(np.diag(slope.sum(1) + self.eta * np.exp(u)) - slope, gap)
            while np.abs(short(u + step, u + step, wins)).max() > worst:
                step = step / 2
            u = u + step

        def at(r: Array) -> Array:
            w = np.maximum(beats(r, levels), TINY)
            low, high = np.minimum(u.min() + np.log(w) / beta, np.log(2 * w)), np.log(2 * w * (1 + beta / self.eta))
            return bisected(lambda middle: short(middle, u, w) > 0, low, high, STEPS)

        return np.asarray(at(np.asarray(reward)) - law.log_mean_exp(at(law.levels)))
