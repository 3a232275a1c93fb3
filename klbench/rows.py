"""What two models say of the draws of one law: the table that every estimator reads. Shapes [P prompts, N draws]; nats; float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klbench.estimate import Array


@dataclass(frozen=True)
class Rows:
    """Draws of one law with what a policy q and the prior p0 say of them, each [P, N].

    log_q, log_p0: of whole outputs.  reward.  A = sum_t [-log q(x_t) - H(q_t)] and B = sum_t [-log p0(x_t) - H(q_t, p0_t)]: mean 0 under q.
    kl: sum_t KL(q_t || p0_t).  entropy: sum_t H(q_t).  lost: sum_t KL(p0_t || q_t), which has under p0 the mean of log p0 - log q.
    Where a policy has no token laws A = B = 0, kl = log_q - log_p0 = -lost, entropy = -log_q.
    """

    log_q: Array
    log_p0: Array
    reward: Array
    A: Array
    B: Array
    kl: Array
    entropy: Array
    lost: Array

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value.shape != self.log_q.shape or value.ndim != 2:
                raise ValueError(f"{name}: [P, N] expected like log_q {self.log_q.shape}, got {value.shape}")

    @classmethod
    def of_ratio(cls, log_p0: Array, reward: Array, log_ratio: Array) -> Rows:
        """Rows of a law known by its density alone: log_ratio = log q/p0."""
        zero = np.zeros_like(log_p0)
        return cls(log_p0 + log_ratio, log_p0, reward, zero, zero, log_ratio, -log_p0 - log_ratio, -log_ratio)

    @classmethod
    def joined(cls, *parts: Rows) -> Rows:
        """Draws of several laws side by side."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts], 1) for name in cls.__dataclass_fields__})

    def part(self, at: slice | NDArray[np.int64]) -> Rows:
        """Some of the draws of each prompt."""
        return Rows(**{name: value[:, at] for name, value in vars(self).items()})

    def rounded(self) -> Rows:
        """As `samples/<id>.npz` keeps it, in float32, so that whoever reads that file computes the same figures."""
        return Rows(**{name: value.astype(np.float32).astype(np.float64) for name, value in vars(self).items()})
