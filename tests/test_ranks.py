"""Ranks and certain brackets by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import stdtr

from klbench import ranks
from klbench.estimate import t_quantile


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and the last may not fall below the one before.
    assert ranks.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert list(ranks.holm([0.9, 0.8])) == [1.0, 1.0]
    assert list(ranks.holm([])) == []


def test_paired_t_by_hand() -> None:
    # mean 2, standard error 1/sqrt(3)
    assert ranks.paired_t(np.array([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(12))
    assert ranks.paired_t(np.array([-1.0, -2.0, -3.0])) == pytest.approx(math.sqrt(12))


@pytest.mark.parametrize(("d", "t"), [([0.0, 0.0, 0.0], 0.0), ([1e-15, -2e-15], 0.0), ([5.0], 0.0), ([0.3, 0.3, 0.3], math.inf)])
def test_paired_t_where_there_is_no_spread(d: list[float], t: float) -> None:
    assert ranks.paired_t(np.array(d)) == t


def test_rank_ranges_by_hand() -> None:
    best = np.array([0.0, 5.0, -3.0, 1.0])
    second = best + np.array([1.0, 1.1, 0.9, 1.0])
    third = second + np.array([0.1, -0.1, 0.1, -0.1])  # no difference in the mean
    assert ranks.rank_ranges(np.stack([third, best, second])) == [(2, 3), (1, 1), (2, 3)]


def test_holm_widens_the_ranks() -> None:
    first = np.zeros(3)
    second = first + 3.258 + np.array([-1.0, 0.0, 1.0])  # p = .03 on its own
    noisy = np.array([100.0, -100.0, 50.0])
    assert ranks.rank_ranges(np.stack([first, second])) == [(1, 1), (2, 2)]
    assert ranks.rank_ranges(np.stack([first, second, noisy])) == [(1, 3)] * 3  # .09 after Holm


def by_every_pair(free: np.ndarray) -> list[tuple[int, int]]:
    """Ranks as the module's formula says them: a p value a pair, Holm over all of them."""
    first, second = np.triu_indices(len(free), 1)
    p = 2 * stdtr(free.shape[1] - 1, -ranks.paired_t(free[first] - free[second]))
    differ, lower = ranks.holm(p) <= 1 - ranks.LEVEL, free.mean(1)[first] < free.mean(1)[second]
    better, worse = np.where(lower, first, second)[differ], np.where(lower, second, first)[differ]
    return [(1 + int((worse == k).sum()), len(free) - int((better == k).sum())) for k in range(len(free))]


@pytest.mark.parametrize("block", [1, 40, ranks.BLOCK])
@pytest.mark.parametrize("seed", range(6))
def test_many_policies_have_the_ranks_of_every_pair(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them equal, some apart by the same at each prompt, some by less than a product of matrices can see."""
    monkeypatch.setattr(ranks, "BLOCK", block)
    rng = np.random.default_rng(seed)
    free = rng.normal(0, 0.3, (24, 9)) + rng.gamma(2, 0.5, (24, 1)) + 50 * rng.normal(size=9)
    free[1], free[2], free[3], free[4] = free[0], free[0] + 0.5, free[0] + 1e-9 * rng.normal(size=9), free[0] + 1e-9
    assert ranks.rank_ranges(free) == by_every_pair(free)
    assert len(set(ranks.rank_ranges(free))) > 5


def test_a_difference_below_what_a_product_of_matrices_sees_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    free = rng.normal(size=(3, 8))
    free[1] = free[0] + 1e-9 * (1 + 0.01 * rng.normal(size=8))
    assert ranks.rank_ranges(free) == by_every_pair(free) == [(1, 2), (2, 3), (1, 3)]
    monkeypatch.setattr(ranks, "NEAR", 0.0)
    assert ranks.rank_ranges(free) == [(1, 3)] * 3


def test_nobody_s_bracket_needs_more_than_the_contenders() -> None:
    rng = np.random.default_rng(0)
    free, stderr = rng.normal(0, 2, (30, 5)), rng.gamma(1, 0.3, (30, 5))
    contenders = ranks.contenders(free, stderr)
    for own in np.argsort(free.mean(axis=1)):
        others, best = [k for k in range(30) if k != own], [k for k in contenders if k != own]
        whole = ranks.certain_bracket(free[own], stderr[own], free[others], stderr[others], None)
        assert ranks.certain_bracket(free[own], stderr[own], free[best], stderr[best], None, 29) == whole
    assert whole[0] > 0  # of the farthest
    assert ranks.certain_bracket(free[own], stderr[own], free[best], stderr[best], None) != whole  # Bonferroni is over all of them


def test_log_z_of_a_prompt_moves_no_rank() -> None:
    free = np.random.default_rng(0).normal(size=(4, 40)) + np.array([0.0, 0.2, 1.0, 1.1])[:, None]
    assert ranks.rank_ranges(free) == ranks.rank_ranges(free + np.linspace(-50, 50, 40))
    assert ranks.rank_ranges(free) != ranks.rank_ranges(free[::-1])


def test_certain_bracket_by_hand() -> None:
    # free - other: 10 on the mean; errors of the mean .1 and .05, added; two prompts have 14 degrees of freedom
    free, other, cap = np.array([11.9, 12.1]), np.array([2.0, 2.0]), np.array([3.0, 3.0])
    own, far = np.full(2, 0.1 * math.sqrt(2)), np.full((1, 2), 0.05 * math.sqrt(2))
    t = t_quantile(14)
    assert ranks.certain_bracket(free, own, other[None], far, cap) == pytest.approx((10 - 0.15 * t, 15 + 0.1 * t))
    both = ranks.certain_bracket(free, own, np.stack([other, other - 0.1]), np.repeat(far, 2, 0), None)[0]
    assert both == pytest.approx(10.1 - 0.15 * t_quantile(14, 0.975))  # the best of two, at half the error each
    assert ranks.certain_bracket(other, own, free[None], far, None) == (0.0, None)  # KL is never below 0
    assert ranks.certain_bracket(free[:1], own[:1], other[None, :1], far[:, :1], None)[0] > 9.0  # one prompt has draws too


def test_the_bracket_holds_log_z() -> None:
    """Exact sums: with p* itself on the board the lower end is the truth; the upper end holds for any law of the reward below the cap."""
    p0, reward, beta = np.array([0.7, 0.2, 0.1]), np.array([0.0, 0.4, 1.0]), 0.25
    log_z = math.log((p0 * np.exp(reward / beta)).sum())
    star = p0 * np.exp(reward / beta - log_z)
    for q in (p0, np.array([0.05, 0.9, 0.05]), star):
        free = np.array([(q * np.log(q / p0)).sum() - (q * reward).sum() / beta])
        low, high = ranks.certain_bracket(free, np.zeros(1), np.array([[-log_z]]), np.zeros((1, 1)), np.array([1.0 / beta]))
        assert high is not None and low - 1e-12 <= free[0] + log_z <= high
        assert low == pytest.approx(max(0.0, free[0] + log_z))
