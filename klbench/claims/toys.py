"""The toys of OBJECTIVES.md section C: laws over a few outcomes, and a three-token language model, all summed exactly in float64.

AB    two tokens, two words, uniform prior, rewards (2, -2) after A, (.5, .5) after B, beta 1
T5    prior logits (0, .8, -.5, .3, -1), rewards (1, 1, 1, 0, .5)
R-K   K outcomes, prior logits and rewards standard normal
LM3   three tokens over three words, standard normal logits at each prefix, standard normal rewards
U8    uniform prior on eight outcomes, r = i/7
MF    4 x 4 uniform prior, r(0,0) = r(1,1) = 1, r(2,2) = .9, beta .3, policies that are products of two marginals
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
from scipy.special import log_softmax, logsumexp

from klbench.estimate import Array
from klbench.laws import World
from klbench.method import RewardLaw


@final
@dataclass(frozen=True)
class Toy:
    """log_p0, reward [S]."""

    log_p0: Array
    reward: Array

    @property
    def p0(self) -> Array:
        return np.exp(self.log_p0)

    def log_z(self, beta: float) -> float:
        return float(logsumexp(self.log_p0 + self.reward / beta))

    def log_target(self, beta: float) -> Array:
        """[S] log p*."""
        return np.asarray(log_softmax(self.log_p0 + self.reward / beta))


def world(toy: Toy, draws: int) -> World:
    """The toy as one prompt with answers of one token. 2^53: its prior is kept to the last bit."""
    return World((tuple(round(p * 2**53) for p in toy.p0.tolist()),), (tuple(toy.reward.tolist()),), draws, 1, len(toy.p0))


def paired(toy: Toy, draws: int) -> tuple[World, Toy]:
    """The world of a toy, and the toy."""
    return world(toy, draws), toy


def best_of(toy: Toy, n: int) -> Array:
    """[S] log of best-of-n's law."""
    return np.asarray(toy.log_p0 + RewardLaw.of(toy.reward, toy.p0).log_best_of(toy.reward, n))


def toy(log_prior: Array | list[float], reward: Array | list[float]) -> Toy:
    """From prior logits and rewards."""
    return Toy(np.asarray(log_softmax(np.asarray(log_prior, dtype=np.float64))), np.asarray(reward, dtype=np.float64))


T5: Final = toy([0.0, 0.8, -0.5, 0.3, -1.0], [1.0, 1.0, 1.0, 0.0, 0.5])
U8: Final = toy(np.zeros(8), np.arange(8) / 7)
AB: Final = toy(np.zeros(4), [2.0, -2.0, 0.5, 0.5])  # AA, AB, BA, BB
MF: Final = toy(np.zeros(16), np.diag([1.0, 1.0, 0.9, 0.0]).ravel())
MF_BETA: Final = 0.3


def random(outcomes: int, seed: int, binary: bool = False) -> Toy:
    """R-K; binary: rewards are 1 where the normal draw is positive, else 0, with at least one of each."""
    rng = np.random.default_rng(seed)
    prior, reward = rng.normal(size=outcomes), rng.normal(size=outcomes)
    if binary:
        reward = (reward > np.clip(0.0, np.sort(reward)[0] + 1e-9, np.sort(reward)[-1] - 1e-9)).astype(np.float64)
    return toy(prior, reward)


def random_policy(outcomes: int, seed: int, scale: float = 1.0) -> Array:
    """[S] log-probabilities."""
    return np.asarray(log_softmax(np.random.default_rng(seed).normal(size=outcomes) * scale))


def kl(log_q: Array, log_p: Array) -> float:
    """KL(q||p), nats."""
    q = np.exp(log_q)
    there = q > 0
    return float((q[there] * (log_q - log_p)[there]).sum())


def tv(log_q: Array, log_p: Array) -> float:
    return float(0.5 * np.abs(np.exp(log_q) - np.exp(log_p)).sum())


def entropy(log_q: Array) -> float:
    q = np.exp(log_q)
    return float(-(q[q > 0] * log_q[q > 0]).sum())
