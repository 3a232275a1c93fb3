"""DPG: forward KL to the target by importance weights on the policy's own draws.

    w_pk = p0(y) exp(r(y)/beta) / q(y),    E_q[w] = Z_p
    loss = -mean_pk (w_pk / Z_pk - 1) log q(y_pk)            w held constant; the 1 is the baseline, E_q[s] = 0
    E[grad loss] = grad KL(p* || q)  times  E[Z_p / Z_pk]

Z_pk is the mean of all weights of the prompt seen so far and of the group's other draws: never of y_pk itself, which keeps the
direction exact and leaves only that factor a prompt, 1 as weights accumulate (E_q[w] = Z for every q, so old ones stay valid).
Optimum: the target p*, reached with zero noise.  Source: Parshakova et al. 2019, arXiv:1912.08517; Korbak et al. 2022, arXiv:2206.00761.
Pitfalls: the weights' variance is chi2(p* || q), and nothing is clipped; a mode that q never draws is never seen.
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
class DPG(AbstractStatefulObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:1912.08517"

    def init(self, prompts: int, width: int) -> State:
        """log_z [prompts]: log mean of the weights seen; seen [prompts]: how many. float64."""
        return normaliser.start(prompts)

    def loss(self, batch: Batch, beta: float, state: State) -> tuple[Tensor, State]:
        """Scalar, nats. Reads log_q, log_p0 [P, K, T], reward [P, K], prompt [P]. Raises ValueError when K < 2 or without prompt."""
        draws = batch.reward.shape[1]
        if draws < 2 or batch.prompt is None:
            raise ValueError(f"dpg needs prompt and K >= 2 draws of each, got {draws}")
        log_q = batch.total(batch.log_q)  # [P, K] nats
        log_w = (batch.total(batch.log_p0) + batch.reward / beta - log_q).detach().double()
        log_z, new = normaliser.leave_one_out(log_w, batch.prompt, state)
        advantage = (log_w - log_z).exp() - 1
        return -(advantage.to(log_q.dtype) * log_q).mean(), new

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """KL(p* || q) of one prompt up to q's absence, all answers [S] enumerated."""
        return -((log_p0 + reward / beta).softmax(0) * log_q).sum()
