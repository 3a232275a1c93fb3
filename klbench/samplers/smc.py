"""Sequential Monte Carlo: N outputs of the prior grow side by side, and where some earn more so far the others are dropped for copies.

    log psi_k = r(text after k blocks) / beta,   psi_0 = 1
    each block    every particle gets `block` more tokens of the prior; w <- w psi_k / psi_(k-1)
                  where (sum w)^2 / sum w^2 < N/2: Zhat <- Zhat mean w, N particles are taken in proportion to w (systematic), w <- 1
    at the end    Zhat <- Zhat mean w; one particle, taken in proportion to w, is the draw

The factors of a particle multiply to exp(r/beta), whatever a text earned half written: E[Zhat] = Z and E[Zhat f(draw)] = Z E_p*[f] at
every N. Draws as they are follow p* only as N grows; one draw a run, so that draws are independent. E[log Zhat] < log Z: average Zhat.
Rewards here read any text, so the half-written one is given as it stands. A reward that misleads there costs particles, not truth.
Source: Lew et al. 2023, arXiv:2306.03081; systematic resampling: Kitagawa 1996.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klbench import streams, weights
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractSteering, Steered
from klbench.target import Draws, Steerable, TiltedPrior

# of draws [P, M, t], the token at which their last block began, and log psi [P, M] before it: log psi after it, texts it had rewarded
Twist = Callable[[Draws, int, Array], tuple[Array, int]]


@final
@dataclass(frozen=True)
class SMC(AbstractSteering):
    """particles: N.  block: tokens between two looks at the reward."""

    particles: int = 32
    block: int = 4

    source: ClassVar[str] = "arXiv:2306.03081"
    why: ClassVar[str] = "the density of one of many resampled particles is a sum over all that the others could have been"

    def __post_init__(self) -> None:
        if min(self.particles, self.block) < 1:
            raise UserError(f"smc: at least 1 particle and 1 token a block expected, got {self.particles} and {self.block}")

    def converged(self) -> SMC:
        """With so many particles that a few hundred draws are p*'s."""
        return replace(self, particles=max(self.particles, 128))

    def steer(self, prior: Steerable, target: TiltedPrior, prompts: Sequence[str], draws: int, length: int, seed: int) -> Steered:
        """A run a draw. Reward calls: the different texts at each block's end that the block has changed."""

        def twist(now: Draws, start: int, before: Array) -> tuple[Array, int]:
            longer = now.mask[..., start:].any(2)
            reward, calls = rewards_of(prior, target, prompts, now, longer)
            after = before.copy()
            after[longer.numpy()] = target.tilt(reward)
            return after, calls

        return filtered(self.particles, self.block, prior, prompts, draws, length, seed, twist)


def filtered(
    size: int, block: int, prior: Steerable, prompts: Sequence[str], runs: int, length: int, seed: int, twist: Twist
) -> Steered:  # fmt: skip
    """`runs` independent runs of `size` particles each, of every prompt, and one particle of each. The last twist has to be r/beta."""
    shape = (len(prompts), runs, size)
    nothing = torch.zeros(len(prompts), runs * size, 0)
    now, log_psi = Draws(nothing.long(), nothing.bool(), nothing), np.zeros(nothing.shape[:2])
    log_w, log_z = np.zeros(shape), np.zeros(shape[:2])
    written = calls = 0
    for start in range(0, length, block):
        now, new = extended(prior, prompts, now, min(block, length - start), streams.seed(seed, f"block/{start}"))
        after, asked = twist(now, start, log_psi)
        written, calls = written + new, calls + asked
        log_w, log_psi = log_w + (after - log_psi).reshape(shape), after
        share = np.exp(log_w - log_w.max(2, keepdims=True))
        uniform = np.random.default_rng(streams.seed(seed, f"resample/{start}")).random(shape[:2])
        if start + block >= length:
            picked = systematic(share.reshape(-1, size), uniform.ravel(), 1).reshape(shape[:2])
            now = taken(now, picked + size * np.arange(runs))
            break
        uneven = weights.ess(share) < size / 2
        index = np.broadcast_to(np.arange(size), shape).copy()
        index[uneven] = systematic(share[uneven], uniform[uneven], size)
        index = (index + size * np.arange(runs)[:, None]).reshape(len(prompts), -1)
        now, log_psi = taken(now, index), np.take_along_axis(log_psi, index, 1)
        log_z = log_z + np.where(uneven, weights.log_mean_exp(log_w), 0.0)
        log_w = np.where(uneven[..., None], 0.0, log_w)
    return Steered(now, log_z + weights.log_mean_exp(log_w), written, calls)


def systematic(weight: Array, uniform: Array, size: int) -> NDArray[np.int64]:
    """[R, size] indices in proportion to weights [R, N] of any sum: at (i + u)/size of their cumulative sum, one `uniform` u [R] a row."""
    rows, n = weight.shape
    cumulative = weight.cumsum(1)
    at = np.arange(rows)[:, None]
    cumulative = cumulative / cumulative[:, -1:] + at
    point = (np.arange(size) + uniform[:, None] * (1 - 2**-24)) / size + at  # a sum with a large `at` must not round up to the next row
    found = np.searchsorted(cumulative.ravel(), point.ravel(), side="right").reshape(rows, size) - n * at
    return found.clip(0, n - 1)


def extended(prior: Steerable, prompts: Sequence[str], now: Draws, new: int, seed: int) -> tuple[Draws, int]:
    """Draws with up to `new` more tokens of the prior, log_q of all of them, and how many tokens it wrote."""
    t = now.tokens.shape[2]
    more = prior.extend(prompts, now.tokens, now.mask, new, seed)
    log_q = torch.cat([now.log_q, more.log_q[..., t:]], 2)
    return Draws(more.tokens, more.mask, log_q), int(more.mask[..., t:].sum())


def taken(now: Draws, index: NDArray[np.int64]) -> Draws:
    """The draws at `index` [P, M] of each prompt."""
    at = torch.tensor(index)[..., None].expand(-1, -1, now.tokens.shape[2])
    return Draws(now.tokens.gather(1, at), now.mask.gather(1, at), now.log_q.gather(1, at))


def rewards_of(prior: Steerable, target: TiltedPrior, prompts: Sequence[str], now: Draws, which: Tensor) -> tuple[Array, int]:
    """[K] rewards of the draws in `which` [P, M], row by row, and how many texts were scored: draws that are equal are scored once."""
    at = which.nonzero()
    if len(at) == 0:
        return np.zeros(0), 0
    first, back = distinct(torch.cat([at[:, :1], torch.where(now.mask, now.tokens, -1)[which]], 1).numpy())
    p, n = at[torch.from_numpy(first)].unbind(1)
    texts = prior.decode(now.tokens[p, n][:, None], now.mask[p, n][:, None])
    reward = target.rewards([prompts[i] for i in p.tolist()], texts)[:, 0]
    return reward[back], len(reward)


def distinct(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One row of each kind among [K, T], and the kind of each row. By one number a row, which sorts faster than rows do."""
    number = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        least, span = int(column.min()), int(column.max() - column.min()) + 1
        if (int(number.max()) + 1) * span >= 2**62:
            number = np.unique(number, return_inverse=True)[1]
        number = number * span + (column - least)
    _, first, back = np.unique(number, return_index=True, return_inverse=True)
    return first, back
