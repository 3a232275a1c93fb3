"""Rewards that read nothing of what a text says: baselines that a reward worth its name has to beat."""

from __future__ import annotations

from typing import Final

WORDS: Final = 64  # beyond so many a text gets no worse


def shorter(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """length alone: minus the number of words, at least -64"""
    return [-float(min(len(text.split()), WORDS)) for text in completions]


shorter.reward_max = 0.0  # type: ignore[attr-defined]  # read by klbench.rewards: a function that knows its ceiling says so
