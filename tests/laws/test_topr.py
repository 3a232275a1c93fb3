"""Laws of TOPR: a bounded loss whose end is p0(.|right), where REINFORCE on the same draws falls for ever."""

import numpy as np
import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, World, check_objective, expected_gradient, stated_gradient
from klbench.method import RewardLaw
from klbench.objectives.topr import TOPR

TWO = World(counts=((3, 2, 1),), reward=((1.0, 0.0, 1.0),), draws=1, length=2)


def test_laws_hold(broken):
    assert broken(check_objective(TOPR())) == []


def off(objective, of=None, world=WORLDS[1]):
    """Relative gap between the expected gradient and that of the stated loss, at the prior and on both sides of it."""
    points = [world.log_p0 + step * world.rewards.sin() for step in (0.0, 0.9, -0.9)]
    pairs = [(expected_gradient(objective, world, x, 1.0), stated_gradient(of or objective, world, x, 1.0)) for x in points]
    return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)


@pytest.mark.parametrize("baseline", [0.6, -0.5])
def test_the_gradient_is_that_of_the_stated_loss(baseline):
    assert off(TOPR(baseline=baseline)) < 1e-6
    assert off(TOPR(baseline=baseline), of=TOPR()) > 1e-2


def tapered(batch, taper="topr", per_token=False):
    u = batch.total(batch.log_q - batch.log_p0) / (batch.mask.sum(2) if per_token else 1)
    low = u.clamp(max=0).exp()
    g = {"topr": low + u.relu(), "twice": low + u.clamp(min=0), "none": u, "unclipped": u.exp(), "held": low.detach() * u}[taper]
    return ((1 - batch.success()) * g - batch.success() * u).mean()


@pytest.mark.parametrize("wrong", [{}, {"taper": "twice"}, {"taper": "none"}, {"taper": "unclipped"}, {"per_token": True}])
def test_mutants_are_rejected(mutant, wrong):
    # "twice": both branches have their slope at u = 0, where training starts
    gap = off(mutant(TOPR, loss=lambda self, batch, beta: tapered(batch, **wrong)), of=TOPR())
    assert gap > 1e-2 if wrong else gap < 1e-6


def test_the_gradient_is_that_of_the_clipped_ratio_held_fixed(mutant):
    # the paper's form: clip(q/p0, 0, 1), no gradient through it, times log q
    world, held = WORLDS[1], mutant(TOPR, loss=lambda self, batch, beta: tapered(batch, taper="held"))
    logits = world.log_p0 + 0.9 * world.rewards.sin()
    torch.testing.assert_close(expected_gradient(TOPR(), world, logits, 1.0), expected_gradient(held, world, logits, 1.0))


def test_the_baseline_sets_the_effective_share_of_right_draws():
    p, c, one = 0.25, 0.6, torch.ones(1, 4, 1, dtype=torch.float64)
    log_q = one.clone().requires_grad_()
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    batch = Batch(one.long(), one > 0, log_q, one, reward, reward, top=torch.ones(1))
    (pull,) = torch.autograd.grad(TOPR(baseline=c).loss(batch, 1.0), log_q)
    share = float(-pull[0, 0] / pull.abs().sum())
    assert share == pytest.approx(p * (1 - c) / (1 + c * (1 - 2 * p)))
    assert share == pytest.approx(1 / 13)


def descended(loss, steps):
    """Loss and log q of the wrong answer after gradient descent at rate 1 on one prompt, one of three answers wrong."""
    log_p0, right = TWO.log_p0[0], TWO.rewards[0]
    logits = log_p0.clone().requires_grad_()
    for _ in range(steps):
        value = loss(logits.log_softmax(0), log_p0, right)
        logits = (logits - torch.autograd.grad(value, logits)[0]).detach().requires_grad_()
    return float(value.detach()), float(logits.detach().log_softmax(0)[1])


def test_bounded_where_reinforce_is_not():
    naive = lambda log_q, log_p0, right: -(log_p0.exp() * (2 * right - 1) * (log_q - log_p0)).sum()  # noqa: E731
    mine = lambda log_q, log_p0, right: TOPR().stated(log_q, log_p0, right, 1.0, 1)  # noqa: E731
    low = float(-(TWO.log_p0[0].exp() * TWO.rewards[0]).sum() * np.log(6 / 4))  # at p0(.|right), ratios 6/4
    first, second, third = (descended(naive, steps) for steps in (100, 200, 300))
    assert third[1] - second[1] == pytest.approx(second[1] - first[1], rel=0.01) and third[1] < -100 and third[0] < 10 * low
    second, third = descended(mine, 200), descended(mine, 300)
    assert low < third[0] < second[0] and -10 < third[1] < second[1]


def test_training_ends_at_the_right_answers_of_the_prior():
    logits = TWO.log_p0.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.5)
    for _ in range(30):
        logits.grad = expected_gradient(TOPR(), TWO, logits, 1.0)
        adam.step()
    q = logits.detach().softmax(1)[0]
    assert q[1] < 1e-2 and float(q[0] / q[2]) == pytest.approx(3.0, rel=0.02)


def test_own_by_hand():
    law = RewardLaw.of(np.array([0.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(np.exp(TOPR().own(np.array([0.0, 1.0]), law, 0.3, 8)), [0.0, 4.0])


def test_a_baseline_of_one_is_refused():
    with pytest.raises(ValueError, match="between -1 and 1"):
        TOPR(baseline=1.0)
