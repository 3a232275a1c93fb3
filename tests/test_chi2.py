"""log(1 + chi2) by numbers: infinities, scales, statuses, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from klbench.estimate import Jackknife
from klbench.estimators.chi2 import guarded, log_chi2

EVEN = np.full(4, 0.25)


def test_where_the_policy_has_no_mass_it_is_infinite() -> None:
    log_u, log_s = np.zeros((3, 4)), np.zeros((3, 4))
    log_s[0, 2] = -math.inf  # p* has mass, q has none
    log_s[1, 2] = log_u[1, 2] = -math.inf  # neither has
    found = log_chi2(log_u, log_s, EVEN)
    assert found[0] == math.inf and found[1] == 0.0 and found[2] == 0.0
    left_out = np.array([1 / 3, 1 / 3, 0.0, 1 / 3])
    assert log_chi2(log_u, log_s, left_out)[0] == pytest.approx(0.0)


def test_a_policy_of_e_to_the_minus_2000_is_not_zero() -> None:
    log_s = np.array([[0.0, 0.0, 0.0, -2000.0]])
    assert log_chi2(np.zeros((1, 4)), log_s, EVEN)[0] == pytest.approx(2000 - math.log(4))
    assert log_chi2(np.full((1, 4), -800.0), np.full((1, 4), -1600.0), EVEN)[0] == pytest.approx(0.0)


def test_it_is_at_least_0() -> None:
    assert log_chi2(np.array([[-1.0] * 4]), np.zeros((1, 4)), EVEN)[0] == 0.0
    assert log_chi2(np.full((1, 4), -math.inf), np.zeros((1, 4)), EVEN)[0] == 0.0


def jack(full: float, spread: float = 0.1) -> Jackknife:
    return Jackknife(np.array([full, full]), full + spread * np.linspace(-1, 1, 8)[:, None] * np.ones(2))


@pytest.mark.parametrize(
    "khat, ess, says",
    [(0.2, 500.0, "what was not drawn"), (0.5, 500.0, "tail index 0.50"), (0.2, 99.0, "99 effective draws")],
)
def test_chi2_is_a_lower_bound_and_says_why(khat: float, ess: float, says: str) -> None:
    found = guarded(jack(2.0), 64, khat, ess)
    assert found.status == "lower" and says in found.reason and found.value == pytest.approx(2.0) and found.ess == ess
    assert found.low is not None and found.low < 2.0
    assert found.high is found.population is None


def test_no_negative_ends_and_no_nan() -> None:
    found = guarded(jack(0.01), 64, 0.1, 500.0)
    assert found.low == 0.0 and found.value == pytest.approx(0.01)
    infinite = guarded(Jackknife(np.array([math.inf, 1.0]), np.ones((8, 2))), 64, 0.9, 3.0)
    assert (infinite.value, infinite.low, infinite.high, infinite.status) == (math.inf, math.inf, math.inf, "exact")


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: log_chi2(np.zeros((1, 4)), np.zeros((1, 3)), EVEN), "twice expected"),
        (lambda: log_chi2(np.zeros(4), np.zeros(4), EVEN), "expected"),
        (lambda: log_chi2(np.zeros((1, 4)), np.zeros((1, 4)), 2 * EVEN), "sum to 1"),
        (lambda: log_chi2(np.zeros((1, 4)), np.zeros((1, 4)), np.array([2.0, -1.0, 0.0, 0.0])), "not negative"),
    ],
)
def test_refusals(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
