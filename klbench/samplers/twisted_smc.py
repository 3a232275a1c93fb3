"""Twisted SMC: the particle filter of `smc`, steered by a learned guess of what is still to be earned instead of the reward so far.

    psi*(s) = E_p0[ exp(r/beta) | prefix s ]                         the twists under which weights say most
    psi(s) = exp(V(s)),   V(s) = m_c + a + b . h(s),   h: the prior's state after s,   m_c: log of the mean of exp(r/beta) at the prompt
    (a, b) = argmin sum_s [ exp(f) - y f ] + |b|^2 / 2,   f = V(s) - m_c,   y = exp(r/beta - m_c) of the prior draw that s begins

Over all functions of s the minimum is f = log E[y | s], where a regression of r/beta itself would end at its mean, which is lower: on
states that tell all prefixes apart V is log psi* in the limit of many fit draws. The loss is convex, a few Newton steps. A finished text
has the twist exp(r/beta), and at the end every text has: any V leaves Zhat unbiased.
The fit is of its own seed, the same at every call: one V, one policy.  Source: Zhao et al. 2024, arXiv:2404.17546, whose proposals are
p0 psi, here the prior's, and whose losses are others; this is the simplest with that minimum.
Pitfall: a reward that few fit draws earn is not learned, and twists then steer away from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, final

import numpy as np
import torch
from torch import Tensor

from klbench import streams, weights
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractSteering, Steered
from klbench.samplers.smc import distinct, filtered, rewards_of, taken
from klbench.target import Draws, Steerable, TiltedPrior

ROWS: Final = 4096  # draws whose states are held at once
NEWTON: Final = 100  # steps at most; a dozen do


@final
@dataclass(frozen=True)
class TwistedSMC(AbstractSteering):
    """particles: N.  block: tokens between two looks at the twist.  fit: prior draws a prompt that V is fitted on."""

    particles: int = 32
    block: int = 4
    fit: int = 128

    source: ClassVar[str] = "arXiv:2404.17546"
    why: ClassVar[str] = "the density of one of many resampled particles is a sum over all that the others could have been"

    def __post_init__(self) -> None:
        if min(self.particles, self.block, self.fit) < 1:
            raise UserError(f"twisted_smc: at least 1 particle, token a block and fit draw expected, got {self}")

    def converged(self) -> TwistedSMC:
        """With so many particles that a few hundred draws are p*'s."""
        return replace(self, particles=max(self.particles, 128))

    def steer(self, prior: Steerable, target: TiltedPrior, prompts: Sequence[str], draws: int, length: int, seed: int) -> Steered:
        """A run a draw. The fit's draws are among the prior's tokens and the reward's calls."""
        seen = Seen.of(prior, target, prompts, self.block, length, self.fit, streams.seed(0, "twisted_smc/fit"))
        tilt = target.tilt(seen.reward)
        value = seen.value(soft, tilt, weights.log_mean_exp(tilt))

        def twist(now: Draws, start: int, before: Array) -> tuple[Array, int]:
            return foreseen(prior, target, prompts, value, target.tilt, length, now, start, before)

        found = filtered(self.particles, self.block, prior, prompts, draws, length, seed, twist)
        return replace(found, prior_tokens=found.prior_tokens + seen.tokens, reward_calls=found.reward_calls + seen.calls)


Value = Callable[[Tensor], Array]  # of states [P, M, D], each of its prompt: [P, M]


