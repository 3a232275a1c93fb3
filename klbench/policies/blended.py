"""Causal models as one, whose next-token law is a function of theirs: what `realignment:0.5` and `emulated:SMALL` are to the passes.

No keys and values are handed out, so the passes sample from it by reading each prefix anew; scoring runs each model once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from klbench.errors import UserError


@final
class Blended(torch.nn.Module):
    """models: over the same ids, the policy first.  law: of the next-token log-probabilities [..., V] of each.  name: the law's, hashed.

    Only ids that all write are in the law.
    """

    def __init__(self, law: Callable[..., Tensor], name: str, *models: Any):
        super().__init__()
        self.models, self.law = torch.nn.ModuleList(models), law
        self.register_buffer("name", torch.tensor(list(name.encode()), dtype=torch.uint8))  # part of the weights' hash
        self.config = models[0].config

    @property
    def policy(self) -> Any:
        return self.models[0]

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
        laws = [model(input_ids, use_cache=False, **given).logits.log_softmax(-1) for model in self.models]
        width = min(law.shape[-1] for law in laws)
        return CausalLMOutput(logits=self.law(*(law[..., :width] for law in laws)))


def emulated(log_tuned: Tensor, log_untuned: Tensor, log_p0: Tensor) -> Tensor:
    """[..., V] log p0 + log tuned - log untuned, normalised: what tuning did to a small model, done to the prior (emulated, proxy tuning).

        q(v | prefix) = p0(v | prefix) tuned(v | prefix) / untuned(v | prefix) / norm

    With tuned = untuned it is the prior, with untuned = p0 it is tuned. `realignment:a` behind it is p0 (tuned / untuned)^a / norm. Over
    whole outputs p0 tuned/untuned is p* exactly where tuned is the small model's posterior under the same r and beta; token by token, as
    here, only where an output is one token, since each norm depends on its prefix. A token that one of the three lacks has no mass.
    Raises UserError where the three share no token.  Sources: Mitchell et al. 2023, arXiv:2310.12962; Liu et al. 2024, arXiv:2401.08565.
    """
    lacking = (log_tuned == -torch.inf) | (log_untuned == -torch.inf) | (log_p0 == -torch.inf)
    if bool(lacking.all(-1).any()):
        raise UserError("emulated: the three models have no next token in common")
    # the difference first: where the small ones agree, no digit of the prior is lost
    return (log_p0 + (log_tuned - log_untuned)).masked_fill(lacking, -torch.inf).log_softmax(-1)
