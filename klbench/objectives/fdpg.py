"""f-DPG: any f-divergence to the target by the score function.

    D_f  = E_{p*}[ f(q/p*) ],    t_pk = q/p* of y_pk = Z_pk / w_pk,    w = p0 exp(r/beta) / q
    loss = mean_pk (f'(t_pk) - b_pk) log q(y_pk)                        t held constant;   E[grad loss] = grad D_f at Z_pk = Z_p

      generator   f(t)                               f'(t)                D_f
      forward     -log t                             -1/t                 KL(p* || q)
      reverse     t log t                            log t + 1            KL(q || p*)
      tv          |1 - t| / 2                        sign(t - 1) / 2      TV
      js          t log t - (t+1) log((t+1)/2)       log(2t / (1+t))      2 JS (of the half-half mixture)

Z_pk: mean of the prompt's weights seen so far and of the group's other draws; b_pk: mean of f'(Z_pk/w_pj) over j != k. Neither
holds y_pk. While Z_pk is still noisy, forward is rescaled, reverse untouched, js bent on the way with its fixed point at p*.
Optimum: the target p*, without noise there; tv is not strictly convex and its path wants a good Z.
Source: Go et al. 2023, arXiv:2302.08215 (default js).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from klbench import normaliser
from klbench.batch import Batch
from klbench.errors import unknown
from klbench.method import AbstractStatefulObjective, State

# f' as a function of log t; sign(0) = 0 is widened to rounding, where any value in [-1/2, 1/2] is a subgradient
SLOPES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "forward": lambda t: -(-t).exp(),
    "reverse": lambda t: t + 1,
    "tv": lambda t: t.sign() * (t.abs() > 1e-6) / 2,
    "js": lambda t: math.log(2) - softplus(-t),
}
GENERATORS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "forward": lambda t: -t,
    "reverse": lambda t: t.exp() * t,
    "tv": lambda t: (1 - t.exp()).abs() / 2,
    "js": lambda t: t.exp() * t - (t.exp() + 1) * (softplus(t) - math.log(2)),
}


@final
@dataclass(frozen=True)
class FDPG(AbstractStatefulObjective):
    """generator: js, forward, reverse or tv."""

    generator: str = "js"

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2302.08215"

    def __post_init__(self) -> None:
        if self.generator not in SLOPES:
            raise unknown("generator of fdpg", self.generator, SLOPES)

    def init(self, prompts: int, width: int) -> State:
        """log_z [prompts]: log mean of the weights seen; seen [prompts]: how many. float64."""
        return normaliser.start(prompts)

    def loss(self, batch: Batch, beta: float, state: State) -> tuple[Tensor, State]:
        """Scalar. Reads log_q, log_p0 [P, K, T], reward [P, K], prompt [P]. Raises ValueError when K < 2 or without prompt."""
        draws = batch.reward.shape[1]
        if draws < 2 or batch.prompt is None:
            raise ValueError(f"fdpg needs prompt and K >= 2 draws of each, got {draws}")
        log_q = batch.total(batch.log_q)  # [P, K] nats
        log_w = (batch.total(batch.log_p0) + batch.reward / beta - log_q).detach().double()
        log_z, new = normaliser.leave_one_out(log_w, batch.prompt, state)
        itself = torch.eye(draws, dtype=torch.bool, device=log_w.device)
        slope = SLOPES[self.generator](log_z[:, :, None] - log_w[:, None, :])  # [P, k, j] f'(Z_pk / w_pj)
        own = slope.diagonal(dim1=1, dim2=2)
        advantage = own - (slope.masked_fill(itself, 0.0).sum(2)) / (draws - 1)
        return (advantage.to(log_q.dtype) * log_q).mean(), new

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """D_f of one prompt, all answers [S] enumerated."""
        log_target = (log_p0 + reward / beta).log_softmax(0)
        return (log_target.exp() * GENERATORS[self.generator](log_q - log_target)).sum()
