"""A linear model over a causal language model's last hidden state, behind prompt, completion and the stop.

h = last hidden state once the model has read prompt, completion and its first stop        [D]
margins = W h + b                                                                          W [M, D], b [M], a row a member
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import numpy as np

from klbench.estimate import Array

if TYPE_CHECKING:
    from klbench.policies.causal_lm import CausalLM

ROWS: Final = 256  # texts in one piece of work


def language_model(spec: str, device: str = "cpu") -> CausalLM:
    """A shipped prior by name, a directory or a hub name. Raises UserError as klbench.policies.causal_lm.load does."""
    from klbench.policies import causal_lm
    from klbench.priors import SHIPPED, prior_path

    return causal_lm.load(prior_path(spec) if spec in SHIPPED else Path(spec) if Path(spec).exists() else spec, spec, device)


def features(model: CausalLM, prompts: Sequence[str], completions: Sequence[str]) -> Array:
    """[n, D] float64. Equal pairs are read once, and texts of one prompt together; no prompt stands for the model's first token."""
    texts: dict[str, list[str]] = {}
    for prompt, completion in sorted(set(zip(prompts, completions, strict=True))):
        texts.setdefault(prompt, []).append(completion)
    as_many: dict[int, list[str]] = {}  # prompts by how many texts they have: a piece of work is a rectangle
    for prompt, row in texts.items():
        as_many.setdefault(len(row), []).append(prompt)
    found: dict[tuple[str, str], Array] = {}
    for n, some in as_many.items():
        step = max(1, ROWS // n)
        for part in (some[i : i + step] for i in range(0, len(some), step)):
            before = [p or model.tokenizer.bos_token or model.tokenizer.eos_token for p in part]
            tokens, mask = model.spelled(before, [texts[p] for p in part], end=True)
            states = model.states(before, tokens, mask)
            last = states.gather(2, mask.sum(2)[..., None, None].expand(*mask.shape[:2], 1, states.shape[3]))[:, :, 0]
            for prompt, row in zip(part, last.double().numpy(), strict=True):
                found.update(zip(((prompt, text) for text in texts[prompt]), row, strict=True))
    return np.stack([found[pair] for pair in zip(prompts, completions, strict=True)])


@final
@dataclass(frozen=True, eq=False)
class HiddenStates:
    """weights [M, D], bias [M] over the states of `model`."""

    model: CausalLM
    weights: Array
    bias: Array

    def margins(self, prompts: Sequence[str], completions: Sequence[str]) -> Array:
        """[M, n]."""
        return np.asarray(self.weights @ features(self.model, prompts, completions).T + self.bias[:, None])
