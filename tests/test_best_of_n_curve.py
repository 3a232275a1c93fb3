"""The over-optimisation curve by numbers: intervals, the KL axis with and without ties, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from klbench.errors import UserError
from klbench.estimators.best_of_n import best_of, curve, kl, kl_bound, weights_of


def test_weights_are_the_combinatorial_ones() -> None:
    for draws, n in ((10, 1), (10, 3), (40, 5)):
        wanted = [math.comb(i - 1, n - 1) / math.comb(draws, n) for i in range(1, draws + 1)]
        np.testing.assert_allclose(weights_of(draws, n), wanted, rtol=1e-10, atol=1e-300)
    assert weights_of(20_000, 2500).sum() == pytest.approx(1.0)


def test_uniform_draws() -> None:
    """E[max of n uniform] = n/(n+1); a gold that is 1 - proxy falls as the proxy rises."""
    x = np.random.default_rng(0).random((4, 512))
    found = curve(x, 1 - x, (1, 4, 64))
    assert found.n == (1, 4, 64) and found.gold is not None
    for n, proxy, gold in zip(found.n, found.proxy, found.gold, strict=True):
        assert proxy.low is not None and proxy.high is not None and gold.value is not None and proxy.value is not None
        assert proxy.low <= n / (n + 1) <= proxy.high and proxy.high - proxy.low < 0.1
        assert gold.value == pytest.approx(1 - proxy.value) and gold.stderr == pytest.approx(proxy.stderr)
        assert proxy.population is not None and proxy.n == 4 * 512
    assert found.proxy[0].value == pytest.approx(x.mean()) and found.proxy[0].stderr == pytest.approx(
        math.sqrt((x.var(1, ddof=1) / 512).sum()) / 4
    )
    assert curve(x, None, (2,)).gold is None and curve(x[:1], None, (2,)).proxy[0].population is None


def test_the_interval_covers() -> None:
    """300 replications of one prompt of 128 draws, n = 8 and 16: the proxy's mean and a noisy gold's."""
    rng, held = np.random.default_rng(5), np.zeros(4)
    for _ in range(300):
        x = rng.random((1, 128))
        gold = x + rng.normal(size=x.shape)
        found = curve(x, gold, (8, 16))
        assert found.gold is not None
        for i, (n, figure) in enumerate([*zip(found.n, found.proxy, strict=True), *zip(found.n, found.gold, strict=True)]):
            held[i] += (figure.low or 0) <= n / (n + 1) <= (figure.high or 0)
    assert (held >= 273).all(), held  # 95 % is 285, standard deviation 3.8


def test_kl_without_ties_is_the_bound() -> None:
    x = np.random.default_rng(1).normal(size=(3, 64))
    for n in (1, 2, 8):
        found = kl(x, n)
        assert found.value == pytest.approx(kl_bound(n), abs=1e-9) and found.stderr == pytest.approx(0.0, abs=1e-9)
    assert kl_bound(1) == 0.0


def test_kl_with_ties_is_that_of_the_tied_law() -> None:
    """Values 0, 1, 2 with shares 5/8, 2/8, 1/8: best-of-n has F^n; within a tie the lot leaves the ratio flat."""
    x = np.repeat([0.0, 1.0, 2.0], [80, 32, 16])[None]
    order = np.random.default_rng(2).permutation(128)
    for n in (2, 5, 16):
        F = np.array([0.0, 5 / 8, 7 / 8, 1.0])
        mass = np.diff(F**n)
        wanted = float((mass * np.log(mass / np.diff(F))).sum())
        found = curve(x[:, order], None, (n,))
        assert found.kl[0].value == pytest.approx(wanted, abs=0.02) and wanted < kl_bound(n) - 0.05
        assert (found.kl[0].low or 0) <= wanted <= (found.kl[0].high or 0) <= found.kl_bound[0] == kl_bound(n)
    flat = kl(np.ones((2, 64)), 8)  # every draw alike: best-of-n is the prior
    assert flat.value == 0.0


def test_rewards_rounded_to_hundredths_lie_below_the_bound_by_what_was_measured() -> None:
    """ESTIMATORS.md section 5: .02 at n = 64 and .16 at 256."""
    x = np.round(np.random.default_rng(3).random((2, 8192)), 2)
    for n, gap in ((64, 0.02), (256, 0.16)):
        found = kl(x, n)
        assert found.value is not None and kl_bound(n) - found.value == pytest.approx(gap, rel=0.5)


def test_a_curve_that_never_varies_has_no_interval_of_zero_width() -> None:
    found = curve(np.ones((2, 64)), np.full((2, 64), 0.25), (1, 8), span=2.0, gold_span=1.0)
    assert found.gold is not None
    assert (found.proxy[0].high or 0) - 1 == pytest.approx(3 * 2 / 128) and (found.proxy[1].high or 0) - 1 == pytest.approx(8 * 3 * 2 / 128)
    assert 0.25 - (found.gold[1].low or 0) == pytest.approx(8 * 3 / 128)
    assert curve(np.ones((1, 16)), None, (2,), span=1.0).proxy[0].high == pytest.approx(1 + 6 / 16)
    assert curve(np.ones((2, 64)), None, (8,)).proxy[0].high == pytest.approx(1.0)  # no span, no pad


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: curve(np.zeros((1, 64)), None, (9,)), UserError, "best of 9: n between 1 and an eighth of the draws expected, 72 draws"),
        (lambda: curve(np.zeros((1, 64)), None, (0,)), UserError, "best of 0"),
        (lambda: curve(np.zeros(64), None, (2,)), ValueError, "proxy: finite values"),
        (lambda: curve(np.zeros((1, 64)), np.zeros((1, 63)), (2,)), ValueError, "gold: finite values"),
        (lambda: curve(np.full((1, 64), math.nan), None, (2,)), ValueError, "proxy: finite values"),
    ],
)
def test_refusals(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_best_of_one_is_the_mean_of_all() -> None:
    x, v = np.random.default_rng(4).normal(size=(2, 2, 10))
    np.testing.assert_allclose(best_of(x, v, 1)[0], v.mean(1))
