"""Markov chain Monte Carlo: a suffix of the output is drawn anew from the prior, and kept or not by what it does to the reward.

    x_0 ~ p0;   each step: a cut k uniform in 0..|x|-1,  x' = x_<k and a fresh end from p0,  |x|: tokens, the EOS among them
    accept with probability min(1, exp((r(x') - r(x)) / beta) |x| / |x'|)

The prior's own ratio cancels against that of the proposals; the chance 1/|x| of the cut does not. Each cut by itself is in detailed balance
with p*, so that p* is stationary, and as k = 0 can reach every output, it is the only law to which chains tend. Without |x|/|x'| they
tend to another (claim C35). Each draw is the end of a chain of its own: what is left of x_0 after the last step is its only bias.
Source: Faria and Smith 2025, arXiv:2504.03790 (QAlign).  Pitfall: a mode whose suffixes the prior seldom writes is not left or entered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from klbench import streams
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractSteering, Steered
from klbench.samplers.smc import rewards_of
from klbench.target import Draws, Steerable, TiltedPrior


@final
@dataclass(frozen=True)
class MCMC(AbstractSteering):
    """steps: proposals a chain."""

    steps: int = 64

    source: ClassVar[str] = "arXiv:2504.03790"
    why: ClassVar[str] = "the density after many proposals is a sum over all the ways there"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"mcmc: at least 0 steps expected, got {self.steps}")

    def converged(self) -> MCMC:
        """With so many steps that a few hundred draws are p*'s."""
        return replace(self, steps=max(self.steps, 64))

    def log_accept(self, gain: Array, tokens: Array, new_tokens: Array) -> Array:
        """log of the chance that a proposal is taken; gain: (r(x') - r(x)) / beta."""
        return np.minimum(0.0, gain + np.log(tokens) - np.log(new_tokens))

    def steer(self, prior: Steerable, target: TiltedPrior, prompts: Sequence[str], draws: int, length: int, seed: int) -> Steered:
        """A chain a draw. Reward calls: the different texts proposed at each step."""
        every = torch.ones(len(prompts), draws, dtype=torch.bool)
        now = prior.sample(prompts, draws, length, streams.seed(seed, "start"))
        written = int(now.mask.sum())
        reward, calls = rewards_of(prior, target, prompts, now, every)
        for step in range(self.steps):
            rng = np.random.default_rng(streams.seed(seed, f"step/{step}"))
            cut, chance = rng.random(every.shape), rng.random(every.shape)
            size = now.mask.sum(2).numpy()
            other, new = proposed(prior, prompts, now, torch.from_numpy((cut * size).astype(np.int64)), streams.seed(seed, f"from/{step}"))
            other_reward, asked = rewards_of(prior, target, prompts, other, every)
            gain = target.tilt(other_reward - reward).reshape(size.shape)
            taken = chance < np.exp(self.log_accept(gain, size, other.mask.sum(2).numpy()))
            at = torch.from_numpy(taken)[..., None]
            now = Draws(*(torch.where(at, a, b) for a, b in zip(_parts(other), _parts(now), strict=True)))
            reward = np.where(taken.ravel(), other_reward, reward)
            written, calls = written + new, calls + asked
        return Steered(now, None, written, calls)


def proposed(prior: Steerable, prompts: Sequence[str], now: Draws, cut: Tensor, seed: int) -> tuple[Draws, int]:
    """Each draw with a fresh end from token `cut` [P, N] on, and the tokens that the prior wrote: one call for all that share a cut."""
    other, written, length = Draws(*(part.clone() for part in _parts(now))), 0, now.tokens.shape[2]
    for k in cut.unique().tolist():
        p, n = (cut == k).nonzero().unbind(1)
        tokens, mask = now.tokens[p, n][:, None, :k], now.mask[p, n][:, None, :k]
        more = prior.extend([prompts[i] for i in p.tolist()], tokens, mask, length - k, streams.seed(seed, f"{k}"))
        for into, part in zip(_parts(other), _parts(more), strict=True):
            into[p, n, k:] = part[:, 0, k:]
        written += int(more.mask[..., k:].sum())
    return other, written


def _parts(of: Draws) -> tuple[Tensor, Tensor, Tensor]:
    return of.tokens, of.mask, of.log_q
