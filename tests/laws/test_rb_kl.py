"""Laws of the Rao-Blackwellised KL: both halves of its gradient are needed; at p* its noise stays."""

from dataclasses import replace

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient, stated_gradient
from klbench.objectives.rb_kl import RBKL
from klbench.objectives.rloo import RLOO

WORLD = WORLDS[0]
LOGITS = WORLD.log_p0 + 0.5 * WORLD.rewards.sin()


def test_laws_hold(broken):
    assert broken(check_objective(RBKL())) == []


@pytest.mark.parametrize("world", WORLDS)
def test_the_factor_is_one(world):
    logits = world.log_p0 + 0.5 * world.rewards.sin()
    found, wanted = expected_gradient(RBKL(), world, logits, 0.7), stated_gradient(RBKL(), world, logits, 0.7)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def split(batch, beta, score=True, present=False, baseline=False, flow=True):
    """The loss with each part of the KL open, without a baseline unless asked."""
    K = batch.reward.shape[1]
    kl = batch.kl_token * batch.mask
    ahead = kl.detach().flip(2).cumsum(2).flip(2)
    ahead = ahead if present else ahead - kl.detach()
    ahead = (ahead - ahead.mean(1, keepdim=True)) * K / (K - 1) if baseline else ahead
    advantage = (batch.reward - batch.reward.mean(1, keepdim=True)) * K / (K - 1)
    cost = (batch.total(kl) if flow else 0) + (batch.total(ahead * batch.log_q) if score else 0)
    return (beta * cost - advantage * batch.total(batch.log_q)).mean()


@pytest.mark.parametrize("right", [{}, {"baseline": True, "present": True}])
def test_what_moves_no_expectation(mutant, broken, right):
    # the present token's own KL is the same whichever token is drawn: with it or without
    assert broken(check_objective(mutant(RBKL, loss=lambda self, *given: split(*given, **right)))) == []


@pytest.mark.parametrize("wrong", [{"score": False}, {"flow": False}])
def test_half_a_gradient_is_rejected(mutant, broken, wrong):
    found = broken(check_objective(mutant(RBKL, loss=lambda self, *given: split(*given, **wrong))))
    assert "the gradient vanishes at the declared optimum" in found


def test_a_wrong_beta_is_rejected(mutant, broken):
    assert broken(check_objective(mutant(RBKL, loss=lambda self, batch, beta: RBKL().loss(batch, beta * 1.1))))


def test_one_token_answers_need_the_first_half_alone(mutant):
    world = replace(WORLD, counts=((5, 3, 2),), reward=((0.0, 0.5, 1.0),), length=1, vocabulary=3)
    logits = torch.tensor([[0.2, -0.7, 0.9]], dtype=torch.float64)
    myopic = mutant(RBKL, loss=lambda self, *given: split(*given, score=False))
    torch.testing.assert_close(expected_gradient(myopic, world, logits, 0.7), expected_gradient(RBKL(), world, logits, 0.7))


def at_the_target(draws):
    """A batch of those answers of WORLD with q = p*, which requires a gradient."""
    beta = 0.4
    logits = WORLD.log_target(beta).requires_grad_()
    policy, prior = WORLD.policy(logits), WORLD.policy(WORLD.log_p0)
    every = policy.enumerate()
    d = torch.tensor([draws])
    return logits, Batch(
        every.tokens[d],
        every.mask[d],
        every.log_prob[:, d[0]],
        prior.enumerate().log_prob[:, d[0]],
        WORLD.rewards[:, d[0]],
        torch.zeros(1, len(draws)),
        kl_token=policy.kl_token(prior)[:, d[0]],
    )


def test_noise_stays_at_the_target_where_rloo_has_none():
    def noise(objective):
        logits, batch = at_the_target([0, 2, 3])
        return float(torch.autograd.grad(objective.loss(batch, 0.4), logits)[0].norm())

    assert noise(RLOO()) < 1e-12 and noise(RBKL()) > 1e-2


def test_refusals():
    _, batch = at_the_target([0, 1])
    with pytest.raises(ValueError, match="kl_token"):
        RBKL().loss(replace(batch, kl_token=None), 1.0)
    with pytest.raises(ValueError, match="K >= 2"):
        RBKL().loss(at_the_target([0])[1], 1.0)
