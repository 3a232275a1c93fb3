"""Temperature: each next-token law of the prior, sharpened below 1 and flattened above.

    q(x_t | x_<t) = p(x_t | x_<t)^(1/T) / sum_v p(v | x_<t)^(1/T)

The power is taken token by token, so the law of whole outputs is not p^(1/T) of theirs. A token of mass 0 keeps mass 0.
Source: Ackley, Hinton and Sejnowski 1985, "A learning algorithm for Boltzmann machines".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.errors import UserError
from klbench.method import AbstractDecoding


@final
@dataclass(frozen=True)
class Temperature(AbstractDecoding):
    """temperature: T above 0; 1 changes nothing."""

    temperature: float = 1.0

    source: ClassVar[str] = "Ackley, Hinton and Sejnowski 1985"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"temperature: a number above 0 expected, got {self.temperature:g}")

    def law(self, log_probs: Tensor) -> Tensor:
        """[..., V] log p / T, normalised; the largest is taken out first, so that no T is too small to divide by."""
        return ((log_probs - log_probs.amax(-1, keepdim=True)) / self.temperature).log_softmax(-1)
