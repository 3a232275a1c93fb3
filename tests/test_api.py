"""klbench.score on models from elsewhere: intervals against sums over every continuation; bad input against one clear line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import WORDS, continuations, exact, model, saved, tokenizer

import klbench
import klbench.policies.causal_lm
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


def of(policies: dict[str, object], **change: object) -> klbench.ScoreResult:
    asked = {
        "prior": model("llama", 1),
        "prompts": PROMPTS,
        "reward": reward,
        "beta": BETA,
        "reward_max": 1.0,
        "max_new_tokens": T,
        "samples": 128,
    }
    return klbench.score(**{**asked, "policies": policies, "tokenizer": tokenizer(), **change})


def test_a_pool_gives_other_figures_and_still_holds_the_truth() -> None:
    """Two policies with each other's draws as strata: the same columns, other figures, the truth inside."""
    both = {"q": model("gpt2", 2), "r": model("llama", 3)}
    alone, joined = of(both, pool=False), of(both)
    assert alone.pool == () and joined.pool == ("q", "r")
    for name, kind, seed in (("q", "gpt2", 2), ("r", "llama", 3)):
        value = truth(model(kind, seed), model("llama", 1))["reverse_kl"]
        a, b = alone[name].reverse_kl, joined[name].reverse_kl
        assert a.value != b.value and set(alone[name].columns) == set(joined[name].columns)
        slack = 0.5 * (b.high - b.low)
        assert b.low - slack <= value <= b.high + slack
        assert b.stderr < 3 * a.stderr


def test_without_a_pool_policies_fall_from_the_same_uniforms_and_differ_with_less_noise() -> None:
    """The same policy under two names: all of its draws are shared, and a difference of nothing has no noise. In a pool it has."""
    both = {"q": model("gpt2", 2), "r": model("gpt2", 2)}
    alone, joined = of(both, pool=False), of(both)
    assert alone["q"].reward == alone["r"].reward and alone["q"].reverse_kl == alone["r"].reverse_kl
    assert joined["q"].reward.value != joined["r"].reward.value  # the mutant: a pool of one set of draws twice


def test_a_difference_needs_no_log_z() -> None:
    both = {"q": model("gpt2", 2), "r": model("llama", 3)}
    wanted = [truth(model(kind, seed), model("llama", 1))["reverse_kl"] for kind, seed in (("gpt2", 2), ("llama", 3))]
    blind = of(both, reward_max=math.inf, samples=500)  # nothing certified
    assert blind["q"].status == "uncertified"
    found = blind.difference("q", "r")
    assert found.status == "certified" and found.low <= wanted[0] - wanted[1] <= found.high
    assert not found.low <= wanted[1] - wanted[0] <= found.high  # the mutant: b minus a
    assert blind.difference("r", "q").value == pytest.approx(-found.value)


def test_an_uncertified_figure_has_a_bracket_that_holds_the_truth() -> None:
    found = of({"q": model("gpt2", 2), "r": model("llama", 3)}, beta=0.02, samples=64, reward_max=1.3)
    for name, kind, seed in (("q", "gpt2", 2), ("r", "llama", 3)):
        assert found[name].status == "uncertified" and "draws would certify it" in found[name].reverse_kl.reason
        low, high = found[name].bracket
        rows = continuations(len(WORDS), T)
        texts = ["".join(WORDS[i] for i in row if i) for row in rows]
        r = torch.tensor(reward([""] * len(rows), texts), dtype=torch.float64)
        value = 0.0
        for prompt in PROMPTS:
            ids = tokenizer()(prompt)["input_ids"]
            lq, l0 = exact(model(kind, seed), ids, rows), exact(model("llama", 1), ids, rows)
            value += float((lq.exp() * (lq - l0 - r / 0.02)).sum() + (l0 + r / 0.02).logsumexp(0)) / len(PROMPTS)
        assert low <= value <= high
    assert of({"q": model("gpt2", 2)}, beta=0.02, samples=64, reward_max=math.inf)["q"].bracket[1] is None


class Speaker:
    """Draws and cannot say how likely they were."""

    name = "speaker"

    def __init__(self) -> None:
        self.model = klbench.policies.causal_lm.wrap("speaker", model("llama", 3), tokenizer())

    def sample(self, prompts, draws, max_new_tokens, seed):
        return self.model.sample(prompts, draws, max_new_tokens, seed)

    def decode(self, tokens, mask):
        return self.model.decode(tokens, mask)


def test_a_policy_without_a_density_gets_the_columns_that_need_none(tmp_path: Path) -> None:
    result = of({"mute": Speaker(), "q": model("gpt2", 2)})
    mute = result["mute"]
    value = truth(model("llama", 3), model("llama", 1))["reward"]
    assert mute.reward.low - 0.05 <= value <= mute.reward.high + 0.05 and mute.unique.value is not None
    for name in ("reverse_kl", "kl_prior", "entropy", "wasted_nats"):
        assert mute.columns[name].value is None and mute.columns[name].status == "uncertified" and mute.columns[name].reason
    assert mute.rank is None and result["q"].rank == (1, 1) and result.pool == ("q",)
    result.to_json(tmp_path / "out.json")


