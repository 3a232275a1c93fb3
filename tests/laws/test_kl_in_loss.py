"""Laws of KL in the loss: of four estimators two have the gradient of KL(q || p0), one that of KL(p0 || q) and one none."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from klbench.errors import UserError
from klbench.laws import WORLDS, World, check_objective, expected_gradient, stated_gradient
from klbench.objectives.kl_in_loss import KINDS, KLInLoss
from klbench.objectives.reinforce import Reinforce

WORLD = WORLDS[0]
VANISHES = "the gradient vanishes at the declared optimum"


@pytest.mark.parametrize("kind, holds", [("k2", True), ("k3_ratio", True), ("k1", False), ("k3", False)])
def test_the_target_is_the_optimum_of_two_kinds(broken, kind, holds):
    # every kind keeps to what it states; k1 does not read beta, which is stated as well
    assert broken(check_objective(KLInLoss(kind))) == ([] if holds else [VANISHES])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS)
def test_each_gradient_is_the_stated_one(kind, world):
    logits = world.log_p0 + 0.5 * world.rewards.sin()
    found, wanted = (f(KLInLoss(kind), world, logits, 0.7) for f in (expected_gradient, stated_gradient))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind, stated", [("k1", "k2"), ("k3", "k2"), ("k2", "k3"), ("k3_ratio", "k3"), ("k2", "k1")])
def test_no_gradient_is_another_kinds(kind, stated):
    logits = WORLD.log_p0 + 0.5 * WORLD.rewards.sin()
    found, wanted = expected_gradient(KLInLoss(kind), WORLD, logits, 0.7), stated_gradient(KLInLoss(stated), WORLD, logits, 0.7)
    assert float((found - wanted).norm() / wanted.norm()) > 1e-2


def test_k1_is_no_kl_at_all():
    logits = WORLD.log_p0 + 0.5 * WORLD.rewards.sin()
    found = expected_gradient(KLInLoss("k1"), WORLD, logits, 0.7)
    torch.testing.assert_close(found, expected_gradient(Reinforce(), WORLD, logits, 0.7))


def pole(log_p0, reward, beta):
    """log of beta p0 / (m - r), m > max r such that it sums to 1."""
    p0, r = log_p0.exp().numpy(), reward.numpy()
    m = brentq(lambda x: float((beta * p0 / (x - r)).sum()) - 1, r.max() + 1e-9, r.max() + 10, xtol=1e-14)
    return torch.from_numpy(np.log(beta * p0 / (m - r)))


@pytest.mark.parametrize("beta", [0.4, 1.5])
def test_k3_stops_at_its_own_optimum(beta):
    at = pole(WORLD.log_p0[0], WORLD.rewards[0], beta)[None]
    assert float(expected_gradient(KLInLoss("k3"), WORLD, at, beta).norm()) < 1e-10
    assert float(expected_gradient(KLInLoss("k2"), WORLD, at, beta).norm()) > 1e-2


@pytest.mark.parametrize("kind, end", [("k1", "maximum"), ("k2", "target"), ("k3", "pole"), ("k3_ratio", "target")])
def test_where_training_ends(kind, end):
    world, beta = World(counts=((1, 2, 3),), reward=((0.4, -0.3, 1.1),), draws=2, length=2), 0.5
    logits = world.log_p0.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.1)
    for _ in range(120):
        logits.grad = expected_gradient(KLInLoss(kind), world, logits, beta)
        adam.step()
    q = logits.detach().log_softmax(1)
    maximum = torch.tensor([[0.01, 0.01, 0.98]], dtype=torch.float64).log()
    ends = {"target": world.log_target(beta), "pole": pole(world.log_p0[0], world.rewards[0], beta)[None], "maximum": maximum}
    off = {name: float((q.exp() * (q - at)).sum()) for name, at in ends.items()}
    assert off[end] < 0.02 and all(gap > 0.02 for name, gap in off.items() if name != end)


@pytest.mark.parametrize("kind", ["k2", "k3_ratio"])
def test_summed_token_by_token_they_are_myopic(mutant, kind):
    def loss(self, batch, beta):
        K = batch.reward.shape[1]
        advantage = (batch.reward - batch.reward.mean(1, keepdim=True)) * K / (K - 1)
        penalty = batch.total(KINDS[kind](batch.log_q - batch.log_p0))
        return (beta * penalty - advantage * batch.total(batch.log_q)).mean()

    at = WORLD.log_target(0.4)
    assert float(expected_gradient(mutant(KLInLoss, loss=loss), WORLD, at, 0.4).norm()) > 1e-2
    assert float(expected_gradient(KLInLoss(kind), WORLD, at, 0.4).norm()) < 1e-12


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="did you mean 'k3_ratio'"):
        KLInLoss("k3-ratio")
