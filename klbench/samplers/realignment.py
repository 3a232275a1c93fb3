"""Realignment (DeRa): a policy and its prior mixed geometrically in each next-token law.

    q(v | prefix) = p0(v | prefix)^(1-lam) pi(v | prefix)^lam / norm          lam 0: the prior, 1: the policy pi, above 1: beyond it,
below 0: away from it (contrastive decoding: the prior sharpened against what pi is inclined to)

Taken over whole outputs, the same mixture of p0 and p*_beta is p*_(beta/lam) exactly. The norm of each token depends on the prefix, so that
token by token it is only near that: where claim C37 has .546 for a first word at lam = .5, this gives it .602.
A token that pi or p0 lacks has no mass at any lam but 0, which is p0 as it is, and 1, which is pi.  Source: Liu et al. 2024,
arXiv:2402.02992. What tuning did to a small model, done to a larger one, is `emulated` (klbench/policies/blended.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from klbench.errors import UserError
from klbench.method import AbstractBlend


@final
@dataclass(frozen=True)
class Realignment(AbstractBlend):
    """lam: the policy's share of the logarithm, any number."""

    lam: float = 0.5

    source: ClassVar[str] = "arXiv:2402.02992"

    def __post_init__(self) -> None:
        if not math.isfinite(self.lam):
            raise UserError(f"realignment: a number expected, got {self.lam:g}")

    def law(self, log_q: Tensor, log_p0: Tensor) -> Tensor:
        """[..., V] (1 - lam) log p0 + lam log pi, normalised. Raises UserError where the two share no token."""
        if self.lam in (0, 1):
            return log_q if self.lam else log_p0
        lacking = (log_q == -torch.inf) | (log_p0 == -torch.inf)
        if bool(lacking.all(-1).any()):
            raise UserError(f"realignment:{self.lam:g}: policy and prior have no next token in common")
        # the difference first: where the two agree, no lam loses digits
        mixed = log_p0 + self.lam * (log_q - log_p0)
        return mixed.masked_fill(lacking, -torch.inf).log_softmax(-1)
