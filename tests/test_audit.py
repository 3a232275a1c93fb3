"""Audits: figures by hand, exact probabilities, what is shared, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from test_train import Letters
from tiny import model, tokenizer

from klbench import measure, method
from klbench.audit import AbstractAudit, Chosen, Drawn, by_prompt
from klbench.bank import draw
from klbench.errors import UserError
from klbench.policies.causal_lm import CausalLM, wrap
from klbench.score import audited
from klbench.sheet import Sheet
from klbench.target import Policy, Reward, TiltedPrior
from klbench.task import AbstractTask


def letters(prompts, completions, **kwargs):
    return [float(len(c)) for c in completions]


def drawn(**fields) -> Drawn:
    return Drawn(**{"name": "x", "title": "x", "formula": "x", "value": letters} | fields)


@pytest.fixture
def prior() -> CausalLM:
    return wrap("tiny", model("llama", 4), tokenizer())


def test_a_mean_of_draws_by_hand():
    texts = [["a" * (i % 2) for i in range(16)], ["a" * 3] * 16]
    figure = drawn().of(["p", "q"], texts)
    assert figure.value == pytest.approx((0.5 + 3.0) / 2) and figure.n == 32
    assert figure.low < 1.75 < figure.high and figure.population[0] < figure.low


def test_a_gap_between_groups_is_one_cluster_a_pair():
    texts = [["aa"] * 16, ["a"] * 16, ["aaa"] * 16, ["a"] * 16]
    gap = drawn(combine=lambda values: values.mean(1)[0::2] - values.mean(1)[1::2])
    assert gap.of(list("pqrs"), texts).value == pytest.approx(1.5)
    assert drawn().of(list("pqrs"), texts).value != pytest.approx(1.5)  # the mutant: no combination


def test_clusters_without_a_draw_that_counts_are_left_out_and_said():
    half = drawn(combine=lambda values: np.where(values.mean(1) > 0, values.mean(1), np.nan))
    figure = half.of(["p", "q"], [["a"] * 16, [""] * 16])
    assert figure.value == 1.0 and figure.reason.startswith("1 of 2 clusters")
    assert half.of(["p"], [[""] * 16]).value is None


def test_probabilities_of_texts_are_exact(prior):
    chosen = Chosen(name="y", title="y", formula="y", prompts=("a", "b c"), texts=((" a", " b"), (" c", " b")))
    log_q = chosen.log_q(prior, prior)
    for p, row in zip(chosen.prompts, zip(chosen.texts, log_q, strict=True), strict=True):
        for text, found in zip(*row, strict=True):
            assert found == pytest.approx(float(prior.log_prob([p], *prior.spelled([p], [[text]])).double().sum()), abs=1e-6)
    figure = chosen.measure(prior, prior)
    assert figure.status == "exact" and figure.low == figure.high == figure.value == np.mean(log_q.argmax(1) == 0)
    assert figure.population is not None
    with pytest.raises(ValueError, match="as many texts of each prompt"):
        Chosen(name="y", title="y", formula="y", prompts=("a", "b"), texts=((" a",), (" a", " b")))


def test_a_figure_that_may_be_negative_keeps_its_sign():
    figure = drawn(combine=lambda values: -values.mean(1)).of(["p"], [["aa"] * 16])
    assert measure.bounded("audit.x", figure).value == -2.0
    assert measure.bounded("kl_prior", figure).value == 0.0


@dataclass(frozen=True)
class Audited(AbstractTask):
    name: ClassVar[str] = "audited"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "letters, with audits"
    max_new_tokens: ClassVar[int] = 3
    beta: ClassVar[float] = 0.5

    def prompts(self, split: str) -> list[str]:
        return Letters().prompts(split)

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return Letters().target(prior, beta)

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return None

    def audits(self) -> tuple[AbstractAudit, ...]:
        own = ("a", "b")
        texts = ((" a", " b"),) * 2
        return (
            drawn(name="length"),
            drawn(name="own", prompts=own),
            drawn(name="own_again", prompts=own, combine=by_prompt),
            Chosen(name="first", title="", formula="", prompts=own, texts=texts),
            Chosen(name="second", title="", formula="", prompts=own, texts=texts, combine=lambda log_q: 1.0 - (log_q.argmax(1) == 0)),
        )


class Counting:
    """A policy that counts what it is asked."""

    def __init__(self, of: CausalLM):
        self.of, self.name, self.sampled, self.asked = of, "counting", 0, 0

    def sample(self, *given):
        self.sampled += 1
        return self.of.sample(*given)

    def log_prob(self, *given):
        self.asked += 1
        return self.of.log_prob(*given)

    def decode(self, *given):
        return self.of.decode(*given)


def sheet_of(prior, policy) -> Sheet:
    task = Audited()
    target, prompts = task.target(prior, 0.5), task.prompts("score")
    sheet = Sheet(prior, target, prompts, draw(task, prior, target, 256), 64, task.max_new_tokens)
    sheet.add("q", policy, 64, 1)
    return sheet


def test_audits_of_one_question_ask_once(prior):
    policy = Counting(prior)
    sheet = sheet_of(prior, policy)
    before = policy.sampled
    found = audited(sheet, "q", Audited())
    assert policy.sampled == before + 1 and policy.asked == 1
    assert found["audit.own"] == found["audit.own_again"] and found["audit.first"].value == 1.0 - found["audit.second"].value
    assert found["audit.length"].value == pytest.approx(np.mean([len(t) for row in sheet.laws["q"].texts for t in row]))


def test_the_prior_s_own_row_is_audited_and_other_samplers_say_why_not(prior):
    ancestral = audited(sheet_of(prior, method.sampler("ancestral")), "q", Audited())
    assert ancestral["audit.own"].value is not None and ancestral["audit.first"].status == "exact"
    best = audited(sheet_of(prior, method.sampler("best_of_n:2")), "q", Audited())
    assert best["audit.own"].value is None and "this task's own prompts" in best["audit.own"].reason
    assert best["audit.first"].value is None and best["audit.length"].value is not None


def test_a_value_that_is_no_number_is_named():
    with pytest.raises(UserError, match="not a finite number"):
        drawn(value=lambda prompts, completions, **kwargs: [float("nan")] * len(completions)).of(["p"], [["a"] * 16])
