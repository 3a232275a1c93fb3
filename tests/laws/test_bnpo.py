"""Laws of BNPO: no optimum is known, so the gradient, its limits and the Beta density are held to their closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta as beta_law

from klbench.batch import Batch
from klbench.laws import WORLDS, World, check_objective, expected_gradient, fresh_state
from klbench.objectives.bnpo import BNPO
from klbench.objectives.grpo import GRPO

WORLD = WORLDS[0]
LOGITS = WORLD.log_p0 + 0.5 * WORLD.rewards.sin()


def fitted(a, b):
    """A state whose two other prompts have the mean and the variance of Beta(a, b)."""
    mean, sd = beta_law(a, b).mean(), beta_law(a, b).std()
    return {"rate": torch.tensor([0.0, mean - sd, mean + sd]).double(), "visits": torch.tensor([0.0, 1.0, 1.0]).double()}


def test_laws_hold(broken):
    assert broken(check_objective(BNPO())) == []


@pytest.mark.parametrize("a, b", [(2.0, 5.0), (1.5, 1.5), (0.4, 3.0)])
def test_the_density_is_that_of_the_beta_law(a, b):
    p = np.linspace(0, 1, 9)
    found = BNPO().density(torch.from_numpy(p), fitted(a, b))
    np.testing.assert_allclose(found, beta_law(1 + a / 3, 1 + b / 3).pdf(p), rtol=1e-9)


def test_the_density_is_one_until_two_rates_differ():
    p = torch.linspace(0, 1, 5, dtype=torch.float64)
    for rate, visits in (([0.2, 0.7], [1, 0]), ([0.5, 0.5], [2, 1]), ([0.0, 1.0], [0, 0]), ([0.0, 1.0], [1, 1])):
        state = {"rate": torch.tensor(rate).double(), "visits": torch.tensor(visits).double()}
        assert BNPO().density(p, state).tolist() == [1.0] * 5  # (0, 1): a + b = 0


def test_no_other_beta_density_is_quieter():
    p = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    mass = torch.from_numpy(beta_law(2, 5).pdf(p.numpy()))

    def noise(density):
        return float((mass * p * (1 - p) / density**2).mean())

    best = noise(BNPO().density(p, fitted(2, 5)))
    assert best == pytest.approx(0.0947, abs=1e-4)
    assert noise(BNPO().density(p, fitted(1.5, 1.5))) == pytest.approx(0.1542, abs=1e-4)
    assert noise(torch.ones_like(p)) == pytest.approx(0.1786, abs=1e-4)
    for a, b in ((2.1, 5), (1.9, 5), (2, 5.2), (2, 4.8)):
        assert noise(BNPO().density(p, fitted(a, b))) > best * (1 + 1e-5)


def strength(p, state, K=WORLD.draws):
    """E[ k/K (1 - k/K) / f(k/K) ] / (p (1-p)), k ~ Bin(K, p)."""
    rates = [k / K for k in range(K + 1)]
    density = BNPO().density(torch.tensor(rates, dtype=torch.float64), state).tolist()
    return sum(
        math.comb(K, k) * p**k * (1 - p) ** (K - k) * x * (1 - x) / f
        for k, x, f in zip(range(1, K), rates[1:-1], density[1:-1], strict=True)
    ) / (p * (1 - p))


def wanted(beta, state):
    """-grad P E[p (1-p) / f] / (P (1-P)) + beta grad KL(q || p0); the third answer of WORLD is right."""
    logits = LOGITS.clone().requires_grad_()
    log_q = logits.log_softmax(1)[0]
    p = log_q[2].exp()
    loss = -strength(p.item(), state) * p + beta * (log_q.exp() * (log_q - WORLD.log_p0[0])).sum()
    return torch.autograd.grad(loss, logits)[0]


STATES = [fresh_state(BNPO(), WORLD), fitted(2.0, 5.0), fitted(1.5, 1.5)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_expected_gradient(state, beta):
    torch.testing.assert_close(expected_gradient(BNPO(), WORLD, LOGITS, beta, state), wanted(beta, state))


def plain(batch, beta, state, inside=False, scale=True, graded=False, per_token=False):
    right = batch.reward if graded else batch.success()
    rate, K = batch.success().mean(1, keepdim=True), right.shape[1]
    u = batch.total(batch.log_q - batch.log_p0).detach()
    charge = beta * (u - u.mean(1, keepdim=True)) * K / (K - 1)
    density = BNPO().density(rate, state).clamp(min=1e-6) if scale else 1.0
    gap = right - right.mean(1, keepdim=True)
    advantage = (gap - charge) / density if inside else gap / density - charge
    log_q = batch.total(batch.log_q)
    return -(advantage * (log_q / batch.mask.sum(2) if per_token else log_q)).mean(), state


@pytest.mark.parametrize("wrong", [{}, {"inside": True}, {"scale": False}, {"graded": True}, {"per_token": True}])
def test_the_closed_form_tells_mutants(mutant, wrong):
    state = fitted(2.0, 5.0)
    found = expected_gradient(mutant(BNPO, loss=lambda self, *given: plain(*given, **wrong)), WORLD, LOGITS, 0.7, state)
    assert torch.allclose(found, wanted(0.7, state), rtol=1e-6, atol=1e-8) == (not wrong)


def test_the_wrong_sign_is_rejected(mutant, broken):
    def loss(self, batch, beta, state):
        value, state = BNPO().loss(batch, beta, state)
        return -value, state

    assert broken(check_objective(mutant(BNPO, loss=loss)))


def test_with_the_spread_of_grpo_it_is_grpo():
    world = World(counts=((5, 3, 2),), reward=((0.0, 0.0, 1.0),), draws=4, length=1, vocabulary=3)
    logits = torch.tensor([[0.2, -0.7, 0.9]], dtype=torch.float64)
    found = expected_gradient(BNPO(), world, logits, 0.0, fitted(1.5, 1.5))
    torch.testing.assert_close(found, math.pi / 8 * expected_gradient(GRPO(delta=1e-12), world, logits, 0.0))


def test_without_a_spread_over_prompts_its_fixed_point_is_known():
    K, beta = WORLD.draws, 0.4
    at = WORLD.log_p0 + (WORLD.rewards == WORLD.top[:, None]).double() * (K - 1) / (K * beta)
    assert float(expected_gradient(BNPO(), WORLD, at, beta, STATES[0]).norm()) < 1e-12
    assert float(expected_gradient(BNPO(), WORLD, at, beta, STATES[1]).norm()) > 5e-3


@pytest.mark.parametrize("state", STATES[1:])
@pytest.mark.parametrize("beta", [0.9, 3.0])
def test_given_the_density_the_fixed_point_solves_for_the_rate(state, beta):
    start = float(WORLD.log_p0[0, 2].exp())
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    p = brentq(lambda p: logit(p) - logit(start) - strength(p, state) / beta, 1e-9, 1 - 1e-9, xtol=1e-15)
    assert p > start + 0.04
    right = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).double()
    at = WORLD.log_p0 + right * (logit(p) - logit(start))
    assert float(expected_gradient(BNPO(), WORLD, at, beta, state).norm()) < 1e-10


def group(right, prompt):
    log_q = torch.full((1, len(right), 1), -1.0, dtype=torch.float64)
    reward = torch.tensor([right], dtype=torch.float64)
    return Batch(
        torch.zeros_like(log_q).long(),
        torch.ones_like(log_q).bool(),
        log_q,
        log_q,
        reward,
        reward * 0,
        prompt=torch.tensor([prompt]),
        top=torch.ones(1).double(),
    )


def test_the_state_keeps_the_last_rate_of_each_prompt():
    state = before = BNPO().init(3, 0)
    for right, prompt in (([1, 0, 0, 0], 1), ([1, 1, 0, 0], 1), ([1, 1, 1, 1], 2)):
        _, state = BNPO().loss(group(right, prompt), 0.5, state)
    assert state["rate"].tolist() == [0.0, 0.5, 1.0] and state["visits"].tolist() == [0.0, 2.0, 1.0]
    assert before["visits"].tolist() == [0.0, 0.0, 0.0]


def test_a_group_of_one_kind_has_no_signal():
    log_q = torch.full((1, 3, 1), -1.0, dtype=torch.float64, requires_grad=True)
    for right in ([1, 1, 1], [0, 0, 0]):
        loss, _ = BNPO().loss(replace(group(right, 0), log_q=log_q), 0.5, fitted(2.0, 5.0))
        assert float(torch.autograd.grad(loss, log_q)[0].abs().max()) == 0.0


def test_refusals():
    with pytest.raises(ValueError, match="K >= 2"):
        BNPO().loss(group([1], 0), 1.0, BNPO().init(1, 0))
    with pytest.raises(ValueError, match="ceiling"):
        BNPO().loss(replace(group([1, 0], 0), top=None), 1.0, BNPO().init(1, 0))
