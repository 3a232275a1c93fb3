"""Laws of best-of-n: the law of the first maximum of n draws, ties and all, summed over every block."""

from itertools import product

import numpy as np
import pytest

from klbench.errors import UserError
from klbench.laws import check_sampler
from klbench.samplers.best_of_n import BestOfN

REWARD = np.array([1.0, -0.5, 2.0, 1.0])  # the first and the last answer tie
COUNTS = np.array([2, 3, 4, 1])
BANK = np.repeat(REWARD, COUNTS * 4)


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
    ratio = np.exp(BestOfN(n).log_ratio(REWARD, BANK, 1.0, 2.0))
    np.testing.assert_allclose(law_of_picks(BestOfN(n).pick, n), COUNTS / 10 * ratio, atol=1e-14)


def test_a_ratio_blind_to_ties_is_rejected(mutant, broken):
    def log_ratio(self, reward, bank, beta, top):
        upto = np.searchsorted(np.sort(bank), reward, side="right") / len(bank)
        return np.log(self.n) + (self.n - 1) * np.log(upto)

    assert "log_ratio is the log of a normalised density ratio" in broken(check_sampler(mutant(BestOfN, log_ratio=log_ratio)))


def test_the_worst_of_n_is_rejected(mutant, broken):
    def pick(self, reward, beta, top, draws, seed):
        return np.arange(draws) * self.n + reward[: draws * self.n].reshape(draws, self.n).argmin(1), draws * self.n

    assert "pick draws from the law of log_ratio" in broken(check_sampler(mutant(BestOfN, pick=pick)))


def test_a_price_of_one_is_rejected(mutant, broken):
    wrong = mutant(BestOfN, cost=lambda self, bank, beta, top: float(self.n) * 1.1)
    assert broken(check_sampler(wrong)) == ["cost is the prior draws used"]


def test_rewards_that_the_bank_never_saw():
    bank, n = np.repeat([0.0, 1.0, 2.0, 3.0], 8), 4
    ratio = BestOfN(n).log_ratio(np.array([-9.0, 0.0, 1.5, 99.0]), bank, 1.0, 100.0)
    assert np.isfinite(ratio).all()
    assert ratio[0] == ratio[1]  # below every level: the lowest one's
    np.testing.assert_allclose(np.exp(ratio[2:]), [n * 0.5**3, n])  # between and above: n F^(n-1)


def test_refusals():
    with pytest.raises(UserError, match="bank of at least 128 draws a prompt, got 127"):
        BestOfN(16).log_ratio(np.zeros(1), np.zeros(127), 1.0, 1.0)
    with pytest.raises(UserError, match="needs 32 prior draws for 2, got 31"):
        BestOfN(16).pick(np.zeros(31), 1.0, 1.0, 2, 0)
    with pytest.raises(UserError, match="at least 1"):
        BestOfN(0)
