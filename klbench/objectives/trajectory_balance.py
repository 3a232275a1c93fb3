"""Trajectory balance: the squared error of the log-density equation that p* alone satisfies, log Z learned beside it.

    e_pk = log z_p + log q(y_pk) - log p0(y_pk) - r_pk / beta
    loss = mean_pk e_pk^2,    y ~ q held fixed
    E[grad loss] = 2 grad KL(q || p*)  for every z;    d loss / d log z_p = 2 mean_k e_pk

    huber d > 0:  e^2 where |e| <= d, d (2 |e| - d) beyond: one corrupted reward pulls with a bounded force

log z_p = start_p + learned_p: at a prompt's first visit the start is the mean of -(log q/p0 - r/beta) over the group's other draws,
at later ones over that whole first group, so that early steps are not spent on the constant; what is learned begins at 0.
Optimum: the target p*, with e = 0.  Source: Malkin et al. 2022, arXiv:2201.13259 (a larger rate for log z: 0.1, Adam).
Pitfall: on-policy, log z is a baseline only: it changes the noise and never the direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.method import AbstractStatefulObjective, State


@final
@dataclass(frozen=True)
class TrajectoryBalance(AbstractStatefulObjective):
    """huber: d, nats; 0 switches it off. With it log z is more than a baseline, and the gradient that of KL(q || p*) near p* alone."""

    huber: float = 0.0

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2201.13259"
    state_lr: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        if not self.huber >= 0:
            raise UserError(f"trajectory_balance: huber is a distance, 0 for none, got {self.huber}")

    def init(self, prompts: int, width: int) -> State:
        """log_z [prompts]: the learned part, trained; start [prompts]: the part fixed at the first visit; seen [prompts]: draws."""
        zeros = torch.zeros(prompts, dtype=torch.float64)
        return {"log_z": zeros.clone().requires_grad_(), "start": zeros.clone(), "seen": zeros.clone()}

    def loss(self, batch: Batch, beta: float, state: State) -> tuple[Tensor, State]:
        """Scalar, squared nats. Reads log_q, log_p0 [P, K, T], reward [P, K], prompt [P]. ValueError when K < 2 or without prompt."""
        draws = batch.reward.shape[1]
        if draws < 2 or batch.prompt is None:
            raise ValueError(f"trajectory_balance needs prompt and K >= 2 draws of each, got {draws}")
        gap = batch.total(batch.log_q - batch.log_p0) - batch.reward / beta  # [P, K] nats
        guess = -gap.detach().double()
        mean, first = guess.mean(1), state["seen"][batch.prompt] == 0
        rest = (guess.sum(1, keepdim=True) - guess) / (draws - 1)  # a draw must not choose its own baseline
        start = torch.where(first[:, None], rest, state["start"][batch.prompt][:, None])
        error = state["log_z"][batch.prompt][:, None] + start + gap
        new = {"log_z": state["log_z"], "start": state["start"].clone(), "seen": state["seen"].clone()}  # the trained leaf stays itself
        new["start"][batch.prompt] = torch.where(first, mean, state["start"][batch.prompt])
        new["seen"][batch.prompt] += draws
        if self.huber:
            near = error.abs().clamp(max=self.huber)
            return (near * (2 * error.abs() - near)).mean(), new
        return (error**2).mean(), new

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """KL(q || p*) of one prompt, all answers [S] enumerated."""
        return (log_q.exp() * (log_q - (log_p0 + reward / beta).log_softmax(0))).sum()
