"""Laws of conditional training: under the first control it clones the right prior draws, under the second the wrong ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from klbench import method
from klbench.batch import Batch
from klbench.errors import UserError
from klbench.laws import WORLDS, World, check_objective, expected_gradient, stated_gradient
from klbench.method import RewardLaw
from klbench.objectives.conditional_training import ConditionalTraining

TWO = World(counts=((3, 2, 1),), reward=((1.0, 0.0, 1.0),), draws=1, length=2)


def test_laws_hold(broken):
    assert broken(check_objective(ConditionalTraining())) == []


def cloned(batch, every=False, per_token=False, push=0.0):
    log_q = batch.total(batch.log_q) / (batch.mask.sum(2) if per_token else 1)
    right = torch.ones_like(log_q) if every else batch.success()
    return -((right - push * (1 - right)) * log_q).mean()


@pytest.mark.parametrize("wrong", [{}, {"every": True}, {"push": 0.1}])
def test_mutants_are_rejected(mutant, wrong):
    world = WORLDS[1]
    logits = world.log_p0 + 0.9 * world.rewards.sin()
    found = expected_gradient(mutant(ConditionalTraining, loss=lambda self, batch, beta: cloned(batch, **wrong)), world, logits, 1.0)
    wanted = stated_gradient(ConditionalTraining(), world, logits, 1.0)
    gap = float((found - wanted).norm() / wanted.norm())
    assert gap > 1e-2 if wrong else gap < 1e-6


@pytest.mark.parametrize("wrong", [{}, {"per_token": True}])
def test_right_answers_of_two_lengths_keep_the_ratio_of_the_prior(mutant, wrong):
    inside = torch.tensor([[3.0, 1e-15, 1.0]], dtype=torch.float64).log()
    gradient = expected_gradient(mutant(ConditionalTraining, loss=lambda self, batch, beta: cloned(batch, **wrong)), TWO, inside, 1.0)
    assert (float(gradient.norm()) > 1e-2) == bool(wrong)


def test_declaring_the_posterior_is_rejected(mutant, broken):
    def own(self, reward, law, beta, draws):
        return reward / beta - law.log_mean_exp(law.levels / beta)

    assert broken(check_objective(mutant(ConditionalTraining, own=own))) == ["the gradient vanishes at the declared optimum"]


def test_training_ends_at_the_right_answers_of_the_prior():
    logits = TWO.log_p0.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.5)
    for _ in range(30):
        logits.grad = expected_gradient(ConditionalTraining(), TWO, logits, 1.0)
        adam.step()
    q = logits.detach().softmax(1)[0]
    assert q[1] < 1e-2 and float(q[0] / q[2]) == pytest.approx(3.0, rel=1e-3)


def test_each_answer_is_read_under_its_own_control():
    reward, shape = torch.tensor([[1.0, 0.0]]), (1, 2, 1)
    good, bad = torch.tensor([[-1.0, -2.0]]).view(shape), torch.tensor([[-4.0, -8.0]]).view(shape)
    batch = Batch(good.long(), good < 0, good, good, reward, torch.zeros(1, 2), top=torch.ones(1), other_log_q=bad)
    assert ConditionalTraining().loss(batch, 1.0).item() == pytest.approx((1 + 8) / 2)
    assert ConditionalTraining().loss(replace(batch, other_log_q=None), 1.0).item() == pytest.approx(1 / 2)


def test_own_by_hand():
    law = RewardLaw.of(np.array([0.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(np.exp(ConditionalTraining().own(np.array([0.0, 1.0]), law, 0.3, 8)), [0.0, 4.0])


def test_the_laws_hold_with_weights(broken):
    assert broken(check_objective(method.objective("conditional_training:good=2,bad=0.1"))) == []


ONE = World(counts=((4, 1, 2),), reward=((0.0, 0.9, 0.9),), draws=1, length=2)
WEIGHTED = ConditionalTraining(good=2.0, bad=0.1)


def gradients(objective, good, bad):
    """Exact gradients at two tables [1, S] of the expected loss on prior draws of ONE, read under "good" and under "bad"."""
    tables, total = [x.clone().requires_grad_() for x in (good, bad)], torch.zeros((), dtype=torch.float64)
    for a in range(ONE.rewards.shape[1]):
        d = torch.full((1, 1, 1), a)
        p0, one, two = (x.log_softmax(1)[0][d] for x in (ONE.log_p0, *tables))
        batch = Batch(d, d >= 0, one, p0, ONE.rewards[0][d[0]], torch.zeros(1, 1), top=ONE.top, other_log_q=two)
        total = total + p0.exp().sum() * objective.loss(batch, 1.0)
    return torch.autograd.grad(total, tables)


def test_weights_scale_the_two_terms_and_move_neither_optimum():
    some = ONE.log_p0 + ONE.rewards.sin()
    plain, weighted = (gradients(x, some, some) for x in (ConditionalTraining(), WEIGHTED))
    for factor, before, after in zip((2.0, 0.1), plain, weighted, strict=True):
        torch.testing.assert_close(after, factor * before)
        assert float(after.norm()) > 1e-3
    right, wrong = (torch.where(mask, ONE.log_p0, -60.0) for mask in (ONE.rewards > 0, ONE.rewards == 0))
    assert all(float(x.norm()) < 1e-9 for x in gradients(WEIGHTED, right, wrong))
    assert all(float(x.norm()) > 1e-2 for x in gradients(WEIGHTED, wrong, right))


@pytest.mark.parametrize("objective, meets", [(WEIGHTED, True), (ConditionalTraining(), False)])
def test_controls_that_are_not_told_apart_end_at_the_prior_reweighted(objective, meets):
    right = (ONE.rewards > 0).double()
    shared = ONE.log_p0 + (2.0 * right + 0.1 * (1 - right)).log()
    assert (float(sum(gradients(objective, shared, shared)).norm()) < 1e-12) == meets


@pytest.mark.parametrize("given", [{"good": 0.0}, {"good": -1.0}, {"bad": -0.1}])
def test_weights_out_of_range_are_refused(given):
    with pytest.raises(UserError, match="conditional_training: weights above 0"):
        ConditionalTraining(**given)
