"""Estimates and the block jackknife: numbers worked by hand, refusals, and seeds that do not meet."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest

from klbench import streams
from klbench.errors import UserError, unknown
from klbench.estimate import (
    BLOCKS,
    STATUSES,
    Estimate,
    Jackknife,
    blocks_of,
    by_reach,
    exactly,
    jackknife,
    t_quantile,
    undefined,
    widening,
)

T7, T14, T30 = 2.364624251592785, 2.1447866879169273, 2.0422724563012373  # 97.5 % quantiles


def test_estimate_travels_through_json_with_its_infinities() -> None:
    there = Estimate(math.inf, -math.inf, None, 0.5, 7, 3.5, "wide", "why", (-1.0, math.inf))
    text = json.dumps(there.to_json(), allow_nan=False)
    assert '"value": "inf"' in text and '"low": "-inf"' in text
    assert Estimate.from_json(json.loads(text)) == there
    assert Estimate.from_json(there) is there


@pytest.mark.parametrize("name", ["value", "low", "high", "stderr", "ess"])
def test_nan_is_no_figure(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of an estimate is NaN"):
        Estimate(**{"value": 1.0, name: math.nan})


def test_nan_is_no_bound_of_a_population() -> None:
    with pytest.raises(ValueError, match="population"):
        Estimate(1.0, population=(0.0, math.nan))


@pytest.mark.parametrize("data", [5, "x", None, {}, {"value": "a lot"}, {"value": [1.0]}, {"value": "nan"}])
def test_what_holds_no_value_is_a_value_error(data: object) -> None:
    with pytest.raises(ValueError):
        Estimate.from_json(data)


@pytest.mark.parametrize("more", [{"vlaue": 2.0}, {"population": 3}, {"population": [1.0]}, {"status": "good"}, {"NUMBERS": []}])
def test_what_is_beside_the_value_is_checked_too(more: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Estimate.from_json({"value": 1.0, **more})


def test_short_forms() -> None:
    assert exactly(2.5, 3, "listed") == Estimate(2.5, 2.5, 2.5, 0.0, 3, None, "exact", "listed", (2.5, 2.5))
    assert undefined("nothing drawn", "infeasible", 4) == Estimate(None, n=4, status="infeasible", reason="nothing drawn")
    assert set(STATUSES) == {"exact", "certified", "wide", "uncertified", "lower", "upper", "infeasible"}


def test_blocks_take_an_eighth_each() -> None:
    assert blocks_of(19).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    assert np.bincount(blocks_of(64)).tolist() == [8] * 8
    assert blocks_of(5, blocks=2).tolist() == [0, 1, 0, 1, 0]


def test_t_quantiles_of_the_tables() -> None:
    assert t_quantile(7) == pytest.approx(T7, rel=1e-12)
    assert t_quantile(30, 0.99) == pytest.approx(2.7499956535672, rel=1e-10)


def test_jackknife_of_a_mean_is_the_textbook_error_of_block_means() -> None:
    # 16 draws: block b holds draws b and b + 8, its mean is b; variance of the mean of 0..7 is (64 - 1)/12 / 7 = 0.75
    values = np.array([[b + 0.25 * sign for sign in (1, -1) for b in range(8)], [10.0] * 16])
    found = jackknife(values)
    np.testing.assert_allclose(found.estimates, [3.5, 10.0], rtol=1e-13)
    np.testing.assert_allclose(found.variances, [0.75, 0.0], atol=1e-13)
    figure = found.mean(n=32, widen=np.array([0.2, 0.4]), ess=5.0)
    half = T14 * math.sqrt(0.75) / 2
    wanted = Estimate(6.75, 6.75 - half, 6.75 + half + 0.3, math.sqrt(0.75) / 2, 32, 5.0)
    for name in Estimate.NUMBERS:
        assert getattr(figure, name) == pytest.approx(getattr(wanted, name), rel=1e-12)
    spread = 12.706204736432095 * 3.25  # t with 1 degree of freedom, times sd 6.5/sqrt 2 over sqrt 2
    assert figure.population == pytest.approx((6.75 - spread, 6.75 + spread + 0.3), rel=1e-9)


def test_jackknife_removes_the_bias_of_a_square_and_the_plain_value_keeps_it() -> None:
    """E mean^2 = mu^2 + sigma^2/8; over all samples the jackknife of it has mean mu^2 exactly, here 0."""
    codes = np.array([[(c >> b) & 1 for b in range(8)] for c in range(256)]) * 2.0 - 1  # +-1, both draws of a block alike: 2^8 samples
    values = np.concatenate([codes, codes], 1)
    means = jackknife(values)
    squares = Jackknife(means.full**2, means.left**2)
    assert abs(squares.estimates.mean()) < 1e-14
    assert squares.full.mean() == pytest.approx(1 / 8)  # the mutant: no correction


def test_one_prompt_has_no_population_and_seven_degrees_of_freedom() -> None:
    found = jackknife(np.arange(16.0)[None]).mean(n=16)
    assert found.population is None and found.value is not None and found.low is not None and found.stderr is not None
    assert (found.value - found.low) / found.stderr == pytest.approx(T7)


def test_degrees_of_freedom_stop_at_thirty() -> None:
    found = jackknife(np.random.default_rng(0).normal(size=(9, 16))).mean(n=144)
    assert found.high is not None and found.value is not None and found.stderr is not None
    assert (found.high - found.value) / found.stderr == pytest.approx(T30)


def test_an_infinite_term_is_an_infinite_mean_and_no_nan() -> None:
    values = np.ones((2, 16))
    values[1, 3] = math.inf
    assert jackknife(values).mean(n=32).to_json() | {"reason": ""} == exactly(math.inf, 32).to_json()


@pytest.mark.parametrize("shape", [(2, 15), (16,), (1, 2, 16)])
def test_too_few_draws_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="N >= 16"):
        jackknife(np.zeros(shape))


def test_widening_by_hand() -> None:
    np.testing.assert_allclose(widening(np.array([30.0, 10.0, 1.0, 3.0])), np.log([1.1, 1.3, 4.0, 2.0]))
    assert widening(np.array([0.0]))[0] == math.inf


@pytest.mark.parametrize(
    "reach, status, says",
    [
        ([30.0, 90.0], "certified", "reach 30 prior"),
        ([29.99, 90.0], "wide", "stretched"),
        ([1.0, 90.0], "wide", "reach 1"),
        ([90.0, 0.6], "uncertified", "50 times the draws"),
        ([90.0, 0.0], "uncertified", "no number of draws"),
        ([90.0, 3e-60], "uncertified", "1e+61 times the draws"),
    ],
)
def test_status_by_the_least_reach(reach: list[float], status: str, says: str) -> None:
    before = Estimate(2.0, 1.0, 3.0, 0.5, 8, 4.0, population=(0.0, 4.0))
    after = by_reach(before, np.array(reach))
    assert after.status == status and after.value == 2.0 and after.stderr == 0.5
    if status == "uncertified":
        assert (after.low, after.high, after.population) == (None, None, None)
    else:
        assert (after.low, after.high, after.population) == (1.0, 3.0, (0.0, 4.0))
    assert says in after.reason


def test_seeds_are_those_of_sha256_and_purposes_do_not_meet() -> None:
    wanted = int(hashlib.sha256(b"3/train/sample/17").hexdigest()[:16], 16) // 2
    assert streams.seed(3, "train/sample/17") == wanted < 2**63
    every = {streams.seed(s, f"{what}/{i}") for s in range(20) for what in ("train/sample", "score/sample", "bank/bias") for i in range(20)}
    assert len(every) == 20 * 3 * 20
    assert streams.seed(1, "1/a") != streams.seed(11, "/a")
    assert BLOCKS == 8


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    assert str(unknown("task", "toxicty", ["bias", "toxicity"])) == "no task 'toxicty'; did you mean 'toxicity'?"
    assert str(unknown("task", "xyz", {"b", "a"})) == "no task 'xyz'; known: a, b"
    assert str(unknown("task", "xyz", [])) == "no task 'xyz'; none is known"
    assert isinstance(unknown("task", "x", []), UserError) and issubclass(UserError, ValueError)
