"""Laws of the uniform policy: log q(x) = -|x| log V, its length and entropy in closed form, its distances summed over every output."""

import math

import pytest
import torch
from tiny import continuations, exact, model, tokenizer

from klbench import method, suite
from klbench.board import NULLS
from klbench.errors import UserError
from klbench.laws import check_decoding, check_sampler
from klbench.policies.causal_lm import wrap
from klbench.samplers.top_p import TopP
from klbench.samplers.uniform import Uniform

V, T = 4, 3


def test_laws_hold(broken):
    assert broken(check_decoding(Uniform())) == [] == broken(check_sampler(Uniform()))


def test_mass_on_what_the_prior_cannot_write_is_rejected(mutant, broken):
    wrong = mutant(Uniform, law=lambda self, log_probs: torch.zeros_like(log_probs).log_softmax(-1))
    assert "a token without mass gets none" in broken(check_decoding(wrong))


def test_an_eos_that_is_forgotten_is_rejected(mutant, broken):
    def law(self, log_probs):
        return Uniform().law(log_probs).index_fill(-1, torch.tensor([0]), -torch.inf)

    assert "a decoded law is normalised" in broken(check_decoding(mutant(Uniform, law=law)))


def of_all(lm, prompts, decodings):
    """log q [2, S] of every output, its length [S], and the policy."""
    rows = continuations(V, T)
    policy = wrap("q", lm, tokenizer(), decodings=decodings)
    tokens = torch.tensor([r + [0] * (T - len(r)) for r in rows])
    size = torch.tensor([len(r) for r in rows])
    mask = torch.arange(T) < size[:, None]
    log_q = policy.log_prob(prompts, tokens.expand(2, -1, -1), mask.expand(2, -1, -1)).sum(2).double()
    return log_q, size, policy, rows


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_over_every_output(kind):
    lm, prompts = model(kind, 0), ["a", "b c a b"]
    log_q, size, policy, rows = of_all(lm, prompts, [Uniform()])
    assert torch.allclose(log_q, (-size * math.log(V)).double().expand(2, -1), atol=1e-5)
    assert torch.allclose(log_q.exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-5)
    assert V * (1 - (1 - 1 / V) ** T) == 2.3125  # 1 + 3/4 + 9/16
    assert float((log_q[0].exp() * size).sum()) == pytest.approx(2.3125, abs=1e-5)
    assert float(-(log_q[0].exp() * log_q[0]).sum()) == pytest.approx(2.3125 * math.log(4), abs=1e-5)
    apart = [float((log_q[i].exp() * (log_q[i] - exact(lm, policy.encode(p), rows).double())).sum()) for i, p in enumerate(prompts)]
    assert all(0.1 < kl < math.inf for kl in apart)  # KL(q || p0): a softmax has mass everywhere
    draws = policy.sample(prompts, 400, T, seed=1)
    assert torch.allclose(draws.log_q[draws.mask], torch.tensor(-math.log(V)))
    lengths = draws.mask.sum(2).double()
    assert abs(float(lengths.mean()) - 2.3125) < 4.5 * float(lengths.std()) / math.sqrt(800)


def test_what_was_cut_off_before_stays_so():
    lm, prompts = model("llama", 0), ["a", "b c a b"]
    log_q, size, _, _ = of_all(lm, prompts, [TopP(0.6), Uniform()])
    assert torch.allclose(log_q.exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-5)
    assert bool((log_q == -torch.inf).any()) and bool((log_q >= -size * math.log(V) - 1e-5)[log_q.isfinite()].all())


def test_it_is_called_by_its_name_and_is_a_null_of_the_published_suites():
    assert method.sampler("uniform") == Uniform() and "uniform" in NULLS and "uniform" in method.names("samplers")
    assert all("uniform" in suite.load(name).samplers for name in suite.names() if name != "gate")


@pytest.mark.parametrize("word, says", [("uniform:2", "takes nothing after the colon"), ("uniforme", "uniform")])
def test_refusals(word, says):
    with pytest.raises(UserError, match=says):
        method.sampler(word)
