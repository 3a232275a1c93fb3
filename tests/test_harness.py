"""lm-eval both ways: exported tasks load and give klbench's own figures; a policy's lm-eval figures become columns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from klbench import models, suite, task
from klbench import run as grid
from klbench.audit import Chosen
from klbench.cli import main
from klbench.errors import UserError
from klbench.harness import kept
from klbench.harness.earned import earned
from klbench.harness.tasks import DRAWS, by_harness_name, export, harness_name
from klbench.policies.causal_lm import CausalLM
from klbench.record import Record, Run, Score, Train
from klbench.score import cell, hashes

ELEMENTS = "klbench_factuality_elements"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every installed task, exported."""
    made = tmp_path_factory.mktemp("tasks") / "moved"
    export(made.with_name("first"), task.names())
    made.with_name("first").rename(made)  # it may lie anywhere
    return made


@pytest.fixture(scope="module")
def mini() -> CausalLM:
    prior = models.open_prior("mini")
    assert isinstance(prior, CausalLM)
    return prior


def test_every_installed_task_exports_and_loads(folder: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(folder)], include_defaults=False)
    assert sorted(manager.all_tasks) == sorted(map(harness_name, task.names()))
    with kept._quiet():
        loaded = manager.load(list(manager.all_tasks))["tasks"]
    for name, theirs in loaded.items():
        ours = task.load(by_harness_name()[name])
        documents = list(theirs.eval_docs)
        assert documents == [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()] != []
        metadata = theirs.config.metadata
        assert (metadata["klbench_task"], metadata["version"]) == (ours.name, ours.version) and "Apache-2.0" in metadata["licence"]
        assert theirs.doc_to_text(documents[0]) == documents[0]["prompt"]
        if theirs.OUTPUT_TYPE == "generate_until":
            assert [d["prompt"] for d in documents] == [p for p in ours.prompts("score") for _ in range(DRAWS)]
            assert theirs.config.generation_kwargs["max_gen_toks"] == ours.max_new_tokens
            assert (theirs.config.generation_kwargs["temperature"], theirs.config.generation_kwargs["do_sample"]) == (1.0, True)
        else:
            assert theirs.OUTPUT_TYPE == "multiple_choice" and theirs.doc_to_target(documents[-1]) == 0


def test_a_multiple_choice_needs_no_klbench(folder: Path) -> None:
    for path in folder.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert ("klbench.harness" in text) == ("generate_until" in text)
    assert "import klbench" not in (folder / "klbench_rows.py").read_text()


def test_its_accuracy_is_klbenchs(mini: CausalLM) -> None:
    audit = task.load("factuality/elements").audits()[0]
    assert isinstance(audit, Chosen)
    ours = audit.measure(mini, mini)
    theirs = kept.kept(mini, [ELEMENTS])[f"lm_eval.{ELEMENTS}.acc"]
    assert theirs.value == ours.value and theirs.n == len(audit.prompts) == 118
    assert theirs.stderr is not None and theirs.low == pytest.approx(theirs.value - 1.96 * theirs.stderr)
    assert theirs.reason == "lm-eval's stderr" and theirs.status == "certified" and theirs.population == (theirs.low, theirs.high)
    last_is_right = Chosen(name="x", title="", formula="", prompts=audit.prompts, texts=tuple(row[::-1] for row in audit.texts))
    assert last_is_right.measure(mini, mini).value != ours.value  # the mutant


