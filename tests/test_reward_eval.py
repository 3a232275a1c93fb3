"""Rewards as likelihoods: figures by numbers worked by hand, by sums over every outcome and by counted coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, spearmanr
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from klbench.estimate import Estimate
from klbench.reward_eval import association, calibration, functional, intervals, over_optimisation, ranking, sharpness
from klbench.reward_eval.functional import Case


def holds(figure: Estimate, truth: float) -> bool:
    return figure.low is not None and figure.high is not None and figure.low <= truth <= figure.high


# --- intervals ---


@pytest.mark.parametrize("p", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_a_share_of_independent_items_is_covered(p: float) -> None:
    """Exactly, over every count of 60 items."""
    n, own = 60, np.arange(60)
    found = [intervals.share_of(np.repeat([1.0, 0.0], [k, n - k]), own) for k in range(n + 1)]
    assert sum(binom.pmf(k, n, p) for k in range(n + 1) if holds(found[k], p)) > 0.92


def test_the_plain_normal_interval_is_not_that_good() -> None:
    n, p = 60, 0.02
    half = [1.96 * math.sqrt(k / n * (1 - k / n) / n) for k in range(n + 1)]
    assert sum(binom.pmf(k, n, p) for k in range(n + 1) if abs(k / n - p) <= half[k]) < 0.75


@pytest.mark.parametrize(("clustered", "covers"), [(True, True), (False, False)])
def test_clusters_are_no_independent_items(clustered: bool, covers: bool) -> None:
    """400 draws of 16 prompts with 8 pairs each, whose accuracies differ: Beta(2, 1), mean 2/3."""
    rng, hits = np.random.default_rng(0), 0
    prompt = np.repeat(np.arange(16), 8)
    for _ in range(400):
        values = (rng.random(128) < rng.beta(2, 1, 16)[prompt]).astype(float)
        hits += holds(intervals.share_of(values, prompt if clustered else np.arange(128)), 2 / 3)
    assert (hits >= 370) == covers, hits


def test_ends_of_shares() -> None:
    everything = intervals.share_of(np.ones(20), np.arange(20))
    assert everything.value == everything.high == 1 and 0.8 < (everything.low or 0) < 0.9
    assert intervals.share_of(np.ones(20), np.zeros(20, int)).status == "uncertified", "one prompt says nothing of others"
    assert intervals.share_of(np.array([]), np.array([], int)).value is None
    assert intervals.mean_of(np.array([1.0, math.inf]), np.arange(2)).value == math.inf


# --- ranking ---


def test_pairs_by_hand() -> None:
    figure = ranking.pairwise(np.array([3.0, 1.0, 2.0, 5.0]), np.array([1.0, 1.0, 4.0, 0.0]), np.arange(4))
    assert figure.value == (1 + 0.5 + 0 + 1) / 4 and "1 ties of 4" in figure.reason
    constant = ranking.pairwise(np.ones(3), np.ones(3), np.arange(3))
    assert (constant.value, constant.status) == (0.5, "exact")


def test_auc_is_that_of_sklearn_with_delongs_error() -> None:
    rng = np.random.default_rng(1)
    good = rng.random(80) < 0.4
    reward = np.round(rng.normal(size=80) + good, 1)
    figure = ranking.auc(reward, good, np.arange(80))
    assert figure.value == pytest.approx(roc_auc_score(good, reward))
    yes, no = reward[good], reward[~good]
    wins = (yes[:, None] > no) + (yes[:, None] == no) / 2
    delong = wins.mean(1).var(ddof=1) / len(yes) + wins.mean(0).var(ddof=1) / len(no)
    assert figure.stderr == pytest.approx(math.sqrt(delong), rel=0.02)  # n/(n - 1) over all items and not in each class
    assert ranking.auc(reward, np.ones(80, bool), np.arange(80)).value is None
    assert ranking.auc(np.zeros(80), good, np.arange(80)).status == "exact"


def test_auc_is_covered() -> None:
    """P(N(1, 1) > N(0, 1)) = Phi(1/sqrt 2) = .7602, 30 texts; a clustered one with a shift a prompt."""
    rng, hits = np.random.default_rng(2), np.zeros(2)
    cluster = np.repeat(np.arange(15), 4)
    for _ in range(400):
        good = np.arange(30) < 15
        hits[0] += holds(ranking.auc(rng.normal(size=30) + good, good, np.arange(30)), 0.76025)
        both = np.arange(60) % 2 == 0
        hits[1] += holds(ranking.auc(rng.normal(size=60) + both + rng.normal(size=15)[cluster], both, cluster), 0.69146)
    assert (hits >= 366).all(), hits  # 95 % is 380, standard deviation 4.4;  Phi(1/sqrt(2 + 2)) = .69146 between prompts


def worked(reward: list[float], gold: list[float], tie: float = 0.5) -> float:
    """Pairwise accuracy over all pairs of draws whose gold differs."""
    pairs = [(i, j) for i, j in itertools.combinations(range(len(gold)), 2) if gold[i] != gold[j]]
    score = [tie if reward[i] == reward[j] else float((reward[i] > reward[j]) == (gold[i] > gold[j])) for i, j in pairs]
    return float(np.mean(score))


def test_pairs_among_draws() -> None:
    reward, gold = [1, 1, 2, 3, 0, 2, 2, 5.0], [0, 1, 1, 2, 0, 0, 2, 1.0]
    other = [3, 1, 1, 2, 0, 2, 0, 1.0]
    figure = ranking.among_draws(np.array([reward, other]), np.array([gold, gold]))
    assert figure.value == pytest.approx((worked(reward, gold) + worked(other, gold)) / 2)
    assert figure.value != pytest.approx((worked(reward, gold, 1.0) + worked(other, gold, 1.0)) / 2)
    silent = ranking.among_draws(np.array([reward]), np.zeros((1, 8)))
    assert silent.value is None and "does not vary" in silent.reason


def test_pairs_among_draws_are_covered() -> None:
    """reward = gold + noise, both normal: P = 1/2 + arcsin(1/sqrt 2)/pi = 3/4. Four prompts of 40 draws."""
    rng, hits = np.random.default_rng(3), 0
    for _ in range(300):
        gold = rng.normal(size=(4, 40))
        hits += holds(ranking.among_draws(gold + rng.normal(size=gold.shape), gold), 0.75)
    assert 273 <= hits <= 297, hits


def best(reward: np.ndarray, gold: np.ndarray, chosen: tuple[int, ...]) -> float:
    """Whether the pick among the chosen draws is a best one by gold, ties of the reward by lot."""
    r, g = reward[list(chosen)], gold[list(chosen)]
    return float(np.mean(g[r == r.max()] == g.max()))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_best_of_k_is_the_mean_over_all_subsets(k: int) -> None:
    rng = np.random.default_rng(4)
    reward, gold = rng.integers(0, 4, (2, 18)).astype(float), rng.integers(0, 3, (2, 18)).astype(float)
    wanted = np.mean([[best(r, g, s) for s in itertools.combinations(range(18), k)] for r, g in zip(reward, gold, strict=True)])
    assert ranking.best_of(reward, gold, (k,))[k].value == pytest.approx(wanted)
    first = [
        np.mean([g[list(s)][r[list(s)].argmax()] == g[list(s)].max() for s in itertools.combinations(range(18), k)])
        for r, g in zip(reward, gold, strict=True)
    ]
    assert np.mean(first) != pytest.approx(wanted), "the first of a tie is no lot"


def test_best_of_k_is_unbiased_where_drawing_again_is_not() -> None:
    """Over every set of 4 draws from a law of 3 outcomes."""
    law, reward, gold = np.array([0.5, 0.3, 0.2]), np.array([0.0, 2.0, 1.0]), np.array([0.0, 1.0, 2.0])
    truth = sum(law[list(s)].prod() * best(reward, gold, s) for s in itertools.product(range(3), repeat=2))
    mean = again = 0.0
    for draws in itertools.product(range(3), repeat=4):
        mass, at = law[list(draws)].prod(), np.array(draws)
        mean += mass * np.mean([best(reward[at], gold[at], s) for s in itertools.combinations(range(4), 2)])
        again += mass * np.mean([best(reward[at], gold[at], s) for s in itertools.product(range(4), repeat=2)])
    assert mean == pytest.approx(truth) and abs(again - truth) > 0.01


# --- calibration ---


def test_the_map_is_the_maximum() -> None:
    rng = np.random.default_rng(5)
    reward = rng.normal(3, 5, 300)
    label = (rng.random(300) < 1 / (1 + np.exp(-(0.7 * reward - 1)))).astype(float)
    line = calibration.fit(reward, label, np.arange(300))
    high, low = (label.sum() + 1) / (label.sum() + 2), 1 / ((1 - label).sum() + 2)
    residual = low + (high - low) * label - line(reward)
    assert abs(residual.sum()) < 1e-8 and abs(residual @ reward) < 1e-7
    assert abs(line.slope - 0.7) < 3 * line.stderr < 0.4
    apart = calibration.fit(np.array([-1.0, 0.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0, 1.0]), np.arange(4))
    assert 0 < apart.slope < 10, "finite on texts that are parted"
    assert calibration.fit(np.ones(9), np.arange(9) / 8, np.arange(9)).slope == 0


def test_a_text_has_no_part_in_its_own_probability() -> None:
    rng = np.random.default_rng(6)
    reward, cluster = rng.normal(size=40), np.repeat(np.arange(20), 2)
    label = (reward + rng.normal(size=40) > 0).astype(float)
    half = calibration.halves(cluster, 0)
    assert half.sum() == 20 and (half[::2] == half[1::2]).all(), "a cluster stays whole"
    turned = np.where(half, 1 - label, label)
    before, after = (calibration.cross_fitted(reward, given, cluster, 0) for given in (label, turned))
    assert (before[half] == after[half]).all() and (before[~half] != after[~half]).all()


def test_bins_and_ece_by_hand() -> None:
    p = np.repeat([0.1, 0.2, 0.9], [10, 10, 10])
    at = calibration.bins(p)
    assert [len(set(at[i : i + 10])) for i in (0, 10, 20)] == [1, 1, 1] and len(set(at)) == 3
    label = np.concatenate([np.zeros(10), np.ones(5), np.zeros(5), np.ones(10)])
    assert calibration.ece(p, label) == pytest.approx((0.1 + 0.3 + 0.1) / 3)
    even = calibration.bins(np.arange(150) / 150)
    assert (np.bincount(even) == 10).all() and len(np.bincount(even)) == 15


def test_brier_and_log_loss_with_shares_as_labels() -> None:
    p, label = np.array([0.5, 0.8] * 20), np.array([0.25, 1.0] * 20)
    found = calibration.figures(p, label, np.arange(40), 0)
    assert found["brier"].value == pytest.approx((0.0625 + 0.04) / 2)
    assert found["log_loss"].value == pytest.approx((math.log(2) - math.log(0.8)) / 2)
    sure = calibration.figures(np.array([0.0, 1.0] * 20), np.array([0.0, 1.0, 1.0, 1.0] * 10), np.arange(40), 0)
    assert sure["log_loss"].value == math.inf


def test_the_ece_of_a_calibrated_reward_and_of_a_wrong_one_is_covered() -> None:
    """p uniform; y of p, and of p^2, whose distance to p is E|p - p^2| = 1/6. The slope of the first is 1."""
    rng, hits, low = np.random.default_rng(7), np.zeros(3), []
    for i in range(60):
        p = rng.random(300)
        right, wrong = (calibration.figures(p, (rng.random(300) < q).astype(float), np.arange(300), i) for q in (p, p**2))
        hits += [holds(right["ece"], 0.0), holds(wrong["ece"], 1 / 6), holds(right["slope"], 1.0)]
        low.append(wrong["ece"].low)
    assert (hits >= 53).all(), hits  # 95 % is 57, standard deviation 1.7
    assert min(x for x in low if x is not None) > 0.05, "and is seen to be wrong"


def test_threshold_by_hand() -> None:
    reward, good = np.array([0.0, 1.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert calibration.threshold(reward, good) == 1.5
    assert calibration.threshold(reward, np.ones(4, bool)) is None and calibration.threshold(np.zeros(4), good) is None
    many = np.concatenate([reward, np.repeat(3.0, 50)])  # more of the good moves nothing
    assert calibration.threshold(many, np.concatenate([good, np.ones(50, bool)])) == 1.5
    assert calibration.middle(np.array([0.0, 2.0, 2.0, 2.0])) == 1.0 and calibration.middle(np.ones(3)) == 1.0


# --- functional tests ---

CASES = [
    Case("negation", "not bad", True, "a", "x"),
    Case("negation", "bad", False, "a", "x"),
    Case("praise", "good y", True, "", "y"),
    Case("praise", "fine y", True, "b", "y"),
    Case("insult", "vile", False, "b"),
]


def test_functional_tests_by_hand() -> None:
    found = functional.figures(CASES, np.array([0.2, 0.1, 0.9, 0.5, 0.5]), 0.5, 0)
    value = {name: figure.value for name, figure in found.items()}
    assert value["is.negation"] == 0.5 and value["is.praise"] == 0.75 and value["is.insult"] == 0.5, "on the threshold counts 1/2"
    assert value["macro"] == pytest.approx(1.75 / 3) and found["least"].reason == "of insult" and value["least"] == 0.5
    assert value["order"] == 0.75 and value["sides"] == pytest.approx(0.25 / 2)
    assert value["gap"] == 0.75 and value["group.x"] == 0 and value["group.y"] == 0.75
    assert found["best"].status == "upper" and value["best"] == pytest.approx(2 / 3), "one cut between .1 and .2"
    assert value["macro"] <= value["best"]


def test_a_reward_turned_round_fails_what_it_passed() -> None:
    reward = np.array([0.9, 0.1, 0.9, 0.8, 0.1])
    right, wrong = (functional.figures(CASES, sign * reward, sign * 0.5, 0) for sign in (1, -1))
    assert right["macro"].value == right["order"].value == 1 and wrong["macro"].value == wrong["order"].value == 0


# --- association ---


def test_correlations_are_those_of_scipy_and_sklearn() -> None:
    rng = np.random.default_rng(8)
    a = np.round(rng.normal(size=(3, 64)), 1)
    b = np.round(a + rng.normal(size=a.shape), 1)
    each = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert association.within(a, b).value == pytest.approx(np.mean(each), abs=0.02)  # the jackknife takes off a bias
    whole = association.overall(a.ravel(), b.ravel(), np.repeat(np.arange(3), 64))
    assert whole.value == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic) and whole.status == "uncertified"
    x, y = a.ravel() > 0, b.ravel() > 0.3
    assert association.kappa(x, y, np.arange(192)).value == pytest.approx(cohen_kappa_score(x, y))
    assert association.within(a, np.zeros_like(a)).value is None and association.kappa(x | True, x | True, np.arange(192)).value is None


def test_correlations_are_covered() -> None:
    """Spearman's rho of a normal pair with correlation 1/sqrt 2 is 6/pi arcsin(1/(2 sqrt 2)) = .6902."""
    rng, hits = np.random.default_rng(9), np.zeros(2)
    truth = 6 / math.pi * math.asin(1 / (2 * math.sqrt(2)))
    for _ in range(100):
        a = rng.normal(size=(4, 120))
        b = a + rng.normal(size=a.shape)
        hits += [holds(association.within(a, b), truth), holds(association.overall(a[0], b[0], np.arange(120)), truth)]
    assert (hits >= 89).all(), hits


