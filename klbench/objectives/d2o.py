"""D2O: DPO against labelled negatives alone; the policy's own draws, unlabelled, stand on the winner's side all together.

    u = log(q/p0),   y_l a wrong draw of the prior,   y_1 .. y_N the policy's own draws, held fixed
    m_l  = beta ( mean_k u(y_k) - negative u(y_l) )
    loss = -mean over prompts and their wrong draws l of log sigma(m_l);   a prompt without one adds nothing
    E[grad loss] = -beta E[ sigma(-m_l) (mean_k s(y_k) - negative s(y_l)) ],   s = grad log q: how q came to draw y_k has no gradient

With N = 1 and negative 1 this is DPO's loss of the pair (own draw, wrong draw), the own one said to win.
Optimum: none. The margin grows without bound and its gradient vanishes with it; the prior's proportions among right answers are no resting
point, and what they end as is left to the path.  Source: Duan et al. 2024, arXiv:2403.03419 (11 own draws; alpha = beta = .1: negative is
alpha/beta). The paper's two reference models are one here, the prior.
Pitfall: an own draw is pulled up even where it is wrong; a wrong answer that the prior seldom draws is pushed by nobody and can take all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn.functional import logsigmoid

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class D2O(AbstractObjective):
    """negative: alpha/beta of the paper."""

    negative: float = 1.0

    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "arXiv:2403.03419"
    draws: ClassVar[str] = "both"
    feedback: ClassVar[str] = "success"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar, nats. Reads log_q, log_p0 [P, K, T], reward, own [P, K], top [P]. Raises ValueError without own draws of a prompt."""
        if batch.own is None or not bool(batch.own.any(1).all()):
            raise ValueError("d2o needs draws of the policy beside the prior's")
        u = batch.total(batch.log_q - batch.log_p0)  # [P, K] nats
        mine = batch.own.to(u.dtype)
        wrong = (1 - batch.success()) * (1 - mine)
        anchor = (mine * u).sum(1, keepdim=True) / mine.sum(1, keepdim=True)
        gap = logsigmoid(beta * (anchor - self.negative * u))
        return -((wrong * gap).sum(1) / wrong.sum(1).clamp(min=1)).mean()
