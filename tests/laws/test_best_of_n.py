"""Laws of best-of-n: the law of the first maximum of n draws, ties and all, summed over every block."""

from itertools import product

import numpy as np
import pytest

from klbench.errors import UserError
from klbench.laws import check_sampler
from klbench.method import RewardLaw
from klbench.samplers.best_of_n import BestOfN

REWARD = np.array([1.0, -0.5, 2.0, 1.0])  # the first and the last answer tie
COUNTS = np.array([2, 3, 4, 1])
LAW = RewardLaw.of(REWARD, COUNTS)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_laws_hold(n, broken):
    assert broken(check_sampler(BestOfN(n))) == []


def law_of_picks(pick, n):
    """[S] over all S^n blocks of prior draws."""
    law, p0 = np.zeros(4), COUNTS / 10
    for block in map(list, product(range(4), repeat=n)):
        (kept,), used = pick(REWARD[block], 1.0, 2.0, 1, 0)
        assert used == n
        law[block[kept]] += p0[block].prod()
    return law


@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_block(n):
    ratio = np.exp(BestOfN(n).log_ratio(REWARD, LAW, 1.0, 2.0))
    np.testing.assert_allclose(law_of_picks(BestOfN(n).pick, n), COUNTS / 10 * ratio, atol=1e-14)


def test_a_ratio_blind_to_ties_is_rejected(mutant, broken):
    def log_ratio(self, reward, law, beta, top):
        upto = np.cumsum(law.mass)[np.searchsorted(law.levels, reward)]
        return np.log(self.n) + (self.n - 1) * np.log(upto)

    assert "log_ratio is the log of a normalised density ratio" in broken(check_sampler(mutant(BestOfN, log_ratio=log_ratio)))


def test_the_worst_of_n_is_rejected(mutant, broken):
    def pick(self, reward, beta, top, draws, seed):
        return np.arange(draws) * self.n + reward[: draws * self.n].reshape(draws, self.n).argmin(1), draws * self.n

    assert "pick draws from the law of log_ratio" in broken(check_sampler(mutant(BestOfN, pick=pick)))


def test_a_price_of_one_is_rejected(mutant, broken):
    wrong = mutant(BestOfN, cost=lambda self, law, beta, top: float(self.n) * 1.1)
    assert broken(check_sampler(wrong)) == ["cost is the prior draws used"]


def test_rewards_that_the_bank_never_saw():
    bank, n = np.repeat([0.0, 1.0, 2.0, 3.0], 8), 4
    ratio = BestOfN(n).log_ratio(np.array([-9.0, 0.0, 1.5, 99.0]), RewardLaw.of(bank), 1.0, 100.0)
    assert np.isfinite(ratio).all()
    assert ratio[0] == ratio[1]  # below every level: the lowest one's
    np.testing.assert_allclose(np.exp(ratio[2:]), [n * 0.5**3, n])  # between and above: n F^(n-1)


def test_refusals():
    with pytest.raises(UserError, match="bank of at least 128 draws a prompt, got 127"):
        BestOfN(16).log_ratio(np.zeros(1), RewardLaw.of(np.zeros(127)), 1.0, 1.0)
    with pytest.raises(UserError, match="needs 32 prior draws for 2, got 31"):
        BestOfN(16).pick(np.zeros(31), 1.0, 1.0, 2, 0)
    with pytest.raises(UserError, match="at least 1"):
        BestOfN(0)


def test_a_law_of_draws_and_one_of_masses_agree():
    drawn, exact = RewardLaw.of(np.repeat(REWARD, COUNTS * 4)), LAW
    np.testing.assert_array_equal(drawn.levels, [-0.5, 1.0, 2.0])
    np.testing.assert_allclose(drawn.mass, exact.mass)
    assert drawn.draws == 40 and exact.draws == np.inf
    np.testing.assert_allclose(drawn.log_mean_exp(drawn.levels * 900), np.log(0.4) + 1800)
    assert RewardLaw.of(np.array([1.0, 7.0]), np.array([2.0, 0.0])).levels.tolist() == [1.0]  # what has no mass is no level


@pytest.mark.parametrize("n", [1, 3])
def test_log_best_of_of_a_mutant_without_the_left_limit_differs(n):
    upto = np.cumsum(LAW.mass)[np.searchsorted(LAW.levels, REWARD)]
    same = np.allclose(LAW.log_best_of(REWARD, n), np.log(n) + (n - 1) * np.log(upto))
    assert same == (n == 1)
