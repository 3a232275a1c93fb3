"""klbench's measures as metric modules of `evaluate`: loaded from their folders without a network, alone and combined."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import klbench
from klbench import UserError, metrics
from klbench.estimators import diversity, entropy, kl_prior
from klbench.pool import Pool
from klbench.rows import Rows

evaluate = pytest.importorskip("evaluate", reason="klbench's dependency `evaluate` is not installed here")

NAMES = ("distinct_n", "entropy", "kl_prior", "reverse_kl", "self_bleu", "unique")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")


def load(name: str) -> Any:
    return evaluate.load(str(klbench.metric_path(name)))


def texts(prompts: int = 3, draws: int = 32, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [[" ".join(rng.choice(list("abcdef"), 5)) for _ in range(draws)] for _ in range(prompts)]


def test_every_folder_is_a_module_that_says_what_it_reads() -> None:
    here = Path(metrics.__file__).parent
    assert sorted(p.name for p in here.iterdir() if p.is_dir() and p.name != "__pycache__") == sorted(NAMES)
    for name in NAMES:
        module = load(name)
        assert module.name == name and len(module.inputs_description) > 50 and "Returns" in module.inputs_description
        assert "@" in module.citation
    with pytest.raises(UserError, match="no metric 'distinct'; did you mean 'distinct_n'\\?"):
        klbench.metric_path("distinct")


def test_distinct_n_by_hand() -> None:
    """16 draws "a b" and 16 draws "a c": of the set's 32 unigrams 2 differ, of its 16 bigrams 1."""
    two = [["a b"] * 16 + ["a c"] * 16]
    assert load("distinct_n").compute(predictions=two, n=1)["distinct_1"] == pytest.approx(2 / 32)
    assert load("distinct_n").compute(predictions=two)["distinct_2"] == pytest.approx(1 / 16)
    mixed = [["a b", "a c"] * 16]  # in sets of 16 the order of draws counts: two bigrams differ in each
    assert load("distinct_n").compute(predictions=mixed)["distinct_2"] == pytest.approx(2 / 16)
    assert load("unique").compute(predictions=mixed)["unique"] == pytest.approx(2 / 16)
    assert load("distinct_n").compute(predictions=two[0])["distinct_2"] == pytest.approx(1 / 16)  # one list is one prompt


def test_a_tokenizer_decides_what_is_counted() -> None:
    found = load("distinct_n").compute(predictions=[["ab"] * 32], n=1, tokenize=list)
    assert found["distinct_1"] == pytest.approx(2 / 32)
    assert load("distinct_n").compute(predictions=[["ab"] * 32], n=1)["distinct_1"] == pytest.approx(1 / 16)


def test_they_are_the_estimators_of_klbench() -> None:
    given = texts()
    words = [[[ord(w) for w in t.split()] for t in row] for row in given]
    for n in (1, 2, 3):
        found, wanted = load("distinct_n").compute(predictions=given, n=n), diversity.distinct(words, n)
        name = f"distinct_{n}"
        assert (found[name], found[f"{name}_low"], found[f"{name}_high"]) == (wanted.value, wanted.low, wanted.high)
        assert wanted.low is not None and found[f"{name}_status"] == wanted.status
    assert load("self_bleu").compute(predictions=given)["self_bleu"] == diversity.self_bleu(given).value
    assert load("unique").compute(predictions=given)["unique"] == diversity.unique(words).value


def test_too_few_draws_have_no_figure_and_say_why() -> None:
    found = load("distinct_n").compute(predictions=texts(draws=15))
    assert found["distinct_2"] is None and found["distinct_2_low"] is None and "16 draws" in found["distinct_2_reason"]
    with pytest.raises(ValueError, match="as many draws of each prompt"):
        load("unique").compute(predictions=[["a"] * 32, ["a"] * 31])


# log-probabilities: three outcomes, so that every figure has an exact value

P0, Q, REWARD, BETA = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5]), np.array([0.0, 0.5, 1.0]), 0.5


