"""Laws of NPO: gradient ascent weighed by W = 2 sigma(beta u); a wrong answer's log q falls like log steps; the end is p0(.|right)."""

import math

import numpy as np
import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, World, check_objective, expected_gradient, stated_gradient
from klbench.method import RewardLaw
from klbench.objectives.npo import NPO

TWO = World(counts=((3, 2, 1),), reward=((1.0, 0.0, 1.0),), draws=1, length=2)


def test_laws_hold(broken):
    assert broken(check_objective(NPO())) == []


def forgetting(batch, beta, factor=2.0, ascent=False, sign=1.0, per_token=False):
    u = batch.total(batch.log_q - batch.log_p0) / (batch.mask.sum(2) if per_token else 1)
    forget = u if ascent else -factor / beta * torch.nn.functional.logsigmoid(-sign * beta * u)
    return ((1 - batch.success()) * forget - batch.success() * batch.total(batch.log_q)).mean()


@pytest.mark.parametrize("wrong", [{}, {"factor": 1.0}, {"ascent": True}, {"sign": -1.0}, {"per_token": True}])
def test_mutants_are_rejected(mutant, wrong):
    world = WORLDS[1]
    logits = world.log_p0 + 0.9 * world.rewards.sin()
    found = expected_gradient(mutant(NPO, loss=lambda self, *given: forgetting(*given, **wrong)), world, logits, 0.7)
    wanted = stated_gradient(NPO(), world, logits, 0.7)
    gap = float((found - wanted).norm() / wanted.norm())
    assert gap > 1e-2 if wrong else gap < 1e-6


def wrong_draws(u):
    """One prompt, wrong draws only, at log-ratios u."""
    shape = (1, len(u), 1)
    log_p0 = torch.full(shape, -3.0, dtype=torch.float64)
    log_q = (log_p0 + torch.tensor(u, dtype=torch.float64).view(shape)).requires_grad_()
    return Batch(log_p0.long(), log_p0 < 0, log_q, log_p0, torch.zeros(1, len(u)), torch.zeros(1, len(u)), top=torch.ones(1))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_weight_of_a_wrong_draw(beta):
    u = [0.0, -2.0, 3.0]
    batch = wrong_draws(u)
    (pull,) = torch.autograd.grad(NPO().loss(batch, beta), batch.log_q)
    wanted = [2 / (1 + math.exp(-beta * x)) / 3 for x in u]
    assert pull.flatten().tolist() == pytest.approx(wanted)
    assert wanted[0] == pytest.approx(1 / 3)  # at the prior, gradient ascent's


def test_a_small_beta_is_gradient_ascent_up_to_a_constant():
    # -(2/beta) log sigma(-beta u) = (2/beta) log 2 + u + O(beta)
    batch = wrong_draws([0.0, -2.0, 3.0])
    beta = 1e-4
    assert NPO().loss(batch, beta).item() - 2 / beta * math.log(2) == pytest.approx(1 / 3, abs=1e-3)


def fallen(beta, steps, ascent=False):
    """log q of the wrong one of two answers after gradient descent at rate 1, nothing retained."""
    log_p0 = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    right = torch.tensor([1.0, 0.0], dtype=torch.float64)
    logits, passed = log_p0.clone().requires_grad_(), []
    for step in range(1, max(steps) + 1):
        log_q = logits.log_softmax(0)
        loss = log_p0[1].exp() * log_q[1] if ascent else NPO(retain=0.0).stated(log_q, log_p0, right, beta, 1)
        logits = (logits - torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
        if step in steps:
            passed.append(float(logits.detach().log_softmax(0)[1]))
    return passed


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_a_wrong_answer_falls_by_one_over_beta_per_unit_of_log_steps(beta):
    early, late = fallen(beta, (200, 800))
    assert (early - late) / math.log(4) == pytest.approx(1 / beta, rel=0.05)


def test_under_gradient_ascent_it_falls_by_a_constant_a_step():
    first, second, third = fallen(1.0, (300, 600, 900), ascent=True)
    assert second - third == pytest.approx(first - second, rel=1e-3) and first - second > 50


def test_training_ends_at_the_right_answers_of_the_prior():
    logits = TWO.log_p0.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.5)
    for _ in range(30):
        logits.grad = expected_gradient(NPO(), TWO, logits, 1.0)
        adam.step()
    q = logits.detach().softmax(1)[0]
    assert q[1] < 1e-2 and float(q[0] / q[2]) == pytest.approx(3.0, rel=0.02)


def test_with_nothing_retained_right_answers_may_share_as_they_like():
    skewed = torch.tensor([[0.2, 1e-26, 0.8]], dtype=torch.float64).log()
    assert float(expected_gradient(NPO(retain=0.0), TWO, skewed, 1.0).norm()) < 1e-12
    assert float(expected_gradient(NPO(), TWO, skewed, 1.0).norm()) > 0.1


def test_own_by_hand():
    law = RewardLaw.of(np.array([0.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(np.exp(NPO().own(np.array([0.0, 1.0]), law, 0.3, 8)), [0.0, 4.0])
