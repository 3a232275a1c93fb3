"""The regression behind several estimators, KL(q||p0), entropy and forgetting by numbers; infinities, refusals, and estimators by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from enumerable import Table, draw, rows

from klbench.errors import UserError
from klbench.estimate import BLOCKS, Jackknife, blocks_of
from klbench.estimators import control, entropy, forgetting, kl_prior, named
from klbench.measure import COLUMNS, Measure
from klbench.rows import Rows

V, T = 3, 3
prior = Table.random(np.random.default_rng(0), 2, V, T)
policy = Table.random(np.random.default_rng(1), 2, V, T)
NO_REWARD = np.zeros((2, V**T))


def of(q: Table, drawn_from: Table, draws: int, seed: int = 0) -> Rows:
    return rows(q, prior, NO_REWARD, draw(np.random.default_rng(seed), drawn_from, draws))


OWN, BANK = of(policy, policy, 64), of(policy, prior, 64)


# each estimator is its formula


@pytest.mark.parametrize(
    "found, per_draw",
    [
        (kl_prior.k1(OWN), OWN.log_q - OWN.log_p0),
        (kl_prior.k3(OWN), np.exp(OWN.log_p0 - OWN.log_q) - (OWN.log_p0 - OWN.log_q) - 1),
        (kl_prior.rao_blackwell(OWN), OWN.kl),
        (entropy.monte_carlo(OWN), -OWN.log_q),
        (entropy.rao_blackwell(OWN), OWN.entropy),
        (forgetting.k1(BANK), BANK.log_p0 - BANK.log_q),
        (forgetting.rao_blackwell(BANK), BANK.lost),
    ],
)
def test_plain_means(found: Jackknife, per_draw: np.ndarray) -> None:
    np.testing.assert_allclose(found.full, per_draw.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.estimates, per_draw.mean(1), rtol=1e-9)  # a mean has no bias to correct
    blocks = np.stack([per_draw[:, blocks_of(64) == b].mean(1) for b in range(BLOCKS)])
    np.testing.assert_allclose(found.variances, blocks.var(0, ddof=1) / BLOCKS, rtol=1e-9)


def literal(y: np.ndarray, *columns: np.ndarray) -> float:
    """The formula of control.py for one prompt, by loops over rows."""
    X = np.stack(columns, 1)
    gram, cross = np.zeros((X.shape[1],) * 2), np.zeros(X.shape[1])
    for row, value in zip(X, y, strict=True):
        gram += np.outer(row, row)
        cross += row * (value - y.mean())
    b = np.linalg.solve(gram, cross)
    t = (X - X.mean(0)) @ b
    h = (t**2).sum() ** 2 / (t**4).sum()
    return float(y.mean() - h / (h + 8 * X.shape[1]) * X.mean(0) @ b)


def test_regressed_is_its_formula_refitted_in_each_block() -> None:
    found, block = kl_prior.regressed(OWN), blocks_of(64)
    np.testing.assert_allclose(found.full, [literal(*x) for x in zip(OWN.kl, OWN.A, OWN.B, strict=True)], rtol=1e-7)
    third = block != 3
    np.testing.assert_allclose(
        found.left[3], [literal(y[third], a[third], b[third]) for y, a, b in zip(OWN.kl, OWN.A, OWN.B, strict=True)], rtol=1e-7
    )
    np.testing.assert_allclose(entropy.regressed(OWN).full, [literal(*x) for x in zip(OWN.entropy, OWN.A, strict=True)], rtol=1e-7)


def test_what_the_columns_explain_is_removed_as_far_as_rows_support_it() -> None:
    x = np.random.default_rng(2).normal(size=(2, 512)) + 0.1
    h = (x - x.mean(1, keepdims=True)) ** 2
    h = h.sum(1) ** 2 / (h**2).sum(1)
    wanted = 3.0 + 2.0 * x.mean(1) * (1 - h / (h + 8) * ((x - x.mean(1, keepdims=True)) ** 2).sum(1) / (x**2).sum(1))
    np.testing.assert_allclose(control.regressed(3.0 + 2.0 * x, x).full, wanted, rtol=1e-9)
    assert (np.abs(wanted - 3.0) < 0.1 * np.abs(2.0 * x.mean(1))).all()
    np.testing.assert_allclose(control.regressed(x, 0 * x).full, x.mean(1))  # nothing to regress on
    np.testing.assert_allclose(control.regressed(x, 0 * x, 0 * x).estimates, x.mean(1))
    np.testing.assert_allclose(control.regressed(0 * x + 7.0, x, x).estimates, 7.0)  # nothing to explain; and the same column twice
    np.testing.assert_allclose(control.regressed(1e6 * x, x).full, 1e6 * control.regressed(x, 1e-6 * x).full, rtol=1e-6)
    np.testing.assert_array_equal(control.regressed(x).full, control.plain(x).full)


# never worse than k1: the policy that has nearly collapsed, where least squares with an intercept fails


def collapsed() -> tuple[Table, Table, float]:
    """A prior of 512 outcomes and its posterior to the power of 4: one outcome has three quarters of the mass."""
    rng = np.random.default_rng(4)
    first = Table.random(rng, 1, 8, 3, 1.5)
    raw = 4 * (first.log_prob() + rng.uniform(0, 1, (1, 512)) / 0.2)
    last = Table.of(raw - np.log(np.exp(raw - raw.max()).sum()) - raw.max(), 8, 3)
    p, lq = np.exp(last.log_prob()), last.log_prob()
    assert 0.7 < p.max() < 0.8
    return last, first, float((p * (lq - first.log_prob())).sum())


def least_squares(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The mutant: an ordinary fit with intercept."""
    dx = x - x.mean(1, keepdims=True)
    square = (dx**2).sum(1)
    slope = np.divide((dx * y).sum(1), square, out=np.zeros(len(y)), where=square > 1e-12)
    return y.mean(1) - slope * x.mean(1)


