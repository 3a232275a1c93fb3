"""Laws of quasi-rejection: its density, its price, and what both do as the bound falls."""

import math

import numpy as np
import pytest

from klbench.errors import UserError
from klbench.laws import check_sampler
from klbench.method import RewardLaw
from klbench.samplers.quasi_rejection import QuasiRejection
from klbench.samplers.rejection import Rejection

RNG = np.random.default_rng(8)
MASS, REWARD = RNG.dirichlet(np.ones(8)), RNG.normal(size=8)
TOP = float(REWARD.max())
LAW = RewardLaw.of(REWARD, MASS)


@pytest.mark.parametrize("c", [1.0, 0.5, 0.1, 0.01])
def test_laws_hold(c, broken):
    assert broken(check_sampler(QuasiRejection(c))) == []


def test_by_hand():
    # rewards 0 and log 4 at beta 1, half of the bank each, bound 2: min(w, 2) = 1 and 2
    levels, top = np.array([0.0, math.log(4)]), math.log(4)
    law = RewardLaw.of(levels)
    np.testing.assert_allclose(np.exp(QuasiRejection(0.5).log_ratio(levels, law, 1.0, top)), [2 / 3, 4 / 3])
    assert QuasiRejection(0.5).cost(law, 1.0, top) == pytest.approx(2 / 1.5)


def test_a_bound_that_holds_is_rejection():
    np.testing.assert_allclose(QuasiRejection(1.0).log_ratio(REWARD, LAW, 0.3, TOP), Rejection().log_ratio(REWARD, LAW, 0.3, TOP))
    assert QuasiRejection(1.0).cost(LAW, 0.3, TOP) == pytest.approx(Rejection().cost(LAW, 0.3, TOP))
    stream = RNG.choice(REWARD, size=300, p=MASS)
    assert QuasiRejection(1.0).pick(stream, 0.3, TOP, 5, 1)[0].tolist() == Rejection().pick(stream, 0.3, TOP, 5, 1)[0].tolist()


@pytest.mark.parametrize("beta", [0.3, 1.2])
def test_quality_is_bought(beta):
    """Claim C36: TV, KL and acceptance fall as the bound rises, and TV is at most 1 - Z_c/Z."""
    p = MASS * np.exp(REWARD / beta)
    z, tvs, kls, prices = p.sum(), [], [], []
    for c in (0.002, 0.01, 0.05, 0.2, 0.6, 1.0):
        q = MASS * np.exp(QuasiRejection(c).log_ratio(REWARD, LAW, beta, TOP))
        tvs.append(0.5 * np.abs(q - p / z).sum())
        kls.append(float((p / z * np.log(p / z / q)).sum()))
        prices.append(QuasiRejection(c).cost(LAW, beta, TOP))
        z_c = (MASS * np.minimum(np.exp(REWARD / beta), c * math.exp(TOP / beta))).sum()
        assert tvs[-1] <= 1 - z_c / z + 1e-12
    assert (np.diff(tvs) <= 1e-12).all() and (np.diff(kls) <= 1e-12).all() and (np.diff(prices) >= -1e-12).all()
    assert tvs[-1] < 1e-12 < 1e-2 < tvs[0] and prices[-1] > 2 * prices[0]


def test_a_ratio_without_the_bound_is_rejected(mutant, broken):
    wrong = mutant(QuasiRejection, log_ratio=lambda self, r, law, beta, top: Rejection().log_ratio(r, law, beta, top))
    assert "pick draws from the law of log_ratio" in broken(check_sampler(wrong))


def test_a_ratio_without_z_is_rejected(mutant, broken):
    wrong = mutant(QuasiRejection, log_ratio=lambda self, r, law, beta, top: self.log_accept(r, beta, top))
    assert "log_ratio is the log of a normalised density ratio" in broken(check_sampler(wrong))


def test_the_price_of_rejection_is_rejected(mutant, broken):
    wrong = mutant(QuasiRejection, cost=lambda self, law, beta, top: Rejection().cost(law, beta, top))
    assert broken(check_sampler(wrong)) == ["cost is the prior draws used"]


@pytest.mark.parametrize(
    "reward, top, draws, says",
    [([0.0], math.inf, 1, "finite reward_max"), ([2.0], 1.0, 1, "reward 2 above reward_max 1"), ([-50.0] * 9, 1.0, 2, "accepted 0 of 9")],
)
def test_refusals(reward, top, draws, says):
    with pytest.raises(UserError, match=says):
        QuasiRejection().pick(np.array(reward), 1.0, top, draws, 0)


@pytest.mark.parametrize("c", [0.0, 1.5, math.nan])
def test_a_share_is_between_0_and_1(c):
    with pytest.raises(UserError, match=r"c in \(0, 1\]"):
        QuasiRejection(c)
    assert QuasiRejection().cost(LAW, 1.0, math.inf) == math.inf
