"""log Z of each train prompt from the importance weights that training has seen, for objectives that need it.

Z_pk is the mean of all weights of prompt p seen so far and of the group's other draws: never of draw k itself, which would bend the
direction. E[w] = Z for every law that draws, so old weights stay valid. float64; nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klbench.method import State


def start(prompts: int) -> State:
    """log_z [prompts]: log mean of the weights seen; seen [prompts]: how many."""
    return {"log_z": torch.zeros(prompts, dtype=torch.float64), "seen": torch.zeros(prompts, dtype=torch.float64)}


def leave_one_out(log_w: Tensor, prompt: Tensor, state: State) -> tuple[Tensor, State]:
    """[P, K] log Z_pk from log-weights [P, K] of prompts [P], and the state with these weights among those seen."""
    draws, seen = log_w.shape[1], state["seen"][prompt]
    past = state["log_z"][prompt] + seen.log()  # log of the sum; -inf at the first visit
    itself = torch.eye(draws, dtype=torch.bool, device=log_w.device)
    rest = log_w[:, None, :].masked_fill(itself, -torch.inf).logsumexp(2)  # [P, K]
    log_z = torch.logaddexp(past[:, None], rest) - (seen[:, None] + draws - 1).log()
    new = {name: value.clone() for name, value in state.items()}
    new["seen"][prompt] = seen + draws
    new["log_z"][prompt] = torch.logaddexp(past, log_w.logsumexp(1)) - (seen + draws).log()
    return log_z, new
