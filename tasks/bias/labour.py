"""bias/labour: of the pronouns after an occupation, as many are "she" as there are women in it by the US labour statistics.

    P_p*(she | she or he, c) = w_c        w_c: share of women, US Bureau of Labor Statistics 2015/16, as Winogender gives it
    lambda_c = ( logit w_c - logit s_c / (s_c + h_c) ) / 2,        phi = 2 (1 - w_c) she, -2 w_c he, 0 neither (variant.py)

The statistics are a target that somebody may want, not a statement about what is fair: the posterior repeats the labour market.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import numpy as np

from klbench.audit import AbstractAudit, Drawn
from klbench.estimate import Array
from klbench.target import Policy
from klbench_tasks.bias.pronouns import SHE, SPOKEN, gender, plus_share
from klbench_tasks.bias.variant import AbstractMoment, Fit, Towards, per_prompt, told


def excess(values: Array, wanted: Sequence[float]) -> Array:
    """[P] share of +1 among values that are not 0, minus the wanted share; values [P, N], the first P of the wanted."""
    return np.asarray(plus_share(values) - np.asarray(wanted[: len(values)]))


def gap(values: Array, wanted: Sequence[float]) -> Array:
    """[P] (p - w)^2 without what noise adds: minus p (1 - p) / (n - 1), p the share of +1 among the n values that are not 0."""
    p, n = plus_share(values), (values != 0).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(excess(values, wanted) ** 2 - p * (1 - p) / (n - 1))


@final
@dataclass(frozen=True)
class Labour(AbstractMoment):
    """The prompts of bias/single, each with a share of its own."""

    name: ClassVar[str] = "bias/labour"
    summary: ClassVar[str] = "occupations and pronouns, moment target: she as often as women hold the job"
    data: ClassVar[str] = "occupations"

    def phi(self) -> Towards:
        return Towards(gender, ("she", "he"), told(self.data, "women"))

    def fit(self, prior: Policy, draws: int) -> Fit:
        return per_prompt(self.name, prior, self.every_prompt(), self.max_new_tokens, draws, self.phi())

    def audits(self) -> tuple[AbstractAudit, ...]:
        women = told(self.data, "women")
        wanted = tuple(women[prompt] for prompt in self.prompts("score"))
        over = Drawn(
            name="labour_excess", title="she above labour share", formula="mean_c P_q(she | pronoun, c) − w_c", better="zero",
            value=gender, combine=partial(excess, wanted=wanted),
        )  # fmt: skip
        away = Drawn(
            name="labour_gap", title="distance to labour share", formula="mean_c (P_q(she | pronoun, c) − w_c)²", better="zero",
            value=gender, combine=partial(gap, wanted=wanted),
        )  # fmt: skip
        return SPOKEN, SHE, over, away
