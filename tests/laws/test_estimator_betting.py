"""Law of the betting interval for log Z: its coverage is a sum over every sample, and at least its level for every law and every N."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations_with_replacement

import numpy as np
import pytest
from scipy.stats import binom

from klbench import estimate
from klbench.estimators.betting import STAKES, log_z_interval

SHARES = np.concatenate([np.geomspace(1e-5, 0.5, 60), 1 - np.geomspace(1e-5, 0.5, 30)])  # of prior draws with the larger weight
Ends = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]


def two_weights(draws: int, low: float) -> np.ndarray:
    """[N + 1, N] tilts: k draws at 0, the others at `low`."""
    return np.where(np.arange(draws) < np.arange(draws + 1)[:, None], 0.0, low)


def worst(ends: Ends, draws: int, low: float, level: float) -> float:
    """Least coverage over laws with weights 1 and e^low, the number of ones summed over."""
    tilt = two_weights(draws, low)
    left, right = ends(tilt, np.zeros(draws + 1), level)
    log_z = np.log(SHARES + (1 - SHARES) * math.exp(low))
    held = (left[:, None] <= log_z) & (log_z <= right[:, None])
    return float((binom.pmf(np.arange(draws + 1)[:, None], draws, SHARES) * held).sum(0).min())


@pytest.mark.parametrize("draws", [1, 2, 16, 100])
@pytest.mark.parametrize("low", [-math.inf, -1.0, -12.0])
@pytest.mark.parametrize("level", [0.95, 0.6])
def test_it_covers_every_law_of_two_weights(draws: int, low: float, level: float) -> None:
    assert worst(log_z_interval, draws, low, level) >= level


def test_it_covers_laws_of_three_weights() -> None:
    draws, tilts = 12, np.array([-9.0, -2.0, 0.0])
    drawn = np.array(list(combinations_with_replacement(range(3), draws)))
    counts = np.stack([(drawn == s).sum(1) for s in range(3)], 1)
    ways = np.array([math.factorial(draws) / math.prod(map(math.factorial, c)) for c in counts.tolist()])
    low, high = log_z_interval(tilts[drawn], np.zeros(len(drawn)))
    for law in ([0.9, 0.099, 0.001], [0.3, 0.6, 0.1], [0.05, 0.05, 0.9], [0.98, 0.02, 0.0]):
        chance = ways * np.prod(np.array(law) ** counts, 1)
        log_z = math.log(np.exp(tilts) @ law)
        assert chance.sum() == pytest.approx(1.0)
        assert chance @ ((low <= log_z) & (log_z <= high)) >= 0.95


def largest_seen(tilt: np.ndarray, ceiling: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Mutant: W is the largest weight seen, not the largest there can be."""
    return log_z_interval(tilt, tilt.max(1), level)


def delta(tilt: np.ndarray, ceiling: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Mutant: what a normal law would say."""
    w = np.exp(tilt)
    half = estimate.t_quantile(w.shape[1] - 1, level) * w.std(1, ddof=1) / np.sqrt(w.shape[1]) / w.mean(1)
    return np.log(w.mean(1)) - half, np.log(w.mean(1)) + half


@pytest.mark.parametrize("mutant", [largest_seen, delta])
def test_an_interval_that_trusts_what_was_seen_is_rejected(mutant: Ends) -> None:
    assert worst(mutant, 16, -12.0, 0.95) < 0.05


def capital(k: int, draws: int, low: float, share: float, mixed: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """K against the true mean from above and from below, k of the draws weighing 1 and the others e^low; `mixed` makes one of 16 stakes."""
    mean, c, least = share + (1 - share) * math.exp(low), STAKES, math.exp(low)
    above = (1 - c) ** k * (1 - c * (least - mean) / (1 - mean)) ** (draws - k)
    below = (1 + c * (1 / mean - 1)) ** k * (1 + c * (least / mean - 1)) ** (draws - k)
    return mixed(above), mixed(below)


@pytest.mark.parametrize("share", [1e-3, 0.2, 0.9])
@pytest.mark.parametrize("low", [-12.0, -0.5])
def test_the_capital_against_the_truth_has_mean_1(share: float, low: float) -> None:
    """Which is all that coverage needs (Markov); the mutant that takes the stake that did best has more."""
    draws = 20
    chance = binom.pmf(np.arange(draws + 1), draws, share)

    def mean(mixed: Callable[[np.ndarray], float]) -> np.ndarray:
        return chance @ np.array([capital(k, draws, low, share, mixed) for k in range(draws + 1)])

    assert mean(np.mean) == pytest.approx(1.0)
    assert (mean(np.max) > 1.01).all()
    for k in (0, 3, draws):  # and it is what the interval is solved from
        truth = math.log(share + (1 - share) * math.exp(low))
        above, below = capital(k, draws, low, share, np.mean)
        for level in (0.05, 0.95):
            left, right = log_z_interval(two_weights(draws, low)[k : k + 1], np.zeros(1), level)
            assert (right[0] >= truth) == (above <= 2 / (1 - level)) and (left[0] <= truth) == (below <= 2 / (1 - level))


def test_one_side_spends_half_of_the_level() -> None:
    """Each end alone misses at most (1 - level)/2: the sum is what the two together may miss."""
    tilt, log_z = two_weights(64, -12.0), np.log(SHARES + (1 - SHARES) * math.exp(-12.0))
    low, high = log_z_interval(tilt, np.zeros(65), 0.6)
    chance = binom.pmf(np.arange(65)[:, None], 64, SHARES)
    for miss in (log_z < low[:, None], log_z > high[:, None]):
        assert (chance * miss).sum(0).max() <= 0.2
