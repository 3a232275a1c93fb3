"""Chi2-RL: reward maximisation held to the prior by a divergence other than the reverse KL; chi-square unless told otherwise.

    J    = E_q[ r ] - beta D(q || p0),   D = E_p0[ f(t) ],   t = q/p0
    g_pk = r_pk - beta f'(t_pk)                              held constant under the gradient
    loss = -mean_pk (g_pk - mean_{j != k} g_pj) log q(y_pk)         E[grad loss] = -grad J  at every K

      divergence   f(t)                               f'(t)            t* at y = (lam - r)/beta, lam the root of E_p0[ t* ] = 1
      chi2         t^2 - 1                            2t               max(-y, 0)/2    linear in r, excludes low rewards altogether
      chi2_kl      t^2/2 + t log t - 1/2              t + log t + 1    W(e^(-y - 1))   chi2PO's: excludes nothing
      forward      -log t                             -1/t             1/y             the optimum of k3 in the loss
      js           t log t - (t+1) log((t+1)/2)       log(2t/(1+t))    1/(e^y - 1)     twice the Jensen-Shannon divergence

Optimum: its own, t* p0, where r - beta f'(t) is one constant over all answers not excluded. Excluded ones have log t* = -700 in place
of -infinity. forward and js have a pole at r = lam: there a reward above every level of the law takes the highest one's t*.
Source: Laidlaw et al. 2024, Correlated proxies, arXiv:2403.03185; chi2_kl: Huang et al. 2024, arXiv:2407.13399; forward and js: Wang et
al. 2023, f-DPO, arXiv:2309.16240. Pitfall: f' grows as the ratio itself, not as its log: one far draw is the gradient of its group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
from scipy.special import wrightomega
from torch import Tensor
from torch.nn.functional import softplus

from klbench.batch import Batch
from klbench.errors import unknown
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw

TINY: Final = math.exp(-700)  # stands for what is excluded, its inverse for a pole
HALVINGS: Final = 100
# f and f' of u = log t; log t* of y, and y where t* = 1
GENERATORS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "chi2": lambda u: (2 * u).exp() - 1,
    "chi2_kl": lambda u: (2 * u).exp() / 2 + u * u.exp() - 0.5,
    "forward": lambda u: -u,
    "js": lambda u: u * u.exp() - (u.exp() + 1) * (softplus(u) - math.log(2)),
}
SLOPES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "chi2": lambda u: 2 * u.exp(),
    "chi2_kl": lambda u: u.exp() + u + 1,
    "forward": lambda u: -(-u).exp(),
    "js": lambda u: math.log(2) - softplus(-u),
}
RATIOS: Final[dict[str, Callable[[Array], Array]]] = {
    "chi2": lambda y: np.log(np.maximum(-y / 2, TINY)),
    "chi2_kl": lambda y: -y - 1 - wrightomega(-y - 1),
    "forward": lambda y: -np.log(np.maximum(y, TINY)),
    "js": lambda y: -np.maximum(y, 0) - np.log(np.maximum(-np.expm1(-np.maximum(y, 0)), TINY)),
}
EVEN: Final = {"chi2": -2.0, "chi2_kl": -2.0, "forward": 1.0, "js": math.log(2)}
POLES: Final = ("forward", "js")


@final
@dataclass(frozen=True)
class Chi2RL(AbstractObjective):
    """divergence: chi2, chi2_kl, forward or js."""

    divergence: str = "chi2"

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2403.03185"

    def __post_init__(self) -> None:
        if self.divergence not in SLOPES:
            raise unknown("divergence of chi2_rl", self.divergence, SLOPES)

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        draws = batch.reward.shape[1]
        if draws < 2:
            raise ValueError(f"chi2_rl compares draws of one prompt: K >= 2 needed, got {draws}")
        log_q = batch.total(batch.log_q)  # [P, K] nats
        gain = batch.reward - beta * SLOPES[self.divergence]((log_q - batch.total(batch.log_p0)).detach())
        advantage = (gain - gain.mean(1, keepdim=True)) * draws / (draws - 1)  # = gain minus the mean of the rest
        return -(advantage * log_q).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return beta * (log_p0.exp() * GENERATORS[self.divergence](log_q - log_p0)).sum() - (log_q.exp() * reward).sum()

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log t* of `reward`, lam by bisection over the levels of the law, from the highest one so that a near pole is resolved."""
        ratio, top = RATIOS[self.divergence], law.levels[-1]
        low, high = law.levels[0] - top + beta * EVEN[self.divergence], beta * EVEN[self.divergence]  # t* >= 1, or <= 1, at every level
        for _ in range(HALVINGS):
            lam = (low + high) / 2
            low, high = (lam, high) if law.mass @ np.exp(ratio((lam + (top - law.levels)) / beta)) > 1 else (low, lam)
        above = np.maximum(top - reward, 0) if self.divergence in POLES else top - reward
        return np.asarray(ratio((lam + above) / beta))
