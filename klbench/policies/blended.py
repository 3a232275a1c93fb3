"""Two causal models as one, whose next-token law is a function of both: what a blend (`realignment:0.5`) is to the passes.

No keys and values are handed out, so the passes sample from it by reading each prefix anew; scoring runs both models once.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from klbench.method import AbstractBlend


@final
class Blended(torch.nn.Module):
    """policy, prior: models over the same ids. Only ids that both write are in the law."""

    def __init__(self, policy: Any, prior: Any, blend: AbstractBlend):
        super().__init__()
        self.policy, self.prior, self.blend = policy, prior, blend
        self.config = policy.config

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.policy.dtype
        return found

    def get_output_embeddings(self) -> Any:
        return self.policy.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        return self.policy.get_input_embeddings()

    def forward(self, input_ids: Tensor, **given: Any) -> CausalLMOutput:
        """Log-probabilities of the blend in place of logits. The passes' `use_cache` is not served: there is no cache to give."""
        given.pop("use_cache", None)
        log_q, log_p0 = (model(input_ids, use_cache=False, **given).logits.log_softmax(-1) for model in (self.policy, self.prior))
        width = min(log_q.shape[-1], log_p0.shape[-1])
        return CausalLMOutput(logits=self.blend.law(log_q[..., :width], log_p0[..., :width]))
