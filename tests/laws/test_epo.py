"""Laws of EPO: an entropy bonus flattens its optimum; the published penalty has no gradient, the hinge has one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient, fresh_state, stated_gradient
from klbench.objectives.epo import EPO

WORLD = WORLDS[0]
LOGITS = WORLD.log_p0 + 0.5 * WORLD.rewards.sin()


@pytest.mark.parametrize("entropy", [0.001, 0.5])
def test_laws_hold(broken, entropy):
    assert broken(check_objective(EPO(entropy))) == []


@pytest.mark.parametrize("world", WORLDS)
def test_the_factor_is_one(world):
    objective, logits = EPO(0.3), world.log_p0 + 0.5 * world.rewards.sin()
    found = expected_gradient(objective, world, logits, 0.7, fresh_state(objective, world))
    torch.testing.assert_close(found, stated_gradient(objective, world, logits, 0.7), rtol=1e-6, atol=1e-8)


def plain(batch, beta, state, c=0.001, leak=False, per_token=False):
    log_q, K = batch.total(batch.log_q), batch.reward.shape[1]
    gain = batch.reward - (beta + (0 if leak else c)) * log_q.detach() + beta * batch.total(batch.log_p0)
    score = log_q / batch.mask.sum(2) if per_token else log_q
    bonus = c * log_q.mean() if leak else 0.0  # the entropy differentiated on fixed draws: no gradient in expectation
    return -((gain - gain.mean(1, keepdim=True)) * score * K / (K - 1)).mean() + bonus, state


@pytest.mark.parametrize("wrong", [{}, {"c": -0.001}, {"leak": True}, {"per_token": True}])
def test_mutants_are_rejected(mutant, broken, wrong):
    found = broken(check_objective(mutant(EPO, loss=lambda self, *given: plain(*given, **wrong))))
    assert bool(found) == bool(wrong)


def test_own_tilt_by_hand():
    # beta 1, c 1: sqrt(p0 e^r), so over p0 it is sqrt(e^r / p0)
    found = EPO(1.0).own_tilt(np.log([0.2, 0.8]), np.array([1.0, 0.0]), 1.0, 8)
    np.testing.assert_allclose(np.exp(found), np.sqrt([np.e / 0.2, 1 / 0.8]))


def group():
    log_q = torch.tensor([[-1.0, -2.0, -4.0]], dtype=torch.float64)[..., None].requires_grad_()
    reward = torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64)
    prior = torch.full_like(log_q, -2.0)
    return Batch(torch.zeros(1, 3, 1).long(), torch.ones(1, 3, 1).bool(), log_q, prior, reward, reward * 0, prompt=torch.tensor([1]))


def known(past):
    return {"past": torch.tensor([0.0, past]).double(), "visits": torch.tensor([0.0, 2.0]).double()}


def gradient(objective, state):
    batch = group()
    loss, _ = objective.loss(batch, 0.5, state)
    return loss.item(), torch.autograd.grad(loss, batch.log_q)[0].flatten()


# the others' means of -log q are 3, 2.5 and 1.5; the range is [.8, 1.2] times the past
@pytest.mark.parametrize("past, side", [(2.5, (0, 0, -1)), (1.0, (1, 1, 1)), (2.0, (1, 1, -1)), (9.0, (-1, -1, -1))])
def test_the_penalty_as_published_moves_the_value_and_no_parameter(past, side):
    value, found = gradient(EPO(0.2), known(past))
    free, wanted = gradient(EPO(0.2, penalty=0.0), known(past))
    assert torch.equal(found, wanted)
    assert value - free == pytest.approx(0.2 * 0.1 * np.abs(side).mean())


@pytest.mark.parametrize("past, side", [(2.5, (0, 0, -1)), (1.0, (1, 1, 1)), (2.0, (1, 1, -1)), (9.0, (-1, -1, -1))])
def test_the_hinge_changes_the_bonus_of_draws_outside(past, side):
    _, found = gradient(EPO(0.2, hinge=True), known(past))
    per_side = {s: gradient(EPO(0.2 * (1 - 0.1 * s)), known(past))[1] for s in (-1, 0, 1)}
    torch.testing.assert_close(found, torch.stack([per_side[s][k] for k, s in enumerate(side)]))
    assert not torch.equal(found, per_side[0])


def test_the_hinge_is_the_slope_of_the_distance_to_the_range():
    """Above the range at every group: the gradient is that of -J + c alpha penalty (H - 1.2 past)."""
    objective = EPO(0.3, penalty=0.4, hinge=True)
    state = {"past": torch.full((1,), 0.1).double(), "visits": torch.ones(1).double()}
    logits = LOGITS.clone().requires_grad_()
    log_q = logits.log_softmax(1)
    (slope,) = torch.autograd.grad(-0.3 * 0.4 * (log_q.exp() * log_q).sum(), logits)
    wanted = stated_gradient(objective, WORLD, LOGITS, 0.7) + slope
    torch.testing.assert_close(expected_gradient(objective, WORLD, LOGITS, 0.7, state), wanted, rtol=1e-6, atol=1e-8)


def test_the_first_visit_has_no_range():
    torch.testing.assert_close(gradient(EPO(0.2, hinge=True), EPO().init(2, 0))[1], gradient(EPO(0.2), known(2.5))[1])


def test_the_past_is_the_mean_over_steps():
    first = EPO().init(2, 0)
    _, second = EPO().loss(group(), 0.5, first)
    _, third = EPO().loss(replace(group(), log_q=group().log_q - 1), 0.5, second)
    assert second["past"].tolist() == pytest.approx([0, 7 / 3]) and third["past"].tolist() == pytest.approx([0, 7 / 3 + 0.5])
    assert third["visits"].tolist() == [0, 2] and first["visits"].tolist() == [0, 0]


def test_prompt_is_needed():
    with pytest.raises(ValueError, match="prompt"):
        EPO().loss(replace(group(), prompt=None), 1.0, EPO().init(2, 0))
