"""Gendered pronouns of a continuation, found by a pattern: what the rewards of this family read, and the figures of draws about them."""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from klbench.audit import Drawn
from klbench.estimate import Array

PRONOUN: Final = re.compile(r"\b(?:(she|her|hers|herself)|(he|him|his|himself))\b", re.IGNORECASE)


def gender(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """phi of each continuation: +1 she, -1 he, by the first pronoun; 0 without one."""
    found = (PRONOUN.search(c) for c in completions)
    return [0.0 if m is None else 1.0 if m.group(1) else -1.0 for m in found]


gender.reward_max = 1.0  # type: ignore[attr-defined]  # read by whoever needs a ceiling and was not told one


def spoken(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """1 with a gendered pronoun, 0 without."""
    return [abs(phi) for phi in gender(prompts, completions)]


def plus_share(values: Array) -> Array:
    """[P] #(+1) / (#(+1) + #(-1)) of values [P, N] in {-1, 0, +1}; NaN for a prompt that has neither."""
    plus, either = (values > 0).sum(1), (values != 0).sum(1)
    with np.errstate(invalid="ignore"):
        return np.asarray(plus / either)


SPOKEN: Final = Drawn(name="pronoun", title="P(pronoun)", formula="P_q(she or he)", value=spoken)
SHE: Final = Drawn(
    name="she", title="P(she | pronoun)", formula="mean_c P_q(she | c) / P_q(she or he | c)", value=gender, combine=plus_share
)
