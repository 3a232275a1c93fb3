"""Law of log(1 + chi2(p*||q)): on rows that are the mixture it is the sum over every outcome, whatever the strata's shares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from klbench.estimators.chi2 import log_chi2

P0 = np.array([6, 2, 1, 7, 3, 5, 4, 4]) / 32
Q = np.array([1, 3, 2, 2, 4, 6, 5, 1]) / 24
REWARD = np.array([0.2, -0.7, 1.0, 0.1, -0.3, 0.9, 0.4, 0.0])
STAR = P0 * np.exp(REWARD / 0.4)
STAR /= STAR.sum()
TRUTH = float(np.log((STAR**2 / Q).sum()))


def mixture(times: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """log u, log s [1, n], row weights [n] and strata of 32 a + 24 b rows written out, a and b times."""
    sizes = (32 * times[0], 24 * times[1])
    drawn = np.concatenate([np.repeat(np.arange(8), np.round(p * n).astype(int)) for p, n in zip((P0, Q), sizes, strict=True)])
    share = np.array(sizes) / sum(sizes)
    m = share[0] * P0 + share[1] * Q
    stratum = np.repeat([0, 1], sizes)
    omega = (share / sizes)[stratum]
    return np.log(STAR / m)[drawn][None], np.log(Q / m)[drawn][None], omega, stratum


@pytest.mark.parametrize("times", [(1, 1), (3, 1), (1, 5)])
def test_exact_on_the_mixture(times: tuple[int, int]) -> None:
    log_u, log_s, omega, _ = mixture(times)
    for weights in (omega, omega[None]):
        assert log_chi2(log_u, log_s, weights)[0] == pytest.approx(TRUTH, abs=1e-12)
    np.testing.assert_allclose(log_chi2(np.repeat(log_u, 2, 0), np.repeat(log_s, 2, 0), np.stack([omega, omega])), TRUTH)


def test_a_stratum_of_which_a_half_is_left_out_keeps_its_share() -> None:
    """Row weights a_j / n_j: half of one stratum's rows, each twice as heavy."""
    log_u, log_s, omega, stratum = mixture((2, 2))
    first = np.concatenate([np.arange(64) % 2 == 0, np.ones(48, bool)])  # np.repeat wrote each outcome out an even number of times
    weights = np.where(first, np.where(stratum == 0, 2 * omega, omega), 0.0)
    assert log_chi2(log_u, log_s, weights)[0] == pytest.approx(TRUTH, abs=1e-12)
    assert abs(log_chi2(log_u, log_s, np.where(first, 1.0, 0.0) / first.sum())[0] - TRUTH) > 1e-2  # pooled as if the shares had moved


def self_normalised(log_u: np.ndarray, log_s: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """Mutant: divided by the square of the mean of u over the policy's own rows alone."""
    own = np.arange(log_u.shape[1]) >= 32
    u, s = np.exp(log_u), np.exp(log_s)
    return np.log((omega * u**2 / s).sum(1) / (np.where(own, omega, 0) * u).sum(1) ** 2 * np.where(own, omega, 0).sum() ** 2)


def swapped(log_u: np.ndarray, log_s: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """Mutant: chi2(q||p*)."""
    return log_chi2(log_s, log_u, omega)


def under_q(log_u: np.ndarray, log_s: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """Mutant: (u/s)^2 averaged over the mixture, which would be right over draws of q."""
    return np.log((omega * np.exp(2 * log_u - 2 * log_s)).sum(1))


def not_squared(log_u: np.ndarray, log_s: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """Mutant: mean u / s."""
    return np.log((omega * np.exp(log_u - log_s)).sum(1))


@pytest.mark.parametrize("mutant", [self_normalised, swapped, under_q, not_squared])
def test_another_mean_is_rejected(mutant: Callable[..., np.ndarray]) -> None:
    log_u, log_s, omega, _ = mixture((1, 1))
    assert abs(float(mutant(log_u, log_s, omega)[0]) - TRUTH) > 1e-2
