"""The combined task: three rewards that stay three, one target with stated weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from klbench import task
from klbench.audit import Drawn
from klbench.bank import Bank, shipped
from klbench.models import open_prior
from klbench.weights import log_mean_exp
from klbench_tasks.combined.task import BETAS, REWARDS, Of, weighted

FAMILIES = ("toxicity", "bias", "factuality")


def answered() -> list[dict[str, str]]:
    path = Path(__file__).parents[1] / "tasks" / "factuality" / "score.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt_of(family: str) -> str:
    return next(p for p in task.load("combined").prompts("score") if p in task.load(family).prompts("score"))


def test_the_tilt_is_the_sum_of_the_weighted_rewards() -> None:
    asking = prompt_of("factuality")
    texts = [" it was fine.", " she was fine.", " you stupid idiot"]
    parts = {name: np.array(reward(prompts=[asking] * 3, completions=texts)) for name, reward in REWARDS.items()}
    assert list(parts["bias"]) == [1.0, 0.0, 1.0] and list(parts["factuality"]) == [0.0] * 3
    assert weighted([asking] * 3, texts) == pytest.approx(list(parts["toxicity"] / 1.0 + parts["bias"] / 0.5 + parts["factuality"] / 0.5))
    assert weighted([asking] * 3, texts) != pytest.approx(list(sum(parts.values())))  # the mutant: weights of one
    target = task.load("combined").target(open_prior("mini"), 1.0)
    tilt = target.tilt(target.rewards([asking], [texts]))
    assert tilt[0, 0] - tilt[0, 1] == pytest.approx(1 / BETAS["bias"] + parts["toxicity"][0] - parts["toxicity"][1])


def test_the_weights_are_said_to_the_reader() -> None:
    assert BETAS == {"toxicity": 1.0, "bias": 0.5, "factuality": 0.5} and "1, 1/2, 1/2" in task.load("combined").summary


def test_a_right_answer_counts_where_something_is_asked() -> None:
    asking, other = prompt_of("factuality"), prompt_of("bias")
    target = task.load("combined").target(open_prior("mini"), 1.0)
    assert list(target.ceiling([asking, other])) == [6.0, 4.0]
    answer = next(row["answer"] for row in answered() if row["prompt"] == asking)
    assert REWARDS["factuality"](prompts=[asking, other], completions=[f" {answer}.", f" {answer}."]) == [1.0, 0.0]


def test_prompts_are_those_of_the_three_families_in_the_same_split() -> None:
    loaded = task.load("combined")
    for split in task.SPLITS:
        prompts = loaded.prompts(split)
        counts = [len(set(prompts) & set(task.load(family).prompts(split))) for family in FAMILIES]
        assert sum(counts) == len(prompts) == len(set(prompts)) and len(set(counts)) == 1 and counts[0] > 0


def test_the_audits_are_the_rewards_on_the_same_draws() -> None:
    loaded = task.load("combined")
    prompts = loaded.prompts("score")
    texts = [[" it was fine."] * 8 + [" she was late."] * 8 for _ in prompts]
    figures = {audit.name: audit.of(prompts, texts) for audit in loaded.audits() if isinstance(audit, Drawn)}
    assert set(figures) == {"reward_toxicity", "reward_bias", "reward_factuality"}
    assert figures["reward_bias"].value == 0.5 and figures["reward_factuality"].value == 0.0
    assert "of 24 clusters" in figures["reward_factuality"].reason
    assert all(not audit.prompts for audit in loaded.audits() if isinstance(audit, Drawn))  # the score split's draws, no others


def test_a_mean_over_the_marked_prompts_holds_for_the_first_of_them_too() -> None:
    values = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert np.array_equal(Of((True, False, True))(values), [0.5, np.nan, 0.0], equal_nan=True)
    assert np.array_equal(Of((True, False, True))(values[:2]), [0.5, np.nan], equal_nan=True)


def test_the_bank_reaches() -> None:
    loaded = task.load("combined")
    path = shipped(loaded, "mini")
    assert path is not None and path.stat().st_size < 400_000
    bank = Bank.from_bytes(path.read_bytes(), str(path))
    top = loaded.target(open_prior("mini"), 1.0).ceiling(loaded.prompts("score"))
    assert (bank.reward >= top[:, None] - 1e-6).mean(1).min() >= 0.05
    assert (bank.reward.shape[1] * np.exp(log_mean_exp(bank.reward) - top)).min() >= 300
