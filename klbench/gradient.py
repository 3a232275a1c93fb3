"""The gradient of a loss that reads all log-probabilities of a batch, some prompts at a time.

    d loss / d theta = sum_i w_i d l_i / d theta,    w_i = d loss / d l_i    at the values l_i, which need no graph of the model

The l are what an objective differentiates through: log q of each token, its next-token KL, log q under a second control, log q of the
prompt. With the w known the sum can be taken in any parts, so that a loss which compares prompts or draws (baselines over the batch, pairs,
a variance) has the gradient of one piece to rounding, in the memory of a part. The price is a pass without gradient where the l are not
known yet; those of a policy's own fresh draws are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from klbench.errors import UserError
from klbench.method import Objective
from klbench.policies.causal_lm import CausalLM, log_probs_and_kl
from klbench.sharded import InStep, layers_of

ROOM: Final = 2.0  # times what a graph keeps: its backward pass has gradients of the same sizes in flight
SHARE: Final = 0.8  # of the memory that is free

T = TypeVar("T")


@final
@dataclass(frozen=True, eq=False)
class Said:
    """What a batch's objective reads of the policy. dtype: of the products, None for that of the weights.

    in_step: with other processes, where the weights are sharded.
    """

    objective: Objective
    policy: CausalLM
    prior: CausalLM
    dtype: torch.dtype | None = None
    in_step: InStep | None = None

    def low(self) -> Any:
        """The context that the models run in."""
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.policy.device.type, self.dtype)

    def of(self, prompts: list[str], tokens: Tensor, mask: Tensor, known: Tensor | None = None) -> dict[str, Tensor]:
        """By field of Batch, differentiable. known [P, K, T]: log q where it is known."""
        out: dict[str, Tensor] = {}
        with self.low():
            if self.objective.needs_kl:
                out["log_q"], out["kl_token"] = log_probs_and_kl(self.policy, self.prior, prompts, tokens, mask)
            else:
                out["log_q"] = self.policy.log_probs(prompts, tokens, mask, known)
            if self.objective.controls is not None:
                second = self.policy.prompted(self.policy.name, self.objective.controls[1], ())
                out["other_log_q"] = second.log_probs(prompts, tokens, mask)
            if self.objective.needs_prompt:
                out["prompt_log_q"] = self.policy.prompt_log_prob(prompts)
        return out

    @property
    def more(self) -> bool:
        """Whether it reads more than log q."""
        return self.objective.needs_kl or self.objective.controls is not None or self.objective.needs_prompt

    @torch.no_grad()
    def values(self, prompts: list[str], tokens: Tensor, mask: Tensor, parts: list[slice]) -> dict[str, Tensor]:
        """What `of` returns, without gradient, for these parts of the batch; [p, ...] with no prompt where there is no part."""
        found = [self.of(prompts[part], tokens[part], mask[part]) for part in parts]
        if self.in_step is not None:
            self.in_step.settle()
        return {name: torch.cat([each[name] for each in found]) for name in found[0]} if found else self._none(tokens)

    def _none(self, tokens: Tensor) -> dict[str, Tensor]:
        asked = ["log_q", *["kl_token"] * self.objective.needs_kl, *["other_log_q"] * (self.objective.controls is not None)]
        out = {name: torch.zeros(0, *tokens.shape[1:]) for name in asked}
        return out | ({"prompt_log_q": torch.zeros(0)} if self.objective.needs_prompt else {})

    def pull(
        self, weights: dict[str, Tensor], values: Tensor, prompts: list[str], tokens: Tensor, mask: Tensor, parts: list[slice | None]
    ) -> None:
        """Adds to the parameters' gradients what weights [P, ...] make of `of`, a part after another; None where only others have one.

        values [P, K, T]: log q, so that it is not worked out again.
        """
        for part in parts:
            made: dict[str, Tensor] = {}
            if part is not None:
                made = self.of(prompts[part], tokens[part], mask[part], values[part])
            ends = [made[name] for name in weights if name in made]
            pulls = [weights[name][part].to(made[name]) for name in weights if name in made]
            if self.in_step is not None:
                beside = self.in_step.settle()
                ends, pulls = [*ends, *beside], [*pulls, *map(torch.zeros_like, beside)]
            some = [(end, pull) for end, pull in zip(ends, pulls, strict=True) if end.requires_grad]
            if some:
                torch.autograd.backward([end for end, _ in some], [pull for _, pull in some])

    def kept(self, prompt: str, tokens: Tensor, mask: Tensor) -> int:
        """Bytes that the graph of one prompt's draws [1, K, T] keeps for its gradient, beside the weights."""
        weights = {p.untyped_storage().data_ptr() for p in self.policy.model.parameters()}
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            held = self.of([prompt], tokens, mask)
        del held
        return sum(size for place, size in seen.items() if place not in weights)


@final
class Fitted:
    """How many prompts go through a model at once. size: asked for, or 0 for as many as fit."""

    def __init__(self, asked: int, size: int = 0):
        self.asked, self.size = asked, asked or size

    def parts(self, rows: slice) -> list[slice]:
        """Equal parts to one of a range of rows, in order."""
        many = rows.stop - rows.start
        count = -(-many // (self.size or many or 1))
        ends = [rows.start + many * k // count for k in range(count + 1)] if count else []
        return [slice(a, b) for a, b in pairwise(ends)]

    def measured(self, rows: int, each: Callable[[], int], free: int | None) -> None:
        """The first size: all rows, or as many as `each` of them, in bytes, fit into what is free (None: nobody knows)."""
        if not self.size:
            self.size = rows if free is None else max(1, min(rows, int(SHARE * free / max(1.0, ROOM * each()))))

    def tried(self, rows: int, work: Callable[[], T]) -> T:
        """`work()`, with half the size and from its beginning where a GPU's memory did not do. Raises UserError where nothing is left."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                size = min(self.size or rows, rows)
            if self.asked or size == 1:
                less = "lower train.micro" if size > 1 else "set train.recompute=true, or lower train.samples"
                raise UserError(f"a GPU's memory does not do for {size} prompt{'s'[: size - 1]} at once: {less}")
            self.size = size // 2
            torch.cuda.empty_cache()


def free_memory() -> int | None:
    """Bytes that this process can still take: what the machine has available, and what its cgroups leave; None where nobody says."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(rows["MemAvailable"].split()[0]) * 1024)
    groups = ["", "memory"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, kinds, path = line.split(":", 2)
            if number == "0" or "memory" in kinds.split(","):
                groups.append(f"{'' if number == '0' else 'memory'}{path}")
    for group in groups:
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                at = Path("/sys/fs/cgroup") / group.strip("/")
                found.append(int((at / most).read_text()) - int((at / used).read_text()))
    return max(0, min(found)) if found else None


@contextlib.contextmanager
def recomputed(model: Any, wanted: bool) -> Iterator[None]:
    """Layers that keep their input alone and are run again for their gradient.

    transformers' own switch works in training mode alone, in which dropout is on too; here the model is in evaluation mode throughout.
    """
    layers = layers_of(model) if wanted else []
    if wanted and not layers:
        raise UserError(f"train.recompute: {type(model).__name__} does not say which of its modules are layers")
    for layer in layers:
        layer.forward = _again(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **given: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **given) if torch.is_grad_enabled() else forward(*args, **given)

    return run
