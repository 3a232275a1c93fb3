"""Ranks and certain brackets by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from klbench import ranks
from klbench.estimate import t_quantile


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and the last may not fall below the one before.
    assert ranks.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert list(ranks.holm([0.9, 0.8])) == [1.0, 1.0]
    assert list(ranks.holm([])) == []


def test_paired_p_by_hand() -> None:
    # mean 2, standard error 1/sqrt(3), 2 degrees of freedom, for which p = 1 - t / sqrt(2 + t^2) with t^2 = 12.
    assert ranks.paired_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - math.sqrt(12 / 14))
    assert ranks.paired_p(np.array([-1.0, -2.0, -3.0])) == pytest.approx(1 - math.sqrt(12 / 14))


@pytest.mark.parametrize(("d", "p"), [([0.0, 0.0, 0.0], 1.0), ([1e-15, -2e-15], 1.0), ([5.0], 1.0), ([0.3, 0.3, 0.3], 0.0)])
def test_paired_p_where_t_has_no_spread(d: list[float], p: float) -> None:
    assert ranks.paired_p(np.array(d)) == p


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
