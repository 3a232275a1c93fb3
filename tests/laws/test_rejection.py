"""Laws of rejection: its density ratio is the posterior's, its picks follow it."""

import math

import numpy as np
import pytest

from klbench.errors import UserError
from klbench.laws import check_sampler
from klbench.method import RewardLaw
from klbench.samplers.rejection import Rejection


def test_laws_hold(broken):
    assert broken(check_sampler(Rejection())) == []


@pytest.mark.parametrize("factor", [1.1, -1.0])
def test_accepting_at_a_wrong_beta_is_rejected(mutant, broken, factor):
    def pick(self, reward, beta, top, draws, seed):
        accept = np.minimum(np.exp((reward - top) / (beta * factor)), 1)
        kept = np.flatnonzero(np.random.default_rng(seed).random(len(reward)) < accept)[:draws]
        return kept, int(kept[-1]) + 1

    assert "pick draws from the law of log_ratio" in broken(check_sampler(mutant(Rejection, pick=pick)))


def test_a_ratio_without_log_z_is_rejected(mutant, broken):
    wrong = mutant(Rejection, log_ratio=lambda self, reward, law, beta, top: reward / beta)
    assert "log_ratio is the log of a normalised density ratio" in broken(check_sampler(wrong))


def test_by_hand():
    # rewards 0 and log 2 at beta 1, half of the bank each: Z = 3/2, acceptance 3/4
    levels = np.array([0.0, math.log(2)])
    law = RewardLaw.of(levels)
    np.testing.assert_allclose(np.exp(Rejection().log_ratio(levels, law, 1.0, math.log(2))), [2 / 3, 4 / 3])
    assert Rejection().cost(law, 1.0, math.log(2)) == pytest.approx(4 / 3)


def test_more_prior_draws_leave_earlier_picks_alone():
    reward = np.random.default_rng(5).normal(size=400).clip(max=1.0)
    few, used = Rejection().pick(reward[:200], 0.7, 1.0, 12, 3)
    many, _ = Rejection().pick(reward, 0.7, 1.0, 20, 3)
    assert few.tolist() == many[:12].tolist() and used == few[-1] + 1


def test_every_draw_at_the_ceiling_is_kept():
    assert Rejection().pick(np.full(5, 2.0), 0.1, 2.0, 5, 0)[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "reward, top, draws, says",
    [([0.0], math.inf, 1, "finite reward_max"), ([2.0], 1.0, 1, "reward 2 above reward_max 1"), ([-50.0] * 9, 1.0, 2, "accepted 0 of 9")],
)
def test_refusals(reward, top, draws, says):
    with pytest.raises(UserError, match=says):
        Rejection().pick(np.array(reward), 1.0, top, draws, 0)
