"""Sums over a vocabulary, a block of it at a time: no step holds a law for every token of a batch.

    log q(v | s) = <w_v, s> + b_v - log sum_u exp(<w_u, s> + b_u)      s: last hidden state [R, D];  w, b: the head

A block of logits is made, used and dropped while it is in the cache, whatever the vocabulary and the batch. In training the logits of a
row are made again for its gradient, which needs less time than to keep and fetch them. softmax is used where exp would do: it is one
fused pass, and faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

ROWS: Final = 256  # of a block: fewer, and reading the head's weights is what a product costs
FLOATS: Final = 1 << 20  # of a block: the width is cut where there would be more
TRAINED: Final = 1 << 24  # floats of logits of one chunk of rows in a backward pass, over the whole vocabulary

ONEDNN: Final = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

Head = tuple[Tensor, Tensor | None]  # weight [V, D], bias [V]


def spans(node: Tensor, rows: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of `step` of the rows, and of the tokens [M] that hang on them. node: the row of each, ascending, on the CPU."""
    starts = list(range(0, rows, step))
    ends = np.searchsorted(node.numpy(), [*starts, rows]).tolist()
    for k, start in enumerate(starts):
        yield slice(start, min(start + step, rows)), slice(ends[k], ends[k + 1])


def _blocks(width: int) -> list[slice]:
    """Parts of a vocabulary, equal to a token."""
    many = -(-width * ROWS // FLOATS)
    return [slice(width * k // many, width * (k + 1) // many) for k in range(many)]


def product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[R, V] states times weight plus bias, without gradient.

    In float32 on a CPU by oneDNN where PyTorch has it: for a head, which is far wider than its input, it needs two thirds of the time of
    the BLAS that `linear` takes, and rounds no worse.
    """
    plain = states.device.type == "cpu" and states.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain and ONEDNN and weight.shape[0] > 4 * weight.shape[1]:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return found
    return torch.nn.functional.linear(states, weight, bias)


def _logits(states: Tensor, head: Head, block: slice) -> Tensor:
    return product(states, head[0][block], None if head[1] is None else head[1][block]).float()


def _told(logits: Tensor, block: slice, row: Tensor, token: Tensor, out: Tensor) -> None:
    """Puts into `out` [M] the logits of those tokens that are in the block; the others stay. No shape depends on which they are."""
    column = token - block.start
    inside = (column >= 0) & (column < logits.shape[1])
    out.copy_(torch.where(inside, logits[row, column.clamp(0, logits.shape[1] - 1)], out))


def log_probs(states: Tensor, head: Head, node: Tensor, token: Tensor) -> Tensor:
    """[M] log-probabilities of tokens; -inf for one beyond V. node [M], ascending and on the CPU: the state before each. No gradient."""
    width, out, place = head[0].shape[0], torch.full((len(node),), -torch.inf, device=states.device), node.to(states.device)
    for rows, some in spans(node, len(states), ROWS):
        at, which, parts = place[some] - rows.start, token[some], []
        for block in _blocks(width):
            logits = _logits(states[rows], head, block)
            parts.append(_norm(logits, logits.softmax(1)))
            _told(logits, block, at, which, out[some])
        out[some] -= torch.stack(parts).logsumexp(0)[at] if len(parts) > 1 else parts[0][at]
    return out


def _norm(logits: Tensor, law: Tensor) -> Tensor:
    """[R] log sum exp of logits whose softmax is `law`."""
    return logits.amax(1) - law.amax(1).log()


def between(
    ours: Tensor, head: Head, theirs: Tensor, other: Head, node: Tensor, token: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """What two models say, q from the states `ours`, p0 from `theirs` [R, D]: log q and log p0 of tokens [M], and over the vocabulary
    H(q), H(q, p0) and KL(p0 || q) [R], in nats.

    With a block's own laws q_b and its share w_b of the mass, sum_v q z = sum_b w_b sum_v q_b z. None where some sum is not finite: a token
    has no mass, or the weights are not numbers. Both heads have the same V. node [M] as in `log_probs`.
    """
    blocks, device = _blocks(head[0].shape[0]), ours.device
    place = node.to(device)
    picked = torch.full((2, len(node)), -torch.inf, device=device)
    sums = torch.empty(3, len(ours), device=device)
    for rows, some in spans(node, len(ours), ROWS):
        at, which = place[some] - rows.start, token[some]
        norm: list[Tensor] = []  # of both, a block
        mean: list[Tensor] = []  # q_b z, q_b y, p_b z, p_b y
        for block in blocks:
            z, y = _logits(ours[rows], head, block), _logits(theirs[rows], other, block)
            _told(z, block, at, which, picked[0, some])
            _told(y, block, at, which, picked[1, some])
            q, p = z.softmax(1), y.softmax(1)
            tops = [x.amax(1, keepdim=True) for x in (z, y)]
            norm.append(torch.stack([top[:, 0].double() - law.amax(1).double().log() for top, law in zip(tops, (q, p), strict=True)]))
            centred = [x.sub_(top) for x, top in zip((z, y), tops, strict=True)]  # what has mass is near 0 then, and keeps its digits
            mean.append(
                torch.stack([torch.linalg.vecdot(law, x) + top[:, 0] for law in (q, p) for x, top in zip(centred, tops, strict=True)])
            )
        norms = torch.stack(norm)
        whole = norms.logsumexp(0)
        share = (norms - whole).exp()
        moment = torch.stack(mean).double().unflatten(1, (2, 2))  # [blocks, law, logits, R]
        (qz, qy), (pz, py) = (share[:, :, None] * moment).sum(0)
        picked[:, some] -= whole.float()[:, at]
        sums[:, rows] = torch.stack([whole[0] - qz, whole[1] - qy, (py - whole[1]) - (pz - whole[0])]).float()
    return (picked[0], picked[1], *sums) if bool(torch.isfinite(sums).all()) else None


@final
class LogProbs(torch.autograd.Function):
    """[M] log-probabilities of tokens from states [R, D] and a linear head, differentiable in states, weight [V, D] and bias [V].

    node [M] ascending, on the CPU: the state before each token.  token [M]: -inf for one beyond V.  known [M]: the values, where they
    are known already, as they are for draws that fell under these very weights; then only the gradient is worked out.  half: type of
    the products, None for that of the states; sums over the vocabulary are in float32 in any case.  trained: whether a gradient will be
    asked for (a function cannot see that).
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, node: Tensor, token: Tensor, known: Tensor | None, half: Any,
        trained: bool,
    ) -> Tensor:  # fmt: skip
        ctx.dtype = states.dtype if half is None else half
        ctx.save_for_backward(states, weight, bias, node, token)
        ctx.law = None
        if known is not None:
            return known.clone()
        with torch.autocast(states.device.type, enabled=False):
            s, w, b = (None if x is None else x.to(ctx.dtype) for x in (states, weight, bias))
            assert s is not None and w is not None
            width = w.shape[0]
            if len(s) * width > TRAINED or not trained:
                return log_probs(s, (w, b), node, token)
            logits = _logits(s, (w, b), slice(width))  # few enough to keep their law in place of making them again
            ctx.law = logits.softmax(1)
            index = node.to(s.device)
            out = logits.view(-1)[index * width + token.clamp(max=width - 1)] - _norm(logits, ctx.law)[index]
            return out.masked_fill(token >= width, -torch.inf)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        states, weight, bias, node, token = ctx.saved_tensors
        width = weight.shape[0]
        grad = upstream[0].masked_fill(token >= width, 0.0).float()
        place = node.to(states.device)
        total = torch.zeros(len(states), device=states.device).index_add_(0, place, grad)
        of_states = torch.empty(states.shape, dtype=ctx.dtype, device=states.device)
        of_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros(bias.shape, device=bias.device) if bias is not None and ctx.needs_input_grad[2] else None
        s, w, b = (None if x is None else x.to(ctx.dtype) for x in (states, weight, bias))
        assert s is not None and w is not None
        for rows, some in spans(node, len(states), max(ROWS, TRAINED // width)):
            law = _logits(s[rows], (w, b), slice(width)).softmax(1) if ctx.law is None else ctx.law[rows]
            back = law * -total[rows, None]
            back.index_put_((place[some] - rows.start, token[some].clamp(max=width - 1)), grad[some], accumulate=True)
            if of_bias is not None:
                of_bias += back.sum(0)
            back = back.to(ctx.dtype)
            torch.mm(back, w, out=of_states[rows])
            if of_weight is not None and ctx.dtype == torch.float32:
                of_weight.addmm_(back.T, s[rows])
            elif of_weight is not None:
                of_weight += (back.T @ s[rows]).float()
        found = (of_states.to(states.dtype), None if of_weight is None else of_weight.to(weight.dtype), of_bias)
        return (*found, None, None, None, None, None)


def draw(law: Tensor, uniform: Tensor, row: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens [M] and their log-probabilities from laws [R, V], by inverse CDF at uniforms [M] in [0, 1).

    law: logits or log-probabilities, up to a constant a row.  row [M]: of each draw; None where each row has one.  The sums are taken in
    blocks of some tokens, which are searched first, then one block: the cost of a draw beside that of its law is small.
    """
    R, V = law.shape
    law = law.float()
    row = torch.arange(R, device=law.device) if row is None else row
    mass = law.softmax(1)
    norm = _norm(law, mass)
    wide = next((w for w in (64, 128, 32, 256, 16) if V % w == 0), 64)
    if V % wide:
        mass = torch.nn.functional.pad(mass, (0, -V % wide))
    mass = mass.view(R, -1, wide)
    below = mass.sum(2).cumsum(1, dtype=torch.float64)
    total = below[:, -1]
    point = torch.minimum(uniform.double() * total[row], torch.nextafter(total, torch.zeros_like(total))[row])
    block = torch.searchsorted(below[row], point[:, None], right=True)[:, 0].clamp_(max=mass.shape[1] - 1)
    inner = mass[row, block].double().cumsum(1)
    rest = point - torch.where(block > 0, below[row, (block - 1).clamp(min=0)], 0.0)
    rest = torch.minimum(rest.clamp(min=0.0), torch.nextafter(inner[:, -1], torch.zeros_like(rest)))
    token = block * wide + torch.searchsorted(inner, rest[:, None], right=True)[:, 0].clamp_(max=wide - 1)
    token.clamp_(max=V - 1)
    return token, law[row, token] - norm[row]