@pytest.mark.parametrize("draws", [16, 64])
def test_never_worse_than_k1_on_a_collapsed_policy(draws: int) -> None:
    q, p0, truth = collapsed()
    count = 400
    many = [Table([np.repeat(step, count, 0) for step in law.steps]) for law in (q, p0)]
    own = rows(*many, np.zeros((count, 512)), draw(np.random.default_rng(draws), q, draws * count).reshape(count, draws))
    rmse = {
        "k1": kl_prior.k1(own).full,
        "regressed": kl_prior.regressed(own).estimates,
        "mutant": least_squares(own.kl, own.A - own.B),
    }
    error = {name: math.sqrt(float(((x - truth) ** 2).mean())) for name, x in rmse.items()}
    assert error["regressed"] < 0.4 * error["k1"]
    assert error["mutant"] > (2 * error["k1"] if draws == 16 else 3 * error["regressed"])


# infinite, never NaN


@pytest.mark.parametrize("estimator", [kl_prior.k1, kl_prior.k3, kl_prior.rao_blackwell, kl_prior.regressed])
@pytest.mark.parametrize("with_laws", [True, False])
def test_a_draw_outside_the_prior_is_infinitely_far(estimator: Callable[[Rows], Jackknife], with_laws: bool) -> None:
    hole = np.zeros((2, 64), bool)
    hole[1, 5] = True
    own = replace(OWN, log_p0=np.where(hole, -math.inf, OWN.log_p0))
    if with_laws:  # the law at a prefix says so too: its cross-entropy is infinite, and B with it
        own = replace(own, kl=np.where(hole, math.inf, own.kl), B=np.where(hole, -math.inf, own.B))
    found = estimator(own)
    assert np.isfinite(found.full[0]) and found.full[1] == math.inf
    assert found.estimates[1] == math.inf and np.isfinite(found.variances).all()
    figure = found.mean(n=128)
    assert (figure.value, figure.status) == (math.inf, "exact")


