"""GRPO-Guard in text form: PPO's clip on a ratio whose drift is taken out first.

    log rho_t = log q/q_old of token t,    E_{q_old}[ log rho_t | y_<t ] = -KL( q_old(.|y_<t) || q(.|y_<t) ) <= 0
    c_kt      = mean of log rho_t over the prompt's other draws that have a token t, 0 where there are none;   held constant
    log rho'_t = log rho_t - c_kt
    loss = -mean_pk sum_t min( rho'_t A_pk, clip(rho'_t, 1 - eps, 1 + eps) A_pk )
    A_pk = g_pk - mean_{j != k} g_pj,   g = r - beta log(q_old/p0)
    E[grad loss] = -grad J at q = q_old, J = beta (log Z - KL(q || p*))

The raw ratio drifts below 1 as the policy moves, and rewarded draws meet the clip late. The paper takes the drift of a denoising step from
its Gaussian; a token's would need the whole vocabulary of q_old, so -c estimates it from the draws: exactly, in expectation, at the first
token, and as a mean over the draws' prefixes later. Its division by the step's noise is left out (every step has scale 1).
Optimum: the target p*; only the trust region moves.  Source: Wang et al. 2025, arXiv:2510.22319 (flow matching).
Pitfall: rho' is no importance ratio, so away from q_old the gradient is rescaled; with K = 2 the estimate is one other draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class GRPOGuard(AbstractObjective):
    """clip: eps."""

    clip: float = 0.2

    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2510.22319"
    epochs: ClassVar[int] = 2

    def log_ratio(self, batch: Batch) -> Tensor:
        """[P, K, T] log rho', 0 where masked. Reads log_q, old_log_q and mask."""
        assert batch.old_log_q is not None
        raw = (batch.log_q - batch.old_log_q.detach()) * batch.mask
        others = batch.mask.sum(1, keepdim=True) - batch.mask.long()
        drift = (raw.sum(1, keepdim=True) - raw).detach() / others.clamp(min=1)
        return (raw - drift) * batch.mask

    def watched(self, batch: Batch) -> dict[str, float]:
        """What the paper plots: mean ratio before and after the drift is taken out, and the shares of tokens that meet either clip."""
        assert batch.old_log_q is not None
        raw, centred = (batch.log_q - batch.old_log_q).detach().exp(), self.log_ratio(batch).detach().exp()
        mean = lambda x: float(x[batch.mask].float().mean())  # noqa: E731
        return {
            "ratio": mean(raw),
            "ratio_centred": mean(centred),
            "clipped_low": mean(centred < 1 - self.clip),
            "clipped_high": mean(centred > 1 + self.clip),
        }

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, reward units. Reads log_q, old_log_q, log_p0 [P, K, T], reward [P, K]. ValueError when K < 2 or without old_log_q."""
        draws = batch.reward.shape[1]
        if draws < 2 or batch.old_log_q is None:
            raise ValueError(f"grpo_guard needs old_log_q and K >= 2 draws of a prompt, got {draws}")
        gain = batch.reward - beta * batch.total(batch.old_log_q.detach() - batch.log_p0)
        advantage = ((gain - gain.mean(1, keepdim=True)) * draws / (draws - 1))[:, :, None]  # [P, K, 1]
        ratio = self.log_ratio(batch).exp()
        return -batch.total(torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """-J of one prompt, all answers [S] enumerated."""
        return -(log_q.exp() * (reward - beta * (log_q - log_p0))).sum()
