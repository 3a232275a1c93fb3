"""Attention on a processor: two batched products where they are faster than the fused kernel of PyTorch.

They are with one query a row, as decoding has it, over keys that lie in a longer buffer (a half to a quarter of the time), and in bfloat16,
whose fused kernel has a slow gradient (a third of the time). transformers looks attention up by name: `take` gives a model this one.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME: Final = "klbench_cpu"
FUSED: Final = "sdpa"
LONGEST: Final = 512  # keys, beyond which products with many queries need too much memory


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """[B, T, H, D] from query [B, H, T, D] over keys and values [B, h, L, D]; H a multiple of h. mask [B, 1, T, L], None where all is seen
    by a single query, and what comes before it by several."""
    B, heads, queries, width = query.shape
    shared, length = key.shape[1:3]
    half = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    half = half and attention_mask is not None and length <= LONGEST
    if query.device.type != "cpu" or not (queries == 1 or half):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **given)
    asked = (query * (width**-0.5 if scaling is None else scaling)).reshape(B * shared, -1, width)
    scores = torch.bmm(asked, key.reshape(B * shared, length, width).transpose(1, 2))
    if attention_mask is not None:
        seen, scores = attention_mask[..., :length], scores.view(B, heads, queries, length)
        lost = torch.finfo(scores.dtype).min  # and not -inf: a pad sees nothing at all, and what is NaN there spreads
        scores = scores.masked_fill(~seen, lost) if seen.dtype == torch.bool else scores + seen
    share = scores.softmax(-1).to(value.dtype).view(B * shared, -1, length)
    out = torch.bmm(share, value.reshape(B * shared, length, value.shape[3]))
    return out.view(B, heads, queries, value.shape[3]).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[FUSED])


def take(model: Any) -> None:
    """Has a model of ours attend by `attend` where it would by the fused kernel. Its saved configuration does not tell."""
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    if getattr(config, "_attn_implementation", None) == FUSED:
        config._attn_implementation = NAME
