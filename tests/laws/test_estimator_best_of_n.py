"""Laws of the over-optimisation curve: unbiased over every sample of a law with ties, and a leave-one-out error that is the literal one."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from klbench.estimators.best_of_n import best_of, kl_bound

PROXY = np.array([0.0, 1.0, 1.0, 2.0])  # two outcomes tie
GOLD = np.array([0.3, 1.0, -0.5, 0.1])
LAW = np.array([0.4, 0.15, 0.25, 0.2])
DRAWS = 6
SAMPLES = np.array(list(product(range(4), repeat=DRAWS)))
CHANCE = LAW[SAMPLES].prod(1)
Figure = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def truth(value: np.ndarray, n: int) -> float:
    """E[value of the best of n], the best drawn by lot among the tied, summed over all n-tuples of outcomes."""
    total = 0.0
    for picks in map(list, product(range(4), repeat=n)):
        best = [i for i in picks if PROXY[i] == PROXY[picks].max()]
        total += LAW[picks].prod() * value[best].mean()
    return total


def unbiased(figure: Figure, n: int) -> float:
    """Largest bias over proxy and gold."""
    return max(abs(CHANCE @ figure(PROXY[SAMPLES], value[SAMPLES], n) - truth(value, n)) for value in (PROXY, GOLD))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_curve_is_unbiased(n: int) -> None:
    assert unbiased(lambda x, v, n: best_of(x, v, n)[0], n) < 1e-12


def plug_in(proxy: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    """Mutant: the best of n redrawn from the N, with weights (i/N)^n - ((i-1)/N)^n."""
    order = np.argsort(proxy, 1, kind="stable")
    i = np.arange(1, proxy.shape[1] + 1)
    return np.take_along_axis(value, order, 1) @ ((i / len(i)) ** n - ((i - 1) / len(i)) ** n)


def first_of_the_tied(proxy: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    """Mutant: gold not averaged within ties, but taken in an order that knows it."""
    order = np.lexsort((value, proxy), axis=1)
    i, N = np.arange(1, proxy.shape[1] + 1), proxy.shape[1]
    weight = np.array([math.comb(k - 1, n - 1) / math.comb(N, n) for k in i])
    return np.take_along_axis(value, order, 1) @ weight


def off_by_one(proxy: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    """Mutant: C(i, n) in place of C(i-1, n-1), normalised."""
    order = np.argsort(proxy, 1, kind="stable")
    weight = np.array([math.comb(i, n) for i in range(1, proxy.shape[1] + 1)], dtype=float)
    return np.take_along_axis(value, order, 1) @ weight / weight.sum()


@pytest.mark.parametrize("mutant", [plug_in, first_of_the_tied, off_by_one])
def test_a_biased_curve_is_rejected(mutant: Figure) -> None:
    assert unbiased(mutant, 3) > 1e-2


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("ties", [True, False])
def test_leaving_one_out_in_closed_form(n: int, ties: bool) -> None:
    rng = np.random.default_rng(n)
    proxy = rng.integers(0, 4, (3, 9)).astype(float) if ties else rng.normal(size=(3, 9))
    gold = rng.normal(size=(3, 9))
    for value in (proxy, gold):
        full, left = best_of(proxy, value, n)
        for p in range(3):
            again = [best_of(np.delete(proxy, j, 1), np.delete(value, j, 1), n)[0][p] for j in np.argsort(proxy[p], kind="stable")]
            np.testing.assert_allclose(left[:, p], again, atol=1e-12)
        np.testing.assert_allclose(left.mean(0), full, atol=1e-12)  # a U-statistic has no jackknife correction


def test_the_bound_on_kl_is_its_value_without_ties() -> None:
    """KL = E[log n U^(n-1)] under the density n u^(n-1) of the best quantile; a law with ties has less."""
    for n in (1, 2, 7):
        u = (np.arange(200_000) + 0.5) / 200_000
        density = n * u ** (n - 1)
        assert kl_bound(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)
    n = 3
    best = np.array([sum(LAW[list(p)].prod() / len(t) * t.count(s) for p in product(range(4), repeat=n)
                         for t in [[i for i in p if PROXY[i] == PROXY[list(p)].max()]]) for s in range(4)])  # fmt: skip
    assert 0.1 < float((best * np.log(best / LAW)).sum()) < kl_bound(n)