def test_forgetting_of_a_policy_without_an_outcome_is_infinite() -> None:
    bank = replace(BANK, log_q=np.where(np.arange(64) == 3, -math.inf, BANK.log_q))
    for found in (forgetting.k1(bank), forgetting.rao_blackwell(bank), forgetting.regressed(bank)):
        assert (found.full == math.inf).all() and found.mean(n=1).status == "exact"


def test_forgetting_of_what_no_prior_draw_has_shown_is_seen_at_its_prefix() -> None:
    """A policy that has given up one next token of mass 1 in 30: prior draws that lack it show nothing to k1, and all of it to the rest."""
    steps = [step.copy() for step in policy.steps]
    steps[0][:, 0, 0] = -60.0
    steps[0] -= np.log(np.exp(steps[0]).sum(-1, keepdims=True))
    given_up = Table(steps)
    others = np.flatnonzero(prior.outcomes()[:, 0] != 0)
    drawn = np.random.default_rng(0).choice(others, (2, 64))
    bank = rows(given_up, prior, NO_REWARD, drawn)
    truth = float((np.exp(prior.log_prob()) * (prior.log_prob() - given_up.log_prob())).sum(1).mean())
    blind = forgetting.k1(bank).mean(n=1)
    seen = forgetting.rao_blackwell(bank).mean(n=1)
    assert (blind.high or 0) < 0.2 * truth  # the mutant: draws alone
    assert abs((seen.value or 0) - truth) < 0.2 * truth


def test_forgetting_of_a_law_known_by_its_density_alone_is_the_plain_mean() -> None:
    """Rows kept in float32 differ from log p0 - log q by rounding alone, a multiple of the figure wherever that takes two values."""
    ratio = np.where(np.arange(64) % 3 > 0, 1.3, -0.7)[None].repeat(2, 0)
    bank = Rows.of_ratio(np.full((2, 64), -20.3), BANK.reward, ratio).rounded()
    np.testing.assert_allclose(forgetting.regressed(bank).full, -ratio.mean(1), rtol=1e-6)
    rounding = control.regressed(bank.lost, bank.log_p0 - bank.log_q - bank.lost)
    assert np.abs(rounding.full + ratio.mean(1)).min() > 0.02  # the mutant: rounding taken for a control variate


def test_forgetting_s_control_variate_has_mean_0_under_the_prior() -> None:
    """Summed over every outcome; the token KLs of the wrong direction do not pass."""
    everything = np.arange(V**T)[None].repeat(2, 0)
    every, p0 = rows(policy, prior, NO_REWARD, everything), np.exp(prior.log_prob())
    np.testing.assert_allclose((p0 * (every.log_p0 - every.log_q - every.lost)).sum(1), 0, atol=1e-12)
    assert (np.abs((p0 * (every.log_p0 - every.log_q - every.kl)).sum(1)) > 0.01).all()


def test_k3_of_a_draw_the_policy_hardly_gives_is_finite() -> None:
    own = replace(OWN, log_q=np.where(np.arange(64) == 3, -2000.0, OWN.log_q))
    figure = kl_prior.k3(own).mean(n=1)
    assert figure.status == "certified" and figure.value is not None and 1e100 < figure.value < math.inf
    assert figure.stderr is not None and math.isfinite(figure.stderr)


