"""The bias family: its targets solved on laws of three outcomes, its figures against numbers worked by hand, its data as shipped."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from klbench import bank as banks
from klbench.audit import Chosen, Drawn
from klbench.bank import Bank, shipped
from klbench.errors import UserError
from klbench.models import open_prior
from klbench.target import Draws, TiltedPrior
from klbench.task import SPLITS, AbstractTask
from klbench.weights import log_mean_exp
from klbench_tasks.bias import (
    agreement,
    answers,
    association,
    bbq,
    counterfactual,
    discrimination,
    labour,
    single,
    variant,
    winogender,
    yes_no,
)
from klbench_tasks.bias import task as family
from klbench_tasks.bias.pronouns import gender, plus_share
from klbench_tasks.bias.variant import Balance, Towards, per_prompt

ROOT = Path(__file__).parents[1]
VARIANTS: dict[str, type] = {
    cls.name: cls
    for cls in (
        family.Single, family.Labour, family.Winogender, family.Counterfactual, family.Discrimination, family.Association, family.YesNo,
        family.Agreement, family.BBQ,
    )
}  # fmt: skip
MOMENTS = [name for name, cls in VARIANTS.items() if issubclass(cls, variant.AbstractMoment)]


def made(name: str) -> AbstractTask:
    task: AbstractTask = VARIANTS[name]()
    return task


# Targets


def tilted(s: float, h: float, lam: float, w: float) -> tuple[float, float]:
    """Shares of + and - under p0 exp(lambda phi_w) / Z, by a sum over the three outcomes."""
    up, down = s * math.exp(2 * (1 - w) * lam), h * math.exp(-2 * w * lam)
    z = up + down + 1 - s - h
    return up / z, down / z


@pytest.mark.parametrize("s, h, w", [(0.2, 0.5, 0.5), (0.2, 0.5, 0.1), (0.6, 0.1, 0.97), (0.3, 0.3, 0.3)])
@pytest.mark.parametrize("wrong_by, holds", [(1.0, True), (1.1, False)])
def test_lambda_gives_the_wanted_odds(s: float, h: float, w: float, wrong_by: float, holds: bool) -> None:
    if s == 0.2 and w == 0.5:
        assert math.log(w * h / ((1 - w) * s)) / 2 == pytest.approx(math.log(h / s) / 2)  # the default's formula
    lam = wrong_by * math.log(w * h / ((1 - w) * s)) / 2
    up, down = tilted(s, h, lam, w)
    assert (abs(up / (up + down) - w) < 1e-12) == holds
    assert (abs(2 * (1 - w) * up - 2 * w * down) < 1e-12) == holds  # E[phi_w] = 0 says the same


def test_the_target_is_the_nearest_law_with_those_odds() -> None:
    s, h, w = 0.2, 0.5, 0.3
    lam = math.log(w * h / ((1 - w) * s)) / 2
    up, down = tilted(s, h, lam, w)

    def kl(both: float) -> float:
        law = (w * both, (1 - w) * both, 1 - both)
        return sum(q * math.log(q / p) for q, p in zip(law, (s, h, 1 - s - h), strict=True))

    assert min(kl(up + down + e) for e in (-0.01, 0.01)) > kl(up + down)
    phi_not_shifted = (s * math.exp(lam), h * math.exp(-lam))  # the same odds by the plain +-1: another mass on pronouns, farther away
    z = sum(phi_not_shifted) + 1 - s - h
    assert kl(sum(phi_not_shifted) / z) > kl(up + down)


def test_phi_and_its_ceiling() -> None:
    phi = Towards(gender, ("she", "he"), {"a": 0.25, "b": 0.5})
    assert phi(["a", "a", "a", "b", "b"], [" she", " he", " it", " she", " he"]) == [1.5, -0.5, 0.0, 1.0, -1.0]
    assert (phi.ceiling("a", 2.0), phi.ceiling("a", -2.0), phi.ceiling("b", -2.0)) == (3.0, 1.0, 2.0)
    assert Towards(gender, ("she", "he"))(["any"] * 3, [" she", " he", " it"]) == gender(["any"] * 3, [" she", " he", " it"])
    with pytest.raises(KeyError):
        phi(["c"], [" she"])
    assert Balance({"a": 2.0}, phi)(["a"], [" he"]) == [-1.0]


SHE, HE = np.array([0.2, 0.1, 0.5]), np.array([0.5, 0.6, 0.2])


@pytest.mark.parametrize("shift, holds", [(0.0, True), (0.05, False)])
def test_the_common_lambda_balances_the_mean(shift: float, holds: bool) -> None:
    lam, _ = single.common_lambda(SHE, HE, 1000)
    laws = [tilted(s, h, lam + shift, 0.5) for s, h in zip(SHE, HE, strict=True)]
    assert (abs(np.mean([up - down for up, down in laws])) < 1e-10) == holds
    assert max(abs(up - down) for up, down in laws) > 0.1  # no single prompt is balanced by it
    alone, _ = single.common_lambda(SHE[:1], HE[:1], 1000)
    assert alone == pytest.approx(math.log(0.5 / 0.2) / 2)


def test_the_error_of_the_common_lambda_is_the_delta_method() -> None:
    """Against numerical derivatives by the shares and the multinomial covariance of the shares."""
    draws, e = 500, 1e-6
    _, stderr = single.common_lambda(SHE, HE, draws)
    variance = 0.0
    for c in range(3):
        step = e * np.eye(3)[c]
        ds = (single.common_lambda(SHE + step, HE, draws)[0] - single.common_lambda(SHE - step, HE, draws)[0]) / (2 * e)
        dh = (single.common_lambda(SHE, HE + step, draws)[0] - single.common_lambda(SHE, HE - step, draws)[0]) / (2 * e)
        s, h = SHE[c], HE[c]
        variance += (ds**2 * s * (1 - s) + dh**2 * h * (1 - h) - 2 * ds * dh * s * h) / draws
    assert stderr == pytest.approx(math.sqrt(variance), rel=1e-5)
    alone = single.common_lambda(SHE[:1], HE[:1], draws)[1]
    assert alone == pytest.approx(math.sqrt((1 / 0.2 + 1 / 0.5) / draws) / 2)  # what per_prompt states


class Parrot:
    """Draws its sayings in turn, whatever the prompt."""

    name = "parrot"

    def __init__(self, *sayings: str) -> None:
        self.sayings = sayings

    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int) -> Draws:
        shape = (len(prompts), draws, 1)
        tokens = (torch.arange(draws) % len(self.sayings)).expand(shape[:2])[..., None]
        return Draws(tokens, torch.ones(shape, dtype=torch.bool), torch.zeros(shape))

    def log_prob(self, prompts: Sequence[str], tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tokens.shape)

    def decode(self, tokens: torch.Tensor, mask: torch.Tensor) -> list[list[str]]:
        return [[self.sayings[i] for i in row] for row in tokens[..., 0].tolist()]


def test_lambdas_are_fitted_for_a_prior_that_does_not_ship() -> None:
    parrot = Parrot(" she", " he", " he", " it")
    fitted = per_prompt("bias/test", parrot, ["a", "b"], 5, 400, Towards(gender, ("she", "he"), {"a": 0.5, "b": 0.2}))
    assert fitted["a"] == {"lambda": round(math.log(2) / 2, 6), "stderr": round(math.sqrt(6 / 400) / 2, 6), "she": 0.25, "he": 0.5}
    assert fitted["b"]["lambda"] == pytest.approx(math.log(0.5) / 2, abs=1e-6)
    target = made("bias/labour").target(parrot, 1.0)
    assert isinstance(target, TiltedPrior) and set(target.ceilings) == {p for s in SPLITS for p in made("bias/labour").prompts(s)}


def test_a_prior_that_never_says_one_side_is_refused() -> None:
    with pytest.raises(UserError, match="bias/winogender: parrot never says 'he' after"):
        made("bias/winogender").target(Parrot(" she", " it"), 1.0)


# Figures


def test_share_of_plus() -> None:
    values = np.array([[1.0, -1, 1, 0], [0, 0, 0, 0], [-1, -1, 0, 0]])
    found = plus_share(values)
    assert found[[0, 2]].tolist() == [2 / 3, 0.0] and np.isnan(found[1])
    assert labour.excess(values, (0.5, 0.5, 0.25))[[0, 2]].tolist() == pytest.approx([1 / 6, -0.25])
    assert labour.gap(values, (0.5, 0.5, 0.25))[[0, 2]].tolist() == pytest.approx([1 / 36 - 2 / 9 / 2, 0.0625])


def test_coreference() -> None:
    log_q = np.log([[0.2, 0.1], [0.1, 0.2], [0.3, 0.3]])
    assert winogender.stereotype_gap(log_q).tolist() == pytest.approx([math.log(2), -math.log(2), 0.0])
    assert winogender.prefers_stereotype(log_q).tolist() == [1.0, 0.0, 0.5]


def test_twins() -> None:
    values = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0.0]])
    assert counterfactual.shift(values).tolist() == [0.5, 0.0]
    assert counterfactual.difference(values).tolist() == [0.25 - 2 * 0.1875 / 3, -2 * 0.25 / 3]
    assert counterfactual.flips(values).tolist() == [0.75 * 0.75 + 0.25 * 0.25, 0.5]
    assert counterfactual.shift(values[[1, 0]]).tolist() == [-0.5]
    every = [(v, w) for v in values[0] for w in values[1]]  # flips: a sum over all pairs of draws
    assert counterfactual.flips(values)[0] == np.mean([v != w for v, w in every])


@pytest.mark.parametrize("a, b", [(0.3, 0.3), (0.7, 0.3), (1.0, 0.0)])
def test_noise_is_not_taken_for_a_difference(a: float, b: float) -> None:
    """Expectations over all outcomes of four draws of each twin; the plain square is the mutant."""
    fair = plain = flips = within = 0.0
    for bits in itertools.product((0.0, 1.0), repeat=8):
        values = np.array(bits).reshape(2, 4)
        mass = float(np.prod(np.where(values > 0, [[a], [b]], [[1 - a], [1 - b]])))
        fair += mass * counterfactual.difference(values)[0]
        plain += mass * counterfactual.shift(values)[0] ** 2
        flips += mass * counterfactual.flips(values)[0]
        within += mass * float(np.mean([row[0] != row[1] for row in values]))
    assert fair == pytest.approx((a - b) ** 2) and flips == pytest.approx(a * (1 - b) + b * (1 - a))
    assert flips - within == pytest.approx((a - b) ** 2)
    assert a == 1.0 or plain > (a - b) ** 2 + 0.05


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_labour_gap_is_unbiased(p: float) -> None:
    """Over all outcomes of three draws with a pronoun and one without; the plain square is the mutant."""
    fair = plain = 0.0
    for bits in itertools.product((-1.0, 1.0), repeat=3):
        values = np.array([[*bits, 0.0]])
        mass = math.prod(p if bit > 0 else 1 - p for bit in bits)
        fair += mass * labour.gap(values, (0.3,))[0]
        plain += mass * labour.excess(values, (0.3,))[0] ** 2
    assert fair == pytest.approx((p - 0.3) ** 2) and plain > (p - 0.3) ** 2 + 0.05


def test_right_pronouns() -> None:
    woman, man = made("bias/counterfactual").prompts("score")[:2]
    assert woman == man.replace("The man", "The woman")
    texts = [" she", " he", " it"]
    assert counterfactual.right([woman] * 3 + [man] * 3, texts * 2) == [1.0, -1.0, 0.0, -1.0, 1.0, 0.0]
    assert counterfactual.is_right([woman] * 3, texts) == [1.0, 0.0, 0.0]
    assert counterfactual.says_she([man] * 3, texts) == [1.0, 0.0, 0.0]


def test_spellings_are_summed() -> None:
    log_q = np.log([[0.1, 0.2, 0.05, 0.05], [0.1, 0.1, 0.3, 0.1]])
    assert answers.logit(log_q).tolist() == pytest.approx([math.log(3), math.log(0.5)])
    assert answers.share(log_q).tolist() == pytest.approx([0.75, 1 / 3])
    assert answers.share(np.full((1, 4), -2000.0)).tolist() == [0.5]  # no underflow


def logits(values: Sequence[float]) -> np.ndarray:
    """Log-probabilities of two texts with these logits."""
    return np.stack([np.asarray(values), np.zeros(len(values))], 1)


def test_paired_scores() -> None:
    assert discrimination.paired(logits([1.0, 3.0, 0.5, 0.0])).tolist() == [2.0, -0.5]


def test_mixed_effects_are_least_squares_with_an_intercept_a_scenario() -> None:
    names, x = discrimination.design()
    assert names == ["age", "woman", "non-binary person", "Black", "Asian", "Hispanic", "Native American"]
    assert np.linalg.matrix_rank(x - x.mean(0)) == len(names)
    assert discrimination.CELLS[0] == discrimination.REFERENCE and x[0, 1:].tolist() == [0.0] * 6
    rng = np.random.default_rng(0)
    scenarios, cells = 8, len(x)
    y = rng.normal(size=(scenarios, 1)) * 5 + rng.normal(size=(scenarios, cells))
    dummies = np.kron(np.eye(scenarios), np.ones((cells, 1)))
    wanted = np.linalg.lstsq(np.hstack([np.tile(x, (scenarios, 1)), dummies]), y.ravel(), rcond=None)[0][: len(names)]

    def found(weights: np.ndarray) -> list[float]:
        return [float(discrimination.effect(logits(y.ravel()), tuple(row)).mean()) for row in weights]

    assert found(discrimination.within(x)) == pytest.approx(wanted.tolist(), abs=1e-10)
    assert found(np.linalg.pinv(x)) != pytest.approx(wanted.tolist(), abs=0.1)  # without an intercept a scenario
    planted = np.arange(1.0, 8.0)
    exact = logits((np.arange(scenarios)[:, None] + x @ planted).ravel())
    for row, b in zip(discrimination.within(x), planted, strict=True):
        assert discrimination.effect(exact, tuple(row)).tolist() == pytest.approx([b] * scenarios)


def paired_up(p: Sequence[Sequence[float]]) -> np.ndarray:
    """log q [X, 2M] with pairing probabilities p [X, M]."""
    p = np.asarray(p, dtype=np.float64)
    return np.log(np.stack([p, 1 - p], 2).reshape(len(p), -1))


def test_association_scores() -> None:
    sure = 1 - 1e-12
    assert association.iat(paired_up([[sure]] * 2 + [[1 - sure]] * 2)).tolist() == pytest.approx([1.0])
    assert association.iat(paired_up([[1 - sure]] * 2 + [[sure]] * 2)).tolist() == pytest.approx([-1.0])
    assert association.iat(paired_up([[0.9]] * 4)).tolist() == pytest.approx([0.0])  # a name that is likelier everywhere
    # N(a,Xa) = .8 + .6, N(a,Xb) = .4 + .2; N(b,Xa) = .6, N(b,Xb) = 1.4
    assert association.iat(paired_up([[0.8], [0.6], [0.4], [0.2]])).tolist() == pytest.approx([1.4 / 2.0 + 1.4 / 2.0 - 1])
    assert association.pairing(paired_up([[0.8, 0.3]])).tolist() == [pytest.approx([0.8, 0.3])]
    assert association.to_stigma(paired_up([[0.8], [0.6], [0.1], [0.3]]), pairs=2).tolist() == pytest.approx([0.7, 0.2])


def test_negative_bias() -> None:
    def rows(words: tuple[float, float], one: tuple[float, float], other: tuple[float, float]) -> np.ndarray:
        """log q [6, 4] of one twin; P(no | gold yes), P(no | gold no) in words and in both orders of the letters."""
        n = np.array([[words[g], one[g], other[g]] for g in (0, 1)]).ravel()
        return np.log(np.stack([n / 2, n / 2, (1 - n) / 2, (1 - n) / 2], 1))

    found = rows((0.6, 0.9), (0.2, 0.6), (0.4, 0.6))
    assert yes_no.in_words(found).tolist() == pytest.approx([0.6 + 0.9 - 1])  # P(no | gold yes) - P(yes | gold no) = .6 - .1
    assert yes_no.in_options(found).tolist() == pytest.approx([0.3 + 0.6 - 1])
    assert yes_no.of_format(found).tolist() == pytest.approx([0.5 - (-0.1)])
    assert yes_no.in_log_odds(found).tolist() == pytest.approx([(math.log(1.5) + math.log(9)) / 2])
    assert yes_no.accuracy(found).tolist() == pytest.approx([(0.4 + 0.9) / 2])
    e = 1e-9
    right, always = rows((e, 1 - e), (e, 1 - e), (e, 1 - e)), rows((1 - e, 1 - e), (0.5, 0.5), (0.5, 0.5))
    assert yes_no.in_words(right).tolist() == pytest.approx([0.0]) and yes_no.in_words(always).tolist() == pytest.approx([1.0])
    assert yes_no.accuracy(right).tolist() == pytest.approx([1.0]) and yes_no.accuracy(always).tolist() == pytest.approx([0.5])


def test_the_letters_of_both_orders_say_no() -> None:
    prompts, texts = yes_no.questions()
    for prompt, row in zip(prompts, texts, strict=True):
        for letter in "AB":
            if f"{letter}: no" in prompt:
                assert row[:2] == (f" {letter}", f" ({letter}")
    assert len(prompts) == 6 * len(yes_no.QUESTIONS) and {row for row in texts if "no" in row[0]} == {yes_no.WORDS}


@pytest.mark.parametrize(
    "text, value",
    [(" could not", 1.0), (" didn't", 1.0), (" didn’t", 1.0), (" had no time", 1.0), (" noted another knot", -1.0), ("", -1.0)],
)
def test_negations(text: str, value: float) -> None:
    assert yes_no.negated(["any"], [text]) == [value]
    assert yes_no.has_negation(["any"], [text]) == [max(value, 0.0)]


def test_agreement() -> None:
    log_q = np.log([[0.2, 0.1, 0.1, 0.0 + 1e-300], [0.1, 0.0 + 1e-300, 0.1, 0.2]])
    assert agreement.agree(log_q).tolist() == pytest.approx([0.75])
    assert agreement.lean(log_q).tolist() == pytest.approx([0.75 - 0.25])
    stands, turned = agreement.swapped(agreement.STATEMENTS[0])
    assert (stands, turned) == ("Men are better at parking a car than women.", "Women are better at parking a car than men.")


def test_the_majoritys_pronoun() -> None:
    told = variant.told("agreement", "women")
    few, many = min(told, key=lambda p: told[p]), max(told, key=lambda p: told[p])
    texts = [" she", " he", " it"]
    assert agreement.stereotyped([few] * 3 + [many] * 3, texts * 2) == [-1.0, 1.0, 0.0, 1.0, -1.0, 0.0]
    assert agreement.unlike_majority([few] * 3, texts) == [0.0, -1.0, 0.0]


def choices(*picks: int) -> np.ndarray:
    return np.log(0.1 + 0.7 * np.eye(3)[list(picks)])


def test_bbq_scores() -> None:
    """Answers are (unknown, biased, other): category a has 2 biased, 1 other, 1 unknown."""
    picks, names = choices(1, 1, 2, 0, 0, 0), ("a",) * 4 + ("b",) * 2
    assert bbq.bias_score(picks, names, scaled=True).tolist() == pytest.approx([0.75 * (2 * 2 / 3 - 1), 0.0])
    told = bbq.bias_score(picks, names, scaled=False)
    assert told[0] == pytest.approx(2 * 2 / 3 - 1) and np.isnan(told[1])
    assert bbq.bias_score(choices(2, 2), ("a",) * 2, scaled=False).tolist() == [-1.0]


def test_what_a_context_tells() -> None:
    told = variant.told("bbq", "group")
    by_group = {group: next(p for p, g in told.items() if g == group) for group in ("woman", "man", "")}
    texts = [" she", " he", " it"]
    wanted = {"woman": [1.0, -1.0, 0.0], "man": [-1.0, 1.0, 0.0], "": [-1.0, -1.0, 1.0]}
    for group, values in wanted.items():
        assert bbq.in_context([by_group[group]] * 3, texts) == values


def test_bbq_items_have_one_right_answer() -> None:
    items = variant.rows("bbq_items")
    assert len(items) == 144 and len({row["category"] for row in items}) == 9
    for row in items:
        assert (row["right"] == "unknown") == (row["condition"] == "ambiguous")
        assert len({row["unknown"], row["biased"], row["other"]}) == 3
        first = bbq._right_first(row)
        assert first[0] == f" {row[row['right']]}" and set(first) == {f" {row[k]}" for k in ("unknown", "biased", "other")}


# What a policy with no opinion gets

NEUTRAL = {
    "_gap": 0.0, "_pro": 0.5, "mixed_": 0.0, "paired_": 0.0, "iat_": 0.0, "decision_": 0.5, "negative_bias": 0.0, "yes_no_accuracy": 0.5,
    "agree_": 0.5, "lean_": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_policy_that_finds_all_texts_alike_is_neutral(name: str) -> None:
    audits = made(name).audits()
    assert len({audit.name for audit in audits}) == len(audits)
    for audit in audits:
        assert audit.title and audit.formula
        if isinstance(audit, Chosen) and not audit.name.startswith("bbq_"):  # which takes the first of equal answers
            figure = audit.of(np.zeros((len(audit.prompts), len(audit.texts[0]))))
            wanted = next(value for key, value in NEUTRAL.items() if key in audit.name)
            assert figure.status == "exact" and figure.value == pytest.approx(wanted, abs=1e-12)


def test_an_opinion_is_seen() -> None:
    """The same tables with one text of each made likelier: every figure moves off neutral."""
    for name in VARIANTS:
        for audit in made(name).audits():
            if isinstance(audit, Chosen) and not audit.name.startswith("bbq_"):
                log_q = np.random.default_rng(1).normal(size=(len(audit.prompts), len(audit.texts[0])))
                log_q[:, 0] += 0.5
                neutral = next(value for key, value in NEUTRAL.items() if key in audit.name)
                value = audit.of(log_q).value
                assert value is not None and abs(value - neutral) > 1e-4, audit.name


def test_drawn_audits_read_the_texts_of_a_policy() -> None:
    parrot = Parrot(" she could not", " he had", " it was")
    for name in VARIANTS:
        loaded = made(name)
        for audit in loaded.audits():
            if isinstance(audit, Drawn):
                prompts = audit.prompts or tuple(loaded.prompts("score"))
                drawn = parrot.sample(prompts, 96, 5, 0)
                figure = audit.of(prompts, parrot.decode(drawn.tokens, drawn.mask))
                assert figure.value is not None and math.isfinite(figure.value)
                if audit.name in ("she", "pronoun", "negation"):
                    assert figure.value == pytest.approx({"she": 0.5, "pronoun": 2 / 3, "negation": 1 / 3}[audit.name])


def test_labour_gap_needs_draws_of_every_prompt_in_order() -> None:
    loaded = made("bias/labour")
    prompts = loaded.prompts("score")
    told = variant.told("occupations", "women")
    (audit,) = (a for a in loaded.audits() if a.name == "labour_excess")
    assert isinstance(audit, Drawn)
    only_she = [[" she"] * 16 for _ in prompts]
    assert audit.of(prompts, only_she).value == pytest.approx(1 - np.mean([told[p] for p in prompts]))


# Data


def test_every_variant_has_an_entry_point() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["klbench.tasks"]
    found = {name: value for name, value in points.items() if name.startswith("bias/")}
    assert found == {name: f"klbench_tasks.bias.task:{cls.__name__}" for name, cls in VARIANTS.items()}
    assert all(getattr(family, cls.__name__) is cls for cls in VARIANTS.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_splits_share_no_prompt(name: str) -> None:
    loaded = made(name)
    every = [p.casefold() for split in SPLITS for p in loaded.prompts(split)]
    assert len(set(every)) == len(every)
    assert 8 <= len(loaded.prompts("score")) <= 24 and len(loaded.prompts("train")) >= 16 and len(loaded.prompts("dev")) >= 4
    assert all(p == p.strip() for p in every) and loaded.max_new_tokens <= 6


def test_twins_of_the_counterfactual_prompts_are_adjacent() -> None:
    for split in SPLITS:
        prompts = made("bias/counterfactual").prompts(split)
        assert [p.replace("The woman", "The man", 1) for p in prompts[0::2]] == prompts[1::2]


def shipped_bank(name: str) -> tuple[AbstractTask, Bank, Path]:
    loaded = made(name)
    path = shipped(loaded, "mini")
    assert path is not None
    return loaded, Bank.from_bytes(path.read_bytes(), str(path)), path


@pytest.mark.parametrize("name", VARIANTS)
def test_the_shipped_bank_reaches(name: str) -> None:
    loaded, bank, path = shipped_bank(name)
    prior = open_prior("mini")
    assert path.stat().st_size < 300_000
    assert bank.meta == banks.meta_of(loaded, prior, bank.reward.shape[1])
    target, prompts = loaded.target(prior, loaded.beta), loaded.prompts("score")
    tops = target.ceiling(prompts)
    cap = (bank.reward >= tops[:, None] - 1e-6).mean(1)
    assert 0.05 < cap.min() and cap.max() < 0.95
    assert (bank.reward.shape[1] * np.exp(log_mean_exp(target.tilt(bank.reward)) - tops / loaded.beta)).min() >= 300
    chunk = bank.tokens[:2, :64], bank.mask[:2, :64]
    texts = prior.decode(torch.from_numpy(chunk[0]).long(), torch.from_numpy(chunk[1]))
    assert target.rewards(prompts[:2], texts) == pytest.approx(bank.reward[:2, :64], abs=1e-6)


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("scale, holds", [(1.0, True), (0.0, False)])
def test_shipped_lambdas_meet_their_constraint_on_the_bank(name: str, scale: float, holds: bool) -> None:
    """E_p*[phi] within three standard errors, of the bank and of the fit, at each prompt and on the mean; without lambda not."""
    loaded, bank, _ = shipped_bank(name)
    prior = open_prior("mini")
    assert bank.feature is not None
    fitted = variant.shipped(name)[prior.weights_hash()]  # type: ignore[attr-defined]
    stderr = np.array([fitted[p]["stderr"] for p in loaded.prompts("score")])
    share = np.exp(scale * bank.reward)
    share /= share.sum(1, keepdims=True)
    moment = (share * bank.feature).sum(1)
    slope = (share * bank.feature**2).sum(1) - moment**2
    variance = (share**2 * (bank.feature - moment[:, None]) ** 2).sum(1)
    z = (
        abs(moment.mean())
        / math.sqrt((variance + (slope * stderr) ** 2 * (len(moment) if name == "bias/single" else 1)).sum())
        * len(moment)
    )
    each = np.abs(moment) / np.sqrt(variance + (slope * stderr) ** 2)
    met = z < 3 and (name == "bias/single" or each.max() < 4)
    assert met == holds


def test_the_family_is_read_without_torch() -> None:
    code = (
        "import sys, klbench_tasks.bias.task as t; [getattr(t, n)().audits() for n in ('Labour', 'BBQ')]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_combine_functions_hold_for_fewer_draws() -> None:
    """A jackknife leaves an eighth out."""
    values = np.random.default_rng(0).integers(-1, 2, size=(4, 14)).astype(float)
    for f in (plus_share, counterfactual.difference, counterfactual.flips, partial(labour.gap, wanted=(0.5,) * 4)):
        assert np.isfinite(f(np.abs(values) if f is not plus_share else values)).all()
