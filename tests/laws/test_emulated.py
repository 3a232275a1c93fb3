"""Laws of emulated fine-tuning: what tuning did to a small model, done to the prior; by hand, at its edges, and from what people write."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import WORDS, saved

from klbench import models
from klbench.errors import UserError
from klbench.policies.blended import emulated
from klbench.policies.causal_lm import CausalLM
from klbench.policies.tabular import Tabular
from klbench.samplers.realignment import Realignment


def laws(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(7, 5, generator=generator, dtype=torch.float64)).log_softmax(1) for _ in range(count)]


def geometric(tuned: torch.Tensor, untuned: torch.Tensor, p0: torch.Tensor) -> torch.Tensor:
    """A mutant: the mean of the logarithms, the untuned model not divided by."""
    return ((tuned + untuned + p0) / 3).log_softmax(-1)


def upside_down(tuned: torch.Tensor, untuned: torch.Tensor, p0: torch.Tensor) -> torch.Tensor:
    return emulated(untuned, tuned, p0)


def unnormalised(tuned: torch.Tensor, untuned: torch.Tensor, p0: torch.Tensor) -> torch.Tensor:
    return p0 + tuned - untuned


def without_prior(tuned: torch.Tensor, untuned: torch.Tensor, p0: torch.Tensor) -> torch.Tensor:
    return (tuned - untuned).log_softmax(-1)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(torch.allclose(found.exp(), wanted.exp(), atol=1e-10))


def untuned_is_tuned(law) -> bool:
    small, p0 = laws(2, 0)
    return same(law(small, small, p0), p0)


def untuned_is_the_prior(law) -> bool:
    tuned, p0 = laws(2, 1)
    return same(law(tuned, p0, p0), tuned)


def one_token_outputs_are_p0_times_the_ratio(law, a: float = 0.6) -> bool:
    """Sums over all outputs: p0 (tuned/untuned)^a / Z, with a by realignment behind it; at a = 1 the law itself is a law."""
    tuned, untuned, p0 = laws(3, 2)
    mass = p0.exp() * (tuned.exp() / untuned.exp()) ** a
    whole = law(tuned, untuned, p0)
    total = whole.exp().sum(1)
    return same(Realignment(a).law(whole, p0), (mass / mass.sum(1, keepdim=True)).log()) and same(total, torch.ones_like(total))


LAWS = (untuned_is_tuned, untuned_is_the_prior, one_token_outputs_are_p0_times_the_ratio)


@pytest.mark.parametrize("check", LAWS)
def test_laws_hold(check):
    assert check(emulated)


@pytest.mark.parametrize(
    "check, mutant",
    [
        (untuned_is_tuned, geometric),
        (untuned_is_tuned, without_prior),
        (untuned_is_the_prior, upside_down),
        (untuned_is_the_prior, geometric),
        (one_token_outputs_are_p0_times_the_ratio, upside_down),
        (one_token_outputs_are_p0_times_the_ratio, unnormalised),
    ],
)
def test_mutants_are_rejected(check, mutant):
    assert not check(mutant)


def test_by_hand():
    tuned, untuned, p0 = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0], [0.4, 0.2, 0, 0.4]))
    wanted = torch.tensor([0.8, 0.2, 0, 0], dtype=torch.float64)  # .4 * 2 and .2 * 1; what one lacks has no mass
    torch.testing.assert_close(emulated(tuned, untuned, p0).exp(), wanted)
    assert emulated(tuned.float(), untuned.float(), p0.float()).dtype == torch.float32
    with pytest.raises(UserError, match="no next token in common"):
        emulated(torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0]), torch.tensor([-0.7, -0.7]))


def two_tokens(log_law: torch.Tensor) -> Tabular:
    return Tabular(log_law[None], ("c",), vocabulary=2, length=2)  # AA, AB, BA, BB


def test_token_by_token_is_not_the_posterior_of_whole_outputs():
    """The small model's posterior under r and beta 1: over whole outputs p0 tuned/untuned is the prior's own, token by token it is not."""
    reward = torch.tensor([2.0, -2.0, 0.5, 0.5], dtype=torch.float64)
    small, large = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.3, 0.2]))
    tuned, wanted = (small + reward).log_softmax(0), (large + reward).log_softmax(0)
    torch.testing.assert_close((large + tuned - small).log_softmax(0), wanted)
    first = [two_tokens(x).enumerate().log_prob[0, [0, 2], 0] for x in (tuned, small, large)]
    assert abs(float(emulated(*first).exp()[0]) - float(wanted.exp()[:2].sum())) > 0.05


@pytest.fixture
def three(tmp_path: Path) -> tuple[CausalLM, Path, Path]:
    """The prior, a tuned small model, what it was tuned from."""
    prior = models.open_prior(str(saved(tmp_path / "prior", "llama", 1)))
    assert isinstance(prior, CausalLM)
    return prior, saved(tmp_path / "tuned", "gpt2", 2), saved(tmp_path / "small", "gpt2", 3)


PROMPTS, TOKENS = ["a b", "c"], torch.tensor([[[1, 2, 3], [2, 0, 0]], [[3, 3, 1], [1, 1, 0]]])
MASK = torch.tensor([[[True] * 3, [True, True, False]], [[True] * 3, [True] * 3]])


def log_prob(spec: str, prior: CausalLM) -> torch.Tensor:
    found = models.open_policy("mine", spec, prior)
    assert isinstance(found, CausalLM)
    return found.log_prob(PROMPTS, TOKENS, MASK)


@pytest.mark.parametrize("behind, a", [("", 1.0), (",realignment:0.5", 0.5), (",realignment:2", 2.0)])
def test_of_three_models_on_disk(three, behind, a):
    prior, tuned, small = three
    lt, ls, l0 = (m.law(m.logits(PROMPTS, TOKENS)) for m in (*(models.open_policy("m", str(x), prior) for x in (tuned, small)), prior))
    wanted = (l0 + a * (lt - ls)).log_softmax(-1).gather(3, TOKENS[..., None])[..., 0].masked_fill(~MASK, 0.0)
    torch.testing.assert_close(log_prob(f"{tuned}@emulated:{small}{behind}", prior), wanted, rtol=1e-4, atol=1e-5)
    swapped = log_prob(f"{small}@emulated:{tuned}{behind}", prior)  # the mutant
    assert (swapped - wanted).abs().max() > 0.1


def test_edges_on_disk(three):
    prior, tuned, _ = three
    same, place = prior.log_prob(PROMPTS, TOKENS, MASK), tuned.parent / "prior"
    torch.testing.assert_close(log_prob(f"{tuned}@emulated:{tuned}", prior), same, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_prob(f"{tuned}@emulated:{place}", prior), log_prob(str(tuned), prior), rtol=1e-4, atol=1e-5)


def test_draws_are_of_that_law(three):
    prior, tuned, small = three
    found = models.open_policy("mine", f"{tuned}@emulated:{small},temperature:0.8", prior)
    draws = found.sample(["a b"], 500, 2, seed=0)
    torch.testing.assert_close(draws.log_q, found.log_prob(["a b"], draws.tokens, draws.mask), rtol=1e-3, atol=1e-4)
    first = torch.bincount(draws.tokens[0, :, 0], minlength=len(WORDS)) / 500
    law = found.law(found.logits(["a b"], torch.zeros(1, 1, 1, dtype=torch.int64)))[0, 0, 0].exp()
    assert float((first - law.detach()).abs().max()) < 4.5 * (0.25 / 500) ** 0.5


def test_what_differs_has_another_name(three):
    """Of three models, of another order of them, and of another share: none has the hash of weights of another."""
    prior, tuned, small = three
    specs = ["", f"@emulated:{small}", f"@emulated:{small},realignment:0.5", f"@emulated:{small},realignment:0.25", "@realignment:0.5"]
    hashes = [models.open_policy("mine", f"{tuned}{spec}", prior).weights_hash() for spec in specs]
    assert len(set(hashes)) == len(specs)


def test_refusals(three, tmp_path):
    prior, tuned, small = three
    other = saved(tmp_path / "other", "gpt2", 4, ["<eos>", "b", "a", "c"])
    for spec, says in (
        (f"{tuned}@emulated:{other}", f"three models of one tokenizer, and that of {other} is another"),
        (f"{other}@emulated:{small}", "three models of one tokenizer, and that of the prior is another"),
        (f"{other}@realignment:0.5", "a blend needs two models of one tokenizer, and the prior's is another"),
        (f"{tuned}@emulated:", "emulated:SMALL expected, once and before other decodings"),
        (f"{tuned}@realignment:0.5,emulated:{small}", "once and before other decodings"),
        (f"{tuned}@emulated:{small},emulated:{small}", "once and before other decodings"),
        (f"emulated:{small}", "name the tuned model before it, as in TUNED@emulated:"),
        (f"{tuned}@emulated:tinny", "did you mean 'tiny'"),
        (f"{tuned}@emulated:{tmp_path}", "config.json is missing"),
    ):
        with pytest.raises(UserError, match=says.replace(".", "[.]")):
            models.open_policy("mine", spec, prior)
