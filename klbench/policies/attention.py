"""Attention of one query a row, as decoding has it, on a processor: two batched products in place of a fused kernel.

The fused kernel of PyTorch is built for many queries. With one, over keys that lie in a longer buffer, plain products take a half to a
quarter of its time on a CPU (docs/performance.md). transformers looks attention up by name; `decoding` lends a model this one for a while.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME: Final = "klbench_one_query"
FUSED: Final = "sdpa"


def one_query(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """[B, 1, H, D] from query [B, H, 1, D] over keys and values [B, h, L, D]; H a multiple of h. Several queries go to the fused kernel."""
    B, heads, queries, width = query.shape
    if queries != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **given)
    shared, length = key.shape[1:3]
    scores = torch.bmm(query.reshape(B * shared, -1, width), key.reshape(B * shared, length, width).transpose(1, 2))
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        by_row = scores.view(B, heads, 1, length)
        seen = attention_mask[..., :length]
        by_row = by_row.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else by_row + seen
        scores = by_row.view(B * shared, -1, length)
    out = torch.bmm(scores.softmax(-1), value.reshape(B * shared, length, value.shape[3]))
    return out.view(B, 1, heads, value.shape[3]), None


AttentionInterface.register(NAME, one_query)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[FUSED])


@contextmanager
def decoding(config: Any, device: torch.device) -> Iterator[None]:
    """A model of this configuration attends by `one_query` on a CPU while this lasts, where it would by the fused kernel."""
    used = getattr(config, "_attn_implementation", None)
    if device.type != "cpu" or used != FUSED:
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = used
