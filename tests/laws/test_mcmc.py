"""Laws of the chain: exact stationarity of its kernel, and what a chain without the length factor tends to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_smc import CONVERGES, EVERY, TABLE, WORLD, answers, off, reward, rewritten, steering
from tiny import model, tokenizer

from klbench import laws, streams
from klbench.errors import UserError
from klbench.laws import check_steering
from klbench.policies.causal_lm import wrap
from klbench.samplers import mcmc
from klbench.samplers.mcmc import MCMC
from klbench.target import TiltedPrior

BETA = 0.4
WITHOUT = type("Mutant", (MCMC,), {"log_accept": lambda self, gain, tokens, new_tokens: np.minimum(0.0, gain)})


def test_laws_hold(broken):
    assert broken(check_steering(MCMC(64))) == []


def kernel(chain, p, beta):
    """[S, S] chance to go from answer to answer in a step: every cut, every end."""
    size, mass = EVERY.mask.sum(1).numpy(), WORLD.log_p0[p].exp().numpy()
    r = np.array(WORLD.reward[p]) / beta
    accept = np.exp(chain.log_accept(r[None, :] - r[:, None], size[:, None] + 0.0 * size, size[None, :] + 0.0 * size[:, None]))
    out = np.zeros((63, 63))
    for x in range(63):
        for k in range(size[x]):
            same = ((EVERY.tokens[:, :k] == EVERY.tokens[x, :k]).all(1) & EVERY.mask[:, :k].all(1)).numpy()
            out[x] += same * mass / (same * mass).sum() / size[x]
    out = out * accept
    return out + np.diag(1 - out.sum(1))


@pytest.mark.parametrize("beta", [0.4, 1.5])
@pytest.mark.parametrize("chain, holds", [(MCMC(), True), (WITHOUT(), False)])
def test_claim_c35_p_star_is_stationary(chain, holds, beta):
    for p in range(2):
        step, target = kernel(chain, p, beta), WORLD.log_target(beta)[p].exp().numpy()
        assert (np.abs(target @ step - target).max() < 1e-12) == holds
        limit = np.linalg.matrix_power(step, 4000)
        np.testing.assert_allclose(limit, limit[:1].repeat(63, 0), atol=1e-10)  # it is the only one
        assert (0.5 * np.abs(limit[0] - target).sum() < 1e-10) == holds
        flow = target[:, None] * step
        assert (np.abs(flow - flow.T).max() < 1e-12) == holds


def test_no_length_factor_is_rejected(broken):
    assert broken(check_steering(WITHOUT(4))) == [CONVERGES]


@pytest.mark.parametrize(
    "old, new, says",
    [
        # the last token is never left alone
        ("for k in cut.unique()", "cut = (cut - 1).clamp(min=0)\n    for k in cut.unique()", CONVERGES),
        ("written += int(more.mask[..., k:].sum())", "written += int(more.mask.sum())", "tokens and reward calls are counted"),
        ("zip(_parts(other), _parts(more), strict=True)", "zip(_parts(other)[:2], _parts(more))", "log_q is the prior's"),
    ],
)
def test_a_broken_proposal_is_rejected(monkeypatch, broken, old, new, says):
    rewritten(monkeypatch, mcmc, "proposed", old, new)
    monkeypatch.setattr(laws, "CLOSE", 1000 if says == CONVERGES else 50)
    assert says in broken(check_steering(MCMC(4)))


@pytest.mark.parametrize("factor", [0.6, 1.6])
def test_a_wrong_beta_is_rejected(broken, factor):
    assert broken(check_steering(steering(MCMC(4), target=lambda t: replace(t, beta=factor * t.beta)))) == [CONVERGES]


def test_one_proposal_for_all_chains_is_rejected(monkeypatch, broken):
    monkeypatch.setattr(mcmc, "proposed", lambda *given, made=mcmc.proposed: _first(made(*given)))
    monkeypatch.setattr(laws, "CLOSE", 50)
    assert "draws of one call are independent" in broken(check_steering(MCMC(4)))


def _first(found):
    """The proposals of the first chain for all."""
    draws, new = found
    return type(draws)(*(x[:, :1].expand_as(x).clone() for x in (draws.tokens, draws.mask, draws.log_q))), new


def test_no_step_is_the_prior():
    found = MCMC(0).steer(TABLE, TiltedPrior(TABLE, reward, BETA), TABLE.prompts, 50, WORLD.length, 3)
    drawn = TABLE.sample(TABLE.prompts, 50, WORLD.length, streams.seed(3, "start"))
    assert torch.equal(found.draws.tokens, drawn.tokens) and found.prior_tokens == int(drawn.mask.sum())


@pytest.mark.parametrize("steps, as_if, holds", [(3, 3, True), (3, 0, False)])
def test_a_few_steps_are_as_many_of_the_kernel(steps, as_if, holds):
    found = MCMC(steps).steer(TABLE, TiltedPrior(TABLE, reward, BETA), TABLE.prompts, 4000, WORLD.length, 1)
    for p, row in enumerate(answers(found.draws)):
        law = WORLD.log_p0[p].exp().numpy() @ np.linalg.matrix_power(kernel(MCMC(), p, BETA), as_if)
        assert (off(row, law) < 4.5) == holds


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model(kind):
    policy, prompts = wrap("p", model(kind, 0), tokenizer()), ["a", "b c a b"]
    target = TiltedPrior(policy, lambda prompts, completions, **kwargs: [float(c.count("b")) for c in completions], 0.3)
    found = MCMC(6).steer(policy, target, prompts, 20, 5, 0)
    assert torch.allclose(policy.log_prob(prompts, found.draws.tokens, found.draws.mask), found.draws.log_q, atol=5e-5)
    start = policy.sample(prompts, 20, 5, streams.seed(0, "start"))
    earned = [target.rewards(prompts, policy.decode(x.tokens, x.mask)).mean() for x in (start, found.draws)]
    assert earned[1] > earned[0] + 0.3


def test_refusals():
    with pytest.raises(UserError, match="at least 0 steps"):
        MCMC(-1)
