"""Laws of robust DPO: the correction takes the flips out label by label; cDPO's optimum is finite even where labels are certain."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch.nn.functional import logsigmoid

from klbench.errors import UserError
from klbench.laws import WORLDS, World, check_objective, expected_gradient, optimum
from klbench.method import RewardLaw
from klbench.objectives.dpo import DPO
from klbench.objectives.robust_dpo import RobustDPO

WORLD = WORLDS[1]
LOGITS = WORLD.log_p0 + 0.5 * WORLD.rewards.cos()
MARGINS = torch.tensor([-6.0, -0.4, 0.0, 1.3, 5.0], dtype=torch.float64)


@pytest.mark.parametrize("objective", [RobustDPO(), RobustDPO(0.2, unbiased=False)])
def test_laws_hold(broken, objective):
    assert broken(check_objective(objective)) == []


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_mean_over_flips_is_the_clean_loss(flip, unbiased):
    told = RobustDPO(flip, unbiased).told
    off = float(((1 - flip) * told(MARGINS) + flip * told(-MARGINS) + logsigmoid(MARGINS)).abs().max())
    assert (off < 1e-12) == (unbiased or flip == 0)


def test_one_unbiased_label_has_no_lower_bound():
    far = torch.tensor([-1e4], dtype=torch.float64)
    assert float(RobustDPO().told(-far)) < -1000 < 0 < float(RobustDPO(unbiased=False).told(-far))


@pytest.mark.parametrize("flip, unbiased, same", [(0.1, True, True), (0.3, True, True), (0.1, False, False), (0.0, False, True)])
def test_on_probabilities_the_unbiased_loss_is_dpo(flip, unbiased, same):
    found = expected_gradient(RobustDPO(flip, unbiased), WORLD, LOGITS, 0.6)
    assert bool((found - expected_gradient(DPO(), WORLD, LOGITS, 0.6)).abs().max() < 1e-12) == same


@pytest.mark.parametrize(
    "told",
    [
        lambda self, margin: -logsigmoid(margin),  # flips ignored
        lambda self, margin: RobustDPO(0.2).told(margin),  # another rate than that of the data
        lambda self, margin: RobustDPO(0.1, False).told(margin),  # smoothed, not corrected
        lambda self, margin: RobustDPO(0.1).told(-margin),
    ],
)
def test_mutants_do_not_rest_at_the_target(mutant, told):
    best = optimum(RobustDPO(), WORLD, 0.4)
    torch.testing.assert_close(best, WORLD.log_target(0.4))
    scale = float(expected_gradient(RobustDPO(), WORLD, WORLD.log_p0, 0.4).norm())
    assert float(expected_gradient(RobustDPO(), WORLD, best, 0.4).norm()) < 1e-12
    assert float(expected_gradient(mutant(RobustDPO, told=told), WORLD, best, 0.4).norm()) > 0.05 * scale


@pytest.mark.parametrize("gap", [1.0, 200.0])
def test_the_optimum_of_cdpo_by_hand(gap):
    # two answers: sigma(beta h) = 1/2 + (1 - 2e)^2 (P - 1/2), finite for certain labels too
    beta, kept, law = 0.3, 0.64, RewardLaw.of(np.array([0.0, gap]), np.array([0.3, 0.7]))
    low, high = RobustDPO(0.1, unbiased=False).own(law.levels, law, beta, 2)
    assert expit(beta * (high - low)) == pytest.approx(0.5 + kept * (expit(gap) - 0.5), abs=1e-12)
    assert law.mass @ np.exp([low, high]) == pytest.approx(1, abs=1e-12)


def test_a_reward_between_levels_is_one_of_no_mass():
    rewards, mass, beta = np.array([-1.0, 0.2, 2.0, 3.0]), np.array([0.3, 0.3, 0.4, 1e-12]), 0.2
    known, new = RewardLaw.of(rewards[:3], mass[:3]), RewardLaw.of(rewards, mass)
    found = [RobustDPO(0.2, unbiased=False).own(rewards, law, beta, 2) for law in (known, new)]
    np.testing.assert_allclose(*found, atol=1e-7)


def test_training_ends_at_the_optimum_of_cdpo():
    objective, beta = RobustDPO(0.2, unbiased=False), 0.3
    world = World(((1, 2, 3),), ((0.4, -0.3, 1.1),), draws=2, length=2)
    logits = world.log_p0.clone()
    adam = torch.optim.Adam([logits], lr=0.2)
    for _ in range(100):
        logits.grad = expected_gradient(objective, world, logits, beta)
        adam.step()
    q, best = logits.log_softmax(1), optimum(objective, world, beta)
    assert float((q.exp() * (q - best)).sum()) < 0.02 < float((q.exp() * (q - world.log_target(beta))).sum())


@pytest.mark.parametrize("flip", [-0.1, 0.5])
def test_a_rate_that_cannot_be_corrected_is_refused(flip):
    with pytest.raises(UserError, match="rate in"):
        RobustDPO(flip)