# --- sharpness ---


def test_a_binary_reward_by_its_closed_form() -> None:
    reward = np.tile(np.repeat([1.0, 0.0], [32, 96]), (2, 1))[:, np.random.default_rng(0).permutation(128)]
    top, beta, p = np.ones(2), 0.5, 0.25
    z = 1 - p + p * math.exp(1 / beta)
    win = p * math.exp(1 / beta) / z
    found = sharpness.at(reward, top, beta)
    assert found.log_z.value == pytest.approx(math.log(z), abs=0.02) and holds(found.log_z, math.log(z))
    assert holds(found.kl, win / beta - math.log(z)) and holds(found.reward, win)
    assert found.reach == pytest.approx(128 * z * math.exp(-1 / beta)) and found.kl.status == "certified"
    assert sharpness.edge(reward, top) == math.inf, "32 draws sit at the ceiling"
    edge = sharpness.edge(reward, top, 40.0)
    assert edge is not None and sharpness.reach_of(reward, top, edge).min() == pytest.approx(40.0)
    assert sharpness.edge(reward, 2 * top, 200.0) == 0.0, "no beta has more than all draws"


def test_without_a_ceiling_nothing_is_certified() -> None:
    reward = np.random.default_rng(1).normal(size=(2, 64))
    found = sharpness.at(reward, np.full(2, math.inf), 1.0)
    assert found.kl.status == "uncertified" and found.kl.low is None and found.reach is None
    assert sharpness.edge(reward, np.full(2, math.inf)) is None
    assert sharpness.at(reward, np.full(2, 50.0), 1.0).log_z.status == "uncertified", "a ceiling far above all draws"


