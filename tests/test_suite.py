"""Suites: settings in their order, unknown words answered with the nearest known one, nothing but UserErrors for bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klbench import suite
from klbench.errors import UserError
from klbench.record import Score, Train
from klbench.suite import Suite

TEXT = """
name: small
tasks: {bias: {beta: 2.0, train: {steps: 7, lr: 0.5}, score: {bank: 64}}, toxicity: {}}
objectives: [rloo, sft]
train: {steps: 5, prompts: 3}
score: {draws: 32}
methods: {rloo: {lr: 0.25, tasks: {bias: {samples: 6}}}}
"""
Load = Callable[..., Suite]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def made(text: str | bytes = TEXT, *settings: str) -> Suite:
        path = tmp_path / "s.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return suite.load(str(path), settings)

    return made


def test_the_method_has_the_last_word_then_the_task_then_the_suite(load: Load) -> None:
    found = load()
    assert found.train_of("bias", "rloo") == Train(steps=7, prompts=3, lr=0.25, samples=6)
    assert found.train_of("bias", "sft") == Train(steps=7, prompts=3, lr=0.5)
    assert found.train_of("toxicity", "rloo") == Train(steps=5, prompts=3, lr=0.25)
    assert found.train_of("toxicity", "sft") == Train(steps=5, prompts=3)
    assert found.score_of("bias") == Score(draws=32, bank=64) and found.score_of("toxicity") == Score(draws=32)
    assert found.tasks["bias"].beta == 2.0 and found.tasks["toxicity"].beta is None and found.seeds == [0]


def test_settings_reach_their_key(load: Load) -> None:
    found = load(TEXT, "train.steps=9", "tasks.toxicity.train.lr=0.125", "methods.sft.samples=4", "seeds=[1, 2]", "score.bank=16")
    assert found.train_of("toxicity", "sft") == Train(steps=9, prompts=3, lr=0.125, samples=4)
    assert found.train_of("bias", "sft").steps == 9 and found.train_of("bias", "sft").lr == 0.5  # above the task's steps, and its lr stands
    assert found.seeds == [1, 2] and found.score_of("toxicity").bank == 16


def test_pooled_policies_have_draws_of_their_own(load: Load) -> None:
    assert load(TEXT, "score.common=true", "pool=0").score_of("bias").common
    with pytest.raises(UserError, match="pooled need draws of their own"):
        load(TEXT, "score.common=true", "pool=2").score_of("bias")


def test_beta_is_set_for_every_task_and_keeps_what_else_they_hold(load: Load) -> None:
    found = load(TEXT, "beta=0.1")
    assert {name: entry.beta for name, entry in found.tasks.items()} == {"bias": 0.1, "toxicity": 0.1}
    assert found.tasks["bias"].train == {"steps": 7, "lr": 0.5}
    assert load(TEXT, "beta=0.1", "tasks.bias.beta=3").tasks["bias"].beta == 3.0


@pytest.mark.parametrize(
    "setting, says",
    [
        ("train.stesp=3", "no setting 'train.stesp'; did you mean 'train.steps'?"),
        ("score.darws=32", "did you mean 'score.draws'?"),
        ("objectivs=[sft]", "did you mean 'objectives'?"),
        ("tasks.bias.bta=1", "did you mean 'tasks.bias.beta'?"),
        ("tasks.bias.train.lrr=1", "did you mean 'lr'?"),
        ("tasks.bias.score.darws=1", "did you mean 'draws'?"),
        ("methods.rloo.stesp=1", "did you mean 'steps'?"),
        ("methods.rloo.tasks.bais.steps=1", "did you mean 'bias'?"),
        ("methods.rloo.tasks=5", "train settings by task expected"),
        ("methods.rloo.tasks.bias=5", "train settings by task expected"),
        ("train.steps=-3", "train.steps"),
        ("train.steps=many", "train.steps"),
        ("train.lr.x=3", "train.lr"),
        ("name.x=3", "name holds no keys"),
        ("beta=-1", "tasks.bias.beta"),
        ("beta=.inf", "tasks.bias.beta"),
        ("seeds=3", "seeds"),
        ("train", "key=value expected"),
        ("name=[", "not YAML"),
        ("name=2001-13-45", "not YAML"),
    ],
)
def test_bad_settings(load: Load, setting: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        load(TEXT, setting)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("first", ["tasks=[bias]", "tasks=5", "tasks.bias=5"])
def test_beta_of_tasks_that_are_none(load: Load, first: str) -> None:
    with pytest.raises(UserError, match="the tasks hold no keys"):
        load(TEXT, first, "beta=1")


@pytest.mark.parametrize(
    "text, says",
    [
        ("- a", "a mapping expected"),
        ("", "a mapping expected"),
        ("a: [", "not YAML"),
        ("name: 2001-13-45", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"name: caf\xe9", "name"),
        ("name: a\nobjectives: [sft]", "tasks: Field required"),
        (TEXT.replace("toxicity: {}", "toxicity: "), "tasks.toxicity"),
        (TEXT.replace("objectives", "objectvies"), "did you mean 'objectives'?"),
        (TEXT.replace("prompts: 3", "promts: 3"), "did you mean 'train.prompts'?"),
        (TEXT.replace("bank: 64", "bnak: 64"), "did you mean 'bank'?"),
        (TEXT.replace("name: small", "name: Über"), "name"),
        (TEXT + "3: 4", "Keys should be strings"),
    ],
)
def test_bad_files(load: Load, text: str | bytes, says: str) -> None:
    with pytest.raises(UserError) as error:
        load(text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_suite_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no suite 'quikc'; did you mean 'quick'?"):
        suite.load("quikc")
    with pytest.raises(UserError, match="no suite file at .*none.yaml"):
        suite.load(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="no suite file"):
        suite.load(f"{tmp_path}/")


@pytest.mark.parametrize("name", suite.names())
def test_shipped_suites_load_and_carry_their_name(name: str) -> None:
    found = suite.load(name)
    assert found.name == name and found.summary and found.objectives
    assert suite.load(name.replace("_", "-")) == found


def test_merging_leaves_the_model_alone() -> None:
    before = Train(steps=3)
    after = suite.merged(before, "here", {"steps": 4, "lr": 1.0}, {"lr": 2.0})
    assert (before, after) == (Train(steps=3), Train(steps=4, lr=2.0))


def test_apply_changes_plain_data_in_place() -> None:
    data: dict[str, Any] = {"tasks": {"bias": None}}
    suite.apply(data, "train.steps=3")
    suite.apply(data, "beta=0.5")
    assert data == {"tasks": {"bias": {"beta": 0.5}}, "train": {"steps": 3}}


def test_what_is_set_on_the_command_line_is_the_last_word() -> None:
    """quick has steps of its own by task and rates by method; an explicit setting stands above both, and above no other key."""
    plain, chosen = suite.load("quick"), suite.load("quick", ["train.steps=7", "train.lr=0.5", "score.draws=32"])
    assert len({plain.train_of(t, o).steps for t in plain.tasks for o in plain.objectives}) > 1
    for task in chosen.tasks:
        assert chosen.score_of(task).draws == 32 and chosen.score_of(task).bank == plain.score_of(task).bank
        for objective in chosen.objectives:
            own = chosen.train_of(task, objective)
            assert (own.steps, own.lr) == (7, 0.5) and own.samples == plain.train_of(task, objective).samples
    later = suite.load("quick", ["train.steps=7", "tasks.bias.train.steps=9"])
    assert later.train_of("bias", "rloo").steps == 9 and later.train_of("factuality", "rloo").steps == 7


@pytest.mark.parametrize(
    "wrong, says", [("tasks=5", "tasks"), ("methods.rloo=5", "methods"), ("methods.rloo.tasks=5", "train settings by task")]
)
def test_a_setting_behind_a_wrong_one_still_says_what_is_wrong(load: Load, wrong: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(TEXT, wrong, "train.steps=3")
