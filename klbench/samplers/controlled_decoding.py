"""Controlled decoding, blockwise: of K continuations by a block of the prior's tokens the one with the highest value is kept.

    V(s) = E_p0[ r | prefix s ] ~ m_c + a + b . h(s),   by ridge regression on prior draws;   h: the prior's state after s
    each block: K continuations of M tokens,  keep the first argmax of V, of r itself where a text is finished

Between best-of-K (one block) and greedy search for the best next token (M = 1). Reads no beta: K and M set how far it goes from the prior.
Its limit is no posterior: as K grows it tends to the best that V sees. Sampling tokens by p0 exp(V/beta) would not be either, since that
needs the soft value (claim C37).  Source: Mudgal et al. 2024, arXiv:2310.17022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch

from klbench import streams
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractSteering, Steered
from klbench.samplers.smc import extended, taken
from klbench.samplers.twisted_smc import Seen, foreseen
from klbench.target import Draws, Steerable, TiltedPrior


@final
@dataclass(frozen=True)
class ControlledDecoding(AbstractSteering):
    """candidates: K.  block: M, tokens between two choices.  fit: prior draws a prompt that V is fitted on."""

    candidates: int = 8
    block: int = 4
    fit: int = 128

    source: ClassVar[str] = "arXiv:2310.17022"
    why: ClassVar[str] = "the density of the best of several continuations is a sum over all that the others could have been"

    def __post_init__(self) -> None:
        if min(self.candidates, self.block, self.fit) < 1:
            raise UserError(f"controlled_decoding: at least 1 candidate, token a block and fit draw expected, got {self}")

    def steer(self, prior: Steerable, target: TiltedPrior, prompts: Sequence[str], draws: int, length: int, seed: int) -> Steered:
        """Each draw by itself. The fit's draws are among the prior's tokens and the reward's calls."""
        seen = Seen.of(prior, target, prompts, self.block, length, self.fit, streams.seed(0, "controlled_decoding/fit"))
        value = seen.value(ridge, seen.reward, seen.reward.mean(1))
        nothing, shape = torch.zeros(len(prompts), draws, 0), (len(prompts), draws, self.candidates)
        now, worth = Draws(nothing.long(), nothing.bool(), nothing), np.zeros(shape[:2])
        written, calls = seen.tokens, seen.calls
        each = np.broadcast_to(np.arange(draws).repeat(self.candidates), (len(prompts), draws * self.candidates))
        for start in range(0, length, self.block):
            many = taken(now, each)
            many, new = extended(prior, prompts, many, min(self.block, length - start), streams.seed(seed, f"block/{start}"))
            before = worth.repeat(self.candidates, axis=1)
            after, asked = foreseen(prior, target, prompts, value, np.asarray, length, many, start, before)
            best = after.reshape(shape).argmax(2) + self.candidates * np.arange(draws)
            now, worth = taken(many, best), np.take_along_axis(after, best, 1)
            written, calls = written + new, calls + asked
        return Steered(now, None, written, calls)


def ridge(x: Array, aim: Array) -> Array:
    """[D] argmin of sum (x b - aim)^2 + |b|^2, the first entry of b free."""
    penalty = np.diag([0.0] + [1.0] * (x.shape[1] - 1))
    return np.asarray(np.linalg.solve(x.T @ x + penalty, x.T @ aim), dtype=np.float64)
