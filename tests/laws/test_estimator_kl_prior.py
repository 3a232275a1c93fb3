"""Laws of the estimators of KL(q||p0), entropy and forgetting: expectations over every sample of 16 draws that four outcomes can give.

A block of the jackknife holds two draws, so a sample is a multiset of 8 of the 10 multisets of two outcomes: 24 310 samples with their
multinomial chances, and the expectation, the RMSE and the coverage of an estimator are finite sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement

import numpy as np
import pytest
from enumerable import Table, rows

from klbench.estimate import BLOCKS, Jackknife, t_quantile
from klbench.estimators import entropy, forgetting, kl_prior
from klbench.rows import Rows

V, T = 2, 2
Q = np.array([[0.38, 0.32, 0.16, 0.14]])  # the prefixes carry a part of the noise
P0 = np.array([[0.06, 0.62, 0.19, 0.13]])
q, p0 = (Table.of(np.log(x), V, T) for x in (Q, P0))
KL = float((Q * np.log(Q / P0)).sum())
TWO = list(combinations_with_replacement(range(V**T), 2))


@cache
def samples() -> tuple[np.ndarray, np.ndarray]:
    """[S, 16] outcomes, the two of a block at i and i + 8, and [S] ways in which each arises as an ordered sample."""
    drawn = np.array(list(combinations_with_replacement(range(len(TWO)), BLOCKS)))
    ways = np.array([math.factorial(BLOCKS) / math.prod(map(math.factorial, np.bincount(s))) for s in drawn])
    pairs = np.array(TWO)
    ways = ways * 2.0 ** (pairs[:, 0] != pairs[:, 1])[drawn].sum(1)
    return np.concatenate([pairs[drawn][:, :, 0], pairs[drawn][:, :, 1]], 1), ways


def chances(law: np.ndarray) -> np.ndarray:
    """[S] chance of each sample under a law over outcomes."""
    drawn, ways = samples()
    return ways * np.exp(np.log(law)[drawn].sum(1))


def table(prompts: int) -> tuple[Table, Table]:
    """Both laws for so many prompts, each a sample."""
    return tuple(Table([np.repeat(step, prompts, 0) for step in law.steps]) for law in (q, p0))  # type: ignore[return-value]


@cache
def every() -> Rows:
    drawn, _ = samples()
    own, prior = table(len(drawn))
    return rows(own, prior, np.zeros((len(drawn), V**T)), drawn)


def facts(figure: Jackknife, truth: float, law: np.ndarray = Q[0]) -> tuple[float, float, float]:
    """Exact bias, root mean square error and coverage of the 95 % interval."""
    chance = chances(law)
    off = figure.estimates - truth
    held = np.abs(off) <= t_quantile(BLOCKS - 1) * np.sqrt(figure.variances) + 1e-12
    return float(chance @ off), math.sqrt(float(chance @ off**2)), float(chance @ held)


def test_the_samples_are_all_samples() -> None:
    assert chances(Q[0]).sum() == pytest.approx(1.0) and samples()[1].sum() == pytest.approx(4.0**16)
    first = (samples()[0] == 0).sum(1)
    assert chances(Q[0]) @ first == pytest.approx(16 * Q[0, 0])


@pytest.mark.parametrize("estimator", [kl_prior.k1, kl_prior.k3, kl_prior.rao_blackwell])
def test_plain_means_are_unbiased(estimator: Callable[[Rows], Jackknife]) -> None:
    bias, rmse, _ = facts(estimator(every()), KL)
    assert abs(bias) < 1e-12 < 1e-2 < rmse


def test_the_regressed_estimate_has_little_bias_less_error_than_any_other_and_covers() -> None:
    bias, rmse, cover = facts(kl_prior.regressed(every()), KL)
    others = [facts(f(every()), KL)[1] for f in (kl_prior.k1, kl_prior.k3, kl_prior.rao_blackwell)]
    assert rmse < min(others) and rmse < 0.4 * others[0]
    assert abs(bias) < 0.2 * rmse
    assert cover > 0.92


def take(a: np.ndarray) -> np.ndarray:
    return np.take_along_axis(np.repeat(a, len(samples()[0]), 0), samples()[0], 1)


def swapped(x: Rows) -> Rows:
    """KL(p0_t || q_t) in place of KL(q_t || p0_t), and the draws' ratio upside down."""
    other = (p0.cross(q) - p0.cross(p0)).sum(-1)
    return replace(x, kl=take(other), log_q=x.log_p0, log_p0=x.log_q)


