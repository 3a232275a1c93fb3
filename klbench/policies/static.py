"""One more token for each of R draws, in shapes and places that no value moves: how a GPU is kept busy.

Rows are never dropped, keys and values lie in buffers of their final size, and what is not yet written is masked. Nothing is read back to
the processor, so that it runs ahead of the device, and a step is the same kernels over the same memory each time: it is captured once as
a CUDA graph and replayed, where the model allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

REPLAYED: Final = 16  # steps from which a graph is worth its capture

Read = Callable[..., tuple[Any, Tensor]]


@final
class Fixed(DynamicLayer):
    """Keys and values of one layer, [R, H, L + room, W] from the first step to the last; a step writes at `at` [1]."""

    def __init__(self, layer: Any, draws: int, room: int, at: Tensor):
        """layer: that of P prompts.  draws: of each prompt, R = P draws.  room: tokens to come."""
        super().__init__()
        self.at, length = at, layer.keys.shape[2]
        made = []
        for part in (layer.keys, layer.values):
            shared = part.repeat_interleave(draws, 0)
            made.append(
                torch.cat([shared, shared.new_zeros(*shared.shape[:2], room, shared.shape[3])], 2)
            )  # masked, yet no NaN may lie there
        self.keys, self.values = made
        self.dtype, self.device, self.is_initialized, self.size = self.keys.dtype, self.keys.device, True, length + room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))  # under autocast a step's may be of another type than a prompt's
        self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.size

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.size, 0


@final
class Step:
    """Logits [R, W] behind one more token of each draw. token, position [R, 1], at [1], mask [R, 1, 1, L + room]: all that changes."""

    def __init__(self, read: Read, layers: Sequence[Any], real: Tensor, draws: int, room: int, dtype: torch.dtype):
        """read: ids, mask, positions, cache to logits.  layers: keys and values of the prompts.  real [P, L]: False on their padding."""
        self.read, self.room = read, room
        shared = real.repeat_interleave(draws, 0)
        R, length = shared.shape
        self.token = torch.zeros(R, 1, dtype=torch.long, device=real.device)
        self.position = shared.sum(1, keepdim=True) - 1
        self.at = torch.full((1,), length - 1, device=real.device)
        self.mask = torch.full((R, 1, 1, length + room), torch.finfo(dtype).min, dtype=dtype, device=real.device)
        self.mask[:, 0, 0, :length].masked_fill_(shared, 0.0)
        self.cache = Cache(layers=[Fixed(layer, draws, room, self.at) for layer in layers])
        self.run: Callable[[], Tensor] | None = None

    def __call__(self, token: Tensor) -> Tensor:
        """token [R]. What is returned may be written over by the next call."""
        self.token.copy_(token[:, None])
        self.position += 1
        self.at += 1
        self.mask.index_fill_(3, self.at, 0.0)
        if self.run is None:
            self.run = captured(self._eager, self.token.device) if self.room >= REPLAYED else self._eager
        return self.run()

    def _eager(self) -> Tensor:
        return self.read(self.token, attention_mask=self.mask, position_ids=self.position, past_key_values=self.cache)[1]


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The step as a CUDA graph over the memory that it reads now; itself where there is no CUDA device, or it cannot be captured.

    A step that looks at values on the way (routed experts, rotations that depend on the length) cannot. Neither is one that talks to
    other processes: a graph of collectives has to be replayed by all of them alike. The step runs once, and has to bear being run twice.
    """
    if not torch.cuda.is_available() or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return step
    try:
        with torch.cuda.device(device):
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up at a first call, which a capture does not allow
                step()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                out = step()
    except RuntimeError:
        return step

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
