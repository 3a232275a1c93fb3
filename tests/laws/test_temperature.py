"""Laws of temperature: the power of each next-token law, and of whole outputs the product of those, summed over every output."""

import math

import pytest
import torch
from tiny import continuations, model, tokenizer

from klbench import method
from klbench.errors import UserError
from klbench.laws import check_decoding, check_sampler
from klbench.policies.causal_lm import wrap
from klbench.samplers.temperature import Temperature

P = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("T", [0.05, 0.7, 1.0, 3.0])
def test_laws_hold(T, broken):
    assert broken(check_decoding(Temperature(T))) == [] == broken(check_sampler(Temperature(T)))


def test_a_power_that_is_not_normalised_is_rejected(mutant, broken):
    wrong = mutant(Temperature, law=lambda self, log_probs: log_probs / 0.7)
    assert "a decoded law is normalised" in broken(check_decoding(wrong))


def test_one_normaliser_for_a_batch_is_rejected(mutant, broken):
    def law(self, log_probs):
        return log_probs / 0.7 - (log_probs / 0.7).flatten(0, -2).logsumexp(-1).mean() if log_probs.dim() > 1 else log_probs

    assert "each law is decoded by itself" in broken(check_decoding(mutant(Temperature, law=law)))


@pytest.mark.parametrize("T", [0.5, 2.0])
@pytest.mark.parametrize("wrong_by, holds", [(1.0, True), (1.1, False)])
def test_the_power_itself(T, wrong_by, holds):
    found = Temperature(T * wrong_by).law(P.log()).exp()
    want = P ** (1 / T) / (P ** (1 / T)).sum()
    assert bool((found - want).abs().max() < 1e-12) == holds


def exact(lm, prompt, rows, decoding):
    """[S] log-probabilities of whole outputs: one plain forward a sequence, each next-token law decoded."""
    out = []
    for row in rows:
        with torch.no_grad():
            logp = decoding.law(lm(torch.tensor([prompt + row])).logits[0].double().log_softmax(-1))
        out.append(sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(row)))
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_policy_at_a_temperature_draws_what_it_scores(kind):
    rows, lm = continuations(4, 3), model(kind, 0)
    policy = wrap("q", lm, tokenizer(), decodings=[Temperature(0.6)])
    tokens = torch.tensor([r + [0] * (3 - len(r)) for r in rows])
    mask = torch.arange(3) < torch.tensor([len(r) for r in rows])[:, None]
    prompts = ["a", "b c a b"]
    found = policy.log_prob(prompts, tokens.expand(2, -1, -1), mask.expand(2, -1, -1)).sum(2).double()
    want = torch.stack([exact(lm, policy.encode(p), rows, Temperature(0.6)) for p in prompts])
    assert torch.allclose(found, want, atol=3e-5)
    assert torch.allclose(found.exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-5)
    of_outputs = torch.stack([exact(lm, policy.encode(p), rows, Temperature(1.0)) for p in prompts]) / 0.6
    assert not torch.allclose(found, of_outputs.log_softmax(1), atol=1e-2)  # the power of whole outputs is another law
    draws = policy.sample(prompts, 400, 3, seed=1)
    assert torch.allclose(policy.log_prob(prompts, draws.tokens, draws.mask), draws.log_q, atol=3e-5)
    index = {tuple(r): i for i, r in enumerate(rows)}
    seen = torch.zeros(len(rows), dtype=torch.float64)
    for row, keep in zip(draws.tokens[0], draws.mask[0], strict=True):
        seen[index[tuple(row[keep].tolist())]] += 1 / 400
    assert (seen - want[0].exp()).abs().max() < 4.5 * 0.5 / math.sqrt(400)


def test_the_coldest_and_the_hottest():
    cold = Temperature(1e-30).law(P.float().log())
    assert cold.exp().tolist() == [0, 0, 0, 1] and not cold.isnan().any()
    assert torch.allclose(Temperature(1e30).law(P.log()).exp(), torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize(
    "word", ["temperature:0", "temperature:-1", "temperature:nan", "temperature:inf", "temperature:hot", "temperature:1,5"]
)
def test_refusals(word):
    with pytest.raises(UserError, match="a number .*expected"):
        method.sampler(word)


@pytest.mark.parametrize(
    "word, value", [("temperature", 1.0), ("temperature:0.7", 0.7), ("temperature:.5", 0.5), ("temperature:2e-1", 0.2)]
)
def test_it_is_called_by_its_name(word, value):
    assert method.sampler(word) == Temperature(value)


def test_whole_numbers_stay_whole():
    with pytest.raises(UserError, match="a whole number expected"):
        method.sampler("best_of_n:0.5")
    with pytest.raises(UserError, match="takes nothing after the colon"):
        method.sampler("rejection:3")
