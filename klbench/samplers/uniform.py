"""Uniform: every next token that the prior can write is as likely as any other, the null policy that has learnt no language.

    q(v | x_<t) = 1 / #{u: p0(u | x_<t) > 0}      so  log q(x) = -|x| log V  where the prior gives every token mass, as a softmax does

V counts the EOS where the prior has one, and |x| counts it where it was written. With one EOS and at most T tokens
    E_q |x| = V [1 - (1 - 1/V)^T],      H(q) = E_q |x| log V
Reads no beta and no reward.  Source: the law of largest entropy over tokens; no paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from klbench.method import AbstractDecoding


@final
@dataclass(frozen=True)
class Uniform(AbstractDecoding):
    """Forgets all that the next-token law says but which tokens are possible."""

    source: ClassVar[str] = "the law of largest entropy over tokens"

    def law(self, log_probs: Tensor) -> Tensor:
        """[..., V] -log V of tokens with mass, V their number; -inf of those without."""
        return torch.zeros_like(log_probs).masked_fill(log_probs == -torch.inf, -torch.inf).log_softmax(-1)
