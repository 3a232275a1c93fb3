"""Rewards made of rewards: all of several, calibrated, and what a model says of the prompt.

    every        sum_k log sigma(r_k - ref_k)                    p* at beta 1 is p0 prod_k sigma(r_k - ref_k) / Z: a soft AND
    calibrated   F(r | c),  the mid-rank of r under the prior    its log Z at a prompt is log E[e^(U/beta)], U uniform, whatever r was
    reversed     log p0(prompt | completion)                     completions that explain their prompt
    in context   log p0(x | text, c) - log p0(x | c)             at beta 1 log Z = 0 and p* = p0(. | text, c): the prior under a text

Sources: Wang et al. 2024, arXiv:2402.00742 (every); Balashankar et al. 2025, arXiv:2412.19792 (calibrated); Varun et al. 2024,
arXiv:2412.02626 (reversed); the last is Bayes' rule read as a reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from klbench.errors import UserError
from klbench.estimate import Array
from klbench.target import Reward


@final
@dataclass(frozen=True)
class Every:
    """Good at all: sum_k log sigma(r_k - ref_k), at most 0. A completion that fails one reward is not saved by another."""

    rewards: tuple[Reward, ...]
    references: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.rewards) != len(self.references) or not self.rewards:
            raise UserError(f"every: one reference a reward expected, got {len(self.references)} for {len(self.rewards)}")

    @property
    def reward_max(self) -> float:
        return 0.0

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        total: Array = np.zeros(len(completions))
        for reward, reference in zip(self.rewards, self.references, strict=True):
            total -= np.logaddexp(0.0, reference - np.asarray(reward(prompts=prompts, completions=completions), dtype=np.float64))
        return [float(x) for x in total]


@final
@dataclass(frozen=True)
class Calibrated:
    """The mid-rank (P(< r) + P(<= r)) / 2 of a reward among `levels`: rewards of prior draws, by prompt, that feed nothing else."""

    reward: Reward
    levels: Mapping[str, tuple[float, ...]]

    @property
    def reward_max(self) -> float:
        return 1.0

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        """Raises UserError for a prompt without levels."""
        for prompt in prompts:
            if prompt not in self.levels:
                raise UserError(f"calibrated: no prior draws of prompt {prompt!r}")
        ranks = {p: np.sort(np.asarray(self.levels[p], dtype=np.float64)) for p in dict.fromkeys(prompts)}
        found = self.reward(prompts=prompts, completions=completions)
        return [
            float(np.searchsorted(ranks[p], r, "left") + np.searchsorted(ranks[p], r, "right")) / (2 * len(ranks[p]))
            for p, r in zip(prompts, found, strict=True)
        ]


@final
@dataclass(frozen=True)
class Reversed:
    """log p0(prompt | completion) in nats, at most 0. prior: a causal language model of klbench."""

    prior: Any

    @property
    def reward_max(self) -> float:
        return 0.0

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        """An empty completion explains nothing: the prompt is read behind a blank."""
        return _said(self.prior, [x or " " for x in completions], prompts)


@final
@dataclass(frozen=True)
class InContext:
    """log p0(x | text, c) - log p0(x | c), nats: how much more likely the text makes a completion x of at most `length` tokens.

    One that is as long was cut, a shorter one has ended. No ceiling: nothing bounds a likelihood ratio, and log Z is 0 by itself.
    prior: a causal language model of klbench.
    """

    prior: Any
    text: str
    length: int

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        told = self.prior.prompted(self.prior.name, self.text, ())
        a, b = (_said(policy, prompts, completions, self.length) for policy in (told, self.prior))
        return [x - y for x, y in zip(a, b, strict=True)]


def _said(policy: Any, prompts: list[str], texts: list[str], length: int = 0) -> list[float]:
    """log-probability of each text behind its prompt; of its end too where it has fewer than `length` tokens."""
    tokens, mask = policy.spelled(prompts, [[x] for x in texts], end=length > 0)
    if length:
        tokens, mask = tokens[:, :, :length], mask[:, :, :length]
    return [float(x) for x in policy.log_prob(prompts, tokens, mask).double().sum((1, 2))]
