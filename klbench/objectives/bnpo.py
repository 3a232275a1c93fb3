"""BNPO: right or wrong, each prompt's advantage divided by a Beta density of its success rate.

    A_pk = (c_pk - p) / f(p),    c: 1 where right, else 0,    p = mean_k c_pk,    f the density of Beta(1 + a/3, 1 + b/3)
    loss = -mean_pk [ A_pk - beta (u_pk - mean_{j != k} u_pj) ] log q(y_pk),    u = log q/p0       held constant
    E[grad loss] = -grad P  E[ p (1-p) / f(p) ] / (P (1-P)) + beta grad KL(q || p0),    P = P_q(right), p ~ Binomial(K, P) / K

Beta(a, b) has the mean and variance of the success rates over prompts, each as its last group showed it before this batch; f = 1 until
two different ones are known. Of all Beta densities this one has the least mean of p (1-p) / f^2, the reward's noise, over p ~ Beta(a, b).
f = 1 is the centred reward; a = b = 3/2 is GRPO's spread times 8/pi.
Optimum: none known, as f moves with the other prompts. Given f: q = p0 reweighted to the P that solves
logit P = logit P_p0(right) + E[ p (1-p) / f(p) ] / (beta P (1-P)), so at f = 1 it is p0 exp(c (K-1)/(K beta)) / norm.
Source: Xiao et al. 2025, arXiv:2506.02864 (KL coefficient 0; rates of the same batch; 16 draws of 32 prompts). The KL is ours, the true
reverse one, outside the division. Pitfalls: beta means something else at every prompt; TRL's loss type "bnpo" is another thing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractStatefulObjective, State

MOST: Final = 1e6  # of 1/f


@final
@dataclass(frozen=True)
class BNPO(AbstractStatefulObjective):
    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "arXiv:2506.02864"
    feedback: ClassVar[str] = "success"

    def init(self, prompts: int, width: int) -> State:
        """rate [prompts]: the last group's success rate; visits [prompts]: how many groups. float64."""
        return {"rate": torch.zeros(prompts, dtype=torch.float64), "visits": torch.zeros(prompts, dtype=torch.float64)}

    def density(self, p: Tensor, state: State) -> Tensor:
        """f at success rates p of any shape."""
        rates = state["rate"][state["visits"] > 0]
        spread = float(rates.var(correction=0)) if len(rates) > 1 else 0.0
        if spread == 0:
            return torch.ones_like(p)
        mean = float(rates.mean())
        total = mean * (1 - mean) / spread - 1  # a + b
        a, b = mean * total / 3, (1 - mean) * total / 3
        norm = math.lgamma(a + 1) + math.lgamma(b + 1) - math.lgamma(a + b + 2)
        return (torch.xlogy(p.new_tensor(a), p) + torch.xlogy(p.new_tensor(b), 1 - p) - norm).exp()

    def loss(self, batch: Batch, beta: float, state: State) -> tuple[Tensor, State]:
        """Scalar. Reads log_q, log_p0 [P, K, T], reward [P, K], top, prompt [P]. Raises ValueError when K < 2, without prompt or top."""
        draws = batch.reward.shape[1]
        if draws < 2 or batch.prompt is None:
            raise ValueError(f"bnpo needs prompt and K >= 2 draws of each, got {draws}")
        right = batch.success()
        rate = right.mean(1, keepdim=True)
        log_q = batch.total(batch.log_q)  # [P, K] nats
        u = (log_q - batch.total(batch.log_p0)).detach()
        charge = beta * (u - u.mean(1, keepdim=True)) * draws / (draws - 1)
        advantage = (right - rate) * self.density(rate, state).reciprocal().clamp(max=MOST) - charge
        new = {name: value.clone() for name, value in state.items()}
        new["rate"][batch.prompt] = rate[:, 0].to(new["rate"])
        new["visits"][batch.prompt] += 1
        return -(advantage * log_q).mean(), new
