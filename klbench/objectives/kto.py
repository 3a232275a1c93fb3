"""KTO: each draw alone is desirable or not; a saturating value of its log-ratio, measured from a reference point, is raised or lowered.

    u = log(q/p0),   v_i = beta (u_i - z_i),   z_i = max(0, mean_{j != i} u_j)   held constant under the gradient
    D_i  = mean_{j != i} sigma(r_i - r_j)      the probability that y_i is desirable
    loss = mean_pi [ lam_D D_i sigma(-v_i) + lam_U (1 - D_i) sigma(v_i) ],   y ~ p0
    grad = -beta mean_pi sigma(v_i) sigma(-v_i) [ lam_D D_i - lam_U (1 - D_i) ] s_i,   s = grad log q

Labels: a pair is judged by Bradley-Terry and taken apart, the winner desirable, the loser not, as the paper makes its unpaired data;
y_i meets each other draw once. Linear in the label, so its probability stands in for it: E[D_i | y_i] = P(y_i beats a prior draw).
Optimum: none of Gibbs form. All mass leaves { x : lam_D P(x) < lam_U (1 - P(x)) }, at every beta; how the rest shares it moves with z.
z: the paper's is a batch mean over other prompts' answers, this one over the other answers of the prompt. On prior draws the mean
estimates -KL(p0 || q), so that z is mostly 0.
Source: Ethayarajh et al. 2024, arXiv:2402.01306 (beta .1, lam_D = lam_U = 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class KTO(AbstractObjective):
    """desirable: lam_D. undesirable: lam_U."""

    desirable: float = 1.0
    undesirable: float = 1.0

    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "arXiv:2402.01306"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "pairs"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, in [0, lam]. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        draws, reward = batch.reward.shape[1], batch.reward
        if draws < 2:
            raise ValueError(f"kto judges draws of one prompt against each other: K >= 2 needed, got {draws}")
        u = batch.total(batch.log_q - batch.log_p0)  # [P, K] nats
        wins = (reward[:, :, None] - reward[:, None, :]).sigmoid().sum(2)  # sigma(0) against itself included
        good = (wins - 0.5) / (draws - 1)
        z = ((u.sum(1, keepdim=True) - u) / (draws - 1)).clamp(min=0).detach()
        v = beta * (u - z)
        return (self.desirable * good * (-v).sigmoid() + self.undesirable * (1 - good) * v.sigmoid()).mean()
