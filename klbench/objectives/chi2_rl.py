"""Chi2-RL: reward maximisation held to the prior by a divergence other than the reverse KL; chi-square unless told otherwise.

    J    = E_q[ r ] - beta D(q || p0),   D = E_p0[ f(t) ],   t = q/p0,   u = log t
    g_pk = r_pk - beta f'(t_pk)                              held constant under the gradient
    loss = -mean_pk (g_pk - mean_{j != k} g_pj) log q(y_pk)         E[grad loss] = -grad J  at every K
    f'(t*) = (r - lam)/beta where t* > 0, lam the root of E_p0[ t* ] = 1

      divergence   f(t)                               f'(t)            t* at a = (r - lam)/beta
      chi2         t^2 - 1                            2t               max(a, 0)/2                  excludes low rewards altogether
      chi2_kl      t^2/2 + t log t - 1/2              t + log t + 1    W(e^(a - 1))                 chi2PO's: nothing excluded
      forward      -log t                             -1/t             1/(-a), a < 0                the optimum of k3 in the loss
      js           t log t - (t+1) log((t+1)/2)       log(2t/(1+t))    e^a/(2 - e^a), a < log 2     2 JS(q, p0)

Optimum: its own, t* p0. Linear in r where the KL is exponential (chi2), or with a pole at lam (forward, js), where a reward above every
level of the law takes the highest one's t*. An answer excluded has log t* = -700 in place of -infinity.
Source: Laidlaw et al. 2024, Correlated proxies, arXiv:2403.03185; chi2_kl Huang et al. 2024, arXiv:2407.13399; Wang et al. 2023, f-DPO,
arXiv:2309.16240. Pitfall: f' is not a log but a ratio: t of one far draw is the gradient of its group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
import torch
from scipy.special import wrightomega
from torch import Tensor
from torch.nn.functional import softplus

from klbench.batch import Batch
from klbench.errors import unknown
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw

TINY: Final = math.exp(-700)
HALVINGS: Final = 100
# f, f' as functions of u = log t, and log t* as one of a; below TINY stands a pole
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
    "chi2": lambda a: np.log(np.maximum(a / 2, TINY)),
    "chi2_kl": lambda a: a - 1 - wrightomega(a - 1),
    "forward": lambda a: -np.log(np.maximum(-a, TINY)),
    "js": lambda a: a - np.log(np.maximum(2 - np.exp(np.minimum(a, 1)), TINY)),
}
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
        """[N] log t* of `reward`, lam by bisection over the levels of the law."""
        ratio, at_prior = RATIOS[self.divergence], float(SLOPES[self.divergence](torch.zeros((), dtype=torch.float64)))
        low, high = law.levels[0] - beta * at_prior, law.levels[-1] - beta * at_prior  # there t* >= 1, or <= 1, at every level
        for _ in range(HALVINGS):
            lam = (low + high) / 2
            low, high = (lam, high) if law.mass @ np.exp(ratio((law.levels - lam) / beta)) > 1 else (low, lam)
        seen = np.minimum(reward, law.levels[-1]) if self.divergence in POLES else np.asarray(reward)
        return np.asarray(ratio((seen - lam) / beta))
