"""Laws of REBEL: a regression without residual at the target, whatever is done to large residuals."""

import pytest
import torch

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.laws import WORLDS, check_objective, expected_gradient
from klbench.objectives.rebel import REBEL
from klbench.preferences import bradley_terry, pairs

WORLD = WORLDS[1]


@pytest.mark.parametrize("objective", [REBEL(), REBEL(huber=0.7)])
def test_laws_hold(broken, objective):
    assert broken(check_objective(objective)) == []


def unrest(objective):
    """Norm of the expected gradient at the target, relative to the prior's."""
    at, scale = (expected_gradient(objective, WORLD, logits, 0.4) for logits in (WORLD.log_target(0.4), WORLD.log_p0))
    return float(at.norm() / scale.norm())


def regression(batch, factor=1.0, per_token=False, labels=False, reference=True):
    u = batch.total(batch.log_q - batch.log_p0 if reference else batch.log_q)
    u = u / batch.mask.sum(2) if per_token else u
    i, j = pairs(u.shape[1])
    gap = bradley_terry(batch.reward) - 0.5 if labels else batch.reward[:, i] - batch.reward[:, j]
    return (factor * (u[:, i] - u[:, j]) - gap).square().mean()


@pytest.mark.parametrize("wrong", [{}, {"factor": 0.44}, {"factor": -0.4}, {"per_token": True}, {"labels": True}, {"reference": False}])
def test_mutants_do_not_rest_at_the_target(mutant, wrong):
    wrong_loss = mutant(REBEL, loss=lambda self, batch, beta: regression(batch, **{"factor": beta, **wrong}))
    assert (unrest(wrong_loss) > 1e-3) == bool(wrong)


def batch_of(log_q, log_p0, reward):
    shape = (*reward.shape, 1)
    mask = torch.ones(shape, dtype=torch.bool)
    return Batch(mask.long(), mask, log_q.reshape(shape), log_p0.reshape(shape), reward, torch.zeros_like(reward))


@pytest.mark.parametrize("huber", [0.0, 0.5])
def test_no_residual_at_the_target(huber):
    world = WORLDS[0]
    log_q = world.log_target(0.4).requires_grad_()
    loss = REBEL(huber).loss(batch_of(log_q, world.log_p0, world.rewards), 0.4)
    assert abs(float(loss.detach())) < 1e-12
    assert float(torch.autograd.grad(loss, log_q)[0].abs().max()) < 1e-6


@pytest.mark.parametrize("gap", [0.3, 0.5, 2.0, -40.0])
def test_huber_by_hand(gap):
    zero, reward = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[gap, 0.0]], dtype=torch.float64)
    error = torch.tensor(gap, dtype=torch.float64)
    wanted = 2 * torch.nn.functional.huber_loss(error, 0 * error, delta=0.5)
    assert float(REBEL(0.5).loss(batch_of(zero, zero, reward), 1.0)) == pytest.approx(float(wanted))
    assert float(REBEL().loss(batch_of(zero, zero, reward), 1.0)) == pytest.approx(gap**2)


def test_the_squared_loss_is_twice_a_variance_of_the_group():
    # of beta u - r with K - 1 below: VarGrad's, where the draws are the policy's own
    log_q, log_p0, reward = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = 2 * (0.7 * (log_q - log_p0) - reward).var(1).mean()
    torch.testing.assert_close(REBEL().loss(batch_of(log_q, log_p0, reward), 0.7), wanted)


def test_a_negative_distance_is_refused():
    with pytest.raises(UserError, match="huber"):
        REBEL(-1.0)
