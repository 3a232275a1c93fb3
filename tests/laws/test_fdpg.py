"""Laws of f-DPG: each generator's divergence, and the fixed point p* even while Z is noisy."""

import math

import pytest
import torch

from klbench.errors import UserError
from klbench.laws import WORLDS, check_objective, expected_gradient, fresh_state
from klbench.objectives.fdpg import FDPG, GENERATORS, SLOPES


@pytest.mark.parametrize("generator", sorted(SLOPES))
def test_laws_hold(generator, broken):
    assert broken(check_objective(FDPG(generator))) == []


@pytest.mark.parametrize("declared, trained", [("forward", "reverse"), ("reverse", "forward"), ("js", "reverse"), ("tv", "js")])
def test_a_swapped_divergence_is_rejected(mutant, broken, declared, trained):
    wrong = mutant(FDPG, loss=lambda self, *given: FDPG(trained).loss(*given), stated=lambda self, *given: FDPG(declared).stated(*given))
    assert "the expected gradient is that of the stated loss" in broken(check_objective(wrong))


@pytest.mark.parametrize("generator", sorted(SLOPES))
def test_slope_is_the_derivative_of_the_generator(generator):
    log_t, h = torch.tensor([-2.0, -0.3, 0.4, 1.7], dtype=torch.float64), 1e-6
    slope = (GENERATORS[generator](log_t + h) - GENERATORS[generator](log_t - h)) / (2 * h) / log_t.exp()
    torch.testing.assert_close(SLOPES[generator](log_t), slope, rtol=1e-7, atol=1e-8)


def test_the_js_generator_is_twice_the_divergence():
    log_q, log_p0, reward = (torch.tensor(x, dtype=torch.float64) for x in ([-40.0, 0.0], [math.log(0.5)] * 2, [40.0, 0.0]))
    assert float(FDPG("js").stated(log_q, log_p0, reward, 1.0, 2)) == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("generator", ["forward", "reverse"])
def test_the_first_visit_keeps_the_direction_where_promised(generator):
    world = WORLDS[0]
    logits, objective = world.log_p0 + 0.5 * world.rewards.sin(), FDPG(generator)
    found = expected_gradient(objective, world, logits, 0.7, fresh_state(objective, world)).flatten()
    settled = {"log_z": (world.log_p0 + world.rewards / 0.7).logsumexp(1), "seen": torch.tensor([1e15]).double()}
    wanted = expected_gradient(objective, world, logits, 0.7, settled).flatten()
    assert float(1 - torch.nn.functional.cosine_similarity(found, wanted, dim=0)) < 1e-12


def test_an_unknown_generator_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean 'reverse'"):
        FDPG("revers")
