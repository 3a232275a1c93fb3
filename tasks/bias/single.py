"""bias/single: one moment constraint over all occupations, so one lambda for all prompts.

    p*(x|c) = p0(x|c) exp(lambda phi(x)) / Z(c),      lambda such that mean_c E_p*[phi | c] = 0 over the score prompts

The posterior says she as often as he over the occupations together and keeps what the prior thinks of one against another: the nearest
law to the prior with that mean. Where `bias` balances each occupation, this one moves all by the same odds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
from scipy.optimize import brentq

from klbench.audit import AbstractAudit
from klbench.estimate import Array
from klbench.target import Policy
from klbench_tasks.bias.pronouns import SHE, SPOKEN, gender
from klbench_tasks.bias.variant import AbstractMoment, Fit, Towards, row_of, shares

PHI: Final = Towards(gender, ("she", "he"))


def common_lambda(s: Array, h: Array, draws: int) -> tuple[float, float]:
    """lambda with mean_c E_p*[phi | c] = 0 and its standard error; s, h [C] the prior's shares of she and he from `draws` draws a prompt.

    The mean rises with lambda, so the root is unique. Its error is that of mean_c e^{lambda phi} (phi - m_c) / Z_c over the draws,
    m_c = E_p*[phi | c], through the slope mean_c Var_p*[phi | c].
    """

    def law(lam: float) -> tuple[Array, Array, Array]:
        """[C] shares of she and he under p*, and Z."""
        up, down = s * math.exp(lam), h * math.exp(-lam)
        z = 1 - s - h + up + down
        return up / z, down / z, z

    def mean(lam: float) -> float:
        up, down, _ = law(lam)
        return float((up - down).mean())

    lam = float(brentq(mean, -30.0, 30.0, xtol=1e-12))
    up, down, z = law(lam)
    m = up - down
    noise = (up * math.exp(lam) * (1 - m) ** 2 + down * math.exp(-lam) * (1 + m) ** 2 + (1 - up - down) * m**2) / z
    slope = float((up + down - m**2).mean())
    return lam, math.sqrt(float(noise.sum()) / draws) / len(s) / slope


def fit_one(name: str, prior: Policy, prompts: Sequence[str], scored: Sequence[str], length: int, draws: int) -> Fit:
    """The common lambda in the row of every prompt."""
    she, he = shares(name, prior, prompts, length, draws, PHI)
    counted = np.isin(prompts, scored)
    lam, error = common_lambda(she[counted], he[counted], draws)
    return {prompt: row_of(lam, error, PHI, s, h) for prompt, s, h in zip(prompts, she, he, strict=True)}


@final
@dataclass(frozen=True)
class Single(AbstractMoment):
    """All occupations of Winogender that the prior can be moved on, with one lambda."""

    name: ClassVar[str] = "bias/single"
    summary: ClassVar[str] = "occupations and pronouns, one moment target over all: she as often as he on average"
    data: ClassVar[str] = "occupations"

    def phi(self) -> Towards:
        return PHI

    def fit(self, prior: Policy, draws: int) -> Fit:
        return fit_one(self.name, prior, self.every_prompt(), self.prompts("score"), self.max_new_tokens, draws)

    def audits(self) -> tuple[AbstractAudit, ...]:
        return SPOKEN, SHE
