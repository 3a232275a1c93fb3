"""Laws of self-normalised importance resampling: its density against the sum over every set of prior draws."""

from itertools import product

import numpy as np
import pytest

from klbench.errors import UserError
from klbench.laws import check_sampler
from klbench.method import RewardLaw
from klbench.samplers.snis import SNIS

REWARD = np.array([1.0, -0.5, 2.0, 1.0])  # the first and the last answer tie
COUNTS = np.array([2, 3, 4, 1])
LAW = RewardLaw.of(REWARD, COUNTS)


@pytest.mark.parametrize("n", [1, 4, 32])
def test_laws_hold(n, broken):
    assert broken(check_sampler(SNIS(n))) == []


def every_set(n, beta):
    """[S] density over the prior's, over all S^(n-1) sets of others."""
    p0, w = COUNTS / 10, np.exp(REWARD / beta)
    ratio = np.zeros(4)
    for rest in map(list, product(range(4), repeat=n - 1)):
        ratio += n * p0[rest].prod() * w / (w + w[rest].sum())
    return ratio


@pytest.mark.parametrize("n, beta", [(1, 0.3), (2, 0.05), (3, 1.5), (7, 0.4)])
@pytest.mark.parametrize("of, holds", [(lambda n: n, True), (lambda n: n + 1, False)])
def test_the_density_is_the_sum_over_every_set(n, beta, of, holds):
    found = np.exp(SNIS(of(n)).log_ratio(REWARD, LAW, beta, 2.0))
    assert np.allclose(found, every_set(n, beta), rtol=1e-9, atol=0) == holds


@pytest.mark.parametrize("n", [1, 32, 500])
@pytest.mark.parametrize("beta", [0.02, 0.3, 50.0])
def test_it_is_normalised_over_any_law(n, beta):
    levels = np.random.default_rng(3).normal(size=4001) * 2
    law = RewardLaw.of(levels)
    assert law.mass @ np.exp(SNIS(n).log_ratio(law.levels, law, beta, 9.0)) == pytest.approx(1, abs=1e-9)


def test_rewards_that_the_bank_never_saw():
    far = SNIS(8).log_ratio(np.array([-2e4, -2e3, 2.0, 3.0, 1e4]), LAW, 0.5, 1e4)
    assert np.isfinite(far).all() and (np.diff(far) >= 0).all()
    assert far[-1] == pytest.approx(np.log(8))  # always taken, of the one in eight that it is
    assert far[1] - far[0] == pytest.approx(18e3 / 0.5)  # against sums that it adds nothing to


@pytest.mark.parametrize(
    "log_ratio",
    [
        lambda self, r, law, beta, top: r / beta - law.log_mean_exp(law.levels / beta),  # the posterior's
        lambda self, r, law, beta, top: SNIS(self.particles - 1).log_ratio(r, law, beta, top),
    ],
)
def test_another_density_is_rejected(broken, log_ratio):
    wrong = type("Mutant", (SNIS,), {"log_ratio": log_ratio})(4)
    assert broken(check_sampler(wrong)) == ["pick draws from the law of log_ratio"]


@pytest.mark.parametrize("factor", [1.1, -1.0])
def test_a_wrong_beta_is_rejected(mutant, broken, factor):
    wrong = mutant(SNIS, pick=lambda self, r, beta, top, draws, seed: SNIS().pick(r, beta * factor, top, draws, seed))
    assert "pick draws from the law of log_ratio" in broken(check_sampler(wrong))


def test_more_prior_draws_leave_earlier_picks_alone():
    reward = np.random.default_rng(5).normal(size=400)
    few, used = SNIS(10).pick(reward[:200], 0.7, 1.0, 20, 3)
    many, _ = SNIS(10).pick(reward, 0.7, 1.0, 40, 3)
    assert few.tolist() == many[:20].tolist() and used == 200
    assert (few // 10).tolist() == list(range(20))


def test_rewards_beyond_the_range_of_exponentials():
    assert SNIS(3).pick(np.array([-1e6, 1e6, 0.0]), 1e-3, 1e6, 1, 0)[0].tolist() == [1]


def test_refusals():
    with pytest.raises(UserError, match="bank of at least 256 draws a prompt, got 255"):
        SNIS(32).log_ratio(np.zeros(1), RewardLaw.of(np.zeros(255)), 1.0, 1.0)
    with pytest.raises(UserError, match="needs 32 prior draws for 2, got 31"):
        SNIS(16).pick(np.zeros(31), 1.0, 1.0, 2, 0)
    with pytest.raises(UserError, match="at least 1 particle"):
        SNIS(0)
    assert SNIS().log_ratio(np.zeros(0), LAW, 1.0, 1.0).shape == (0,)
