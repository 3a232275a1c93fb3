"""Several processes that train one policy: which prompts are whose, and sums over all of them.

`torchrun` or `accelerate launch` starts them and says in the environment how many there are. Each has the whole model, or, where the
weights are sharded, its part of every matrix; each draws and scores its share of a step's prompts. A sum of parts that are zero everywhere
but in their own rows is exact, so that all processes see the same batch, bit for bit, and take the same step.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, final

import torch
from torch import Tensor, distributed

from klbench.errors import UserError

WAIT: Final = timedelta(minutes=30)  # for a process that is slower; one that has died is noticed at once


@final
@dataclass(frozen=True)
class Processes:
    """rank: number of this process among `count`."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Which of so many rows are this process's own: equal parts to one, none of them perhaps."""
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def whole(self, part: Tensor, rows: int) -> Tensor:
        """[rows, ...] of all processes from each one's share [r, ...]; on the CPU."""
        if self.count == 1:
            return part
        full = torch.zeros(rows, *part.shape[1:], dtype=torch.uint8 if part.dtype == torch.bool else part.dtype)
        full[self.share(rows)] = part.cpu().to(full.dtype)
        self.add(full)
        return full.to(part.dtype)

    def add(self, *tensors: Tensor) -> None:
        """Replaces each by its sum over all processes."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Until all are here."""
        self.add(torch.zeros(1))


ALONE: Final = Processes()


def joined(device: str) -> tuple[Processes, str]:
    """This process among those of its run, and the device that is its own; alone where no launcher says otherwise."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE, device
    if device.startswith("cuda"):
        place = int(os.environ.get("LOCAL_RANK", "0"))
        if place >= torch.cuda.device_count():
            raise UserError(f"process {place} of this machine has no GPU: {torch.cuda.device_count()} are here")
        torch.cuda.set_device(place)
        device = f"cuda:{place}"
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=WAIT)
        atexit.register(distributed.destroy_process_group)
    return Processes(distributed.get_rank(), distributed.get_world_size()), device


@contextmanager
def watched(processes: Processes) -> Iterator[None]:
    """Work in which the loss of another process is told in one line, as UserError."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if processes.count == 1 or not (isinstance(error, distributed.DistError) or "gloo" in said or "NCCL" in said):
            raise
        raise UserError(f"process {processes.rank}: another process of this run has ended, or did not answer for {WAIT}") from None