@pytest.mark.parametrize("precision, reached", [(0.2, True), (0.002, False)])
def test_draws_until_the_interval_is_narrow_or_the_budget_ends(precision: float, reached: bool) -> None:
    result = of({"q": model("gpt2", 2)}, samples=64, precision=precision, budget=2048)
    found = result["q"].reverse_kl
    assert (found.high - found.low <= precision) == reached
    assert ("reached" in result.stopped) == reached and ("budget of 2,048" in result.stopped) != reached
    first = of({"q": model("gpt2", 2)}, samples=64)["q"].reverse_kl
    assert found.n > first.n and found.high - found.low < first.high - first.low


def test_a_search_for_precision_draws_no_more_of_what_is_exact_or_mute() -> None:
    result = of({"q": model("gpt2", 2), "exact": "rejection", "mute": Speaker()}, samples=64, precision=0.3, budget=1024)
    assert result["exact"].reward.n == result["mute"].reward.n == 2 * 64 and "reached" in result.stopped


def test_a_sampler_that_would_need_a_million_prior_draws_is_refused_before_they_are_drawn() -> None:
    with pytest.raises(UserError, match="rejection accepted"):
        of({"exact": "rejection"}, beta=0.02, reward_max=1.2, samples=64)


def test_draws_of_a_longer_score_begin_with_those_of_the_shorter() -> None:
    """Extended, never redrawn: the sheet of 64 draws is the beginning of that of 128."""
    from klbench.bank import Reservoir
    from klbench.sheet import Sheet
    from klbench.task import GivenTask

    prior = klbench.policies.causal_lm.wrap("p0", model("llama", 1), tokenizer())
    task = GivenTask(tuple(PROMPTS), reward, 1.0, max_new_tokens=T)
    target = task.target(prior, BETA)
    reservoir = Reservoir(task, prior, target, T, 0)
    short = reservoir.upto(64)
    long = reservoir.upto(160)
    assert (long.tokens[:, :64] == short.tokens).all() and long.reward.shape[1] == 160
    sheet = Sheet(prior, target, PROMPTS, short, 64, T)
    sheet.add("p0", prior, 64, 5)
    before = sheet.rows("p0", "p0")
    sheet.draw("p0", 64)
    sheet.set_bank(long, 100)
    after, on_bank = sheet.rows("p0", "p0"), sheet.rows("p0", "")
    assert after.log_q.shape == (2, 128) and (after.log_q[:, :64] == before.log_q).all()
    assert on_bank.log_q.shape == (2, 100) and sheet.rest.shape == (2, 60)
    assert torch.tensor(on_bank.log_q).allclose(torch.tensor(long.log_p0[:, :100]), atol=1e-5)


def test_a_kept_bank_is_extended_and_shared(tmp_path: Path) -> None:
    first = of({"q": model("gpt2", 2)}, bank=tmp_path, samples=64)
    kept = sorted(tmp_path.glob("*.npz"))
    before = kept[0].read_bytes()
    again = of({"q": model("gpt2", 2)}, bank=tmp_path, samples=64, seed=7)
    assert [e.value for e in first.log_z] == [e.value for e in again.log_z] and kept[0].read_bytes() == before  # other seed, same bank
    of({"q": model("gpt2", 2)}, bank=tmp_path, samples=600)
    assert sorted(tmp_path.glob("*.npz")) == kept and kept[0].read_bytes() != before
    other = of({"q": model("gpt2", 2)}, bank=tmp_path, samples=64, reward=lambda prompts, completions, **kw: [0.0] * len(completions))
    assert all(e.value == 0.0 for e in other.log_z)  # the reward is asked again, not read from the file


def test_betting_gives_an_interval_at_any_reach() -> None:
    usual, bets = (of({"q": model("gpt2", 2)}, beta=0.02, samples=64, reward_max=1.3, interval=x) for x in ("jackknife", "betting"))
    assert usual["q"].status == "uncertified" and bets["q"].status == "wide" and "betting" in bets["q"].reverse_kl.reason
    assert usual["q"].reverse_kl.value == bets["q"].reverse_kl.value
    assert bets["q"].reverse_kl.high > bets["q"].reverse_kl.low
    for estimate in bets.log_z:
        assert estimate.low <= estimate.value <= estimate.high
    with pytest.raises(UserError, match="did you mean 'betting'"):
        of({"q": model("gpt2", 2)}, interval="beting")


def test_named_estimators_stand_beside_the_default() -> None:
    found = of({"q": model("gpt2", 2)}, measures=["kl_prior.k1", "kl-prior.k3"], samples=1000)["q"]
    value = truth(model("gpt2", 2), model("llama", 1))["kl_prior"]
    for name in ("kl_prior", "kl_prior.k1"):
        e = found.columns[name]
        assert abs(e.value - value) <= 1.5 * (e.high - e.low)
    assert found.columns["kl_prior.k1"].stderr >= found.kl_prior.stderr and "kl_prior.k3" in found.columns
    with pytest.raises(UserError, match="k3"):
        of({"q": model("gpt2", 2)}, measures=["kl_prior.k4"])


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
