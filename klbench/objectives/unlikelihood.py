"""Unlikelihood: likelihood of right prior draws, and of every token of a wrong one that it is not taken.

    S = 1 where y is right,  y ~ p0
    loss = -mean_pk [ keep S log q(y) + alpha (1 - S) U(y) ],    U = sum_t log(1 - q(y_t | y_<t))    form "token"
                                                                 U = -log q(y)                       form "ascent"

Optimum: none that is a function of the answer. Form "token" has a minimum prefix by prefix: where tokens v of right mass g_v and wrong mass
b_v follow, keep g_v/q_v - alpha b_v/(1 - q_v) is one constant. For answers of one token that is p0(.|S=1), neared as 1/steps; for longer
ones a wrong answer takes the tokens that right ones share with it down too, and those that it pushes away from go up, right or not.
Form "ascent" has no minimum: log q of a wrong answer falls by a constant a step, for ever.
Source: Welleck et al. 2020, arXiv:1908.04319; as in Korbak et al. 2023, arXiv:2302.08582 (alpha 1).
Pitfall: 1 - q is held above 1e-5, so a token that certain is not pushed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.errors import unknown
from klbench.method import AbstractObjective

LEAST: Final = 1e-5  # of 1 - q: its logarithm stays finite
FORMS: Final = ("token", "ascent")


@final
@dataclass(frozen=True)
class Unlikelihood(AbstractObjective):
    """form: token or ascent.  alpha: weight of wrong draws.  keep: that of right ones."""

    form: str = "token"
    alpha: float = 1.0
    keep: float = 1.0

    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "arXiv:1908.04319"
    draws: ClassVar[str] = "prior"
    feedback: ClassVar[str] = "success"
    needs_prior: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form of unlikelihood", self.form, FORMS)

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats. Reads log_q [P, K, T], reward [P, K], top [P]."""
        right, log_q = batch.success(), batch.total(batch.log_q)
        away = -log_q if self.form == "ascent" else batch.total(torch.log((1 - batch.log_q.exp()).clamp(min=LEAST)))
        return -(self.keep * right * log_q + self.alpha * (1 - right) * away).mean()
