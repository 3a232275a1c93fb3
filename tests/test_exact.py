"""Sums over every outcome against brute force of another kind: one forward a sequence, loops over texts, numbers worked by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from klbench import exact, method
from klbench.errors import UserError
from klbench.estimators import diversity
from klbench.method import RewardLaw
from klbench.policies.causal_lm import CausalLM, wrap
from klbench.policies.tabular import Tabular
from klbench.target import TiltedPrior, WithoutDensity

PROMPTS = ["a", "b c a"]
T = 3


def a_task(gold: Any = None, features: Any = None) -> Any:
    return SimpleNamespace(gold=lambda: gold, features=lambda: features)


def length_of(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    return [len(c.split()) / 4 for c in completions]


@pytest.fixture(scope="module")
def models() -> dict[str, CausalLM]:
    return {kind: wrap(kind, tiny.model(kind, seed), tiny.tokenizer()) for kind, seed in (("llama", 3), ("gpt2", 5))}


@pytest.fixture
def table() -> Callable[..., Tabular]:
    def made(law: list[list[float]], name: str = "table") -> Tabular:
        """Answers 0 | 10 | 110 | 111, EOS 0."""
        prompts = tuple(PROMPTS[: len(law)])
        return Tabular(torch.tensor(law, dtype=torch.float64).log() + 2.0, prompts, vocabulary=2, length=3, eos=0, name=name)

    return made


# Outcomes


def test_outcomes_by_hand() -> None:
    tokens, mask = exact.outcomes(3, [1], 2)
    rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    assert rows == [[1], [0, 1], [2, 1], [0, 0], [0, 2], [2, 0], [2, 2]]
    assert tokens[0].tolist() == [1, 1]  # filled with the stop
    tokens, mask = exact.outcomes(2, [], 3)
    assert len(tokens) == 8 and bool(mask.all())
    tokens, mask = exact.outcomes(4, [3, 0], 1)
    assert tokens[:, 0].tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("words, stops, length", [(4, [0], 3), (4, [2, 0], 3), (2, [1], 4), (3, [], 2)])
def test_outcomes_are_each_sequence_once(words: int, stops: list[int], length: int) -> None:
    tokens, mask = exact.outcomes(words, stops, length)
    found = [tuple(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]
    wanted = set()
    for row in itertools.product(range(words), repeat=length):
        end = next((t + 1 for t, word in enumerate(row) if word in stops), length)
        wanted.add(row[:end])
    assert set(found) == wanted and len(found) == len(wanted)


def test_too_many_outcomes_are_counted() -> None:
    with pytest.raises(UserError, match="50 tokens at length 5 make 288,360,150 outcomes; at most 300,000"):
        exact.outcomes(50, [0], 5)


# Laws


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_law_is_one_plain_forward_a_sequence(models: dict[str, CausalLM], kind: str) -> None:
    policy, before = models[kind], models[kind].weights_hash()
    tokens, mask = exact.outcomes(len(tiny.WORDS), [0], T)
    found = exact.log_law(policy, PROMPTS, tokens, mask)
    rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    assert sorted(rows) == sorted(tiny.continuations(len(tiny.WORDS), T))
    for p, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(found[p], tiny.exact(policy.model, policy.encode(prompt), rows).numpy(), atol=2e-5)
    assert policy.weights_hash() == before and policy.model.dtype == torch.float32


def test_what_is_not_every_outcome_is_refused(models: dict[str, CausalLM]) -> None:
    policy = models["llama"]
    tokens, mask = exact.outcomes(len(tiny.WORDS), [0], T)
    for wrong in (mask & (torch.arange(T) > 0), mask.roll(1, 1), torch.ones_like(mask)):  # a mask off by one token
        with pytest.raises(UserError, match="llama: the mass of all outcomes after .* is .*, not 1"):
            exact.log_law(policy, PROMPTS, tokens, wrong)
    with pytest.raises(UserError, match="not 1"):
        exact.log_law(policy, PROMPTS, tokens[1:], mask[1:])


def test_decodings_are_laws_of_their_own(models: dict[str, CausalLM]) -> None:
    policy = models["gpt2"]
    tokens, mask = exact.outcomes(len(tiny.WORDS), [0], 2)
    plain = exact.log_law(policy, ["a"], tokens, mask)[0]
    sharp = exact.log_law(replace(policy, decodings=(method.sampler("temperature:0.5"),)), ["a"], tokens, mask)[0]  # type: ignore[arg-type]
    first = np.array([plain[0], *(np.logaddexp.reduce(plain[(tokens[:, 0] == w).numpy()]) for w in (1, 2, 3))])
    squared = 2 * first - np.logaddexp.reduce(2 * first)
    assert sharp[0] == pytest.approx(squared[0], abs=1e-9)  # the output that is <eos> alone
    cut = exact.log_law(replace(policy, decodings=(method.sampler("top_p:0.6"),)), ["a"], tokens, mask)[0]  # type: ignore[arg-type]
    assert np.isneginf(cut).any() and np.exp(cut).sum() == pytest.approx(1, abs=1e-12)


def test_a_table_is_read_in_any_order(table: Callable[..., Tabular]) -> None:
    policy = table([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    tokens, mask = exact.outcomes(2, [0], 3)
    turned = torch.tensor([2, 0, 3, 1])
    np.testing.assert_allclose(np.exp(exact.log_law(policy, PROMPTS, tokens, mask)), [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    np.testing.assert_allclose(np.exp(exact.log_law(policy, PROMPTS, tokens[turned], mask[turned]))[0], [0.3, 0.1, 0.4, 0.2])
    shorter = exact.outcomes(2, [0], 2)
    np.testing.assert_allclose(np.exp(exact.log_law(policy, PROMPTS, *shorter))[0], [0.1, 0.2, 0.7], atol=1e-6)
    with pytest.raises(UserError, match="no prompt 'z'"):
        exact.log_law(policy, ["z"], tokens, mask)


# Columns

LAWS = {"p0": [[0.1, 0.2, 0.3, 0.4]], "q": [[0.4, 0.3, 0.2, 0.1]]}
REWARD = [0.0, 0.25, 0.5, 0.75]  # `length_of` the four answers
BETA = 0.5


@pytest.fixture
def found(table: Callable[..., Tabular]) -> dict[str, float]:
    prior, policy = table(LAWS["p0"], "prior"), table(LAWS["q"], "policy")
    target = TiltedPrior(prior, length_of, BETA, 1.0)
    gold = lambda prompts, completions, **_: [float(c == "1 1") for c in completions]  # noqa: E731
    phi = lambda prompts, completions, **_: [1.0 if c else -1.0 for c in completions]  # noqa: E731
    tilts = SimpleNamespace(own=lambda reward, law, beta, draws: reward * draws * beta - law.log_mean_exp(law.levels * draws * beta))
    return exact.truths(policy, a_task(gold, (phi, 0.0)), prior, target, PROMPTS[:1], 3, tilts, 2)  # type: ignore[arg-type]


def test_columns_by_loops(found: dict[str, float]) -> None:
    p0, q, r = LAWS["p0"][0], LAWS["q"][0], REWARD
    z = sum(a * math.exp(x / BETA) for a, x in zip(p0, r, strict=True))
    p = [a * math.exp(x / BETA) / z for a, x in zip(p0, r, strict=True)]
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    mean = lambda a, x: sum(y * z for y, z in zip(a, x, strict=True))  # noqa: E731
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    tilted = [a * math.exp(x) for a, x in zip(p0, r, strict=True)]
    wanted = {
        "log_z": math.log(z),
        "reward": mean(q, r),
        "reward_target": mean(p, r),
        "kl_prior": kl(q, p0),
        "kl_prior_target": kl(p, p0),
        "reverse_kl": kl(q, p),
        "forward_kl": kl(p, q),
        "forgetting": kl(p0, q),
        "tv": sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        "js": (kl(q, middle) + kl(p, middle)) / 2,
        "chi2": math.log(sum(a * a / b for a, b in zip(p, q, strict=True))),
        "entropy": -mean(q, [math.log(x) for x in q]),
        "entropy_target": -mean(p, [math.log(x) for x in p]),
        "gold": 0.2,
        "moments": 0.6 - 0.4,
        "moments_target": 1 - 2 * p[0],
        "own_kl": kl(q, [x / sum(tilted) for x in tilted]),
        "wasted_nats": kl(q, p0),  # the policy earns less than the prior: nothing was bought
        "beta_implied": math.inf,
        "kl_efficiency": 0.0,
    }
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, abs=1e-12)
    assert set(found) - set(wanted) == {
        "distinct_1",
        "distinct_2",
        "distinct_3",
        "distinct_4",
        "distinct_2_target",
        "unique",
        "unique_target",
    }


@pytest.mark.parametrize("wrong", ["a swapped KL", "a dropped log Z", "a mask off by one"])
def test_mutants_are_rejected(found: dict[str, float], wrong: str) -> None:
    """The identity reverse_kl = kl_prior - E_q r / beta + log Z holds between sums that were made apart, and for no mutant of them."""
    reverse = {"a swapped KL": found["forward_kl"], "a dropped log Z": found["reverse_kl"] - found["log_z"]}.get(wrong, found["reverse_kl"])
    reward = found["reward"] if wrong != "a mask off by one" else found["reward"] - 0.25
    assert abs(found["reverse_kl"] - (found["kl_prior"] - found["reward"] / BETA + found["log_z"])) < 1e-12
    assert abs(reverse - (found["kl_prior"] - reward / BETA + found["log_z"])) > 0.1


def test_wasted_is_least_over_a_grid_of_lambda_for_all_prompts_at_once(table: Callable[..., Tabular]) -> None:
    prior = table([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], "prior")
    policy = table([[0.1, 0.1, 0.1, 0.7], [0.1, 0.1, 0.2, 0.6]], "policy")
    target = TiltedPrior(prior, length_of, BETA, 1.0)
    out = exact.truths(policy, a_task(), prior, target, PROMPTS, 3)
    p0, q = (x.logits.softmax(1).numpy() for x in (prior, policy))
    spent = (q * np.log(q / p0)).sum(1).mean()
    lams = np.linspace(0, 20, 20001)
    curve = [spent - lam * (q @ REWARD).mean() + np.log(p0 @ np.exp(lam * np.array(REWARD))).mean() for lam in lams]
    assert out["wasted_nats"] == pytest.approx(min(curve), abs=1e-6)
    assert 1 / out["beta_implied"] == pytest.approx(lams[int(np.argmin(curve))], abs=1e-3)
    assert out["kl_efficiency"] == pytest.approx(1 - min(curve) / spent, abs=1e-6)


def test_a_posterior_wastes_nothing_and_tells_its_beta(table: Callable[..., Tabular]) -> None:
    prior = table([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], "prior")
    law = prior.logits.softmax(1).numpy() * np.exp(np.array(REWARD) / 0.2)
    out = exact.truths(
        table((law / law.sum(1, keepdims=True)).tolist()), a_task(), prior, TiltedPrior(prior, length_of, BETA, 1.0), PROMPTS, 3
    )
    assert out["wasted_nats"] == pytest.approx(0, abs=1e-12) and out["beta_implied"] == pytest.approx(0.2, abs=1e-9)
    assert out["kl_efficiency"] == pytest.approx(1, abs=1e-9) and out["reverse_kl"] > 0.1


def test_a_policy_at_the_ceiling_has_an_infinite_lambda() -> None:
    log_p0, reward = np.log([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]), np.array([[0.0, 1.0, 1.0], [0.5, 1.0, 0.0]])
    lam, least = exact.nearest_posterior(log_p0, reward, 1.0)
    assert lam == math.inf and least == pytest.approx((math.log(0.5) + math.log(0.4)) / 2)
    lam, least = exact.nearest_posterior(log_p0, reward, 1 - 1e-9)  # nearly there
    assert 20 < lam < 100 and least == pytest.approx((math.log(0.5) + math.log(0.4)) / 2, abs=1e-6)
    assert exact.nearest_posterior(log_p0, reward, 0.1) == (0.0, 0.0)


def test_a_rewardless_mode_makes_only_what_reads_it_infinite(models: dict[str, CausalLM]) -> None:
    prior = models["llama"]
    target = TiltedPrior(prior, length_of, BETA, 1.0)
    cut = replace(prior, decodings=(method.sampler("top_p:0.7"),))  # type: ignore[arg-type]
    out = exact.truths(cut, a_task(), prior, target, PROMPTS, 2)
    assert {k for k, v in out.items() if math.isinf(v)} <= {"forward_kl", "forgetting", "chi2", "beta_implied"}
    assert out["forward_kl"] == out["forgetting"] == out["chi2"] == math.inf and 0 < out["js"] < math.log(2)
    swapped = exact.truths(prior, a_task(), cut, replace(target, prior=cut), PROMPTS, 2)  # mass where the prior has none
    assert swapped["kl_prior"] == swapped["reverse_kl"] == swapped["wasted_nats"] == math.inf and "kl_efficiency" not in swapped


def test_a_policy_without_density_has_the_targets_figures_alone(table: Callable[..., Tabular]) -> None:
    prior = table(LAWS["p0"])
    out = exact.truths(WithoutDensity(prior, "a test"), a_task(), prior, TiltedPrior(prior, length_of, BETA, 1.0), PROMPTS[:1], 3)
    assert set(out) == {
        *("log_z", "reward_target", "kl_prior_target", "entropy_target", "distinct_2_target", "unique_target", "unique_valid_target")
    }


# Samplers: the law of the reward is exact


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_over_every_block(models: dict[str, CausalLM], n: int) -> None:
    prior = models["gpt2"]
    target = TiltedPrior(prior, length_of, BETA, 1.0)
    every = exact.Outcomes.of(prior, target, ["b"], 2)
    p0, wanted = np.exp(every.log_p0[0]), np.zeros(len(every.texts))
    for block in itertools.product(range(len(p0)), repeat=n):
        best = max(block, key=lambda i: every.reward[0, i])  # the first maximum
        wanted[best] += p0[list(block)].prod()
    found = every.log_q(method.sampler(f"best_of_n:{n}"), target)  # type: ignore[arg-type]
    np.testing.assert_allclose(np.exp(found[0]), wanted, atol=1e-12)


def test_rejection_is_the_posterior(models: dict[str, CausalLM]) -> None:
    prior = models["llama"]
    out = exact.truths(method.sampler("rejection"), a_task(), prior, TiltedPrior(prior, length_of, 0.2, 1.0), PROMPTS, T)  # type: ignore[arg-type]
    assert all(out[k] == pytest.approx(0, abs=1e-12) for k in ("reverse_kl", "forward_kl", "tv", "js", "chi2", "wasted_nats"))
    assert out["unique"] == out["unique_target"] and out["beta_implied"] == pytest.approx(0.2)


def test_a_ratio_that_is_no_density_is_refused(table: Callable[..., Tabular]) -> None:
    from klbench.samplers.rejection import Rejection

    class Wrong(Rejection):  # type: ignore[misc]
        def log_ratio(self, reward: Any, law: RewardLaw, beta: float, reward_max: float) -> Any:
            return reward / beta  # log Z dropped

    prior = table(LAWS["p0"])
    target = TiltedPrior(prior, length_of, BETA, 1.0)
    with pytest.raises(UserError, match=r"Wrong: p0 exp\(log_ratio\) sums to"):
        exact.Outcomes.of(prior, target, PROMPTS[:1], 3).log_q(Wrong(), target)


# Diversity: every set of draws, literally


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct_over_every_set(models: dict[str, CausalLM], monkeypatch: pytest.MonkeyPatch, size: int, n: int) -> None:
    monkeypatch.setattr(exact, "SET", size)
    monkeypatch.setattr(diversity, "SET", size)
    every = exact.Outcomes.of(models["llama"], TiltedPrior(models["llama"], length_of, BETA, 1.0), PROMPTS, 2)
    q = np.exp(every.log_p0)
    ids = [row[keep & (row != 0)].tolist() for row, keep in zip(every.tokens, every.mask, strict=True)]
    top, bottom, different = np.zeros(2), np.zeros(2), np.zeros(2)
    for members in itertools.product(range(len(ids)), repeat=size):
        mass = q[:, members].prod(1)
        grams = [tuple(ids[i][j : j + n]) for i in members for j in range(len(ids[i]) - n + 1)]
        top += mass * len(set(grams))
        bottom += mass * len(grams)
        different += mass * len({tuple(ids[i]) for i in members})
    wanted = np.divide(top, bottom, out=np.zeros(2), where=bottom > 0)
    np.testing.assert_allclose(exact.distinct(every, q, n), wanted, atol=1e-12)
    np.testing.assert_allclose(exact.unique(every, q), different / size, atol=1e-12)


def test_diversity_is_that_of_the_estimator(models: dict[str, CausalLM]) -> None:
    prior = models["gpt2"]
    every = exact.Outcomes.of(prior, TiltedPrior(prior, length_of, BETA, 1.0), ["a"], T)
    q = np.exp(every.log_p0)
    drawn = np.random.default_rng(0).choice(len(q[0]), size=16 * 2000, p=q[0] / q[0].sum())
    ids = [row[keep & (row != 0)].tolist() for row, keep in zip(every.tokens, every.mask, strict=True)]
    for n in (1, 2):
        estimate = diversity.distinct([[ids[i] for i in drawn]], n)
        assert estimate.value is not None and estimate.stderr is not None
        assert abs(estimate.value - exact.distinct(every, q, n)[0]) < 4 * estimate.stderr
