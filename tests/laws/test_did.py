"""Laws of DID: losers drawn against the target's log-ratio make DPO recover the target, group by group."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient
from klbench.objectives.did import DID

WORLD = WORLDS[0]


def test_laws_hold(broken):
    assert broken(check_objective(DID())) == []


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_the_losers_carry_the_inverse_of_what_is_learned(beta):
    # softmax(-r) on prior draws is the law p0 (p0/p*)^beta, whatever beta: the density-ratio law then gives p0 (p0/losers)^(1/beta) = p*
    losers = (WORLD.log_p0 - WORLD.rewards).log_softmax(1)
    torch.testing.assert_close(losers, (WORLD.log_p0 + beta * (WORLD.log_p0 - WORLD.log_target(beta))).log_softmax(1))
    torch.testing.assert_close((WORLD.log_p0 + (WORLD.log_p0 - losers) / beta).log_softmax(1), WORLD.log_target(beta))


def weighted(batch, beta, loser=lambda r: -r, winner=lambda r: 0 * r):
    """All ordered pairs, both sides with weights of their own."""
    u, r = batch.total(batch.log_q - batch.log_p0), batch.reward
    weight = (winner(r)[:, :, None] + loser(r)[:, None, :]).exp() * (1 - torch.eye(r.shape[1], dtype=torch.float64))
    weight = weight / loser(r).exp().sum(1)[:, None, None] / (r.shape[1] - 1)
    return -(weight * logsigmoid(beta * (u[:, :, None] - u[:, None, :]))).sum((1, 2)).mean()


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"loser": lambda r: -2 * r},
        {"loser": lambda r: r},
        {"loser": lambda r: 0 * r},  # winners and losers from one law: nothing to learn
        {"winner": lambda r: r},  # the difference counted twice
    ],
)
def test_mutants_do_not_rest_at_the_target(mutant, wrong):
    world, beta = WORLDS[1], 0.4
    other = mutant(DID, loss=lambda self, batch, beta: weighted(batch, beta, **wrong))
    scale = float(expected_gradient(DID(), world, world.log_p0, beta).norm())
    at = float(expected_gradient(other, world, world.log_target(beta), beta).norm())
    assert (at > 1e-3 * scale) == bool(wrong)


def test_no_noise_at_the_target():
    mask = torch.ones(1, 4, 1, dtype=torch.bool)
    log_q = WORLD.log_target(0.4).reshape(1, 4, 1).requires_grad_()
    batch = Batch(mask.long(), mask, log_q, WORLD.log_p0.reshape(1, 4, 1), WORLD.rewards, torch.zeros(1, 4))
    (gradient,) = torch.autograd.grad(DID().loss(batch, 0.4), log_q)
    assert float(gradient.abs().max()) < 1e-12


def test_a_constant_on_the_reward_is_nothing():
    mask = torch.ones(1, 4, 1, dtype=torch.bool)
    log_q = (WORLD.log_p0 + WORLD.rewards.sin()).reshape(1, 4, 1)
    batch = Batch(mask.long(), mask, log_q, WORLD.log_p0.reshape(1, 4, 1), WORLD.rewards, torch.zeros(1, 4))
    moved = Batch(**{**vars(batch), "reward": batch.reward + 300.0})
    torch.testing.assert_close(DID().loss(moved, 0.4), DID().loss(batch, 0.4))


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        DID().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
