"""Causal language models: what is sampled is what is scored, and both are the sum over every continuation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import continuations, exact, model, saved, tokenizer

from klbench.errors import UserError
from klbench.policies.causal_lm import CausalLM, _draw, load, token_laws, wrap

PROMPTS = ["a", "b c a b", "c c"]  # of different lengths, so that padding matters
T = 3


@pytest.fixture(params=["llama", "gpt2"])
def policy(request: pytest.FixtureRequest) -> CausalLM:
    return wrap(request.param, model(request.param, 0), tokenizer())


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([r + [0] * (T - len(r)) for r in rows])
    return tokens, torch.arange(T) < torch.tensor([len(r) for r in rows])[:, None]


def test_log_prob_is_the_plain_forward_for_every_continuation(policy: CausalLM) -> None:
    rows = continuations(4, T)
    tokens, mask = padded(rows)
    got = policy.log_prob(PROMPTS, tokens.expand(3, -1, -1), mask.expand(3, -1, -1)).sum(2)
    want = torch.stack([exact(policy.model, policy.encode(p), rows) for p in PROMPTS])
    assert torch.allclose(got.double(), want, atol=2e-5)
    assert torch.allclose(want.exp().sum(1), torch.ones(3, dtype=torch.float64), atol=1e-6)  # nothing is missing from the list
    shifted = policy.log_prob(PROMPTS, tokens.roll(1, 1).expand(3, -1, -1), mask.expand(3, -1, -1)).sum(2)
    assert not torch.allclose(shifted.double(), want, atol=1e-2)


def test_sampled_log_probabilities_are_those_of_the_scorer(policy: CausalLM) -> None:
    draws = policy.sample(PROMPTS, 40, T, seed=3)
    assert torch.allclose(policy.log_prob(PROMPTS, draws.tokens, draws.mask), draws.log_q, atol=2e-5)
    ended = (draws.tokens == policy.eos) & draws.mask
    assert ended.any() and (draws.mask.sum(2) >= 1).all()
    after = ended.cumsum(2) - ended.long()
    assert not (draws.mask & (after > 0)).any()  # nothing counts after EOS


def test_draws_follow_the_law(policy: CausalLM) -> None:
    rows = continuations(4, T)
    index = {tuple(r): i for i, r in enumerate(rows)}
    draws = policy.sample(PROMPTS[:1], 20000, T, seed=0)
    counts = torch.zeros(len(rows), dtype=torch.float64)
    for row, keep in zip(draws.tokens[0], draws.mask[0], strict=True):
        counts[index[tuple(row[keep].tolist())]] += 1
    p = exact(policy.model, policy.encode(PROMPTS[0]), rows).exp()
    z = (counts - 20000 * p) / (20000 * p * (1 - p)).sqrt().clamp(min=1e-9)
    assert z.abs().max() < 4.8
    wrong = (counts - 20000 * p.roll(1)) / (20000 * p.roll(1)).sqrt()
    assert wrong.abs().max() > 10


def test_seed_alone_decides_the_draws(policy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = policy.sample(PROMPTS, 24, T, seed=5)
    monkeypatch.setattr("klbench.policies.causal_lm.ROWS", 10)
    pieces = policy.sample(PROMPTS, 24, T, seed=5)
    assert torch.equal(whole.tokens, pieces.tokens)
    assert not torch.equal(whole.tokens, policy.sample(PROMPTS, 24, T, seed=6).tokens)


def test_token_laws_are_sums_over_the_vocabulary(policy: CausalLM) -> None:
    other = wrap("other", model("llama", 9), policy.tokenizer)
    draws = policy.sample(PROMPTS, 5, T, seed=1)
    laws = token_laws(policy, other, PROMPTS, draws.tokens, draws.mask)
    for p, prompt in enumerate(PROMPTS):
        ids = policy.encode(prompt)
        for n in range(5):
            for t in range(int(draws.mask[p, n].sum())):
                prefix = torch.tensor([ids + draws.tokens[p, n, :t].tolist()])
                with torch.no_grad():
                    lq, l0 = (m.model(prefix).logits[0, -1].double().log_softmax(-1) for m in (policy, other))
                assert laws.entropy[p, n, t] == pytest.approx(-(lq.exp() * lq).sum().item(), abs=2e-5)
                assert laws.cross[p, n, t] == pytest.approx(-(lq.exp() * l0).sum().item(), abs=2e-5)
                assert laws.log_p0[p, n, t] == pytest.approx(l0[draws.tokens[p, n, t]].item(), abs=2e-5)
                if t:  # the mutant that reads one position too early
                    assert laws.entropy[p, n, t] != pytest.approx(laws.entropy[p, n, t - 1].item(), abs=1e-6)


def test_gradient_of_the_tree_pass_is_that_of_the_plain_pass(policy: CausalLM) -> None:
    tokens = torch.tensor([[[1, 2, 3], [3, 3, 1]]])
    policy.log_probs(["b c"], tokens).sum().backward()
    head = policy.model.get_output_embeddings().weight
    tree = head.grad.clone()
    policy.model.zero_grad()
    for row in tokens[0].tolist():
        ids = torch.tensor([policy.encode("b c") + row])
        logp = policy.model(ids).logits[0, 1:-1].log_softmax(-1)
        logp[torch.arange(3), torch.tensor(row)].sum().backward()
    assert torch.allclose(tree, head.grad, atol=1e-5) and tree.abs().max() > 1e-3


def test_inverse_cdf_never_draws_a_token_of_probability_zero() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]).repeat(4, 1)
    token, logp = _draw(logits, torch.tensor([0.0, 0.2689414, 0.5, 1 - 1e-17], dtype=torch.float64))
    assert set(token.tolist()) <= {0, 2} and torch.isfinite(logp).all()


def test_a_saved_policy_comes_back_with_its_hash(policy: CausalLM, tmp_path: Path) -> None:
    policy.save(tmp_path / "p")
    again = load(tmp_path / "p")
    assert again.weights_hash() == policy.weights_hash()
    assert not list((tmp_path / "p").glob("*.bin")) and list((tmp_path / "p").glob("*.safetensors"))


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no model in .*config\.json is missing"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="no model directory"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match="no EOS"):
        load(saved(tmp_path / "no_eos", "llama", 0, eos=None))
    weights = saved(tmp_path / "cut", "llama", 0) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match="no model could be loaded"):
        load(tmp_path / "cut")
    a, b = load(saved(tmp_path / "a", "llama", 0)), load(saved(tmp_path / "b", "llama", 0, words=["<eos>", "a", "b", "d"]))
    tokens = torch.zeros(1, 1, 2, dtype=torch.long)
    with pytest.raises(UserError, match="different tokenizers"):
        token_laws(a, b, ["a"], tokens, tokens == 0)
