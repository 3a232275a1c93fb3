"""Laws of the moment fit: on rows that are the mixture, lambda is that of sums over every outcome; its stated error is the real one."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.optimize import brentq

from klbench.estimators.moments import Moment, fit

P0 = np.array([6, 2, 1, 7, 3, 5, 4, 4]) / 32
Q = np.array([1, 3, 2, 2, 4, 6, 5, 1]) / 24
PHI = np.array([1.0, -1.0, 0.0, -1.0, 1.0, 0.0, 2.0, -2.0])
BOX = (-2.0, 2.0)


def moment(lam: float, phi: np.ndarray = PHI) -> float:
    w = P0 * np.exp(lam * phi)
    return float(w @ phi / w.sum())


def truth(mu: float) -> tuple[float, float, float]:
    """lambda, log Z and the least KL by sums over the outcomes."""
    lam = brentq(lambda x: moment(x) - mu, -50, 50)
    w = P0 * np.exp(lam * PHI)
    star = w / w.sum()
    return lam, math.log(w.sum()), float((star * np.log(star / P0)).sum())


def written_out(times: int = 4, bank: int = 32, own: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outcomes, log p0/m and strata of rows that are the mixture of P0 and Q in the proportions of `bank` and `own`."""
    drawn = np.concatenate([np.repeat(np.arange(8), np.round(p * n * times).astype(int)) for p, n in ((P0, bank), (Q, own))])
    m = (bank * P0 + own * Q) / (bank + own)
    return drawn, np.log(P0 / m)[drawn], np.repeat([0, 1], [bank * times, own * times])


def fitted(mu: float, **change: np.ndarray) -> Moment:
    drawn, log_weight, stratum = written_out()
    return fit(PHI[drawn], mu, change.get("log_weight", log_weight), change.get("stratum", stratum), BOX)


@pytest.mark.parametrize("mu", [-1.2, -0.3, 0.4, 1.7])
def test_the_fit_is_exact_where_the_rows_are_the_mixture(mu: float) -> None:
    lam, log_z, least = truth(mu)
    found = fitted(mu)
    assert found.lam is not None and found.lam[0] == pytest.approx(lam, abs=1e-6)
    assert found.log_z == pytest.approx(log_z, abs=1e-6) and found.least_kl.value == pytest.approx(least, abs=1e-9)
    assert least > 0.01 and abs(lam) > 0.1


def test_weights_that_are_dropped_or_turned_round_are_rejected() -> None:
    lam = truth(0.4)[0]
    _, log_weight, _ = written_out()
    for mutant in (np.zeros_like(log_weight), -log_weight, log_weight * 0.5):
        found = fitted(0.4, log_weight=mutant)
        assert found.lam is not None and abs(found.lam[0] - lam) > 0.03


def test_the_sign_and_the_dual_value() -> None:
    """At the prior's own moment lambda is 0 and nothing is spent; mutants lambda mu + log Z and KL(p0||p*) are other numbers."""
    at_prior = fitted(moment(0.0))
    assert at_prior.lam is not None and abs(at_prior.lam[0]) < 1e-6 and at_prior.least_kl.value == pytest.approx(0.0, abs=1e-9)
    lam, log_z, least = truth(0.4)
    star = P0 * np.exp(lam * PHI - log_z)
    other = float((P0 * np.log(P0 / star)).sum())
    assert abs(other - least) > 1e-3 and abs(lam * 0.4 + log_z - least) > 1e-2


def test_two_features_at_once() -> None:
    """E[phi] and E[phi^2] together: both constraints hold under the fitted law, summed over the outcomes."""
    drawn, log_weight, stratum = written_out()
    phi, mu = np.stack([PHI, PHI**2], 1), np.array([0.3, 0.8])
    found = fit(phi[drawn], mu, log_weight, stratum, ([-2.0, 0.0], [2.0, 4.0]))
    assert found.lam is not None and found.stderr is not None and found.stderr.shape == (2,)
    w = P0 * np.exp(phi @ found.lam)
    np.testing.assert_allclose(w @ phi / w.sum(), mu, atol=1e-6)
    alone = fit(PHI[drawn], 0.3, log_weight, stratum, BOX)
    assert alone.lam is not None and abs(alone.lam[0] - found.lam[0]) > 0.1
    assert (found.least_kl.value or 0.0) > (alone.least_kl.value or 0.0)  # a second constraint costs more


def test_the_stated_error_is_the_real_one() -> None:
    """One prior stratum of 24 draws and two weights: lambda is a function of the count, its variance a sum over all counts."""
    draws, share, mu = 24, 0.3, 0.5
    counts = np.arange(3, draws - 2)
    chance = np.array([math.comb(draws, int(k)) * share**k * (1 - share) ** (draws - k) for k in counts])
    chance /= chance.sum()
    fits = [fit(np.repeat([1.0, 0.0], [k, draws - k]), mu, box=(0.0, 1.0)) for k in counts]
    lam = np.array([found.lam[0] for found in fits if found.lam is not None])
    np.testing.assert_allclose(lam, np.log((draws - counts) / counts), atol=1e-6)  # odds mu : 1 - mu = 1
    spread = math.sqrt(chance @ (lam - chance @ lam) ** 2)
    stated = np.array([found.stderr[0] for found in fits if found.stderr is not None])
    rms = math.sqrt(chance @ stated**2)
    assert rms == pytest.approx(spread, rel=0.15)
    least = np.array([found.least_kl.value for found in fits], dtype=float)
    error = math.sqrt(chance @ np.array([found.least_kl.stderr or 0.0 for found in fits]) ** 2)
    assert error == pytest.approx(math.sqrt(chance @ (least - chance @ least) ** 2), rel=0.15)


def test_strata_are_not_pooled_in_the_error() -> None:
    """The allocation is fixed: the spread between strata is no error. All samples of 2 + 2 draws of two laws far apart."""
    laws = np.array([[0.1, 0.9], [0.9, 0.1]])
    pairs = list(product((0, 1), repeat=2))
    means = [sum(x) + sum(y) for x in pairs for y in pairs]
    chance = [laws[0][list(x)].prod() * laws[1][list(y)].prod() for x in pairs for y in pairs]
    total = np.dot(chance, np.square(means)) - np.dot(chance, means) ** 2
    assert total == pytest.approx(4 * 0.09)  # four draws of variance .09; pooled about one mean it would be 1
    drawn = np.repeat([0, 1, 0, 1], [90, 10, 10, 90])
    m = laws.mean(0)
    split, pooled = (fit(drawn.astype(float), 0.3, np.log(laws[0] / m)[drawn], np.repeat([0, j], 100), (0.0, 1.0)) for j in (1, 0))
    assert split.stderr is not None and pooled.stderr is not None and split.stderr[0] < 0.8 * pooled.stderr[0]
