"""exact/design: feasibility and motifs by hand, its optimum over every output, and the figures that its README states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp

from klbench import exact, task
from klbench.policies.causal_lm import CausalLM, load
from klbench.priors import prior_path
from klbench_tasks.exact import design
from klbench_tasks.exact.task import WARMTH

README = Path(__file__).parents[1] / "tasks" / "exact" / "README.md"
BEST = "rain sun warm wind"


@pytest.fixture(scope="module")
def prior() -> CausalLM:
    return load(prior_path("tiny"), "tiny")


@pytest.fixture(scope="module")
def every(prior: CausalLM) -> exact.Outcomes:
    loaded = task.load("exact/design")
    return exact.Outcomes.of(prior, loaded.target(prior, loaded.beta), loaded.prompts("score"), loaded.max_new_tokens)


@pytest.mark.parametrize(
    "text, feasible, reward",
    [
        (BEST, 1, 1),
        ("sun rain wind warm", 0, 0),  # both motifs whole, and rain after sun
        ("rain sun warm calm", 1, 0.5),
        ("rain sun fog wind", 1, 0.5),
        ("rain sun fog fog", 1, 0.25),
        ("rain sun calm", 1, 0),  # of three words the second stands at no place of a motif
        ("rain cold warm", 1, 0),  # one motif whole, the other not begun
        ("sun warm wind", 1, 0),
        ("rain sun", 1, 0),  # too short for any place
        ("", 1, 0),
        ("cold sun warm wind", 0, 0),
        ("rain cold warm wind", 1, 0.5),
        ("rain rain sun warm", 1, 0),  # one motif whole at the second place
        ("sun wind rain warm", 1, 0.25),  # neighbours are no motif: half of each, sun . rain and wind . warm
    ],
)
def test_by_hand(text: str, feasible: float, reward: float) -> None:
    assert design.feasible([""], [text]) == [feasible] and design.design([""], [text]) == [reward]


def test_words_are_the_prior_s_and_every_word_bans_another() -> None:
    assert set(design.BANNED) == set(WARMTH) == set(design.BANNED) | {b for some in design.BANNED.values() for b in some}
    assert sum(map(len, design.BANNED.values())) == 9  # as the README counts


def test_one_output_is_best_and_its_twin_is_infeasible(prior: CausalLM, every: exact.Outcomes) -> None:
    texts = prior.decode(every.tokens[None], every.mask[None])[0]
    row = every.reward[0]
    assert [t for t, r in zip(texts, row, strict=True) if r == 1] == [BEST] and set(row) == {0, 0.25, 0.5, 1}
    both = [t for t in texts if all(design.share(t.split(), m) == 1 for m in design.MOTIFS)]
    assert sorted(both) == [BEST, "sun rain wind warm"]  # without the constraint, the mutant, there would be two


def test_the_target_is_more_feasible_than_the_prior_but_not_wholly(prior: CausalLM, every: exact.Outcomes) -> None:
    loaded = task.load("exact/design")
    gold = loaded.gold()
    assert gold is design.feasible
    log_p = every.log_p0 + every.reward / loaded.beta
    p = np.exp(log_p - logsumexp(log_p, axis=1)[:, None])
    of_prior, of_target = (float((q * every.values(gold)).sum(1).mean()) for q in (np.exp(every.log_p0), p))
    assert of_prior == pytest.approx(0.634, abs=5e-4) and "63 % of the prior is feasible" in README.read_text(encoding="utf-8")
    assert of_prior + 0.1 < of_target < 0.8
    truth = exact.truths(prior, loaded, prior, loaded.target(prior, loaded.beta), loaded.prompts("score"), 4)
    assert truth["gold"] == pytest.approx(of_prior)


def test_the_table_of_base_rates_is_exact(prior: CausalLM, every: exact.Outcomes) -> None:
    rows = [line.split("|") for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    said = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in rows}
    at, beta = said["on `tiny`, six score prompts"].index("design"), task.load("exact/design").beta
    p0, log_z = np.exp(every.log_p0), logsumexp(every.log_p0 + every.reward / beta, axis=1)
    cap = (p0 * (every.reward == 1)).sum(1)
    assert float(said["suggested β"][at]) == beta
    assert float(said["log Z"][at]) == pytest.approx(log_z.mean(), abs=2e-4)
    assert float(said["prior's mean reward"][at]) == pytest.approx((p0 * every.reward).sum(1).mean(), rel=1e-3)
    assert said["prior's mass at the cap, mean and least over prompts"][at] == f"{cap.mean():.2g}, {cap.min():.2g}"
