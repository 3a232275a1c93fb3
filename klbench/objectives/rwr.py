"""RWR: reward-weighted regression, maximum likelihood on prior draws that weigh exp(r/beta).

    w_pk = exp(r(y)/beta),    E_p0[w] = Z_p
    loss = -mean_pk (w_pk / Z_pk) log q(y_pk),   y ~ p0          E[grad loss] = grad KL(p* || q)  times  E[Z_p / Z_pk]

Z_pk is the mean of all weights of the prompt seen so far and of the group's other draws: never of y_pk itself, which would bend the
direction towards the prior (with weights that sum to 1 in a group of 2, five answers end .1 or more from p* in total variation). One fit
on the prior's draws has beta as it is; n refits, each on the last one's draws, would have beta/n.
Optimum: the target p*.  Source: Peters and Schaal 2007; on language models Korbak et al. 2023, arXiv:2302.08582 (rewards of tokens,
beta 10, weights cut at 1000).  Pitfalls: a cut changes the optimum, so nothing is cut; the weights' variance is chi2(p* || p0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench import normaliser
from klbench.batch import Batch
from klbench.method import AbstractStatefulObjective, State


@final
@dataclass(frozen=True)
class RWR(AbstractStatefulObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2302.08582"
    draws: ClassVar[str] = "prior"
    needs_prior: ClassVar[bool] = False

    def init(self, prompts: int, width: int) -> State:
        """log_z [prompts]: log mean of the weights seen; seen [prompts]: how many. float64."""
        return normaliser.start(prompts)

    def loss(self, batch: Batch, beta: float, state: State) -> tuple[Tensor, State]:
        """Scalar, nats. Reads log_q [P, K, T], reward [P, K], prompt [P]. Raises ValueError when K < 2 or without prompt."""
        draws = batch.reward.shape[1]
        if draws < 2 or batch.prompt is None:
            raise ValueError(f"rwr needs prompt and K >= 2 draws of each, got {draws}")
        log_w = batch.reward.double() / beta
        log_z, new = normaliser.leave_one_out(log_w, batch.prompt, state)
        share = (log_w - log_z).exp().to(batch.log_q.dtype)
        return -(share * batch.total(batch.log_q)).mean(), new

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """KL(p* || q) of one prompt up to q's absence, all answers [S] enumerated."""
        return -((log_p0 + reward / beta).softmax(0) * log_q).sum()
