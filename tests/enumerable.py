"""Tiny autoregressive laws over V tokens and T positions, as tables: every quantity of a pool is also a sum over V^T outcomes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from klbench.rows import Rows


@dataclass(frozen=True)
class Table:
    """log-probabilities [P, V^t, V] of the next token after each prefix, t = 0 .. T-1; outcomes are numbered in base V."""

    steps: list[np.ndarray]

    @classmethod
    def random(cls, rng: np.random.Generator, prompts: int, V: int, T: int, scale: float = 1.0) -> Table:
        raw = [rng.normal(size=(prompts, V**t, V)) * scale for t in range(T)]
        return cls([x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in raw])

    @classmethod
    def of(cls, log_prob: np.ndarray, V: int, T: int) -> Table:
        """The autoregressive form of any law over outcomes, [P, V^T] log-probabilities."""
        steps, mass = [], np.exp(log_prob)
        for t in range(T):
            level = mass.reshape(len(mass), V**t, V, -1).sum(-1)
            steps.append(np.log(level / level.sum(-1, keepdims=True)))
        return cls(steps)

    @property
    def shape(self) -> tuple[int, int]:
        return self.steps[0].shape[2], len(self.steps)

    def outcomes(self) -> np.ndarray:
        V, T = self.shape
        return np.array(list(itertools.product(range(V), repeat=T)))  # [V^T, T]

    def token_log_prob(self) -> np.ndarray:
        """[P, V^T, T]"""
        x = self.outcomes()
        V, T = self.shape
        prefix, out = np.zeros(len(x), int), []
        for t in range(T):
            out.append(self.steps[t][:, prefix, x[:, t]])
            prefix = prefix * V + x[:, t]
        return np.stack(out, -1)

    def log_prob(self) -> np.ndarray:
        return self.token_log_prob().sum(-1)

    def cross(self, other: Table) -> np.ndarray:
        """[P, V^T, T] of H(self_t, other_t) at each prefix of each outcome."""
        x = self.outcomes()
        V, T = self.shape
        prefix, out = np.zeros(len(x), int), []
        for t in range(T):
            h = -(np.exp(self.steps[t]) * other.steps[t]).sum(-1)
            out.append(h[:, prefix])
            prefix = prefix * V + x[:, t]
        return np.stack(out, -1)


def rows(q: Table, p0: Table, reward: np.ndarray, drawn: np.ndarray) -> Rows:
    """Rows of drawn outcomes [P, N] (indices), for the policy q against p0; reward [P, V^T]."""
    entropy, cross = q.cross(q).sum(-1), q.cross(p0).sum(-1)
    lost = p0.cross(q).sum(-1) - p0.cross(p0).sum(-1)
    lq, l0 = q.log_prob(), p0.log_prob()
    take = lambda a: np.take_along_axis(a, drawn, 1)  # noqa: E731
    return Rows(take(lq), take(l0), take(reward), take(-lq - entropy), take(-l0 - cross), take(cross - entropy), take(entropy), take(lost))


def draw(rng: np.random.Generator, table: Table, n: int) -> np.ndarray:
    p = np.exp(table.log_prob())
    return np.stack([rng.choice(p.shape[1], n, p=row / row.sum()) for row in p])


def posterior(p0: Table, reward: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """log p* [P, V^T] and log Z [P]."""
    raw = p0.log_prob() + reward / beta
    log_z = np.log(np.exp(raw - raw.max(1, keepdims=True)).sum(1)) + raw.max(1)
    return raw - log_z[:, None], log_z
