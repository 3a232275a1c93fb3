"""The betting interval by numbers: against a literal search, at scales that overflow, and its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from klbench.estimators.betting import STAKES, log_z_interval, mean_log_z


def literal(w: np.ndarray, W: float, level: float) -> tuple[float, float]:
    """Capitals as ESTIMATORS.md section 3 writes them, on a grid of means."""
    limit, grid = math.log(2 / (1 - level)), np.exp(np.linspace(math.log(W) - 9, math.log(W) - 1e-4, 3000))
    c = STAKES[:, None, None]
    above = np.log(np.mean(np.prod(1 - c * (w - grid[:, None]) / (W - grid[:, None]), 2), 0))
    below = np.log(np.mean(np.prod(1 + c * (w / grid[:, None] - 1), 2), 0))
    return math.log(grid[below <= limit].min()), math.log(grid[above <= limit].max())


@pytest.mark.parametrize("level", [0.95, 0.5])
@pytest.mark.parametrize("draws", [3, 40])
def test_against_a_literal_search(draws: int, level: float) -> None:
    w = np.random.default_rng(draws).beta(0.5, 2, draws) * 7
    low, high = log_z_interval(np.log(w)[None], np.array([math.log(7.0)]), level)
    assert (low[0], high[0]) == pytest.approx(literal(w, 7.0, level), abs=4e-3)


@pytest.mark.parametrize("scale", [60.0, 800.0, 1e5, -800.0])
def test_a_common_factor_moves_both_ends_by_its_log(scale: float) -> None:
    tilt = np.log(np.random.default_rng(1).beta(0.5, 2, (2, 50)))
    ends = np.array(log_z_interval(tilt, np.array([0.0, 0.5])))
    np.testing.assert_allclose(np.array(log_z_interval(tilt + scale, np.array([0.0, 0.5]) + scale)), ends + scale, atol=1e-7)


def test_a_wide_range_of_weights_loses_no_precision() -> None:
    """One draw at the ceiling of e^60 among 99 that weigh e^-60 of it: the ends are those of weights 1 and 0."""
    tilt = np.full((1, 100), -60.0)
    tilt[0, 0] = 60.0
    zero = np.full((1, 100), -math.inf)
    zero[0, 0] = 60.0
    np.testing.assert_allclose(log_z_interval(tilt, np.array([60.0])), log_z_interval(zero, np.array([60.0])), atol=1e-8)


def test_the_interval_holds_the_mean_and_narrows() -> None:
    rng = np.random.default_rng(2)
    width = []
    for draws in (16, 256, 4096):
        tilt = np.log(rng.beta(1, 3, (3, draws)))
        low, high = log_z_interval(tilt, np.zeros(3))
        mean = np.log(np.exp(tilt).mean(1))
        assert (low < mean).all() and (mean < high).all() and (high <= 0).all()
        width.append(float((high - low).mean()))
    assert width[0] > 2 * width[1] > 4 * width[2]


def test_ends_of_what_never_varies() -> None:
    low, high = log_z_interval(np.zeros((1, 50)), np.zeros(1))
    assert high[0] == 0.0 and -0.2 < low[0] < 0.0  # every draw at the ceiling
    low, high = log_z_interval(np.full((1, 50), -math.inf), np.zeros(1))
    assert low[0] == -math.inf and math.log(3 / 50) < high[0] < math.log(9 / 50)  # the rule of three, and the price of exactness


def test_without_a_ceiling_there_is_no_upper_end() -> None:
    tilt = np.log(np.random.default_rng(3).beta(1, 3, (2, 64)))
    low, high = log_z_interval(tilt, np.array([math.inf, 0.0]))
    assert high[0] == math.inf and high[1] < 0.0
    assert low[0] == log_z_interval(tilt, np.array([5.0, 0.0]))[0][0]  # the lower end needs none
    assert mean_log_z(tilt, np.array([math.inf, 0.0]))[1] == math.inf
    nothing = log_z_interval(np.full((1, 16), -math.inf), np.array([math.inf]))
    assert (nothing[0][0], nothing[1][0]) == (-math.inf, math.inf)


def test_the_mean_is_that_of_ends_at_bonferroni_s_level() -> None:
    tilt = np.log(np.random.default_rng(4).beta(1, 3, (5, 64)))
    low, high = log_z_interval(tilt, np.zeros(5), 0.98)
    assert mean_log_z(tilt, np.zeros(5), 0.9) == pytest.approx((low.mean(), high.mean()), abs=1e-12)
    at_once, alone = mean_log_z(tilt, np.zeros(5)), log_z_interval(tilt, np.zeros(5))
    assert at_once[0] < alone[0].mean() and at_once[1] > alone[1].mean()


def test_a_float32_reward_may_lie_a_rounding_above_its_ceiling() -> None:
    ceiling = np.array([0.1])
    tilt = np.full((1, 16), np.float64(np.float32(0.1)))
    assert tilt[0, 0] > 0.1 and log_z_interval(tilt, ceiling)[1][0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: log_z_interval(np.zeros(4), np.zeros(4)), r"tilt \[P, N >= 1\]"),
        (lambda: log_z_interval(np.zeros((2, 4)), np.zeros(3)), r"ceiling \[P\] expected"),
        (lambda: log_z_interval(np.zeros((2, 0)), np.zeros(2)), "N >= 1"),
        (lambda: log_z_interval(np.zeros((1, 4)), np.zeros(1), 1.0), "level in"),
        (lambda: log_z_interval(np.full((1, 4), math.nan), np.zeros(1)), "NaN"),
        (lambda: log_z_interval(np.full((1, 4), math.inf), np.full(1, math.inf)), "below infinity"),
        (lambda: log_z_interval(np.full((1, 4), 0.1), np.zeros(1)), "above its ceiling"),
    ],
)
def test_refusals(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