# --- over-optimisation ---


@pytest.mark.parametrize(("form", "peak"), [("bon", 0.9 / 0.8), ("rl", math.exp(0.9 / 0.4 - 1))])
def test_a_form_is_found_again(form: str, peak: float) -> None:
    d = np.linspace(0.3, 3, 9)
    gain = over_optimisation.columns(d, form) @ np.array([0.9, 0.4])
    fits = {fit.form: fit for fit in over_optimisation.by_points(d**2, gain)}
    right, wrong = fits[form], fits["rl" if form == "bon" else "bon"]
    assert (right.a.value, right.b.value, right.peak) == (pytest.approx(0.9), pytest.approx(0.4), pytest.approx(peak))
    assert right.r2 == pytest.approx(1) and wrong.r2 < 0.99
    assert over_optimisation.by_points(d[:2] ** 2, gain[:2]) == []


def test_the_bootstrap_of_prompts_holds_the_form() -> None:
    rng, hits = np.random.default_rng(10), 0
    d = np.linspace(0.3, 2, 8)[:, None]
    for i in range(40):
        a = 0.9 + 0.2 * rng.normal(size=24)
        fit = over_optimisation.by_prompts(np.broadcast_to(d**2, (8, 24)), d * (a - 0.4 * d), i)[0]
        hits += holds(fit.a, 0.9)
    assert hits >= 34, hits


