"""klbench.score on models from elsewhere: intervals against sums over every continuation; bad input against one clear line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import WORDS, continuations, exact, model, saved, tokenizer

import klbench
from klbench.errors import UserError

PROMPTS = ["a", "b c a b"]
T, BETA = 3, 0.4


def reward(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """In [0, 1], of text alone."""
    return [min(1.0, 0.45 * c.count("a") + 0.3 * c.count("c")) for c in completions]


def truth(q: torch.nn.Module, p0: torch.nn.Module, words: list[str] = WORDS) -> dict[str, float]:
    """Every column by a sum over every continuation, mean over prompts."""
    rows, eos = continuations(len(words), T), 0
    texts = ["".join(words[i] for i in row if i != eos) for row in rows]
    r = torch.tensor(reward([""] * len(rows), texts), dtype=torch.float64)
    out: dict[str, list[float]] = {}
    for prompt in PROMPTS:
        ids = tokenizer(words)(prompt)["input_ids"]
        lq, l0 = exact(q, ids, rows), exact(p0, ids, rows)
        raw = l0 + r / BETA
        log_z = raw.logsumexp(0)
        ls = raw - log_z
        Q, S, M = lq.exp(), ls.exp(), (lq.exp() + ls.exp()) / 2
        figures = {
            "reward": (Q * r).sum(), "kl_prior": (Q * (lq - l0)).sum(), "reverse_kl": (Q * (lq - ls)).sum(),
            "forward_kl": (S * (ls - lq)).sum(), "tv": (Q - S).abs().sum() / 2,
            "js": ((Q * (lq - M.log())).sum() + (S * (ls - M.log())).sum()) / 2, "entropy": -(Q * lq).sum(),
            "forgetting": (l0.exp() * (l0 - lq)).sum(), "log_z": log_z, "entropy_target": -(S * ls).sum(),
            "reward_target": (S * r).sum(),
        }  # fmt: skip
        for name, value in figures.items():
            out.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in out.items()}


@pytest.mark.parametrize("kinds", [("llama", "gpt2"), ("gpt2", "llama")])
def test_intervals_hold_the_sums_over_every_continuation(kinds: tuple[str, str], tmp_path: Path) -> None:
    p0, q = saved(tmp_path / "p0", kinds[0], 1), saved(tmp_path / "q", kinds[1], 2)
    result = klbench.score(
        prior=str(p0),
        policies={"mine": str(q)},
        prompts=PROMPTS,
        reward=reward,
        beta=BETA,
        reward_max=1.0,
        max_new_tokens=T,
        samples=1000,
        seed=0,
    )
    want = truth(model(kinds[1], 2), model(kinds[0], 1))
    mine = result["mine"]
    assert mine.status == "certified"
    for name, value in want.items():
        found = getattr(mine, name)
        slack = 0.5 * ((found.high or math.inf) - found.low)  # one seed: half a width more than the 95 %
        assert found.low - slack <= value <= (math.inf if found.high is None else found.high) + slack, (name, value, found)
    swapped = truth(model(kinds[0], 1), model(kinds[1], 2))  # the mutant: prior and policy changed places
    assert not mine.reverse_kl.low <= swapped["reverse_kl"] <= mine.reverse_kl.high
    assert [e.status for e in result.log_z] == ["certified"] * 2
    frame = result.to_frame()
    assert set(frame["policy"]) == {"mine"} and {"reverse_kl", "wasted_nats", "distinct_2"} <= set(frame["column"])
    result.to_json(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["policies"]["mine"]["columns"]["reverse_kl"]["value"] == mine.reverse_kl.value


def test_same_seed_same_figures_and_models_in_memory() -> None:
    words, p0, q = tokenizer(), model("llama", 1), model("llama", 3)
    call = lambda seed: klbench.score(  # noqa: E731
        prior=p0, policies={"q": q, "bon": "best_of_n:2", "exact": "rejection"}, prompts=PROMPTS, reward=reward, beta=BETA, reward_max=1.0,
        max_new_tokens=T, samples=64, seed=seed, tokenizer=words,
    )  # fmt: skip
    a, b, c = call(0), call(0), call(1)
    assert a["q"].reverse_kl == b["q"].reverse_kl != c["q"].reverse_kl
    assert abs(a["exact"].reverse_kl.value) < 0.1 and a["bon"].kl_prior.value <= math.log(2) - 0.5 + 0.1


def test_without_a_ceiling_nothing_is_certified() -> None:
    result = klbench.score(
        model("llama", 1), [model("llama", 2)], PROMPTS, reward, BETA, max_new_tokens=T, samples=32, tokenizer=tokenizer()
    )
    found = result["policy_0"]
    assert found.status == "uncertified" and found.reverse_kl.low is None and found.reverse_kl.value is not None
    assert found.kl_prior.low is not None  # no Z in it


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda n: [math.nan] * n, "gave nan, not a finite number, for prompt 'a' and completion"),
        (lambda n: [-math.inf] * n, "not a finite number"),
        (lambda n: [0.5] * (n - 1), "returned 63 values for 64 completions|returned [0-9]+ values for"),
        (lambda n: [1.5] * n, "above its declared maximum 1"),
        (lambda n: ["x"] * n, "must return a list of floats"),
    ],
)
def test_a_bad_reward_is_refused_at_the_door(bad, message: str) -> None:
    def broken(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        return bad(len(completions))

    with pytest.raises(UserError, match=message):
        klbench.score(model("llama", 1), [model("llama", 2)], PROMPTS, broken, BETA, reward_max=1.0, samples=32, tokenizer=tokenizer())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"samples": 8}, "at least 16"),
        ({"beta": None}, "beta is needed"),
        ({"beta": 0.0}, "beta must be finite and above 0"),
        ({"prompts": ["a", "a"]}, "'a' is given twice"),
        ({"task": "toxicty", "prompts": None, "reward": None}, "did you mean 'toxicity'"),
        ({"policies": {}}, "no policy"),
        ({"policies": {"x": "best_of_m:4"}}, "no model directory"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    asked = {"prior": model("llama", 1), "policies": {"q": model("llama", 2)}, "prompts": PROMPTS, "reward": reward, "beta": BETA}
    with pytest.raises(UserError, match=message):
        klbench.score(**{**asked, "tokenizer": tokenizer(), **change})


def test_an_unknown_column_names_the_nearest() -> None:
    result = klbench.score(model("llama", 1), [model("llama", 2)], ["a"], reward, BETA, max_new_tokens=2, samples=16, tokenizer=tokenizer())
    with pytest.raises(AttributeError, match="did you mean 'reverse_kl'"):
        _ = result["policy_0"].reverse_lk
