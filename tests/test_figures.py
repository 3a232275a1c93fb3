"""Figures of single works: gated diversity, DID entropy, choice flips, ranking, update regressions, bounds of log Z. By hand or by sums."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from test_api import BETA, PROMPTS, T, reward
from tiny import WORDS, continuations, exact, model, tokenizer

import klbench
from klbench import audit, task
from klbench import exact as sums
from klbench.api import ScoreResult, regression_rate
from klbench.audit import Chosen, Flips, ranked, ranking
from klbench.errors import UserError
from klbench.estimators.diversity import at_cap, unique
from klbench.models import open_prior
from klbench.policies.causal_lm import CausalLM
from klbench.target import TiltedPrior

Flags = NDArray[np.bool_]


# Diversity among draws that are good


def test_only_valid_draws_are_counted() -> None:
    """A set of 16: four different draws, of which two are valid, one of these drawn twice."""
    draws = [[[1]] * 10 + [[2]] * 3 + [[3], [4], [4]]] * 2
    valid = np.array([[True] + [False] * 9 + [False] * 3 + [False, True, True]] * 2)
    assert unique(draws, valid).value == pytest.approx(2 / 16) and unique(draws).value == pytest.approx(4 / 16)
    assert unique(draws, np.zeros((2, 16), bool)).value == 0.0
    assert unique(draws, np.ones((2, 16), bool)) == unique(draws)


def test_the_cap_is_one_a_prompt_and_known_to_float32() -> None:
    reward = np.array([[0.1, 0.3], [0.3, 0.7]]).astype(np.float32).astype(np.float64)
    found = at_cap(reward, np.array([0.3, 0.7]))
    assert found is not None and found.tolist() == [[False, True], [False, True]]
    assert at_cap(reward, np.array([0.3, math.inf])) is None


def test_gated_diversity_is_the_mean_over_all_sets() -> None:
    """16 draws of 3 outcomes: a sum over all ways to draw them, by their counts."""
    tokens = torch.tensor([[1, 0], [2, 0], [1, 2]])
    every = sums.Outcomes(("c",), tokens, torch.tensor([[True, True]] * 3), (0,), ["a", "b", "ab"], np.zeros((1, 3)), np.zeros((1, 3)))
    q, valid = np.array([[0.03, 0.9, 0.07]]), np.array([[True, False, True]])
    mean = 0.0
    for i, j in itertools.product(range(17), repeat=2):
        if i + j <= 16:
            k = 16 - i - j
            chance = math.factorial(16) / math.prod(map(math.factorial, (i, j, k))) * 0.03**i * 0.9**j * 0.07**k
            mean += chance * ((i > 0) + (k > 0)) / 16
    assert sums.unique(every, q, valid)[0] == pytest.approx(mean, rel=1e-10)
    assert sums.unique(every, q)[0] > mean + 0.05  # the mutant: all of them


# Differential information


def test_differential_entropy_by_hand() -> None:
    p0, q = np.array([[0.5, 0.25, 0.25, 0.0]]), np.array([[0.25, 0.25, 0.5, 0.0]])
    with np.errstate(divide="ignore"):
        log_p0, log_q = np.log(p0), np.log(q)
    d = np.array([0.5, 1, 2]) / 3.5  # q / p0
    assert sums.differential_entropy(log_q, log_p0)[0] == pytest.approx(-(d * np.log(d)).sum(), abs=1e-12)
    assert sums.differential_entropy(log_p0, log_p0)[0] == pytest.approx(math.log(3))
    assert sums.differential_entropy(log_p0, log_q)[0] == pytest.approx(-(d * np.log(d)).sum(), abs=1e-12)  # here 1/d is d turned round
    kl = float((q[0, :3] * np.log(q[0, :3] / p0[0, :3])).sum())
    assert abs(sums.differential_entropy(log_q, log_p0)[0] - kl) > 0.1 and abs(d @ np.log(d) + -(q[0, :3] @ np.log(q[0, :3]))) > 0.01
    with pytest.raises(ValueError, match="no law"):
        sums.differential_entropy(np.log(np.full((1, 4), 0.25)), log_p0)


def test_differential_entropy_of_the_posterior_is_that_of_a_softmax_of_rewards() -> None:
    rng = np.random.default_rng(0)
    log_p0, tilt = np.log(rng.dirichlet(np.ones(7), 2)), rng.normal(size=(2, 7))
    soft = np.exp(tilt) / np.exp(tilt).sum(1, keepdims=True)
    log_p = log_p0 + tilt - np.log((np.exp(log_p0 + tilt)).sum(1, keepdims=True))
    np.testing.assert_allclose(sums.differential_entropy(log_p, log_p0), -(soft * np.log(soft)).sum(1), atol=1e-12)


# The likeliest text under another wording


def test_flips_by_hand() -> None:
    """Two items in three wordings: the first flips under one of two, the second under none."""
    log_q = np.log([[0.6, 0.4], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.45, 0.55]])
    assert Flips(3)(log_q).tolist() == [0.5, 0.0]
    assert Flips()(log_q).tolist() == [1.0, 1.0, 0.0]  # read in twins: rows 1 2, 3 4, 5 6
    assert Flips(3)(log_q[::-1]).tolist() != [0.5, 0.0]


def test_the_emotional_flips_compare_each_prefix_with_none() -> None:
    (flips,) = (a for a in task.load("factuality/emotional").audits() if a.name == "choice_flips")
    assert isinstance(flips, Chosen) and len(flips.prompts) % 9 == 0
    assert all(prompt.endswith(f" {flips.prompts[9]}") for prompt in flips.prompts[10:18])
    log_q = np.zeros((len(flips.prompts), 4))
    log_q[:, 0] = 1.0
    assert flips.of(log_q).value == 0.0
    log_q[1::9, 2] = 2.0  # the first prefix changes every choice
    assert flips.of(log_q).value == pytest.approx(1 / 8)


# Weights by what the prior answers


def test_a_weighed_mean_by_hand() -> None:
    asked = Chosen(name="x", title="", formula="", prompts=("a",) * 3, texts=((" b",),) * 3, combine=lambda x: x[:, 0])
    weighed = replace(asked, weights=lambda x: np.exp(x[:, 0]))
    values, log_p0 = np.array([[1.0], [2.0], [4.0]]), np.log([[0.2], [0.3], [0.5]])
    found = weighed.of(values, log_p0)
    assert found.value == pytest.approx(0.2 + 0.6 + 2.0) and asked.of(values, log_p0).value == pytest.approx(7 / 3)
    linear = 2.8 + np.array([0.6, 0.9, 1.5]) * (np.array([1.0, 2.0, 4.0]) - 2.8)
    half = 4.302652729911275 * linear.std(ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom
    assert found.population == pytest.approx((2.8 - half, 2.8 + half))
    assert replace(asked, weights=lambda x: 0 * x[:, 0]).of(values, log_p0).value is None


def test_yes_no_twins_are_parted_by_the_priors_own_answers() -> None:
    from klbench_tasks.bias import yes_no

    n = np.array([[0.1, 0.9], [0.8, 0.3], [0.9, 0.9]])  # P0(no) of each twin: right on both, wrong on both, always no
    rows = np.zeros((18, 4))
    rows[0::3, 0], rows[0::3, 2] = np.log(n).ravel(), np.log1p(-n).ravel()
    rows[:, 1] = rows[:, 3] = -np.inf
    parts = [f(rows) for f in (yes_no.known, yes_no.wrong, yes_no.unknown)]
    np.testing.assert_allclose(parts[0], [0.81, 0.2 * 0.3, 0.1 * 0.9])
    np.testing.assert_allclose(parts[1], [0.01, 0.8 * 0.7, 0.9 * 0.1])
    np.testing.assert_allclose(sum(parts), 1.0)
    assert np.argmax(parts, axis=0).tolist() == [0, 1, 2]
    audits = {a.name: a for a in yes_no.answers() if isinstance(a, Chosen)}
    log_q = np.zeros((len(audits["negative_bias"].prompts), 4))
    log_q[0:3, :2] = 5.0  # a policy that says no to the first twin's yes
    everywhere = np.tile(rows, (6, 1))[: len(log_q)]
    of = {name: audits[name].of(log_q, everywhere).value for name in ("negative_bias_known", "negative_bias_wrong")}
    bias = 1 / (1 + math.exp(-5)) - 0.5
    copies = [len(range(i, len(log_q) // 6, 3)) for i in range(3)]  # twins of each kind
    assert of["negative_bias_known"] == pytest.approx(bias * 0.81 / sum(c * x for c, x in zip(copies, parts[0], strict=True)))
    assert of["negative_bias_wrong"] == pytest.approx(bias * 0.01 / sum(c * x for c, x in zip(copies, parts[1], strict=True)))


# Ranking


def pairs() -> tuple[tuple[str, str, str], ...]:
    return (("a", " b", " c c"), ("b", " a a", " b c"), ("a", " c", " b"), ("c a", " b b", " a"))


def by_sum(lm: torch.nn.Module, prompt: str, text: str) -> float:
    """log-probability of a text with the stop, by a plain forward."""
    ids = tokenizer()(text)["input_ids"]
    return float(exact(lm, tokenizer()(prompt)["input_ids"], [[*ids, 0]])[0])


@pytest.fixture(scope="module")
def prior() -> CausalLM:
    opened = open_prior(model("llama", 1), tokenizer=tokenizer())
    assert isinstance(opened, CausalLM)
    return opened


def test_ranking_of_a_policy_and_of_the_exact_posterior(prior: CausalLM) -> None:
    asked = ranking(pairs())
    policy = open_prior(model("gpt2", 2), tokenizer=tokenizer())
    lm, p0 = model("gpt2", 2), model("llama", 1)
    wanted = np.mean([by_sum(lm, c, w) > by_sum(lm, c, x) for c, w, x in pairs()])
    assert asked.measure(policy, prior).value == wanted
    for beta in (0.05, 50.0):
        target = TiltedPrior(prior, reward, beta, 1.0)
        value = lambda c, x, beta=beta: by_sum(p0, c, x) + reward([c], [x])[0] / beta  # noqa: E731
        ceiling = np.mean([value(c, w) > value(c, x) for c, w, x in pairs()])
        assert asked.of_posterior(target, prior).value == ceiling, beta
    strict = np.mean([reward([c], [w])[0] > reward([c], [x])[0] for c, w, x in pairs()])
    assert asked.of_posterior(TiltedPrior(prior, reward, 1e-3, 1.0), prior).value >= strict  # where rewards differ, they decide
    with pytest.raises(ValueError, match="no whole outputs"):
        replace(asked, whole=False).of_posterior(TiltedPrior(prior, reward, 1.0, 1.0), prior)


def test_a_tie_is_not_ranked_right() -> None:
    log_q = np.array([[-1.0, -1.0], [-1.0, -2.0], [-3.0, -2.0], [-np.inf, -np.inf]])
    assert ranked(log_q).tolist() == [0, 1, 0, 0] and audit.first_chosen(log_q).tolist() == [1, 1, 0, 1]


def test_the_toxicity_variants_rank_pairs_and_the_published_task_does_not() -> None:
    assert task.load("toxicity").audits() == ()
    (asked,) = task.load("toxicity/threat").audits()
    assert isinstance(asked, Chosen) and asked.whole and len(asked.texts) == 63 and all(len(row) == 2 for row in asked.texts)


# Right before, wrong after


def shares(k: int, n: int = 16) -> Flags:
    return (np.arange(n) < k)[None]


def test_the_regression_rate_is_unbiased() -> None:
    """A sum over all outcomes of 16 and 16 draws: E[a (1 - b)] = P(right before) P(wrong after)."""
    before, after = 0.7, 0.45
    values = np.array([[regression_rate(shares(i), shares(j)).value for j in range(17)] for i in range(17)], dtype=np.float64)
    law = np.outer(binom.pmf(range(17), 16, before), binom.pmf(range(17), 16, after))
    assert (law * values).sum() == pytest.approx(before * (1 - after), abs=1e-12)
    swapped = (law * values.T).sum()  # the mutant: before and after changed places
    assert abs(swapped - before * (1 - after)) > 0.1
    dropped = (law * np.maximum(0, [[(i - j) / 16 for j in range(17)] for i in range(17)])).sum()  # a fall of the mean is no flip
    assert abs(dropped - before * (1 - after)) > 0.05


def test_the_regression_rates_error_is_the_spread_of_its_values() -> None:
    rng, rates = np.random.default_rng(0), np.array([[0.7, 0.45], [0.2, 0.9], [0.5, 0.5]])
    truth = float((rates[:, 0] * (1 - rates[:, 1])).mean())
    found = [regression_rate(*(rng.random((3, 64)) < rates[:, [i]] for i in (0, 1))) for _ in range(400)]
    values, errors = np.array([x.value for x in found]), np.array([x.stderr for x in found])
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.1)
    inside = np.mean([x.low <= truth <= x.high for x in found if x.low is not None and x.high is not None])
    assert 0.93 <= inside <= 0.995
    none = regression_rate(np.zeros((1, 16), bool), np.ones((1, 16), bool))
    assert none.value == none.low == 0.0 and none.high is not None and 0.1 < none.high < 0.4  # not a single draw is no proof


# The two bounds of log Z, and what `score` says


@pytest.fixture(scope="module")
def result() -> ScoreResult:
    return klbench.score(
        prior=model("llama", 1), policies={"mine": model("gpt2", 2), "prior": model("llama", 1), "best": "best_of_n:2"}, prompts=PROMPTS,
        reward=reward, beta=BETA, reward_max=1.0, max_new_tokens=T, samples=2000, seed=0, tokenizer=tokenizer(),
    )  # fmt: skip


def laws() -> list[tuple[Any, Any, Any, list[str]]]:
    """(log q, log p0, reward) of every continuation and their texts, a prompt."""
    rows = continuations(len(WORDS), T)
    texts = ["".join(WORDS[i] for i in row if i != 0) for row in rows]
    out = []
    for prompt in PROMPTS:
        ids = tokenizer()(prompt)["input_ids"]
        lq, l0 = (exact(model(*kind), ids, rows).numpy() for kind in (("gpt2", 2), ("llama", 1)))
        out.append((lq, l0, np.array(reward([prompt] * len(rows), texts)), texts))
    return out


def test_bounds_of_log_z_are_their_sums(result: ScoreResult) -> None:
    lower = upper = middle = 0.0
    for lq, l0, r, _ in laws():
        log_w, raw = l0 + r / BETA - lq, l0 + r / BETA
        log_z = np.logaddexp.reduce(raw)
        lower, upper, middle = lower + np.exp(lq) @ log_w / 2, upper + np.exp(raw - log_z) @ log_w / 2, middle + log_z / 2
    found = result["mine"].log_z_bounds
    assert found is not None and [x.status for x in found] == ["lower", "upper"]
    for figure, wanted in zip(found, (lower, upper), strict=True):
        assert figure.value is not None and figure.stderr is not None and abs(figure.value - wanted) < 4 * figure.stderr, (figure, wanted)
    low, high = found[0].high, found[1].low
    assert low is not None and high is not None and lower < low < middle < high < upper + 1  # apart by both divergences: more than noise
    assert found[1].value is not None and abs(found[1].value - lower) > 10 * (found[1].stderr or 0)  # the mutant: the policy's own draws
    bounds = result["prior"].log_z_bounds
    assert bounds is not None and bounds[1].value is not None and bounds[0].value is not None and bounds[0].value < bounds[1].value


def test_without_a_ceiling_there_is_no_upper_bound_and_nothing_is_right() -> None:
    found = klbench.score(
        prior=model("llama", 1), policies={"a": model("gpt2", 2), "b": model("llama", 1)}, prompts=PROMPTS, reward=reward, beta=BETA,
        max_new_tokens=T, samples=64, tokenizer=tokenizer(),
    )  # fmt: skip
    bounds = found["a"].log_z_bounds
    assert bounds is not None and bounds[1].value is None and "0 draws of the posterior" in bounds[1].reason and bounds[0].value is not None
    assert "unique_valid" not in found["a"].columns and "unique_valid_target" not in found["a"].columns
    with pytest.raises(UserError, match="without reward_max"):
        found.regressions("a", "b")


def test_regressions_and_gated_diversity_of_two_policies_are_their_sums(result: ScoreResult) -> None:
    flips, gated = [], []
    for lq, l0, r, _ in laws():
        right = r >= 1 - 1e-9
        flips.append(np.exp(l0[right]).sum() * (1 - np.exp(lq[right]).sum()))
        gated.append((1 - (1 - np.exp(lq[right])) ** 16).sum() / 16)
    figure = result.regressions("prior", "mine")
    assert figure.value is not None and figure.stderr is not None and abs(figure.value - np.mean(flips)) < 4 * figure.stderr
    assert abs(figure.value - (result.regressions("mine", "prior").value or 0)) > 4 * figure.stderr
    column = result["mine"].unique_valid
    assert column.low is not None and column.high is not None and column.low <= np.mean(gated) <= column.high
    assert column.value is not None and column.value < (result["mine"].unique.value or 0) and result["mine"].unique_valid_target.value
    with pytest.raises(UserError, match="to itself"):
        result.regressions("mine", "mine")


def test_the_mean_log_prior_is_minus_entropy_and_kl() -> None:
    """Why E_q[log p0] has no column of its own: it is -(entropy + kl_prior), exactly."""
    for lq, l0, _, _ in laws():
        q = np.exp(lq)
        assert q @ l0 == pytest.approx(-(-(q @ lq) + q @ (lq - l0)), abs=1e-12)
        assert abs(q @ l0 + q @ (lq - l0)) > 0.1  # the mutant: KL alone