def test_a_column_that_is_not_finite_at_a_prompt_is_left_out_there() -> None:
    B = OWN.B.copy()
    B[0, 7] = -math.inf
    found = control.regressed(OWN.kl, OWN.A, B)
    np.testing.assert_allclose(found.full[1], kl_prior.regressed(OWN).full[1])
    assert np.isfinite(found.full[0]) and found.full[0] != kl_prior.regressed(OWN).full[0]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: control.regressed(np.zeros((2, 15)), np.zeros((2, 15))), "N >= 16"),
        (lambda: control.regressed(np.zeros((2, 16)), np.zeros((2, 17))), "columns alike"),
        (lambda: control.regressed(np.zeros(16), np.zeros(16)), "N >= 16"),
        (lambda: control.plain(np.zeros((2, 15))), "N >= 16"),
        (lambda: kl_prior.k1(OWN.part(slice(0, 8))), "N >= 16"),
    ],
)
def test_refusals(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


# bounded figures


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, -1e6])
@pytest.mark.parametrize("draws", [20, 128])
def test_a_figure_that_never_varies_has_no_interval_of_zero_width(value: float, draws: int) -> None:
    column = np.random.default_rng(0).normal(size=(2, draws))
    for columns in ((), (column,), (column, column**2)):
        found = control.bounded_mean(np.full((2, draws), value), *columns, span=2.0)
        assert (found.high or 0) - value == pytest.approx(3 * 2.0 / (2 * draws), rel=1e-6)
        assert value - (found.low or 0) == pytest.approx(3 * 2.0 / (2 * draws), rel=1e-6)
    varies = control.bounded_mean(column, span=2.0)
    room = 1.5 * 2.0 / column.size
    half = (varies.stderr or 0) * 2.1447866879169273
    assert (varies.high or 0) - (varies.value or 0) == pytest.approx(room + math.hypot(room, half))


# by name


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("kl_prior", kl_prior.regressed(OWN)),
        ("kl-prior.k3", kl_prior.k3(OWN)),
        ("kl_prior.k1", kl_prior.k1(OWN)),
        ("kl_prior.rao-blackwell", kl_prior.rao_blackwell(OWN)),
        ("kl_prior.regressed", kl_prior.regressed(OWN)),
        ("kl_prior.rao_blackwell(draws=24)", kl_prior.rao_blackwell(OWN.part(slice(0, 24)))),
        ("entropy", entropy.regressed(OWN)),
        ("entropy.monte_carlo", entropy.monte_carlo(OWN)),
        ("forgetting", forgetting.regressed(BANK)),
        ("forgetting.k1(draws=32)", forgetting.k1(BANK.part(slice(0, 32)))),
    ],
)
def test_a_measure_names_a_function(text: str, wanted: Jackknife) -> None:
    found = named.of(Measure.parse(text))(OWN, BANK)
    np.testing.assert_array_equal(found.full, wanted.full)
    np.testing.assert_array_equal(found.left, wanted.left)


def test_names_are_functions_of_the_column_s_own_file() -> None:
    files = {"kl_prior": kl_prior, "entropy": entropy, "forgetting": forgetting}
    assert set(named.NAMED) == set(files) <= set(COLUMNS)
    for column, known in named.NAMED.items():
        public = {n for n, f in vars(files[column]).items() if callable(f) and getattr(f, "__module__", "") == files[column].__name__}
        assert set(known) == {n for n in public if not n.startswith("_")}


@pytest.mark.parametrize(
    "text, says",
    [
        ("kl_prior.k33", "no estimator of kl_prior 'k33'; did you mean 'k3'?"),
        ("entropy.k1", "no estimator of entropy 'k1'; known: monte_carlo, rao_blackwell, regressed"),
        ("kl_prior.rao_blackwel", "did you mean 'rao_blackwell'?"),
        ("reverse_kl.k1", "no column with named estimators 'reverse_kl'"),
        ("kl_prior.k1(interval='betting')", "no option of kl_prior.k1 'interval'; known: draws"),
        ("kl_prior.k1(draws=8)", "16 at least"),
        ("kl_prior.k1(draws='all')", "16 at least"),
    ],
)
def test_unknown_names(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        named.of(Measure.parse(text))
    assert says in str(error.value)


def test_more_draws_than_there_are() -> None:
    with pytest.raises(UserError, match="65 draws a prompt asked for, 64 are there"):
        named.of(Measure.parse("kl_prior.k1(draws=65)"))(OWN, BANK)
