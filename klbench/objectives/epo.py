"""EPO: an entropy bonus beside the KL, and a penalty when the entropy leaves the range of its own past.

    J    = E_q[r] - beta KL(q || p0) + c H(q),    H(q) = -E_q[ log q ]
    g_pk = r_pk - beta log(q/p0)_pk,   h_pk = -log q(y_pk),   both less the mean of the prompt's other draws, held constant
    loss = -mean_pk (g_pk + c_pk h_pk) log q(y_pk) + c alpha P
    P    = penalty where the others' mean of h is outside [.8, 1.2] times the prompt's mean over past steps, else 0
    E[grad loss] = -grad J

As published P is a constant wherever it is not 0: it has no gradient, and c_pk = c. `hinge` (ours) lets it grow with the distance to the
range: its gradient is penalty times grad H, away from the range, so c_pk = c (1 - alpha penalty) above it and c (1 + alpha penalty) below.
Optimum: its own, p0^(beta/(beta+c)) exp(r/(beta+c)) / norm, hinge off: flatter than p* in r and in the prior.
Source: Xu et al. 2025, arXiv:2509.22576 (c .001, penalty .1, alpha 1). Theirs reads token entropies; here the entropy
is the sequence's, a prompt at a time.  Pitfall: entropy is not divergence from the prior: c pulls towards what p0 hardly ever says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.estimate import Array
from klbench.method import AbstractStatefulObjective, State


@final
@dataclass(frozen=True)
class EPO(AbstractStatefulObjective):
    """entropy: c, in reward units a nat.  penalty, alpha: of the range.  hinge: whether it has a gradient."""

    entropy: float = 0.001
    penalty: float = 0.1
    alpha: float = 1.0
    hinge: bool = False

    optimum: ClassVar[str] = "own"
    source: ClassVar[str] = "arXiv:2509.22576"

    def init(self, prompts: int, width: int) -> State:
        """past [prompts]: mean of -log q over the draws of past steps; visits [prompts]: how many steps. float64."""
        return {"past": torch.zeros(prompts, dtype=torch.float64), "visits": torch.zeros(prompts, dtype=torch.float64)}

    def loss(self, batch: Batch, beta: float, state: State) -> tuple[Tensor, State]:
        """Scalar, reward units. Reads log_q, log_p0 [P, K, T], reward [P, K], prompt [P]. ValueError when K < 2 or without prompt."""
        draws = batch.reward.shape[1]
        if draws < 2 or batch.prompt is None:
            raise ValueError(f"epo needs prompt and K >= 2 draws of each, got {draws}")
        log_q = batch.total(batch.log_q)  # [P, K] nats
        surprise = -log_q.detach()
        gain = batch.reward + beta * (surprise + batch.total(batch.log_p0))
        rest = [(x.sum(1, keepdim=True) - x) / (draws - 1) for x in (gain, surprise)]  # means of the other draws
        past, visits = (state[name][batch.prompt][:, None] for name in ("past", "visits"))
        side = ((rest[1] > 1.2 * past).double() - (rest[1] < 0.8 * past).double()) * (visits > 0)  # 1 above the range, -1 below
        bonus = self.entropy * (1 - self.alpha * self.penalty * side * self.hinge).to(log_q)
        advantage = gain - rest[0] + bonus * (surprise - rest[1])
        new = {name: value.clone() for name, value in state.items()}
        new["past"][batch.prompt] = ((past * visits + surprise.mean(1, keepdim=True)) / (visits + 1))[:, 0]
        new["visits"][batch.prompt] += 1
        return -(advantage * log_q).mean() + self.entropy * self.alpha * self.penalty * side.abs().mean().to(log_q), new

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward - beta * (log_q - log_p0) - self.entropy * log_q)).sum()

    def own_tilt(self, log_p0: Array, reward: Array, beta: float, draws: int) -> Array:
        """[N] log of the optimum over p0, up to a constant a prompt."""
        return np.asarray((reward - self.entropy * log_p0) / (beta + self.entropy))
