"""Laws of IPO: its optimum is the prior tilted by the win rate, not by the reward."""

import numpy as np
import pytest

from klbench.laws import WORLDS, check_objective, expected_gradient
from klbench.method import RewardLaw
from klbench.objectives.ipo import IPO
from klbench.preferences import bradley_terry, pairs


def test_laws_hold(broken):
    assert broken(check_objective(IPO())) == []


def squared(batch, beta, margin=0.5, per_token=False):
    u = batch.total(batch.log_q - batch.log_p0)
    u = u / batch.mask.sum(2) if per_token else u
    i, j = pairs(u.shape[1])
    wins, h = bradley_terry(batch.reward), u[:, i] - u[:, j]
    return (wins * (h - margin / beta) ** 2 + (1 - wins) * (h + margin / beta) ** 2).mean()


@pytest.mark.parametrize("wrong", [{}, {"margin": 1.0}, {"per_token": True}])
def test_mutants_are_rejected(mutant, broken, wrong):
    found = broken(check_objective(mutant(IPO, loss=lambda self, batch, beta: squared(batch, beta, **wrong))))
    assert bool(found) == bool(wrong)


def test_declaring_the_posterior_is_rejected(mutant, broken):
    def own(self, reward, law, beta, draws):
        return reward / beta - law.log_mean_exp(law.levels / beta)

    found = broken(check_objective(mutant(IPO, own=own)))
    assert found == ["the gradient vanishes at the declared optimum"]


def test_gradient_does_not_vanish_at_the_posterior():
    assert float(expected_gradient(IPO(), WORLDS[0], WORLDS[0].log_target(0.4), 0.4).norm()) > 1e-2


def test_own_by_hand():
    # one draw in two wins: rates .5 sigma(0) + .5 sigma(+-2); tau = .5 doubles them; the norm is over the law
    log_ratio = IPO().own(np.array([2.0, 0.0]), RewardLaw.of(np.array([0.0, 2.0])), 0.5, 8)
    win = 1 / (1 + np.exp(-2.0))
    rates = np.array([0.25 + win / 2, 0.25 + (1 - win) / 2]) / 0.5
    np.testing.assert_allclose(log_ratio, rates - np.log(np.exp(rates).mean()))
