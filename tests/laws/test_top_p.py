"""Laws of top-p: the smallest set of likeliest tokens, ties and edges included, and its outputs summed over every output."""

import pytest
import torch
from tiny import continuations, model, tokenizer

from klbench import method
from klbench.errors import UserError
from klbench.laws import check_decoding
from klbench.policies.causal_lm import token_laws, wrap
from klbench.samplers.temperature import Temperature
from klbench.samplers.top_p import TopP

P = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_laws_hold(p, broken):
    assert broken(check_decoding(TopP(p))) == []


def test_a_law_that_keeps_the_unlikely_is_rejected(mutant, broken):
    def law(self, log_probs):
        return log_probs.masked_fill(log_probs == log_probs.amax(-1, keepdim=True), -torch.inf).log_softmax(-1)

    assert "a likelier token stays at least as likely" in broken(check_decoding(mutant(TopP, law=law)))


def test_a_law_that_is_not_renormalised_is_rejected(mutant, broken):
    wrong = mutant(TopP, law=lambda self, log_probs: log_probs.masked_fill(log_probs < log_probs.amax(-1, keepdim=True) - 1, -torch.inf))
    assert "a decoded law is normalised" in broken(check_decoding(wrong))


@pytest.mark.parametrize(
    "p, kept", [(0.3, [1]), (0.4, [1]), (0.41, [1, 2]), (0.7, [1, 2]), (0.71, [1, 2, 3]), (0.9, [1, 2, 3]), (0.95, [0, 1, 2, 3])]
)
def test_the_smallest_set_that_reaches_p(p, kept):
    for law in (P.log(), P.float().log()):
        found = TopP(p).law(law).exp().double()
        want = torch.zeros(4, dtype=torch.float64)
        want[kept] = P[kept] / P[kept].sum()
        assert torch.allclose(found, want, atol=1e-6) and (found[want == 0] == 0).all()


def test_ties_go_to_the_lower_id_whatever_the_last_bits():
    same = torch.full((6,), 1 / 6, dtype=torch.float64).log()
    for noise in (0, 1e-7, -1e-7):
        assert (TopP(0.5).law(same + noise) > -torch.inf).tolist() == [True] * 3 + [False] * 3


def test_rounding_at_the_edge_decides_nothing():
    generator = torch.Generator().manual_seed(0)
    laws = torch.randn(2000, 8, generator=generator).log_softmax(1)
    kept = TopP(0.8).law(laws) > -torch.inf
    moved = TopP(0.8).law((laws + 1e-7 * torch.randn(laws.shape, generator=generator)).log_softmax(1)) > -torch.inf
    assert (kept != moved).any(1).float().mean() < 0.002


def exact(lm, prompt, rows, decodings):
    out = []
    for row in rows:
        with torch.no_grad():
            logp = lm(torch.tensor([prompt + row])).logits[0].double().log_softmax(-1)
        for decoding in decodings:
            logp = decoding.law(logp)
        out.append(sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(row)))
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_output(kind):
    """log_prob, entropy and both directions of KL against the sum over every output; decodings act in the order given."""
    rows, lm = continuations(4, 3), model(kind, 0, sharp=1.0)
    prior = wrap("p0", lm, tokenizer())
    policy = prior.prompted("q", None, [Temperature(0.5), TopP(0.7)])
    tokens = torch.tensor([r + [0] * (3 - len(r)) for r in rows])[None]
    mask = torch.arange(3) < torch.tensor([len(r) for r in rows])[:, None]
    laws = token_laws(policy, prior, ["b c"], tokens, mask[None])
    ids = prior.encode("b c")
    want, base = exact(lm, ids, rows, [Temperature(0.5), TopP(0.7)]), exact(lm, ids, rows, [])
    found = laws.log_q.sum(2)[0].double()
    assert torch.equal(found == -torch.inf, want == -torch.inf) and (want == -torch.inf).any()
    there = want > -torch.inf
    assert torch.allclose(found[there], want[there], atol=3e-5)
    assert torch.allclose(found.exp().sum(), torch.ones((), dtype=torch.float64), atol=1e-5)
    mass = want[there].exp()
    entropy, cross = (x.sum(2)[0].double()[there] for x in (laws.entropy, laws.cross))
    assert float((mass * entropy).sum()) == pytest.approx(float(-(mass * want[there]).sum()), abs=3e-5)
    assert float((mass * cross).sum()) == pytest.approx(float(-(mass * base[there]).sum()), abs=3e-5)
    swapped = exact(lm, ids, rows, [TopP(0.7), Temperature(0.5)])
    assert not torch.equal(swapped == -torch.inf, want == -torch.inf) or not torch.allclose(swapped[there], want[there], atol=1e-3)


def test_mass_that_the_prior_lacks_is_infinite_and_never_nan():
    rows, lm = continuations(4, 2), model("llama", 0)
    plain = wrap("q", lm, tokenizer())
    prior = plain.prompted("p0", None, [TopP(0.5)])
    tokens = torch.tensor([r + [0] * (2 - len(r)) for r in rows])[None]
    mask = (torch.arange(2) < torch.tensor([len(r) for r in rows])[:, None])[None]
    laws = token_laws(plain, prior, ["a"], tokens, mask)
    assert (laws.cross[mask] == torch.inf).all() and (laws.cross[~mask] == 0).all()
    assert torch.isfinite(laws.entropy).all() and torch.isfinite(laws.log_q).all()
    assert (laws.log_p0 == -torch.inf).any() and not laws.log_p0.isnan().any()
    back = token_laws(prior, plain, ["a"], tokens, mask)
    assert torch.isfinite(back.entropy).all() and torch.isfinite(back.cross).all()
    own = token_laws(prior, prior, ["a"], tokens, mask)
    assert torch.equal(own.cross, own.entropy)


def test_a_draw_keeps_the_probability_it_was_drawn_with():
    policy = wrap("q", model("llama", 0, sharp=1.0), tokenizer(), decodings=[TopP(0.95)])
    draws = policy.sample(["a", "c c"], 60, 3, seed=2)
    assert torch.isfinite(draws.log_q).all()
    assert torch.allclose(policy.log_prob(["a", "c c"], draws.tokens, draws.mask), draws.log_q, atol=3e-5)
    other = torch.tensor([[[t, 1, 1]] for t in (1, 2)])  # sequences of someone else
    tokens, mask = torch.cat([draws.tokens, other], 1), torch.cat([draws.mask, torch.ones_like(other, dtype=torch.bool)], 1)
    edge = policy.prompted("q", None, [TopP(0.01)])  # as if rounding had put all but the likeliest outside
    assert (token_laws(edge, policy, ["a", "c c"], tokens, mask).log_q[:, :60] == -torch.inf).any()
    kept = token_laws(edge, policy, ["a", "c c"], tokens, mask, drawn=draws.log_q)
    assert torch.isfinite(kept.log_q[:, :60]).all()


@pytest.mark.parametrize("word", ["top_p:0", "top_p:1.5", "top_p:2", "top_p:x"])
def test_refusals(word):
    with pytest.raises(UserError, match=r"p in \(0, 1\] expected|a number expected"):
        method.sampler(word)


def test_it_is_called_by_its_name():
    assert method.sampler("top_p:0.9") == method.sampler("top-p:.9") == TopP(0.9) and method.sampler("top_p") == TopP(1.0)