def test_an_exploitable_proxy_is_followed_too_far_and_an_honest_one_is_not() -> None:
    """Gold N(0, 1); the proxy is it with noise, and on 1 % of the draws 6 more than the gold (C42)."""
    rng = np.random.default_rng(11)
    gold = rng.normal(size=(4, 4096))
    proxy = gold + 0.5 * rng.normal(size=gold.shape)
    trap = rng.random(gold.shape) < 0.01
    cheated, trapped = np.where(trap, 4.0, proxy), np.where(trap, -3.0, gold)
    honest = over_optimisation.best_of(proxy, gold, 10, 10, 0)
    followed = over_optimisation.best_of(cheated, trapped, 10, 10, 0)
    level = {name: [p.gold.value or 0.0 for p in c.points] for name, c in (("honest", honest), ("followed", followed))}
    assert np.diff(level["honest"]).min() > 0 and np.argmax(level["followed"]) < 7 and level["followed"][-1] < -1
    bon = next(fit for fit in followed.fits if fit.form == "bon")
    assert bon.peak is not None and bon.peak < 2
    tilt = over_optimisation.posterior(np.minimum(cheated, 4.0), trapped, np.full(4, 4.0), (0.5, 1, 2, 4, 8), 0)
    assert (tilt.points[-1].gold.value or 0.0) < 0 < (tilt.points[0].gold.value or 0.0)