@final
@dataclass(frozen=True, eq=False)
class Seen:
    """Prior draws that a value is fitted on: the states [K, D] of their prefixes at the ends of blocks, and which draw [K] each begins.

    reward [P, N]; draw: p N + n.  tokens, calls: what they cost.
    """

    states: Tensor
    draw: Tensor
    reward: Array
    tokens: int
    calls: int

    @classmethod
    def of(
        cls, prior: Steerable, target: TiltedPrior, prompts: Sequence[str], block: int, length: int, fit: int, seed: int
    ) -> Seen:  # fmt: skip
        """Of `fit` fresh draws a prompt; none where one block is the whole text, and no value is asked for."""
        ends = list(range(block, length, block))
        if not ends:
            return cls(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), np.zeros((len(prompts), fit)), 0, 0)
        drawn = prior.sample(prompts, fit, length, seed)
        reward, calls = rewards_of(prior, target, prompts, drawn, torch.ones(drawn.mask.shape[:2], dtype=torch.bool))
        begun = torch.stack([drawn.mask[..., t - 1] for t in ends], 2)  # a prefix of t tokens is there
        draw = torch.arange(begun[..., 0].numel()).view(begun.shape[:2])[..., None].expand(begun.shape)
        states = states_at(prior, prompts, drawn, ends)
        return cls(states[begun], draw[begun], reward.reshape(begun.shape[:2]), int(drawn.mask.sum()), calls)

    def value(self, regression: Callable[[Array, Array], Array], aim: Array, middle: Array) -> Value:
        """`middle` [P] and a regression of aim - middle [P, N] on features: a constant, and states, centred and of mean square norm 1.

        Values are kept between the least and the most that was aimed at: no mean lies beyond.
        """
        if not len(self.states):
            return lambda states: np.zeros(states.shape[:-1])
        centre = self.states.double().mean(0)
        spread = float((self.states.double() - centre).square().sum(1).mean().sqrt()) or 1.0

        def features(states: Tensor) -> Array:
            scaled = (states.double() - centre) / spread
            return np.asarray(torch.cat([torch.ones_like(scaled[..., :1]), scaled], -1).numpy())

        line = regression(features(self.states), (aim - middle[:, None]).ravel()[self.draw.numpy()])
        least, most = aim.min(1, keepdims=True), aim.max(1, keepdims=True)
        return lambda states: np.clip(features(states) @ line + middle[:, None], least, most)


def soft(x: Array, aim: Array) -> Array:
    """[D] argmin of sum exp(x b) - exp(aim) x b + |b|^2/2, the first entry of b free: Newton steps, halved until the loss falls."""
    y, ridge, line = np.exp(aim), np.ones(x.shape[1]), np.zeros(x.shape[1])
    ridge[0] = 0.0

    def loss(line: Array) -> float:
        with np.errstate(over="ignore"):
            return float(np.sum(np.exp(x @ line) - y * (x @ line)) + ridge @ line**2 / 2)

    for _ in range(NEWTON):
        mean = np.exp(x @ line)
        slope = x.T @ (mean - y) + ridge * line
        step = np.linalg.solve((x.T * mean) @ x + np.diag(ridge), slope)
        gain, size, here = float(slope @ step), 1.0, loss(line)
        if gain < 1e-12 * len(x):
            break
        while loss(line - size * step) > here - size * gain / 4 and size > 1e-6:
            size /= 2
        line = line - size * step
    return line


def states_at(prior: Steerable, prompts: Sequence[str], now: Draws, ends: Sequence[int]) -> Tensor:
    """[P, N, len(ends), D] the prior's states after so many tokens, some draws at a time."""
    size = max(1, ROWS // len(prompts))
    parts = zip(now.tokens.split(size, 1), now.mask.split(size, 1), strict=True)
    return torch.cat([prior.states(prompts, tokens, mask)[:, :, list(ends)] for tokens, mask in parts], 1)


def foreseen(
    prior: Steerable, target: TiltedPrior, prompts: Sequence[str], value: Value, tilt: Callable[[Array], Array], length: int,
    now: Draws, start: int, before: Array,
) -> tuple[Array, int]:  # fmt: skip
    """A twist: `tilt` of the reward where a text is finished, the value of its prefix elsewhere."""
    after, end = before.copy(), now.tokens.shape[2]
    known = now.mask.new_zeros(now.mask.shape[:2]) if start == 0 else ~now.mask[..., start - 1]
    done = torch.ones_like(known) if end == length else ~now.mask[..., -1]
    reward, calls = rewards_of(prior, target, prompts, now, done & ~known)
    after[(done & ~known).numpy()] = tilt(reward)
    if not bool(done.all()):
        after[~done.numpy()] = value_of(prior, prompts, value, now)[~done.numpy()]
    return after, calls


def value_of(prior: Steerable, prompts: Sequence[str], value: Value, now: Draws) -> Array:
    """[P, M] values of draws as prefixes; the states of equal ones are asked for once."""
    P, M, t = now.tokens.shape
    which = torch.arange(P).repeat_interleave(M)[:, None]
    first, back = distinct(torch.cat([which, torch.where(now.mask, now.tokens, -1).flatten(0, 1)], 1).numpy())
    p, place = first // M, np.arange(len(first))  # kinds come in the order of prompts
    place = place - np.searchsorted(p, p)
    one = np.zeros((P, int(place.max()) + 1), dtype=np.int64)
    one[p, place] = first % M
    some = taken(now, one)
    found = value(states_at(prior, prompts, some, [t])[:, :, 0])
    return np.asarray(found[p[back], place[back]].reshape(P, M))
