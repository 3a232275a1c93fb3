"""Laws of RPO: DPO's gradient plus that of the winners' likelihood, an optimum between the two, and a bounded ratio to the prior."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch.nn.functional import logsigmoid

from klbench.errors import UserError
from klbench.laws import WORLDS, World, check_objective, expected_gradient, optimum
from klbench.method import RewardLaw
from klbench.objectives.dpo import DPO
from klbench.objectives.rpo import RPO
from klbench.preferences import bradley_terry, pairs

WORLD = WORLDS[1]


@pytest.mark.parametrize("objective", [RPO(), RPO(0.3)])
def test_laws_hold(broken, objective):
    assert broken(check_objective(objective)) == []


def winners(world):
    """[P, S] law of the better of two prior draws."""
    wins = (world.rewards[:, :, None] - world.rewards[:, None, :]).sigmoid()
    return 2 * world.log_p0.exp() * (wins * world.log_p0.exp()[:, None, :]).sum(2)


@pytest.mark.parametrize("eta", [0.005, 2.0])
def test_the_gradient_is_the_sum(eta):
    logits, beta = WORLD.log_p0 + 0.5 * WORLD.rewards.sin(), 0.4
    cloned = (logits.softmax(1) - winners(WORLD)) / len(logits)  # grad of -E_c log q
    wanted = expected_gradient(DPO(), WORLD, logits, beta) + eta * cloned
    torch.testing.assert_close(expected_gradient(RPO(eta), WORLD, logits, beta), wanted)


def joined(batch, beta, eta=0.3, per_token=False, loser=False):
    log_q = batch.total(batch.log_q)
    u = log_q - batch.total(batch.log_p0)
    liked = log_q / batch.mask.sum(2) if per_token else log_q
    i, j = pairs(u.shape[1])
    wins, margin = bradley_terry(batch.reward), beta * (u[:, i] - u[:, j])
    told = (1 - wins) * liked[:, i] + wins * liked[:, j] if loser else wins * liked[:, i] + (1 - wins) * liked[:, j]
    return -(wins * logsigmoid(margin) + (1 - wins) * logsigmoid(-margin) + eta * told).mean()


@pytest.mark.parametrize("wrong", [{}, {"eta": 0.0}, {"eta": -0.3}, {"eta": 0.33}, {"per_token": True}, {"loser": True}])
def test_mutants_do_not_rest_at_the_optimum(mutant, wrong):
    beta, real = 0.4, RPO(0.3)
    best, scale = optimum(real, WORLD, beta), float(expected_gradient(real, WORLD, WORLD.log_p0, beta).norm())
    other = mutant(RPO, loss=lambda self, batch, beta: joined(batch, beta, **wrong))
    assert (float(expected_gradient(other, WORLD, best, beta).norm()) > 1e-3 * scale) == bool(wrong)


def test_the_ends_are_the_target_and_the_winners():
    beta = 0.4
    torch.testing.assert_close(optimum(RPO(1e-9), WORLD, beta), WORLD.log_target(beta), atol=1e-6, rtol=0)
    torch.testing.assert_close(optimum(RPO(1e9), WORLD, beta), winners(WORLD).log(), atol=1e-6, rtol=0)
    assert float((optimum(RPO(0.3), WORLD, beta) - WORLD.log_target(beta)).abs().max()) > 0.1


@pytest.mark.parametrize("beta, eta", [(0.01, 0.005), (0.05, 0.005), (1.0, 0.3)])
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_the_optimum_is_bounded_and_solves_its_equation(beta, eta, spread):
    random = np.random.default_rng(0)
    law = RewardLaw.of(spread * random.normal(size=60), random.dirichlet(np.full(60, 0.5)))
    u, win = RPO(eta).own(law.levels, law, beta, 2), expit(law.levels[:, None] - law.levels) @ law.mass
    left = 2 * beta * (win - expit(beta * (u[:, None] - u)) @ law.mass) + eta * (2 * win - np.exp(u))
    assert np.abs(left).max() < 1e-11
    assert law.mass @ np.exp(u) == pytest.approx(1, abs=1e-10)
    assert (np.exp(u) < 2 * (1 + beta / eta) * win * (1 + 1e-9)).all()
    if spread > 1 and beta < 0.1:
        assert law.levels[-1] / beta - law.log_mean_exp(law.levels / beta) > u[-1] + 0.1  # the target's ratio is not so bounded


def test_a_reward_between_levels_is_one_of_no_mass():
    rewards, mass = np.array([-1.0, 0.2, 2.0, 3.0]), np.array([0.3, 0.3, 0.4, 1e-12])
    known, new = RewardLaw.of(rewards[:3], mass[:3]), RewardLaw.of(rewards, mass)
    np.testing.assert_allclose(*(RPO().own(rewards, law, 0.2, 2) for law in (known, new)), atol=1e-7)


def test_merged_levels_move_the_optimum_little(monkeypatch):
    law = RewardLaw.of(3 * np.random.default_rng(0).normal(size=300))
    few = RPO().own(law.levels, law, 0.1, 2)
    monkeypatch.setattr("klbench.objectives.rpo.NODES", 1000)
    np.testing.assert_allclose(few, RPO().own(law.levels, law, 0.1, 2), atol=3e-3)
    monkeypatch.setattr("klbench.objectives.rpo.NODES", 4)
    assert np.abs(few - RPO().own(law.levels, law, 0.1, 2)).max() > 3e-2


def test_under_certain_labels_the_chosen_keep_more_than_under_dpo():
    # rewards far apart: DPO's gap grows without end, RPO's optimum is finite
    world, beta = World(((2, 3, 1),), ((0.0, 60.0, 120.0),), draws=2, length=2), 0.3
    law, gaps = world.law(0), []
    for objective in (DPO(), RPO(0.05)):
        logits = world.log_p0.clone()
        adam = torch.optim.Adam([logits], lr=0.2)
        for _ in range(100):
            logits.grad = expected_gradient(objective, world, logits, beta)
            adam.step()
        gaps.append(logits.log_softmax(1))
    chosen = [float((winners(world) * q).sum()) for q in gaps]
    assert chosen[1] > chosen[0] + 1
    best = torch.from_numpy(RPO(0.05).own(np.array(world.reward[0]), law, beta, 2)) + world.log_p0
    assert float((gaps[1].exp() * (gaps[1] - best)).sum()) < 0.02


def test_no_weight_is_refused():
    with pytest.raises(UserError, match="eta"):
        RPO(0.0)
