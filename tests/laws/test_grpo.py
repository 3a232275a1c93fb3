"""Laws of GRPO: no optimum is known, so the group's factor and the k3 penalty are held to their closed forms on one-token answers."""

import math
from dataclasses import replace

import pytest
import torch

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.laws import World, check_objective, expected_gradient
from klbench.objectives.grpo import GRPO

# three answers of one token (V = 3, T = 1), the third alone is right
RIGHT = World(counts=((5, 3, 2),), reward=((0.0, 0.0, 1.0),), draws=3, length=1, vocabulary=3)
EXACT = GRPO(delta=0.0 + 1e-12)


def wanted(world, logits, beta, least=-1.0):
    """-grad p E[s]/(p(1-p)) + beta grad KL(p0||q), s = sqrt(k/K (1 - k/K)), 0 where it is at or below `least`, k ~ Bin(K, p)."""
    logits = logits.clone().requires_grad_()
    log_q = logits.log_softmax(1)
    p, K = log_q[0, 2].exp(), world.draws
    at = p.item()
    every = [math.sqrt(k / K * (1 - k / K)) for k in range(K + 1)]
    spread = sum(math.comb(K, k) * at**k * (1 - at) ** (K - k) * s * (s > least) for k, s in enumerate(every))
    loss = -p * spread / (at * (1 - at)) - beta * (world.log_p0.exp() * log_q).sum()
    return torch.autograd.grad(loss, logits)[0]


LOGITS = torch.tensor([[0.2, -0.7, 0.9]], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.04, 2.0])
def test_expected_gradient(beta):
    torch.testing.assert_close(expected_gradient(EXACT, RIGHT, LOGITS, beta), wanted(RIGHT, LOGITS, beta), rtol=1e-8, atol=1e-10)


def test_laws_hold(broken):
    assert broken(check_objective(GRPO())) == []


def plain(self, batch, beta, scale=True, swap=False):
    """GRPO on fresh draws, written out, with the scale and the KL direction open."""
    advantage = batch.reward - batch.reward.mean(1, keepdim=True)
    if scale:
        advantage = advantage / (batch.reward.std(1, correction=0, keepdim=True) + 1e-12)
    u = batch.log_q - batch.log_p0
    penalty = u**2 / 2 if swap else (-u).exp() - 1 + u
    return (batch.total(beta * penalty - advantage[:, :, None] * batch.log_q) / batch.mask.sum(2)).mean()


@pytest.mark.parametrize("wrong, holds", [({}, True), ({"scale": False}, False), ({"swap": True}, False)])
def test_the_closed_form_tells_mutants(mutant, wrong, holds):
    found = expected_gradient(mutant(GRPO, loss=lambda self, batch, beta: plain(self, batch, beta, **wrong)), RIGHT, LOGITS, 0.5)
    assert torch.allclose(found, wanted(RIGHT, LOGITS, 0.5), rtol=1e-6, atol=1e-8) == holds


def test_the_wrong_sign_is_rejected(mutant, broken):
    assert broken(check_objective(mutant(GRPO, loss=lambda self, batch, beta: -GRPO().loss(batch, beta))))


def test_the_posterior_is_not_its_optimum():
    gradient = expected_gradient(EXACT, RIGHT, RIGHT.log_target(0.5), 0.5)
    assert float(gradient.norm()) > 1e-2


FOUR = replace(RIGHT, draws=4)  # sd .433 with one or three right, .5 with two


@pytest.mark.parametrize("least, kept", [(0.43, 0.0), (0.45, 0.45), (0.5, 0.5)])
def test_groups_of_little_spread_have_no_advantage(least, kept):
    found = expected_gradient(replace(EXACT, least_spread=least), FOUR, LOGITS, 0.5)
    torch.testing.assert_close(found, wanted(FOUR, LOGITS, 0.5, kept), rtol=1e-8, atol=1e-10)
    assert torch.allclose(found, wanted(FOUR, LOGITS, 0.5)) == (kept == 0.0)


@pytest.mark.parametrize("least, learns", [(0.36, True), (0.46, False)])  # a group of (0, .9) has .45, of (.4, -.3) and (.4, 1.1) .35
def test_the_laws_hold_while_some_group_is_left_of_each_prompt(least, learns, broken):
    assert (broken(check_objective(GRPO(least_spread=least))) == []) == learns


def test_a_least_spread_by_hand():
    reward = torch.tensor([[1.0, 0.0], [0.5, 0.7], [0.3, 0.3]], dtype=torch.float64)  # sd .5, .1, 0
    log_q = torch.zeros(3, 2, 1, dtype=torch.float64, requires_grad=True)
    batch = Batch(log_q.long(), log_q < 1, log_q, torch.zeros_like(log_q), reward, torch.zeros_like(reward))

    def pull(**given):
        return torch.autograd.grad(GRPO(delta=1e-12, **given).loss(batch, 1.0), log_q)[0][:, :, 0] * 6

    torch.testing.assert_close(pull(), torch.tensor([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]).double())
    torch.testing.assert_close(pull(least_spread=0.2), torch.tensor([[-1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]).double())
    assert torch.equal(pull(least_spread=1e-9), pull())
    with pytest.raises(UserError, match="least_spread is a standard deviation"):
        GRPO(least_spread=-0.1)
