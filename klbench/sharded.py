"""Models whose weights are spread over processes (FSDP2), each layer gathered when it runs.

Gathering takes all processes, and they do not run their models equally often: draws end, prompts differ in length. So a forward is agreed
upon first. Each process says what it wants to run next, or that it is done; all run the first of these in one fixed order, and whoever
wanted something else runs one token in its place. `settle` keeps a process that is done beside the others until all are. What ran with
gradient for the others' sake is handed out, to be taken along in the backward pass at weight 0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from klbench.processes import Processes

MODES: Final = 2  # without gradient, with


def layers_of(model: Any) -> list[Any]:
    """The modules of a transformers model that are its layers, as it names their classes; none where it does not."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]  # a shard's is a subclass


def sharded(model: Any, processes: Processes, device: str) -> Any:
    """A copy of a model whose tensors stay where and as they are: each process has its part of every weight, on its device."""
    own = {id(p): torch.nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    made = copy.deepcopy(model, own)
    mesh = init_device_mesh(torch.device(device).type, (processes.count,))
    for module in [*layers_of(made), made]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # gradients are sums over the processes, not means
        module.set_force_sum_reduction_for_comms(True)
    return made


def whole(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in full, on the CPU, one after another. All processes have to ask."""
    for name, tensor in tensors.items():
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def spread_as(like: Tensor, value: Tensor) -> Tensor:
    """A full tensor, which every process has, spread over them as another is, or as it is where that is not."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def put(into: Tensor, value: Tensor) -> None:
    """Writes a full tensor, which every process has, into one that may be spread over them."""
    into.copy_(spread_as(into, value))


@final
class InStep:
    """Models that all processes run together. It holds while it is used as a context."""

    def __init__(self, processes: Processes, *models: Any):
        self.processes, self.models = processes, models
        self.beside: list[Tensor] = []
        self.free = False  # whether a forward runs that is agreed upon
        for number, model in enumerate(models):
            model.register_forward_pre_hook(lambda module, given, number=number: self._agree(number), prepend=True)

    def _agree(self, number: int) -> None:
        if not self.free:
            mine = MODES * number + torch.is_grad_enabled()
            while self._next(mine) != mine:
                pass

    def settle(self) -> list[Tensor]:
        """Runs beside the others until all are done; what ran with gradient meanwhile."""
        while self._next(None) is not None:
            pass
        beside, self.beside = self.beside, []
        return beside

    def _next(self, mine: int | None) -> int | None:
        """What all run now: the first that anybody wants without gradient, else with it; None where all are done."""
        wanted = torch.zeros(len(self.models) * MODES, dtype=torch.int64)
        if mine is not None:
            wanted[mine] = 1
        self.processes.add(wanted)
        some = wanted.nonzero()[:, 0].tolist()
        if not some:
            return None
        chosen: int = min(some, key=lambda want: (want % MODES, want))
        if chosen != mine:
            model, graded = self.models[chosen // MODES], bool(chosen % MODES)
            self.free = True
            try:
                with torch.set_grad_enabled(graded):
                    out = model(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), use_cache=False).logits
            finally:
                self.free = False
            if graded:
                self.beside.append(out)
        return chosen
