"""Laws of trajectory balance: twice grad KL(q || p*) whatever log z is; log z itself is trained towards e = 0."""

from dataclasses import replace

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient, fresh_state, stated_gradient
from klbench.objectives.trajectory_balance import TrajectoryBalance

WORLD = WORLDS[0]
LOGITS = WORLD.log_p0 + 0.5 * WORLD.rewards.sin()


def test_laws_hold(broken):
    assert broken(check_objective(TrajectoryBalance())) == []


@pytest.mark.parametrize("log_z", [None, -3.0, 5.0])
def test_the_factor_is_two_for_every_log_z(log_z):
    objective = TrajectoryBalance()
    state = fresh_state(objective, WORLD)
    if log_z is not None:
        state |= {"log_z": torch.full((1,), log_z, dtype=torch.float64).requires_grad_(), "seen": torch.ones(1).double()}
    found = expected_gradient(objective, WORLD, LOGITS, 0.7, state)
    torch.testing.assert_close(found, 2 * stated_gradient(objective, WORLD, LOGITS, 0.7), rtol=1e-6, atol=1e-8)


def balance(batch, beta, state, own=False, tilt=1.0, per_token=False):
    gap = batch.total(batch.log_q - batch.log_p0) - tilt * batch.reward / beta
    gap = gap / batch.mask.sum(2) if per_token else gap
    log_z = state["log_z"][batch.prompt][:, None]
    if own:
        log_z = (-gap.detach()).logsumexp(1, keepdim=True) - torch.tensor(gap.shape[1]).log()
    return ((log_z + gap) ** 2).mean(), state


@pytest.mark.parametrize("wrong", [{}, {"own": True}, {"tilt": 1.1}, {"tilt": -1.0}, {"per_token": True}])
def test_mutants_are_rejected(mutant, broken, wrong):
    found = broken(check_objective(mutant(TrajectoryBalance, loss=lambda self, *given: balance(*given, **wrong))))
    assert bool(found) == bool(wrong)


def group():
    log_q = torch.tensor([[-1.0, -2.0]], dtype=torch.float64).reshape(1, 2, 1)
    return Batch(
        torch.zeros(1, 2, 1, dtype=torch.int64),
        torch.ones(1, 2, 1, dtype=torch.bool),
        log_q,
        torch.full((1, 2, 1), -1.5, dtype=torch.float64),
        torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        torch.zeros(1, 2),
        prompt=torch.tensor([1]),
    )


def test_visits_by_hand():
    objective = TrajectoryBalance()
    first = objective.init(2, 0)
    # gaps .5 - 2 = -1.5 and -.5; each draw starts at the other's minus: e = .5 - 1.5, 1.5 - .5
    loss, second = objective.loss(group(), 0.5, first)
    assert loss.item() == pytest.approx(1.0)
    assert second["start"].tolist() == [0.0, 1.0] and second["seen"].tolist() == [0.0, 2.0]
    assert second["log_z"] is first["log_z"] and first["seen"].tolist() == [0.0, 0.0]
    # the second visit starts at their mean 1: e = -.5, .5, and log z has a gradient of 2 mean e at rewards shifted by .25
    loss, third = objective.loss(replace(group(), reward=group().reward + 0.25), 0.5, second)
    (gradient,) = torch.autograd.grad(loss, second["log_z"])
    assert loss.item() == pytest.approx(0.5) and gradient.tolist() == pytest.approx([0.0, -1.0])
    assert third["start"].tolist() == [0.0, 1.0]


def test_prompt_is_needed():
    with pytest.raises(ValueError, match="prompt"):
        TrajectoryBalance().loss(replace(group(), prompt=None), 1.0, TrajectoryBalance().init(2, 0))
