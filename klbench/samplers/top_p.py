"""Top-p, or nucleus sampling: the likeliest tokens whose mass reaches p, and no others.

    q(x_t | x_<t) = p(x_t | x_<t) / p(S_p)  for x_t in S_p, else 0;   S_p: the smallest set of likeliest tokens with p(S_p) >= p

Ties are broken by id, the lower one first. The mass of a set is known to the rounding of its log-probabilities, so "reaches p" is read
to 1e-5: two of four equal tokens reach p = 0.5, whatever their last bits. Outside S_p the law has no mass, so KL(p*||q) is infinite.
Source: Holtzman et al. 2020, arXiv:1904.09751.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from klbench.errors import UserError
from klbench.method import AbstractDecoding

NEAR: Final = 1e-5  # mass by which a set may fall short of p: more than float32 rounding, less than any token that counts


@final
@dataclass(frozen=True)
class TopP(AbstractDecoding):
    """p: mass kept, in (0, 1]; 1 changes nothing."""

    p: float = 1.0

    source: ClassVar[str] = "arXiv:1904.09751"

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UserError(f"top_p: p in (0, 1] expected, got {self.p:g}")

    def law(self, log_probs: Tensor) -> Tensor:
        """[..., V] log p - log p(S_p) inside S_p, -inf outside. The likeliest token is always inside."""
        if self.p == 1:
            return log_probs
        ordered, index = log_probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.double().exp().cumsum(-1).roll(1, -1)  # mass of the likelier ones
        outside = before >= self.p - NEAR
        outside[..., 0] = False
        kept = log_probs.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)
        return kept.log_softmax(-1)