def last_token_left_out(x: Rows) -> Rows:
    """The mask ends one token early."""
    lq, l0 = q.token_log_prob()[:, :, -1], p0.token_log_prob()[:, :, -1]
    return replace(x, kl=x.kl - take((q.cross(p0) - q.cross(q))[:, :, -1]), log_q=x.log_q - take(lq), log_p0=x.log_p0 - take(l0))


def cross_entropy(x: Rows) -> Rows:
    """The entropy of q dropped from its KL, log q from the ratio."""
    return replace(x, kl=take(q.cross(p0).sum(-1)), log_q=0 * x.log_q)


@pytest.mark.parametrize("mutant", [swapped, last_token_left_out, cross_entropy])
@pytest.mark.parametrize("estimator", [kl_prior.k1, kl_prior.rao_blackwell, kl_prior.regressed])
def test_a_wrong_figure_is_rejected(mutant: Callable[[Rows], Rows], estimator: Callable[[Rows], Jackknife]) -> None:
    bias, _, cover = facts(estimator(mutant(every())), KL)
    assert abs(bias) > 0.03 and cover < 0.92


def written_out() -> Rows:
    """100 draws that are the law: every mean over them is an expectation, and that of A and B is 0."""
    return rows(q, p0, np.zeros((1, V**T)), np.repeat(np.arange(V**T), np.round(100 * Q[0]).astype(int))[None])


def at(x: Rows, table: np.ndarray) -> np.ndarray:
    """Of the outcome that each written-out row is."""
    return np.take_along_axis(table, np.abs(x.log_q[:, :, None] - q.log_prob()[:, None]).argmin(2), 1)


def misses_last_entropy(x: Rows) -> Rows:
    """The mask of the entropies ends one token early: the last surprise is charged, its mean is not."""
    return replace(x, A=x.A + at(x, q.cross(q)[:, :, -1]))


def of_the_prior(x: Rows) -> Rows:
    """B with the prior's entropy in place of the cross-entropy: mean 0 under p0, not under q."""
    return replace(x, B=-x.log_p0 - at(x, p0.cross(p0).sum(-1)))


@pytest.mark.parametrize("mutant", [misses_last_entropy, of_the_prior])
def test_a_control_variate_whose_mean_is_not_0_is_rejected(mutant: Callable[[Rows], Rows]) -> None:
    x = written_out()
    assert abs(x.A.mean()) < 1e-12 and abs(x.B.mean()) < 1e-12
    assert kl_prior.regressed(x).full[0] == pytest.approx(KL, abs=1e-12)
    assert abs(kl_prior.regressed(mutant(x)).full[0] - KL) > 1e-2


def test_entropy() -> None:
    truth = -float((Q * np.log(Q)).sum())
    mc, rb, best = (facts(f(every()), truth) for f in (entropy.monte_carlo, entropy.rao_blackwell, entropy.regressed))
    assert abs(mc[0]) < 1e-12 and abs(rb[0]) < 1e-12 and abs(best[0]) < 0.2 * best[1]
    assert best[1] < rb[1] < mc[1] and best[2] > 0.92
    short = replace(every(), entropy=every().entropy - take(q.cross(q)[:, :, -1]))
    crossed = replace(every(), entropy=take(q.cross(p0).sum(-1)), log_q=every().log_p0)
    for mutant in (short, crossed):
        assert abs(facts(entropy.regressed(mutant), truth)[0]) > 0.03
    assert abs(facts(entropy.monte_carlo(crossed), truth)[0]) > 0.03


def test_forgetting_is_the_other_direction() -> None:
    truth = float((P0 * np.log(P0 / Q)).sum())
    bias, _, cover = facts(forgetting.k1(every()), truth, P0[0])
    assert abs(bias) < 1e-12 and cover > 0.84
    assert abs(facts(forgetting.k1(every()), truth, Q[0])[0]) > 0.03  # of the policy's own draws
    assert abs(facts(forgetting.k1(every()), KL, P0[0])[0]) > 0.01  # of the other direction