def test_a_reward_of_lm_evals_draws_is_that_of_ours(mini: CausalLM) -> None:
    prompt = task.load("bias").prompts("score")[0]
    target = task.load("bias").target(mini, 1.0)
    rewards = [earned({"klbench_task": "bias", "prompt": prompt}, [text])["reward"] for text in (" she ran", " he ran", " it ran")]
    assert (
        rewards == list(target.rewards([prompt], [[" she ran", " he ran", " it ran"]])[0]) and rewards[0] == -rewards[1] != rewards[2] == 0
    )
    name = "klbench_factuality"
    figure = kept.kept(mini, [name], limit=160)[f"lm_eval.{name}.reward"]
    prompts = task.load("factuality").prompts("score")[: 160 // DRAWS]
    drawn = mini.sample(prompts, 256, 6, 0)
    expected = float(task.load("factuality").target(mini, 1.0).rewards(prompts, mini.decode(drawn.tokens, drawn.mask)).mean())
    assert figure.n == 160 and figure.value is not None and figure.stderr is not None
    assert abs(figure.value - expected) < 4 * figure.stderr


def test_results_become_columns() -> None:
    results = {
        "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25, "acc_norm_stderr,none": "N/A"},
        "b": {"exact_match,strict": 1.0, "exact_match_stderr,strict": 0.0, "sample_len": 3},
    }
    found = kept.columns(results, {"a": {"original": 9, "effective": 4}})
    assert set(found) == {"lm_eval.a.acc", "lm_eval.a.acc_norm", "lm_eval.b.exact_match.strict"}
    first = found["lm_eval.a.acc"]
    assert (first.value, first.stderr, first.n, first.status) == (0.5, 0.1, 4, "certified") and first.low == pytest.approx(0.304)
    assert found["lm_eval.a.acc_norm"].low is None and found["lm_eval.a.acc_norm"].status == "uncertified"


def test_lm_eval_is_silent_and_leaves_the_policy_as_it_was(mini: CausalLM, capfd: pytest.CaptureFixture[str]) -> None:
    before = mini.weights_hash(), mini.tokenizer.padding_side, dict(mini.tokenizer.special_tokens_map)
    kept.kept(mini, [ELEMENTS], limit=2)
    assert capfd.readouterr() == ("", "")
    assert (mini.weights_hash(), mini.tokenizer.padding_side, dict(mini.tokenizer.special_tokens_map)) == before


def test_an_unknown_task_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(UserError, match="klbench_factuality_elments.*did you mean 'klbench_factuality_elements'"):
        grid.resolve(given(lm_eval=["klbench_factuality_elments"]))


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known_by_name() -> None:
    assert kept.rests_on(["arc_easy"]) != kept.rests_on([ELEMENTS])
    with pytest.raises(UserError, match="'arc_esy'.*did you mean 'arc_easy'"):
        kept.rests_on(["arc_esy"])


def test_a_decoded_policy_is_not_what_lm_eval_would_read() -> None:
    cold = models.open_policy("cold", "temperature:0.7", models.open_prior("mini"))
    assert isinstance(cold, CausalLM)
    with pytest.raises(UserError, match="the model alone"):
        kept.kept(cold, [ELEMENTS])


def given(**changes: object) -> suite.Suite:
    """A suite of one trained policy, the prior and a sampler."""
    data = {
        "name": "small", "tasks": {"factuality/elements": None}, "objectives": ["rloo"], "samplers": ["best_of_n:2"],
        "train": {"steps": 1, "prompts": 2, "samples": 2}, "score": {"draws": 16, "bank": 16, "prompts": 2}, "lm_eval_limit": 6, **changes,
    }  # fmt: skip
    data["tasks"] = {name: suite.TaskEntry() for name in data["tasks"]}  # type: ignore[attr-defined]
    return suite.Suite.model_validate(data)


def test_a_suite_names_lm_eval_tasks_and_old_ids_stand() -> None:
    asked = given(lm_eval=[ELEMENTS]).score_of("factuality/elements")
    assert asked.lm_eval == (ELEMENTS,) and asked.lm_eval_limit == 6
    assert "lm_eval" not in Score().model_dump() and "lm_eval_limit" not in Score().model_dump()
    plain = grid.resolve(given(lm_eval_limit=None))
    assert all("lm_eval" not in run.hashes for run in plain)
    assert {run.id for run in grid.resolve(given(lm_eval=[ELEMENTS]))}.isdisjoint(run.id for run in plain)


def test_a_trained_policy_and_the_prior_have_the_columns_and_samplers_have_not(tmp_path: Path, mini: CausalLM) -> None:
    loaded, name = task.load("factuality/elements"), f"lm_eval.{ELEMENTS}.acc"
    score = Score(draws=16, bank=16, prompts=2, lm_eval=(ELEMENTS,), lm_eval_limit=6)
    found = {}
    for method, kind in (("rloo", "objective"), ("ancestral", "sampler"), ("best_of_n:2", "sampler")):
        run = Run(
            task=loaded.name, task_version=1, method=method, kind=kind, prior="mini", beta=0.33, max_new_tokens=6, score=score,
            train=Train(steps=1, prompts=2, samples=2) if kind == "objective" else None, hashes=hashes(loaded, "mini", 0.33, score),
        )  # fmt: skip
        cell(run, tmp_path, lambda event: None)
        found[method] = Record.read(tmp_path / "records" / f"{run.id}.json").columns
    assert name in found["rloo"] and name in found["ancestral"] and name not in found["best_of_n:2"]
    assert found["ancestral"][name] == kept.kept(mini, [ELEMENTS], 6)[name] and found["ancestral"][name].n == 6


def test_the_command_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "export", str(tmp_path / "out"), "--task", "factuality/elements", "--task", "bias"]) == 0
    written = capsys.readouterr().out.split()
    assert written == [str(tmp_path / "out" / f"{name}.yaml") for name in (ELEMENTS, "klbench_bias")]
    text = Path(written[0]).read_text(encoding="utf-8")
    assert text.startswith("# symbols of elements") and yaml.safe_load(text.replace("!function", ""))["task"] == ELEMENTS


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "export", str(tmp_path / "out"), "--task", "factuality/elemnts"]) == 2
    assert "factuality/elements" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert main(["tasks", "export", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.slow
def test_lm_evals_own_command_gives_klbenchs_accuracy(tmp_path: Path, folder: Path, mini: CausalLM) -> None:
    audit = task.load("factuality/elements").audits()[0]
    assert isinstance(audit, Chosen)
    words = ["run", "--model", "hf", "--model_args", f"pretrained={models.prior_path('mini')}", "--include_path", str(folder)]
    command = [sys.executable, "-m", "lm_eval", *words, "--tasks", ELEMENTS, "--device", "cpu", "--output_path", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = tmp_path.rglob("results_*.json")
    assert json.loads(result.read_text())["results"][ELEMENTS]["acc,none"] == audit.measure(mini, mini).value
