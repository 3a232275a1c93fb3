"""What an objective reads: K draws of each of P prompts, their log-probabilities and rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One training batch. Shapes [P prompts, K draws, T tokens]; nats, natural log; the EOS token counts where there is one.

    tokens      [P, K, T] int64      mask        [P, K, T] bool, False after EOS
    log_q       [P, K, T] log q(token), with gradient        log_p0  [P, K, T] log p0(token), none
    reward      [P, K]               log_weight  [P, K] log of the draw's importance weight towards the law it stands for
    old_log_q   [P, K, T] log-probability under the policy that drew it (PPO's denominator); log_q at the draw when on-policy
    kl_token    [P, K, T] KL(q(.|prefix) || p0(.|prefix)), summed over the vocabulary, with gradient
    values      [P, K, T] a critic's values     prompt  [P] index of each prompt in the train split, for per-prompt state
    """

    tokens: Tensor
    mask: Tensor
    log_q: Tensor
    log_p0: Tensor
    reward: Tensor
    log_weight: Tensor
    old_log_q: Tensor | None = None
    kl_token: Tensor | None = None
    values: Tensor | None = None
    prompt: Tensor | None = None

    def __post_init__(self) -> None:
        """The one shape check: raises ValueError that names the field."""
        per_token = {"mask": self.mask, "log_q": self.log_q, "log_p0": self.log_p0}
        per_token |= {k: v for k in ("old_log_q", "kl_token", "values") if (v := getattr(self, k)) is not None}
        if self.tokens.dim() != 3:
            raise ValueError(f"tokens: [P, K, T] expected, got {tuple(self.tokens.shape)}")
        for name, value in per_token.items():
            if value.shape != self.tokens.shape:
                raise ValueError(f"{name}: {tuple(self.tokens.shape)} expected, got {tuple(value.shape)}")
        for name in ("reward", "log_weight"):
            if getattr(self, name).shape != self.tokens.shape[:2]:
                raise ValueError(f"{name}: {tuple(self.tokens.shape[:2])} expected, got {tuple(getattr(self, name).shape)}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask: bool expected, got {self.mask.dtype}")
        if self.prompt is not None and self.prompt.shape != self.tokens.shape[:1]:
            raise ValueError(f"prompt: {tuple(self.tokens.shape[:1])} expected, got {tuple(self.prompt.shape)}")

    def total(self, per_token: Tensor) -> Tensor:
        """[P, K] sum over the tokens of each draw, masked ones left out."""
        return (per_token * self.mask).sum(2)
