"""Laws of Chi2-RL: each divergence's gradient, and its optimum against closed forms of a few answers."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.laws import WORLDS, World, check_objective, expected_gradient, optimum
from klbench.method import RewardLaw
from klbench.objectives.chi2_rl import GENERATORS, SLOPES, Chi2RL

WORLD = WORLDS[1]


@pytest.mark.parametrize("divergence", sorted(SLOPES))
def test_laws_hold(broken, divergence):
    assert broken(check_objective(Chi2RL(divergence))) == []


@pytest.mark.parametrize("divergence", sorted(SLOPES))
def test_slope_is_the_derivative_of_the_generator(divergence):
    u, h = torch.tensor([-2.0, -0.3, 0.4, 1.7], dtype=torch.float64), 1e-6
    slope = (GENERATORS[divergence](u + h) - GENERATORS[divergence](u - h)) / (2 * h) / u.exp()
    torch.testing.assert_close(SLOPES[divergence](u), slope, rtol=1e-7, atol=1e-8)
    assert float(GENERATORS[divergence](torch.zeros(()))) == pytest.approx(0)


@pytest.mark.parametrize("declared", sorted(SLOPES))
@pytest.mark.parametrize("trained", [*sorted(SLOPES), "kl", "factor"])
def test_another_divergence_does_not_rest_there(mutant, declared, trained):
    def kl(self, batch, beta):
        log_q = batch.total(batch.log_q)
        gain = batch.reward - beta * (log_q - batch.total(batch.log_p0)).detach()
        return -((gain - gain.mean(1, keepdim=True)) * log_q).mean()

    others = {
        "kl": mutant(Chi2RL, loss=kl),
        "factor": mutant(Chi2RL, loss=lambda self, *given: Chi2RL(declared).loss(given[0], 1.1 * given[1])),
    }
    objective, beta = others[trained] if trained in others else Chi2RL(trained), 1.5
    best, scale = optimum(Chi2RL(declared), WORLD, beta), float(expected_gradient(objective, WORLD, WORLD.log_p0, beta).norm())
    assert (float(expected_gradient(objective, WORLD, best, beta).norm()) < 1e-9 * scale) == (trained == declared)


def density(divergence, rewards, mass, beta):
    law = RewardLaw.of(np.array(rewards), np.array(mass))
    return np.exp(Chi2RL(divergence).own(np.array(rewards), law, beta, 2))


def test_chi2_is_linear_in_the_reward():
    # 1 + (r - mean)/(2 beta) while nothing is excluded
    np.testing.assert_allclose(density("chi2", [0.0, 1.0, 3.0], [0.5, 0.25, 0.25], 2.0), [0.75, 1.0, 1.5])


def test_chi2_excludes_what_falls_below_lam():
    # beta 1/4: with the top one alone (3 - lam) / (1/2) / 4 = 1, so lam = 1, and 1 is not above it
    found = density("chi2", [0.0, 1.0, 3.0], [0.5, 0.25, 0.25], 0.25)
    np.testing.assert_allclose(found, [0.0, 0.0, 4.0], atol=1e-12)
    assert (found[:2] > 0).all() and np.log(found[0]) == pytest.approx(-700)  # finite, for sums over draws


def test_chi2_kl_excludes_nothing():
    t = density("chi2_kl", [-40.0, 1.0, 3.0], [0.5, 0.25, 0.25], 0.25)
    assert t @ [0.5, 0.25, 0.25] == pytest.approx(1)
    assert np.ptp(t + np.log(t) - np.array([-40.0, 1.0, 3.0]) / 0.25) < 1e-9


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_forward_is_the_optimum_of_k3(beta):
    # right or wrong, prior .312: beta (p - p_0) = p (1 - p)
    share = 0.312
    root = brentq(lambda p: beta * (p - share) - p * (1 - p), share, 1)
    t = density("forward", [0.0, 1.0], [1 - share, share], beta)
    assert share * t[1] == pytest.approx(root)
    assert share * t[1] == pytest.approx({0.3: 0.8149, 1.0: 0.5585, 3.0: 0.3913}[beta], abs=1e-3)


def test_js_by_its_own_slope():
    t = density("js", [0.0, 1.0, 3.0], [0.5, 0.25, 0.25], 0.4)
    assert t @ [0.5, 0.25, 0.25] == pytest.approx(1)
    assert np.ptp(0.4 * np.log(t / (1 + t)) - [0.0, 1.0, 3.0]) < 1e-9


@pytest.mark.parametrize("divergence", sorted(SLOPES))
@pytest.mark.parametrize("beta", [0.003, 0.1, 5.0])
def test_the_optimum_is_a_law_even_by_a_pole(divergence, beta):
    # the top level has a mass of 1e-10: lam stands 1e-10 beta above it
    law = RewardLaw.of(np.array([-9.0, 0.0, 0.2, 8.0]), np.array([0.4, 0.3, 0.3, 1e-10]))
    assert law.mass @ np.exp(Chi2RL(divergence).own(law.levels, law, beta, 2)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("divergence", sorted(SLOPES))
def test_a_reward_above_the_law(divergence):
    law = RewardLaw.of(np.array([0.0, 1.0]), np.array([0.9, 0.1]))
    low, top, above = Chi2RL(divergence).own(np.array([-2.0, 1.0, 4.0]), law, 0.5, 2)
    assert low < top and np.isfinite(above)
    assert (above == top) == (divergence in ("forward", "js"))


def test_training_ends_at_the_optimum_where_an_answer_is_excluded():
    world, beta = World(((1, 2, 3),), ((0.4, -0.3, 1.1),), draws=2, length=2), 0.3
    best = optimum(Chi2RL(), world, beta).exp()
    assert best[0, 1] < 1e-300 and float((best - world.log_target(beta).exp()).abs().max()) > 0.02
    logits = world.log_p0.clone()
    adam = torch.optim.Adam([logits], lr=0.2)
    for _ in range(100):
        logits.grad = expected_gradient(Chi2RL(), world, logits, beta)
        adam.step()
    torch.testing.assert_close(logits.softmax(1), best, atol=5e-3, rtol=0)


def test_an_unknown_divergence_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean 'forward'"):
        Chi2RL("forwards")


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        Chi2RL().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
