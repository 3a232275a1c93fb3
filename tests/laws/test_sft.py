"""Laws of filtered SFT: it clones best-of-K of the prior and nothing else."""

import numpy as np
import torch

from klbench.laws import WORLDS, check_objective, expected_gradient, optimum
from klbench.method import RewardLaw
from klbench.objectives.sft import SFT


def test_laws_hold(broken):
    assert broken(check_objective(SFT())) == []


def test_cloning_every_draw_is_rejected(mutant, broken):
    assert broken(check_objective(mutant(SFT, loss=lambda self, batch, beta: -batch.total(batch.log_q).mean())))


def test_a_mean_over_tokens_is_rejected(mutant, broken):
    def loss(self, batch, beta):
        best = (batch.reward == batch.reward.amax(1, keepdim=True)).double()
        return -(best / best.sum(1, keepdim=True) * batch.total(batch.log_q) / batch.mask.sum(2)).sum(1).mean()

    assert broken(check_objective(mutant(SFT, loss=loss)))


def test_cloning_all_ties_in_full_is_rejected(mutant, broken):
    def loss(self, batch, beta):
        return -((batch.reward == batch.reward.amax(1, keepdim=True)) * batch.total(batch.log_q)).mean()

    assert broken(check_objective(mutant(SFT, loss=loss)))


def test_gradient_does_not_vanish_at_the_posterior():
    world = WORLDS[0]
    gradient = expected_gradient(SFT(), world, world.log_target(0.4), 0.4)
    assert float(gradient.norm()) > 1e-2


def test_own_by_hand():
    # p0 = 1/2 bad, 1/2 good; best of two draws is good with probability 3/4
    log_ratio = SFT().own(np.array([0.0, 1.0]), RewardLaw.of(np.array([0.0, 1.0])), 1.0, 2)
    np.testing.assert_allclose(np.exp(log_ratio), [0.5, 1.5])


def test_own_is_normalised():
    best = optimum(SFT(), WORLDS[1], 1.0)
    torch.testing.assert_close(best.exp().sum(1), torch.ones(2, dtype=torch.float64))
