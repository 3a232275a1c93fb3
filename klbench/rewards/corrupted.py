"""Rewards with an error put into them on purpose: what a policy gains from a proxy is then known, as the clean reward is the gold one.

    flipped   1 - r on a share e of the completions                         label noise
    noisy     clip( r + sd z, low, high ),   z standard normal              an unbiased judge with a bad eye
    biased    r, and the ceiling wherever a pattern is found                a loophole, found or not

The error of a completion is a function of the prompt, the completion and the seed: asked twice, a reward answers twice the same. A judge
that was trained on other text, the third kind of wrong proxy, is a reward of its own (tasks/corrupted).
Source: Pang et al. 2023, arXiv:2211.08714 (rewards gamed by noise, bias and shift); Natarajan et al. 2013 (flips).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.special import ndtri

from klbench.errors import UserError
from klbench.estimate import Array
from klbench.target import Reward


def uniform(prompts: list[str], completions: list[str], seed: int) -> Array:
    """[n] numbers in (0, 1), one a (prompt, completion, seed), as good as drawn."""
    keys = (hashlib.sha256(f"{seed}\0{p}\0{x}".encode()).digest()[:8] for p, x in zip(prompts, completions, strict=True))
    return (np.array([int.from_bytes(key, "big") for key in keys], dtype=np.float64) + 0.5) / 2.0**64


@final
@dataclass(frozen=True)
class Flipped:
    """A reward of 0 or 1 with a share `rate` of its labels turned over, in [0, 1/2)."""

    clean: Reward
    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 0.5:
            raise UserError(f"flipped reward: a rate in [0, 1/2) expected, got {self.rate}")

    @property
    def reward_max(self) -> float:
        return 1.0

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        clean = np.asarray(self.clean(prompts=prompts, completions=completions))
        return [float(r) for r in np.where(uniform(prompts, completions, self.seed) < self.rate, 1.0 - clean, clean)]


@final
@dataclass(frozen=True)
class Noisy:
    """A reward in [low, high] with normal noise of standard deviation `sd`, clipped."""

    clean: Reward
    sd: float
    low: float
    high: float
    seed: int = 0

    @property
    def reward_max(self) -> float:
        return self.high

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        z = ndtri(uniform(prompts, completions, self.seed))
        clean = np.asarray(self.clean(prompts=prompts, completions=completions))
        return [float(r) for r in np.clip(clean + self.sd * z, self.low, self.high)]


@final
@dataclass(frozen=True)
class Biased:
    """A reward that gives its ceiling to every completion in which `pattern` is found."""

    clean: Reward
    pattern: re.Pattern[str]
    high: float

    @property
    def reward_max(self) -> float:
        return self.high

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        clean = self.clean(prompts=prompts, completions=completions)
        return [self.high if self.pattern.search(x) else float(r) for x, r in zip(completions, clean, strict=True)]
