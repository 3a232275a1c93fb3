"""KL in the loss: what the usual estimators of KL(q || p0) do when they are differentiated on fixed draws.

    u_pk = log q/p0 of y_pk,    A_pk = r_pk - mean_{j != k} r_pj held constant
    loss = mean_pk [ -A_pk log q(y_pk) + beta k(u_pk) ],    y ~ q held fixed

      kind        k(u)                           its expected gradient       minimiser of the whole
      k1          u                              0                           any law on the maxima of r: as without a KL
      k2          u^2 / 2                        grad KL(q || p0)            p*
      k3          exp(-u) - 1 + u                grad KL(p0 || q)            beta p0 / (m - r), m > max r such that it sums to 1
      k3_ratio    q/sg(q) (exp(-u) - 1 + u)      grad KL(q || p0)            p*

k1 and k3 are unbiased estimates of KL(q || p0) and have the wrong gradient; k2 is biased and has the right one.
Optimum: the target p*, declared for the default k2; the other kinds follow the table.  Source: Schulman 2020, "Approximating KL
divergence", joschu.net/blog/kl-approx.html (k1, k2, k3); as a GRPO penalty: Shao et al. 2024, arXiv:2402.03300 (k3).
Pitfall: k is that of the sequence; summed token by token, k2 and k3 treat the prefix as given and are myopic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, final

from torch import Tensor

from klbench.batch import Batch
from klbench.errors import unknown
from klbench.method import AbstractObjective

KINDS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "k1": lambda u: u,
    "k2": lambda u: u**2 / 2,
    "k3": lambda u: (-u).exp() - 1 + u,
    "k3_ratio": lambda u: (u - u.detach()).exp() * ((-u).exp() - 1 + u),  # log p0 is constant: u - sg(u) = log q - sg(log q)
}


@final
@dataclass(frozen=True)
class KLInLoss(AbstractObjective):
    """kind: k1, k2, k3 or k3_ratio."""

    kind: str = "k2"

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "joschu.net/blog/kl-approx.html"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of kl_in_loss", self.kind, KINDS)

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, log_p0 [P, K, T] and reward [P, K]. Raises ValueError when K < 2."""
        draws = batch.reward.shape[1]
        if draws < 2:
            raise ValueError(f"kl_in_loss compares draws of one prompt: K >= 2 needed, got {draws}")
        advantage = (batch.reward - batch.reward.mean(1, keepdim=True)) * draws / (draws - 1)  # = reward minus the mean of the rest
        penalty = KINDS[self.kind](batch.total(batch.log_q - batch.log_p0))
        return (beta * penalty - advantage * batch.total(batch.log_q)).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-E_q[r] plus beta times the divergence whose gradient the kind has, all answers [S] enumerated."""
        divergence = {
            "k1": 0 * log_q,
            "k2": log_q.exp() * (log_q - log_p0),
            "k3": log_p0.exp() * (log_p0 - log_q),
            "k3_ratio": log_q.exp() * (log_q - log_p0),
        }
        return (beta * divergence[self.kind] - log_q.exp() * reward).sum()
