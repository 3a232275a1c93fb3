"""Sums over a vocabulary, some rows at a time: no step holds a law for every token of a batch.

    log q(v | s) = <w_v, s> + b_v - log sum_u exp(<w_u, s> + b_u)      s: last hidden state [R, D];  w, b: the head

A chunk of rows is made, used and dropped while it is in the cache. In training the logits of a chunk are made again for its gradient,
which needs less time than to keep and fetch them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, final

import torch
from torch import Tensor

ROWS: Final = 128  # of a chunk at least: fewer, and reading the head's weights is what a product costs
FLOATS: Final = 1 << 20  # of a chunk beyond that


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` laws over `width` tokens."""
    step = max(ROWS, FLOATS // max(1, width))
    for i in range(0, rows, step):
        yield slice(i, i + step)


def spans(node: Tensor, rows: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of the rows, and of the tokens [M] that hang on them (`node`: the row of each, ascending)."""
    parts = list(chunks(rows, width))
    ends = torch.searchsorted(node, torch.tensor([0, *(part.stop for part in parts)], device=node.device)).tolist()
    for k, part in enumerate(parts):
        yield part, slice(ends[k], ends[k + 1])


@final
class LogProbs(torch.autograd.Function):
    """[M] log-probabilities of tokens from states [R, D] and a linear head, differentiable in states, weight [V, D] and bias [V].

    node [M] ascending: the state before each token.  token [M]: -inf for one beyond V.  known [M]: the values, where they are known
    already, as they are for draws that fell under these very weights; then only the gradient is worked out.  half: type of the
    products, None for that of the states; sums over the vocabulary are in float32 in any case.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, node: Tensor, token: Tensor, known: Tensor | None, half: Any
    ) -> Tensor:
        dtype = states.dtype if half is None else half
        ctx.dtype, ctx.width = dtype, weight.shape[0]
        with torch.autocast(states.device.type, enabled=False):
            if known is None:
                out = torch.empty(len(node), device=states.device)
                norms = torch.empty(len(states), device=states.device)
                s, w, b = (None if x is None else x.to(dtype) for x in (states, weight, bias))
                for rows, some in spans(node, len(states), ctx.width):
                    logits = torch.nn.functional.linear(s[rows], w, b).float()  # type: ignore[index,arg-type]
                    norms[rows] = logits.logsumexp(1)
                    out[some] = logits[node[some] - rows.start, token[some].clamp(max=ctx.width - 1)] - norms[rows][node[some] - rows.start]
                out.masked_fill_(token >= ctx.width, -torch.inf)
            else:
                out, norms = known.clone(), states.new_empty(0)
        ctx.save_for_backward(states, weight, bias, node, token, norms)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        states, weight, bias, node, token, norms = ctx.saved_tensors
        (grad,) = upstream
        grad = grad.masked_fill(token >= ctx.width, 0.0)
        total = torch.zeros(len(states), device=states.device).index_add_(0, node, grad.float())
        of_states = torch.empty(states.shape, dtype=ctx.dtype, device=states.device)
        wanted = ctx.needs_input_grad
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted[1] else None
        of_bias = torch.zeros(bias.shape, device=bias.device) if bias is not None and wanted[2] else None
        s, w, b = (None if x is None else x.to(ctx.dtype) for x in (states, weight, bias))
        for rows, some in spans(node, len(states), ctx.width):
            assert s is not None and w is not None
            logits = torch.nn.functional.linear(s[rows], w, b).float()
            norm = norms[rows] if len(norms) else logits.logsumexp(1)
            back = logits.sub_(norm[:, None]).exp_().mul_(-total[rows, None])
            back.index_put_((node[some] - rows.start, token[some].clamp(max=ctx.width - 1)), grad[some].float(), accumulate=True)
            back = back.to(ctx.dtype)
            torch.mm(back, w, out=of_states[rows])
            if of_weight is not None:
                if ctx.dtype == torch.float32:
                    of_weight.addmm_(back.T, s[rows])
                else:
                    of_weight += (back.T @ s[rows]).float()
            if of_bias is not None:
                of_bias += back.float().sum(0)
        returned = (of_states.to(states.dtype), None if of_weight is None else of_weight.to(weight.dtype), of_bias)
        return (*returned, None, None, None, None)


def draw(law: Tensor, uniform: Tensor, row: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens [M] and their log-probabilities from laws [R, V], by inverse CDF at uniforms [M] in [0, 1).

    law: logits or log-probabilities, up to a constant a row.  row [M]: of each draw; None where each row has one.  The sums are taken in
    blocks of about sqrt(V) tokens, whose own are then searched, then one block: the cost of a draw beside that of its law is small.
    """
    R, V = law.shape
    law = law.float()
    if row is None:
        row = torch.arange(R, device=law.device)
    wide = 1 << max(0, (V - 1).bit_length() + 1) // 2
    blocks = -(-V // wide)
    top = law.amax(1, keepdim=True)
    mass = law.new_zeros(R, blocks * wide) if blocks * wide > V else law.new_empty(R, V)
    torch.sub(law, top, out=mass[:, :V]) if blocks * wide == V else mass[:, :V].copy_(law - top)
    mass[:, :V].exp_()
    mass = mass.view(R, blocks, wide)
    below = mass.sum(2, dtype=torch.float64).cumsum(1)
    total = below[:, -1]
    point = torch.minimum(uniform.double() * total[row], torch.nextafter(total, torch.zeros_like(total))[row])
    block = torch.searchsorted(below[row], point[:, None], right=True)[:, 0].clamp_(max=blocks - 1)
    inner = mass[row, block].double().cumsum(1)
    rest = point - torch.where(block > 0, below[row, (block - 1).clamp(min=0)], 0.0)
    rest = torch.minimum(rest.clamp(min=0.0), torch.nextafter(inner[:, -1], torch.zeros_like(rest)))
    token = torch.searchsorted(inner, rest[:, None], right=True)[:, 0].clamp_(max=wide - 1) + block * wide
    token.clamp_(max=V - 1)
    return token, law[row, token] - top[row, 0] - total.log().float()[row]