def columns(draws: int = 4000) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    own, bank = (rng.choice(3, p=p, size=(2, draws)) for p in (Q, P0))
    of = {"log_q": np.log(Q), "log_p0": np.log(P0), "reward": REWARD}
    return {k: v[own] for k, v in of.items()} | {f"prior_{k}": v[bank] for k, v in of.items()}


def test_divergences_meet_the_exact_sums() -> None:
    given = columns()
    weight = P0 * np.exp(REWARD / BETA)
    target = weight / weight.sum()
    exact = {
        "reverse_kl": (Q * np.log(Q / target)).sum(), "forward_kl": (target * np.log(target / Q)).sum(), "log_z": math.log(weight.sum()),
        "tv": np.abs(Q - target).sum() / 2, "kl_prior": (Q * np.log(Q / P0)).sum(), "entropy": -(Q * np.log(Q)).sum(),
    }  # fmt: skip
    found = evaluate.combine([str(klbench.metric_path(n)) for n in ("reverse_kl", "kl_prior", "entropy")]).compute(
        **given, beta=BETA, reward_max=1.0
    )
    for name, value in exact.items():
        assert found[f"{name}_low"] <= value <= found[f"{name}_high"], name
        assert abs(found[name] - value) < 0.02 and found[f"{name}_status"] == "certified"
    other = load("reverse_kl").compute(**given, beta=2 * BETA, reward_max=1.0)  # at another beta it is another posterior
    assert not other["reverse_kl_low"] <= exact["reverse_kl"] <= other["reverse_kl_high"]


def test_divergences_are_the_estimators_of_klbench() -> None:
    x = columns(64)
    own = Rows.of_ratio(x["log_p0"], x["reward"], x["log_q"] - x["log_p0"])
    bank = Rows.of_ratio(x["prior_log_p0"], x["prior_reward"], x["prior_log_q"] - x["prior_log_p0"])
    wanted = Pool(own, bank, np.zeros((2, 0)), np.ones(2)).columns(1 / BETA)[0]["reverse_kl"]
    found = load("reverse_kl").compute(**x, beta=BETA, reward_max=1.0)
    assert found["reverse_kl"] == pytest.approx(wanted.value, abs=1e-12) and found["reverse_kl_low"] == pytest.approx(wanted.low, abs=1e-12)
    assert load("kl_prior").compute(log_q=x["log_q"], log_p0=x["log_p0"])["kl_prior"] == pytest.approx(kl_prior.k1(own).mean(n=1).value)
    assert load("entropy").compute(log_q=x["log_q"].tolist())["entropy"] == pytest.approx(entropy.monte_carlo(own).mean(n=1).value)
    blind = load("reverse_kl").compute(**x, beta=BETA)
    assert blind["reverse_kl"] is not None and blind["reverse_kl_low"] is None and "no reward_max" in blind["reverse_kl_reason"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"beta": 0.0}, "beta must be given, finite and above 0"), ({"beta": None}, "beta must be given"),
        ({"reward_max": 0.9}, "a reward is above reward_max 0.9"), ({"log_q": np.full((2, 64), math.nan)}, "log_q: there is NaN in it"),
        ({"log_q": np.zeros((2, 63))}, "as many in each column"), ({"log_q": [[0.0] * 64, [0.0] * 3]}, "as many draws of each prompt"),
        ({f"{p}{k}": np.zeros((2, 8)) for p in ("", "prior_") for k in ("log_q", "log_p0", "reward")}, "a list of 16 and more numbers"),
    ],
)  # fmt: skip
def test_what_is_no_draw_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load("reverse_kl").compute(**{**columns(64), "beta": BETA, "reward_max": 1.0, **change})


def test_combine_takes_folders_and_loaded_modules() -> None:
    given = texts()
    paths = evaluate.combine([str(klbench.metric_path(n)) for n in ("distinct_n", "self_bleu", "unique")]).compute(predictions=given)
    loaded = evaluate.combine([load("distinct_n"), load("self_bleu"), load("unique")]).compute(predictions=given)
    assert paths == loaded and {"distinct_2", "self_bleu", "unique"} <= set(paths)
    assert paths["distinct_2"] != paths["unique"]
