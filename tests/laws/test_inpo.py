"""Laws of INPO: a step is a mirror step, and the steps rest at the Nash policy and nowhere near."""

from itertools import product

import numpy as np
import pytest
import torch

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.laws import WORLDS, World, check_objective, expected_gradient, optimum
from klbench.method import RewardLaw
from klbench.objectives.inpo import INPO
from klbench.objectives.ipo import IPO
from klbench.preferences import bradley_terry, pairs

WORLD = WORLDS[1]


def test_laws_hold(broken):
    assert broken(check_objective(INPO())) == []


def wins(world):
    """[P, S, S] probability that the first beats the second."""
    return (world.rewards[:, :, None] - world.rewards[:, None, :]).sigmoid()


@pytest.mark.parametrize("ratio", [1 / 3, 0.05, 1.0])
def test_on_its_own_draws_the_ratio_is_a_factor(ratio):
    beta, log_q = 0.4, (WORLD.log_p0 + 0.5 * WORLD.rewards.sin()).log_softmax(1)
    pull = log_q - WORLD.log_p0 - (wins(WORLD) * log_q.exp()[:, None, :]).sum(2) / beta
    wanted = 4 * ratio * log_q.exp() * (pull - (log_q.exp() * pull).sum(1, keepdim=True)) / len(log_q)
    torch.testing.assert_close(expected_gradient(INPO(ratio), WORLD, log_q, beta), wanted)


def square(batch, beta, ratio=1 / 3, prior=True, margin=1.0, mine=True):
    H = batch.total(batch.log_q - ratio * batch.log_p0 * prior - (1 - ratio) * (batch.old_log_q if mine else batch.log_p0))
    i, j = pairs(H.shape[1])
    p, h, m = bradley_terry(batch.reward), H[:, i] - H[:, j], margin * ratio / (2 * beta)
    return (p * (h - m) ** 2 + (1 - p) * (h + m) ** 2).mean()


@pytest.mark.parametrize("wrong", [{}, {"prior": False}, {"margin": 2.0}, {"margin": -1.0}, {"mine": False}])
def test_mutants_do_not_rest_at_the_nash_policy(mutant, wrong):
    beta = 0.4
    best, scale = optimum(INPO(), WORLD, beta), float(expected_gradient(INPO(), WORLD, WORLD.log_p0, beta).norm())
    other = mutant(INPO, loss=lambda self, batch, beta: square(batch, beta, **wrong))
    assert (float(expected_gradient(other, WORLD, best, beta).norm()) > 1e-3 * scale) == bool(wrong)


def test_the_opponent_is_the_policy_and_not_the_prior():
    world, beta = WORLDS[0], 0.1
    scale = float(expected_gradient(INPO(), world, world.log_p0, beta).norm())
    assert float(expected_gradient(INPO(), world, optimum(IPO(), world, beta), beta).norm()) > 1e-2 * scale


def step_gradient(logits, old, ratio, beta):
    """Exact gradient at `logits` of the loss on pairs that the fixed `old` drew; one prompt, two draws."""
    logits, total = logits.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    log_q = logits.log_softmax(1)
    for draw in product(range(logits.shape[1]), repeat=2):
        d = torch.tensor([draw])
        log_p0, before, now = ((x[0][d])[..., None] for x in (WORLD.log_p0, old, log_q))
        batch = Batch(d[..., None], d[..., None] >= 0, now, log_p0, WORLD.rewards[0][d], d * 0.0, old_log_q=before)
        total = total + before.sum().exp() * INPO(ratio).loss(batch, beta)
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("ratio", [1 / 3, 1.0])
def test_a_step_fitted_to_the_end_is_a_mirror_step(ratio):
    beta, old = 0.4, (WORLD.log_p0 + 0.8 * WORLD.rewards.sin())[:1].log_softmax(1)
    win = (wins(WORLD)[:1] * old.exp()[:, None, :]).sum(2)
    after = ratio * WORLD.log_p0[:1] + (1 - ratio) * old + ratio / beta * win  # 1/eta = ratio/tau
    assert float(step_gradient(after, old, ratio, beta).norm()) < 1e-12
    assert float(step_gradient(old, old, ratio, beta).norm()) > 1e-2
    assert float(step_gradient(after, old, 0.5, beta).norm()) > 1e-2


@pytest.mark.parametrize("beta", [0.002, 0.02, 0.1, 3.0])
@pytest.mark.parametrize("spread", [0.3, 3.0, 60.0])
def test_nobody_beats_the_nash_policy(beta, spread):
    random = np.random.default_rng(0)
    law = RewardLaw.of(spread * random.normal(size=40), random.dirichlet(np.full(40, 0.5)))
    tilt = INPO().own(law.levels, law, beta, 2)
    q = law.mass * np.exp(tilt)
    assert q.sum() == pytest.approx(1, abs=1e-12)
    rate = 1 / (1 + np.exp(-np.clip(law.levels[:, None] - law.levels, -700, 700))) @ q
    assert np.ptp(tilt - rate / beta) < 1e-8 * max(1, 1 / beta)  # the best response to q is q


def test_a_reward_between_levels_is_one_of_no_mass():
    rewards, mass = np.array([-1.0, 0.2, 2.0, 3.0]), np.array([0.3, 0.3, 0.4, 1e-14])
    known, new = RewardLaw.of(rewards[:3], mass[:3]), RewardLaw.of(rewards, mass)
    np.testing.assert_allclose(*(INPO().own(rewards, law, 0.1, 2) for law in (known, new)), atol=1e-9)


def test_training_ends_at_the_nash_policy():
    world, beta = World(((1, 2, 3),), ((0.4, -0.3, 1.1),), draws=2, length=2), 0.1
    logits = world.log_p0.clone()
    adam = torch.optim.Adam([logits], lr=0.1)
    for _ in range(100):
        logits.grad = expected_gradient(INPO(), world, logits, beta)
        adam.step()
    q, best = logits.log_softmax(1), optimum(INPO(), world, beta)
    assert float((q.exp() * (q - best)).sum()) < 0.02 < float((q.exp() * (q - world.log_target(beta))).sum())


@pytest.mark.parametrize("ratio", [0.0, 1.1])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(UserError, match="ratio"):
        INPO(ratio)


def test_the_drawing_policy_is_needed():
    one = torch.zeros(1, 2, 1)
    with pytest.raises(ValueError, match="old_log_q"):
        INPO().loss(Batch(one.long(), one.bool() | True, one, one, one[..., 0], one[..., 0]), 1.0)
