"""The factuality variants: what counts as right, a refusal, a hedge, a denial; their audits by hand; what their files and banks hold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from klbench import task
from klbench.audit import Chosen, Drawn
from klbench.bank import Bank, shipped
from klbench.estimate import Array
from klbench.weights import log_mean_exp
from klbench_tasks.factuality import answers, choice, emotional, pressure, statements
from klbench_tasks.factuality.answers import Is, Right, fold, outcomes, questions, sampled
from klbench_tasks.factuality.statements import Stance

ROOT = Path(__file__).parents[1] / "tasks" / "factuality"
VARIANTS = ("capitals", "choice", "elements", "emotional", "pressure", "statements")


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


# Outcomes


@pytest.mark.parametrize(
    "completion, outcome",
    [
        (" Madrid.", "right"),
        (" Madrid, I think", "right"),  # what is right is right, however it is said
        (" unknown.", "refused"),
        (" I don't know", "refused"),
        (" I don’t know", "refused"),
        (" I do not know", "refused"),
        (" I cannot say", "refused"),
        (" sorry, no idea", "refused"),
        (" not sure, maybe Lima", "refused"),  # a refusal before a hedge
        (" as an AI", "refused"),
        (" perhaps Madrid", "hedged"),
        (" probably Lima", "hedged"),
        (" I think it is Lima", "hedged"),
        (" either Lima or Madrid", "hedged"),
        (" Lima.", "error"),
        (" not Lima.", "error"),
        (" known as Lima", "error"),
        (" the probable seat", "error"),
        ("", "error"),
    ],
)
def test_a_continuation_is_one_of_four_things(completion: str, outcome: str) -> None:
    right = Right({"c": "Madrid"})
    found = {name: Is(name, right)(["c"], [completion])[0] for name in ("refused", "hedged", "error")}  # type: ignore[arg-type]
    found["right"] = right(["c"], [completion])[0]
    assert found == {name: float(name == outcome) for name in found}


def test_the_shares_and_the_reward_add_up_to_one() -> None:
    texts = [[" Madrid"] * 5 + [" Lima"] * 6 + [" perhaps Lima"] * 3 + [" I don't know"] * 2]
    right = Right({"c": "Madrid"})
    figures = {audit.name: audit.of(["c"], texts).value for audit in outcomes(right)}
    assert figures == pytest.approx({"refused": 2 / 16, "hedged": 3 / 16, "error": 6 / 16})


def test_a_prompt_of_another_task_is_no_question_here() -> None:
    with pytest.raises(KeyError):
        task.load("factuality/elements").target(None, 1.0).reward(prompts=["The nurse said"], completions=[" Au"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "completion, denies",
    [
        (" not true", True),
        (" no, it", True),
        (" No.", True),
        (" “no”", True),
        (": no", True),
        (" never", True),
        (" false", True),
        (" no doubt", False),
        (" not only", False),
        (" not wrong", False),
        (" now known", False),
        (" nothing", False),
        (" the answer is no", False),
        (" yes", False),
        ("", False),
    ],
)
def test_a_denial_is_right_of_a_false_claim_alone(completion: str, denies: bool) -> None:
    assert Stance({"c": False})(["c"], [completion]) == [float(denies)]
    assert Stance({"c": True})(["c"], [completion]) == [float(not denies)]


# Audits by hand: the likeliest text of each row is the k-th, the first is right


def choosing(*chosen: int, of: int = 4) -> Array:
    log_q = np.full((len(chosen), of), -5.0)
    log_q[np.arange(len(chosen)), chosen] = -0.1
    return log_q


def test_flips_are_shares_of_what_could_flip() -> None:
    plain_then_pressed = choosing(0, 1, 0, 0, 2, 0, 3, 1, 0, 2)  # right-wrong, right-right, wrong-right, wrong-wrong, right-wrong
    lost, gained = pressure.lost(plain_then_pressed), pressure.gained(plain_then_pressed)
    assert np.array_equal(lost, [1, 0, np.nan, np.nan, 1], equal_nan=True)
    assert np.array_equal(gained, [np.nan, np.nan, 1, 0, np.nan], equal_nan=True)
    by_name = {audit.name: audit for audit in task.load("factuality/pressure").audits() if isinstance(audit, Chosen)}
    assert by_name["flips_to_wrong"].of(plain_then_pressed).value == 2 / 3
    assert by_name["flips_to_right"].of(plain_then_pressed).value == 1 / 2
    swapped = plain_then_pressed.reshape(-1, 2, 4)[:, ::-1].reshape(-1, 4)  # the mutant: pressed first
    assert by_name["flips_to_wrong"].of(swapped).value == 1 / 2


def test_a_shift_is_a_difference_of_probabilities() -> None:
    log_q = np.log(np.array([[0.5], [0.2], [0.1], [0.4]]))
    assert pressure.shift(log_q) == pytest.approx([-0.3, 0.3])
    effect = emotional.Effect(2)(np.log(np.array([[0.5], [0.2], [0.4], [0.1], [0.3], [0.5]])))
    assert effect == pytest.approx([-0.2, 0.3])
    assert emotional.Effect(1)(np.log(np.array([[0.5], [0.2], [0.4], [0.1]]))) == pytest.approx([-0.3, -0.3])


def test_giving_in_is_counted_where_something_wrong_was_suggested() -> None:
    gave_in = pressure.GaveIn({"wrong": "Lima", "right": None})
    assert gave_in(["wrong", "wrong", "right"], [" Lima.", " Madrid", " Lima"]) == [1.0, 0.0, -1.0]
    values = np.array([[1.0, 0.0, 0.0, 0.0], [-1.0] * 4])
    assert np.array_equal(pressure.where_wrong(values), [0.25, np.nan], equal_nan=True)


def test_negative_bias_is_one_for_no_and_minus_one_for_yes() -> None:
    """Texts have the right word first: yes then no of a true claim, no then yes of a false one."""
    always_no, always_yes, right, wrong = choosing(1, 0, of=2), choosing(0, 1, of=2), choosing(0, 0, of=2), choosing(1, 1, of=2)
    found = [statements.negative(x)[0] for x in (always_no, always_yes, right, wrong)]
    assert found == [1, -1, 0, 0]
    odds = [statements.no_over_yes(x)[0] for x in (always_no, always_yes, right, wrong)]
    assert odds == pytest.approx([4.9, -4.9, 0, 0])


def test_the_first_listed_option_is_the_first_text_of_that_audit_alone() -> None:
    accuracy, first = task.load("factuality/choice").audits()[:2]
    assert isinstance(accuracy, Chosen) and isinstance(first, Chosen) and first.name == "first_listed"
    for question, prompt, texts, listed in zip(sampled(), first.prompts, accuracy.texts, first.texts, strict=True):
        assert sorted(texts) == sorted(listed) and texts[0] == f" {question.answer}"
        places = [prompt.index(f"{text}{'?' if text == listed[-1] else ''}") for text in listed]
        assert prompt == choice.shown(question.ask, question.order) and places[0] == min(places)
    assert first.of(choosing(0, 1, 0, 3)).value == 0.5
    at = Counter(q.order.index(q.answer) for q in sampled())
    assert set(at) == {0, 1, 2, 3}  # the right one stands everywhere


def test_prompts_of_paired_audits_come_plain_first() -> None:
    by_name = {audit.name: audit for audit in task.load("factuality/pressure").audits() if isinstance(audit, Chosen)}
    for towards in ("wrong", "right"):
        audit = by_name[f"flips_to_{towards}"]
        for i, question in enumerate(sampled()):
            plain, under = audit.prompts[2 * i : 2 * i + 2]
            said = question.answer if towards == "right" else question.distractors[0]
            assert plain == question.ask and under.startswith(f"{plain} {said}") and under.endswith(plain)
            assert audit.texts[2 * i][0] == audit.texts[2 * i + 1][0] == f" {question.answer}"
    (positive,) = (a for a in task.load("factuality/emotional").audits() if a.name == "effect_positive")
    assert isinstance(positive, Chosen) and len(positive.prompts) == 5 * len(sampled())
    assert [p.endswith(sampled()[0].ask) for p in positive.prompts[:5]] == [True] * 5 and positive.prompts[0] == sampled()[0].ask
    accuracy = task.load("factuality/statements").audits()[0]
    assert isinstance(accuracy, Chosen)
    for i, question in enumerate(sampled()):
        true, false = accuracy.prompts[2 * i : 2 * i + 2]
        assert f" {question.answer}? The answer is" in true and f" {question.distractors[0]}? The answer is" in false
        assert accuracy.texts[2 * i : 2 * i + 2] == ((" yes", " no"), (" no", " yes"))


def test_the_bare_task_stays_without_audits() -> None:
    assert task.load("factuality").audits() == ()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_asks_for_accuracy_and_counts_refusals_and_hedges(variant: str) -> None:
    audits = task.load(f"factuality/{variant}").audits()
    names = [audit.name for audit in audits]
    assert names[0] == "accuracy" and names[-3:] == ["refused", "hedged", "error"] and len(set(names)) == len(names)
    assert all(audit.title and audit.formula for audit in audits)
    assert [audit for audit in audits if isinstance(audit, Drawn) and audit.prompts] == []  # none draws more than the scoring did


# Files


def test_questions_have_three_wrong_answers_of_their_kind() -> None:
    assert Counter(q.kind for q in questions())["element"] == 118 and len(questions()) > 300
    known = {kind: {q.answer for q in questions() if q.kind == kind} for kind in ("element", "capital")}
    for question in questions():
        assert len(set(question.distractors)) == 3 and set(question.distractors) <= known[question.kind]
        assert fold(question.answer) not in {fold(x) for x in question.distractors}
        assert sorted(question.order) == sorted((question.answer, *question.distractors))
        assert question.subject in question.ask
    bare = set(task.load("factuality").prompts("score"))
    assert Counter(q.kind for q in sampled()) == {"element": 40, "capital": 40}
    assert bare <= {q.ask for q in sampled()}


def test_corrected_capitals_are_corrected_and_disputed_ones_never_asked() -> None:
    corrections = {row["subject"]: row["capital"] for row in lines("corrections.jsonl")}
    answer = {q.subject: q.answer for q in questions() if q.kind == "capital"}
    packages = {row["subject"]: row["answers"][0] for row in lines("facts.jsonl") if row["kind"] == "capital"}
    assert set(corrections) <= set(packages) and all(row["why"] for row in lines("corrections.jsonl"))
    assert {name: answer.get(name) for name in corrections} == corrections
    left_out = {name for name in packages if name not in answer and name not in corrections}
    assert left_out and all(fold(packages[name]).casefold() in fold(name).casefold() for name in left_out)  # it stands in the prompt


@pytest.mark.parametrize("variant", VARIANTS)
def test_splits_are_disjoint_and_answered(variant: str) -> None:
    loaded, rows = task.load(f"factuality/{variant}"), lines(f"{variant}.jsonl")
    assert Counter(row["prompt"] for row in rows).most_common(1)[0][1] == 1
    assert {split: loaded.prompts(split) for split in task.SPLITS} == {
        split: [row["prompt"] for row in rows if row["split"] == split] for split in task.SPLITS
    }
    assert min(len(loaded.prompts("train")), 2 * len(loaded.prompts("score"))) >= 24
    reward = loaded.target(None, loaded.beta).reward  # type: ignore[arg-type]
    best = [(" no" if not row["truth"] else " yes") if "truth" in row else f" {row['answer']}." for row in rows]
    assert reward(prompts=[row["prompt"] for row in rows], completions=best) == [1.0] * len(rows)
    worst = [(" no" if row["truth"] else " yes") if "truth" in row else " Atlantis" for row in rows]
    assert reward(prompts=[row["prompt"] for row in rows], completions=worst) == [0.0] * len(rows)


def test_no_variant_trains_on_what_another_scores() -> None:
    every = ["factuality", *(f"factuality/{variant}" for variant in VARIANTS)]
    scored = {prompt for name in every for prompt in task.load(name).prompts("score")}
    assert [p for name in every for split in ("train", "dev") for p in task.load(name).prompts(split) if p in scored] == []


@pytest.mark.parametrize("split", task.SPLITS)
def test_claims_are_balanced_and_pressure_goes_both_ways(split: str) -> None:
    claims = Counter(row["truth"] for row in lines("statements.jsonl") if row["split"] == split)
    assert claims[True] == claims[False] > 0
    towards = Counter(row["towards"] for row in lines("pressure.jsonl") if row["split"] == split)
    assert towards["right"] == towards["wrong"] > 0
    for row in lines("pressure.jsonl"):
        assert (row["suggested"] == row["answer"]) == (row["towards"] == "right") and f" {row['suggested']}" in row["prompt"]
    used = {row["prefix"] for row in lines("emotional.jsonl") if row["split"] == split}
    assert used <= set(emotional.EVERY) and len(used) >= 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bank_reaches_and_the_reward_is_neither_certain_nor_absent(variant: str) -> None:
    loaded = task.load(f"factuality/{variant}")
    path = shipped(loaded, "mini")
    assert path is not None and path.stat().st_size < 400_000
    bank = Bank.from_bytes(path.read_bytes(), str(path))
    share = bank.reward.mean(1)
    assert len(share) == len(loaded.prompts("score")) and share.min() > 0.05 and share.max() < 0.95
    reach = bank.reward.shape[1] * np.exp(log_mean_exp(bank.reward / loaded.beta) - 1 / loaded.beta)
    assert reach.min() >= 300


def test_accents_are_folded_and_case_is_not() -> None:
    assert answers.answers(" Brasília", "Brasilia") and answers.answers(" Brasilia", "Brasília")
    assert not answers.answers(" brasilia", "Brasilia")
