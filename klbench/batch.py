"""What an objective reads: K draws of each of P prompts, their log-probabilities and rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

SLACK: Final = 1e-6  # of a ceiling: rewards come in single precision


@dataclass(frozen=True)
class Batch:
    """One training batch. Shapes [P prompts, K draws, T tokens]; nats, natural log; the EOS token counts where there is one.

    tokens      [P, K, T] int64      mask        [P, K, T] bool, False after EOS
    log_q       [P, K, T] log q(token), with gradient        log_p0  [P, K, T] log p0(token), none
    reward      [P, K]               log_weight  [P, K] log of the draw's importance weight towards the law it stands for
    old_log_q   [P, K, T] log-probability under the law that drew it (PPO's denominator); log_q at the draw when on-policy
    prompt      [P] index of each prompt in the train split, for per-prompt state
    top         [P] the declared ceiling of each prompt's reward, inf where nobody declared one
    own         [P, K] bool, True where the policy drew it and False where the prior did

    and where the objective asks for them

    kl_token    [P, K, T] KL(q(.|prefix) || p0(.|prefix)), summed over the vocabulary, with gradient
    features    [P, K, T, D] what a critic reads of the prefix before each token: the prior's last hidden state, no gradient
    other_log_q [P, K, T] like log_q, under the second of the objective's two control prompts; log_q is under the first
    prompt_log_q [P] log q of the prompt's tokens behind its first, with gradient
    """

    tokens: Tensor
    mask: Tensor
    log_q: Tensor
    log_p0: Tensor
    reward: Tensor
    log_weight: Tensor
    old_log_q: Tensor | None = None
    prompt: Tensor | None = None
    top: Tensor | None = None
    own: Tensor | None = None
    kl_token: Tensor | None = None
    features: Tensor | None = None
    other_log_q: Tensor | None = None
    prompt_log_q: Tensor | None = None

    def __post_init__(self) -> None:
        """The one shape check: raises ValueError that names the field."""
        per_token = {"mask": self.mask, "log_q": self.log_q, "log_p0": self.log_p0}
        per_token |= {k: v for k in ("old_log_q", "kl_token", "other_log_q") if (v := getattr(self, k)) is not None}
        if self.tokens.dim() != 3:
            raise ValueError(f"tokens: [P, K, T] expected, got {tuple(self.tokens.shape)}")
        for name, value in per_token.items():
            if value.shape != self.tokens.shape:
                raise ValueError(f"{name}: {tuple(self.tokens.shape)} expected, got {tuple(value.shape)}")
        per_draw = {"reward": self.reward, "log_weight": self.log_weight} | ({} if self.own is None else {"own": self.own})
        for name, value in per_draw.items():
            if value.shape != self.tokens.shape[:2]:
                raise ValueError(f"{name}: {tuple(self.tokens.shape[:2])} expected, got {tuple(value.shape)}")
        if self.features is not None and self.features.shape[:3] != self.tokens.shape:
            raise ValueError(f"features: {tuple(self.tokens.shape)} and a width expected, got {tuple(self.features.shape)}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask: bool expected, got {self.mask.dtype}")
        for name in ("prompt", "top", "prompt_log_q"):
            value = getattr(self, name)
            if value is not None and value.shape != self.tokens.shape[:1]:
                raise ValueError(f"{name}: {tuple(self.tokens.shape[:1])} expected, got {tuple(value.shape)}")

    def total(self, per_token: Tensor) -> Tensor:
        """[P, K] sum over the tokens of each draw, masked ones left out."""
        return (per_token * self.mask).sum(2)

    def success(self) -> Tensor:
        """[P, K] 1 where a draw earns the most there is, else 0: the reward as right or wrong. Raises ValueError without a ceiling."""
        if self.top is None or not bool(torch.isfinite(self.top).all()):
            raise ValueError("right and wrong need a declared ceiling of the reward (reward_max)")
        top = self.top[:, None]
        return (self.reward >= top - SLACK * (1 + top.abs())).to(self.log_q.dtype)
