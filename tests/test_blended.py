"""A policy mixed with the prior token by token: its law by hand, its draws, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import saved

from klbench import models
from klbench.errors import UserError
from klbench.policies.causal_lm import CausalLM, token_laws


@pytest.fixture
def pair(tmp_path: Path) -> tuple[CausalLM, Path]:
    prior = models.open_prior(str(saved(tmp_path / "prior", "llama", 1)))
    assert isinstance(prior, CausalLM)
    return prior, saved(tmp_path / "policy", "llama", 2)


def opened(spec: str, prior: CausalLM) -> CausalLM:
    found = models.open_policy("mine", spec, prior)
    assert isinstance(found, CausalLM)
    return found


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, 1.5])
def test_the_law_is_the_normalised_geometric_mix(pair: tuple[CausalLM, Path], share: float) -> None:
    prior, folder = pair
    policy, mixed = opened(str(folder), prior), opened(f"{folder}@realignment:{share}", prior)
    prompts, tokens = ["a b", "c"], torch.tensor([[[1, 2, 3], [2, 0, 0]], [[3, 3, 1], [1, 1, 0]]])
    mask = torch.tensor([[[True] * 3, [True, True, False]], [[True] * 3, [True] * 3]])
    lq, l0 = (m.law(m.logits(prompts, tokens)) for m in (policy, prior))
    wanted = ((1 - share) * l0 + share * lq).log_softmax(-1).gather(3, tokens[..., None])[..., 0].masked_fill(~mask, 0.0)
    torch.testing.assert_close(mixed.log_prob(prompts, tokens, mask), wanted, rtol=1e-4, atol=1e-5)
    arithmetic = ((1 - share) * l0.exp() + share * lq.exp()).log().gather(3, tokens[..., None])[..., 0].masked_fill(~mask, 0.0)
    if 0 < share < 1:  # the mutant: a mixture of probabilities in place of logarithms
        assert (arithmetic - wanted).abs().max() > 1e-2


def test_draws_are_of_that_law(pair: tuple[CausalLM, Path]) -> None:
    prior, folder = pair
    mixed = opened(f"{folder}@realignment:0.5", prior)
    draws = mixed.sample(["a b"], 2000, 2, seed=0)
    torch.testing.assert_close(draws.log_q, mixed.log_prob(["a b"], draws.tokens, draws.mask), rtol=1e-3, atol=1e-4)
    first = torch.bincount(draws.tokens[0, :, 0], minlength=mixed.columns) / 2000
    law = mixed.law(mixed.logits(["a b"], torch.zeros(1, 1, 1, dtype=torch.int64)))[0, 0, 0].exp()
    assert float((first - law.detach()).abs().max()) < 4.5 * (0.25 / 2000) ** 0.5
    laws = token_laws(mixed, prior, ["a b"], draws.tokens, draws.mask)
    assert bool((laws.cross - laws.entropy > -1e-4).all()) and bool((laws.lost > -1e-4).all())


def test_a_decoding_comes_after_the_blend_and_the_prior_is_no_policy(pair: tuple[CausalLM, Path]) -> None:
    prior, folder = pair
    cooled = opened(f"{folder}@realignment:0.5,temperature:0.5", prior)
    assert len(cooled.decodings) == 1
    with pytest.raises(UserError, match="it comes before other decodings"):
        opened(f"{folder}@temperature:0.5,realignment:0.5", prior)
    with pytest.raises(UserError, match="name the policy, as in POLICY@realignment:0.5"):
        opened("realignment:0.5", prior)
