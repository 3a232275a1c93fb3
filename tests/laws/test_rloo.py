"""Laws of RLOO: exactly minus the gradient of J at every K, without noise at p*."""

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient, stated_gradient
from klbench.objectives.rloo import RLOO


def test_laws_hold(broken):
    assert broken(check_objective(RLOO())) == []


@pytest.mark.parametrize("world", WORLDS)
def test_the_factor_is_one(world):
    logits = world.log_p0 + 0.5 * world.rewards.sin()
    found, wanted = expected_gradient(RLOO(), world, logits, 0.7), stated_gradient(RLOO(), world, logits, 0.7)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("world", WORLDS)
def test_the_plain_group_mean_shrinks_the_gradient(mutant, world):
    def loss(self, batch, beta):
        log_q = batch.total(batch.log_q)
        gain = batch.reward - beta * (log_q - batch.total(batch.log_p0)).detach()
        return -((gain - gain.mean(1, keepdim=True)) * log_q).mean()

    logits = world.log_p0 + 0.5 * world.rewards.sin()
    found = expected_gradient(mutant(RLOO, loss=loss), world, logits, 0.7)
    torch.testing.assert_close(found, stated_gradient(RLOO(), world, logits, 0.7) * (1 - 1 / world.draws), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("factor", [1.1, -1.0])
def test_a_wrong_beta_is_rejected(mutant, broken, factor):
    assert broken(check_objective(mutant(RLOO, loss=lambda self, batch, beta: RLOO().loss(batch, beta * factor))))


def test_one_baseline_for_all_draws_of_the_batch_scaled_by_the_group_is_rejected(mutant, broken):
    def loss(self, batch, beta):
        log_q = batch.total(batch.log_q)
        gain = batch.reward - beta * (log_q - batch.total(batch.log_p0)).detach()
        return -((gain - gain.mean(1, keepdim=True)) / (gain.std(1, keepdim=True) + 1e-4) * log_q).mean()

    assert broken(check_objective(mutant(RLOO, loss=loss)))


def test_no_noise_at_the_target():
    world, beta = WORLDS[0], 0.4
    log_q = world.log_target(beta)[0, :3].reshape(1, 3, 1).requires_grad_()
    batch = Batch(
        torch.zeros(1, 3, 1, dtype=torch.int64),
        torch.ones(1, 3, 1, dtype=torch.bool),
        log_q,
        world.log_p0[0, :3].reshape(1, 3, 1),
        world.rewards[:, :3],
        torch.zeros(1, 3),
    )
    (gradient,) = torch.autograd.grad(RLOO().loss(batch, beta), log_q)
    assert float(gradient.abs().max()) < 1e-12


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        RLOO().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
