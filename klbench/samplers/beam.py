"""Beam search by log-ratio: of many half-written outputs those with the most posterior mass go on, and the likeliest whole one is the draw.

    log p*(s) = log p0(s) + log E_p0[exp(r/beta) | s] - log Z       the posterior's mass on the prefix s, with the soft value as advantage
    score(s) = log p0(s) + V(s),   V ~ log E_p0[exp(r/beta) | s] as `twisted_smc` fits it, r/beta where a text is finished
    each block: every one of W prefixes gets K continuations of M tokens of the prior;  the W different ones of highest score stay
    at the end: the first of them, argmax of log p0 + r/beta among those that the beam has found

A search for the mode of p*, and no sampler of it: with W and K that reach every prefix the law is a point on that mode, at every beta.
With one prefix and one block it is best-of-K by log p*, with W = K = 1 the prior. Only what the prior writes is found, and a wrong V can
drop the mode's beginning. Each draw has a beam of its own, of other tokens, so that draws are independent.
Source: Rafailov et al. 2024, arXiv:2404.12358, who search by a trained policy's log pi, which is log p* where training has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch

from klbench import streams, weights
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractSteering, Steered
from klbench.samplers.smc import distinct, extended, taken
from klbench.samplers.twisted_smc import Seen, foreseen, soft
from klbench.target import Draws, Steerable, TiltedPrior


@final
@dataclass(frozen=True)
class Beam(AbstractSteering):
    """width: W.  candidates: K.  block: M, tokens between two choices.  fit: prior draws a prompt that V is fitted on."""

    width: int = 8
    candidates: int = 4
    block: int = 4
    fit: int = 128

    source: ClassVar[str] = "arXiv:2404.12358"
    why: ClassVar[str] = "the density of the best of a beam is a sum over all that the beam could have held"

    def __post_init__(self) -> None:
        if min(self.width, self.candidates, self.block, self.fit) < 1:
            raise UserError(f"beam: at least 1 prefix, candidate, token a block and fit draw expected, got {self}")

    def steer(self, prior: Steerable, target: TiltedPrior, prompts: Sequence[str], draws: int, length: int, seed: int) -> Steered:
        """A beam a draw. The fit's draws are among the prior's tokens and the reward's calls."""
        seen = Seen.of(prior, target, prompts, self.block, length, self.fit, streams.seed(0, "beam/fit"))
        tilt = target.tilt(seen.reward)
        value = seen.value(soft, tilt, weights.log_mean_exp(tilt))
        P, size = len(prompts), self.width * self.candidates
        nothing = torch.zeros(P, draws * self.width, 0)
        now, worth = Draws(nothing.long(), nothing.bool(), nothing), np.zeros(nothing.shape[:2])
        written, calls = seen.tokens, seen.calls
        for start in range(0, length, self.block):
            each = np.broadcast_to(np.arange(worth.shape[1]).repeat(self.candidates), (P, draws * size))
            many, before = taken(now, each), np.take_along_axis(worth, each, 1)
            many, new = extended(prior, prompts, many, min(self.block, length - start), streams.seed(seed, f"block/{start}"))
            after, asked = foreseen(prior, target, prompts, value, target.tilt, length, many, start, before)
            score = np.where(repeated(many, size), -np.inf, many.log_q.double().sum(2).numpy() + after)
            kept = 1 if start + self.block >= length else self.width
            best = np.argsort(-score.reshape(P, draws, size), axis=2, kind="stable")[..., :kept]
            best = (best + size * np.arange(draws)[:, None]).reshape(P, -1)
            now, worth = taken(many, best), np.take_along_axis(after, best, 1)
            written, calls = written + new, calls + asked
        return Steered(now, None, written, calls)


def repeated(now: Draws, size: int) -> Array:
    """[P, M] whether an equal draw stands before it among the `size` of its beam."""
    P, M, t = now.tokens.shape
    beam = torch.arange(P * M)[:, None] // size
    first, _ = distinct(torch.cat([beam, torch.where(now.mask, now.tokens, -1).view(P * M, t)], 1).numpy())
    again = np.ones(P * M, dtype=bool)
    again[first] = False
    return again.reshape(P, M)
