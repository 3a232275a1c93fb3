"""Laws of EXO: the temperature is the product of the two betas, and no group pulls at the target."""

import math

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient
from klbench.objectives.dpo import DPO
from klbench.objectives.exo import EXO

WORLD = WORLDS[1]


def unrest(objective, beta=0.4, at=None):
    """Norm of the expected gradient at the target, relative to the prior's."""
    best = WORLD.log_target(beta if at is None else at)
    return float(expected_gradient(objective, WORLD, best, beta).norm() / expected_gradient(EXO(), WORLD, WORLD.log_p0, beta).norm())


@pytest.mark.parametrize("objective", [EXO(), EXO(split=0.3, forward=True)])
def test_laws_hold(broken, objective):
    assert broken(check_objective(objective)) == []


@pytest.mark.parametrize("forward", [False, True])
def test_betas_of_a_half_and_four_fifths_make_two_fifths(forward):
    objective = EXO(math.log(0.5) / math.log(0.4), forward)
    assert unrest(objective) < 1e-12 < 1e-2 < unrest(objective, at=0.5)


def softmaxes(batch, policy_beta, reward_beta, reference=True, per_token=False):
    u = batch.log_q - batch.log_p0 if reference else batch.log_q
    u = batch.total(u) / batch.mask.sum(2) if per_token else batch.total(u)
    g, t = (policy_beta * u).log_softmax(1), (batch.reward / reward_beta).log_softmax(1)
    return (g.exp() * (g - t)).sum(1).mean()


@pytest.mark.parametrize(
    "wrong, given",
    [
        (False, lambda beta: (beta, 1.0)),
        (True, lambda beta: (beta, beta)),
        (True, lambda beta: (1.0, 1.0)),
        (True, lambda beta: (beta, 1.0, False)),
        (True, lambda beta: (beta, 1.0, True, True)),
        (True, lambda beta: (-beta, 1.0)),
    ],
)
def test_mutants_do_not_rest_at_the_target(mutant, wrong, given):
    assert (unrest(mutant(EXO, loss=lambda self, batch, beta: softmaxes(batch, *given(beta)))) > 1e-3) == wrong


def test_the_forward_twin_of_two_draws_is_dpo():
    logits = WORLD.log_p0 + 0.5 * WORLD.rewards.sin()
    wanted = expected_gradient(DPO(), WORLD, logits, 0.7)
    torch.testing.assert_close(expected_gradient(EXO(split=1.0, forward=True), WORLD, logits, 0.7), wanted)
    assert float((expected_gradient(EXO(split=1.0), WORLD, logits, 0.7) - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("forward", [False, True])
def test_no_noise_at_the_target(forward):
    world, beta = WORLDS[0], 0.4
    log_q = world.log_target(beta)[0, :3].reshape(1, 3, 1).requires_grad_()
    mask = torch.ones(1, 3, 1, dtype=torch.bool)
    batch = Batch(mask.long(), mask, log_q, world.log_p0[0, :3].reshape(1, 3, 1), world.rewards[:, :3], torch.zeros(1, 3))
    loss = EXO(forward=forward).loss(batch, beta)
    assert abs(float(loss.detach())) < 1e-12
    assert float(torch.autograd.grad(loss, log_q)[0].abs().max()) < 1e-12


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        EXO().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
