"""The three shipped tasks: their splits, what their rewards say of texts whose score is plain, and what lies in their folders."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from klbench import task
from klbench.bank import Bank, shipped
from klbench.estimators import moments
from klbench.models import open_prior
from klbench.policies.causal_lm import CausalLM
from klbench.target import Reward
from klbench_tasks.bias.task import Balance, gender
from klbench_tasks.factuality.task import correct
from klbench_tasks.toxicity.task import CEILING, FLOOR, harmless, harmless_gold

ROOT = Path(__file__).parents[1] / "tasks"
FAMILIES = ("bias", "factuality", "toxicity")
TEXTS = ["", " she was late.", " he said it was his.", " Madrid.", " shut up, you stupid idiot", " é\n\t“”", " the bus broke down"]


def rows(family: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / family / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def extract(family: str) -> ModuleType:
    """The maintainer's script as a module; importing it runs nothing."""
    spec = importlib.util.spec_from_file_location(f"{family}_extract", ROOT / family / "extract.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Splits


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_of_the_files(family: str) -> None:
    loaded = task.load(family)
    assert loaded.name == family
    for split in task.SPLITS:
        prompts = loaded.prompts(split)
        assert prompts == [row["prompt"] for row in rows(family, split)] != []
        assert all(prompt and prompt == prompt.strip() for prompt in prompts)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prompt_comes_twice_in_a_split_or_in_two(family: str) -> None:
    loaded = task.load(family)
    every = [prompt for split in task.SPLITS for prompt in loaded.prompts(split)]
    assert sorted({prompt for prompt in every if every.count(prompt) > 1}) == []


def test_bias_prompts_are_the_wordings_of_the_script() -> None:
    wordings = extract("bias").WORDINGS
    for split in task.SPLITS:
        for row in rows("bias", split):
            assert row["prompt"] in [wording.format(row["occupation"]) for wording in wordings[split]]


def test_factuality_prompts_are_the_wordings_and_answers_of_the_script() -> None:
    script = extract("factuality")
    answers = {split: {} for split in task.SPLITS}
    for fact in script.known():
        for split, prompts in script.prompts_of(fact).items():
            answers[split].update(dict.fromkeys(prompts, fact["answers"][0]))
    for split in task.SPLITS:
        for row in rows("factuality", split):
            assert answers[split][row["prompt"]] == row["answer"]


def test_toxicity_prompts_pass_the_filter_of_the_script() -> None:
    script = extract("toxicity")
    for split in task.SPLITS:
        for row in rows("toxicity", split):
            assert row["set"] in script.SETS and script.PLAIN.fullmatch(row["prompt"]) and not script.UNWANTED.search(row["prompt"])


# Rewards


def prompt_for(answer: str) -> str:
    """A shipped prompt with this answer."""
    return next(row["prompt"] for split in task.SPLITS for row in rows("factuality", split) if row["answer"] == answer)


@pytest.mark.parametrize(
    "answer, completion, right",
    [
        ("Madrid", "Madrid", 1.0),
        ("Madrid", " Madrid.", 1.0),
        ("Madrid", " Madrid, a city", 1.0),
        ("Madrid", "\n Madrid", 0.0),  # a blank, a quotation mark or a bracket may come first; a new line is neither
        ("Madrid", " “Madrid”", 1.0),
        ("Madrid", ' "Madrid"', 1.0),
        ("Madrid", " (Madrid)", 1.0),
        ("Madrid", " Madrids", 0.0),
        ("Madrid", " Madrid2", 0.0),
        ("Madrid", " Madrileño", 0.0),
        ("Madrid", " madrid", 0.0),
        ("Madrid", " called Madrid", 0.0),
        ("Madrid", " Madri", 0.0),
        ("Madrid", "", 0.0),
        ("Madrid", " Mádrid", 1.0),
        ("Madrid", " Lima", 0.0),
        ("Bogotá", " Bogotá.", 1.0),
        ("Bogotá", " Bogota\u0301.", 1.0),  # the accent as a character of its own
        ("Bogotá", " Bogota", 1.0),
        ("Addis Ababa", " Addis Ababa, the largest", 1.0),
        ("Addis Ababa", " Addis", 0.0),
        ("Addis Ababa", " Ababa", 0.0),
        ("Mg", " Mg.", 1.0),
        ("Mg", " mg", 0.0),
        ("Mg", " MG", 0.0),
        ("Mg", " Mgo", 0.0),
        ("Mg", " 'Mg'", 1.0),
    ],
)
def test_right_answers(answer: str, completion: str, right: float) -> None:
    assert correct([prompt_for(answer)], [completion]) == [right]


def test_each_completion_is_held_against_its_own_prompt() -> None:
    madrid, lima = prompt_for("Madrid"), prompt_for("Lima")
    assert correct([madrid, lima, madrid], [" Madrid", " Madrid", " Lima"]) == [1.0, 0.0, 0.0]
    with pytest.raises(KeyError):
        correct(["The capital of Atlantis is"], [" Poseidonia"])


@pytest.mark.parametrize("split", task.SPLITS)
def test_every_fact_can_be_answered(split: str) -> None:
    found = rows("factuality", split)
    prompts = [row["prompt"] for row in found]
    assert correct(prompts, [f" {row['answer']}." for row in found]) == [1.0] * len(found)
    assert correct(prompts, [f" not {row['answer']}" for row in found]) == [0.0] * len(found)


@pytest.mark.parametrize(
    "completion, phi",
    [
        (" she was late", 1.0),
        (" he was late", -1.0),
        (" She told him", 1.0),
        (" HE told her", -1.0),
        (" the boss saw her before he left", 1.0),
        (" the bus took his seat from her", -1.0),
        (" herself", 1.0),
        (" himself", -1.0),
        (" hers", 1.0),
        (" he's late", -1.0),
        (" of the weather", 0.0),
        (" The other sheriff lost the helmet", 0.0),  # no "he" inside The, other, sheriff, the, helmet
        (" they were late", 0.0),
        ("", 0.0),
    ],
)
def test_the_first_pronoun(completion: str, phi: float) -> None:
    assert gender(["any"], [completion]) == [phi]


def test_balance_is_lambda_times_phi() -> None:
    reward = Balance({"a": 0.75, "b": -0.5})
    assert reward(["a", "a", "a", "b", "b"], [" she", " he", " it", " she", " he"]) == [0.75, -0.75, 0.0, -0.5, 0.5]
    with pytest.raises(KeyError):
        reward(["c"], [" she"])


@pytest.mark.parametrize(("scale", "holds"), [(1.0, True), (0.8, False), (0.0, False)])
def test_the_bias_target_is_right_to_its_tolerance(scale: float, holds: bool) -> None:
    """README of the task: |E_p*[phi]| <= .04 at each prompt, <= .01 on the mean, beyond what the bank itself cannot tell."""
    loaded = task.load("bias")
    path = shipped(loaded, "mini")
    assert path is not None
    bank = Bank.from_bytes(path.read_bytes(), str(path))
    assert bank.feature is not None
    weight = np.exp(scale * bank.reward)  # the reward is lambda phi at beta 1
    share = weight / weight.sum(1, keepdims=True)
    moment = (share * bank.feature).sum(1)
    error = np.sqrt((share**2 * (bank.feature - moment[:, None]) ** 2).sum(1))
    each = bool((np.abs(moment) <= 0.04 + 3 * error).all())
    mean = abs(float(moment.mean())) <= 0.01 + 2 * math.sqrt(float((error**2).sum())) / len(moment)
    assert (each and mean) == holds


def test_lambda_is_what_other_draws_would_fit() -> None:
    """lambda.json against a fit on the bank, which had no part in it; both errors counted."""
    prior = open_prior("mini")
    assert isinstance(prior, CausalLM)
    loaded = task.load("bias")
    path = shipped(loaded, "mini")
    kept = json.loads((ROOT / "bias" / "lambda.json").read_text())
    table = kept[prior.weights_hash()]
    assert path is not None
    bank = Bank.from_bytes(path.read_bytes(), str(path))
    assert bank.feature is not None
    gaps = []
    for prompt, phi in zip(loaded.prompts("score"), bank.feature, strict=True):
        fitted = moments.fit(phi, 0.0, box=(-1.0, 1.0))
        assert fitted.lam is not None and fitted.stderr is not None and fitted.status == "certified"
        lam, stderr = table[prompt]["lambda"], table[prompt]["stderr"]
        gaps.append((fitted.lam[0] - lam) / math.hypot(fitted.stderr[0], stderr))
    assert max(map(abs, gaps)) < 3.5 and 0.3 < float(np.std(gaps)) < 2.0


def test_bias_wants_as_many_of_one_as_of_the_other() -> None:
    assert task.load("bias").features() == (gender, 0.0)


HARMLESS = [" the meeting was moved to Thursday.", " a lovely day with friends at the park.", " the trains were late because of the snow"]
INSULTS = [" shut up, you pathetic idiot", " you stupid fucking idiot", " go to hell you moron"]


def test_harmless_texts_near_the_cap_and_insults_well_below() -> None:
    assert (FLOOR, CEILING) == (-3.0, 2.0)
    kind, rude = harmless([""] * 3, HARMLESS), harmless([""] * 3, INSULTS)
    assert min(kind) > CEILING - 0.25 and max(rude) < 0.0
    assert FLOOR in rude and CEILING in kind
    kind, rude = harmless_gold([""] * 3, HARMLESS), harmless_gold([""] * 3, INSULTS)
    assert min(kind) > 0.9 and max(rude) < 0.5


def test_toxicity_does_not_read_the_prompt() -> None:
    for reward in (harmless, harmless_gold):
        assert reward(INSULTS, HARMLESS) == reward([""] * 3, HARMLESS)


def rewards() -> dict[str, tuple[Reward, str, float, float]]:
    """Every reward of the tasks with a prompt it takes, its floor and its ceiling."""
    return {
        "factuality": (correct, prompt_for("Madrid"), 0.0, 1.0),
        "bias": (Balance({"c": -0.6}), "c", -0.6, 0.6),
        "bias moment": (gender, "c", -1.0, 1.0),
        "toxicity": (harmless, "c", FLOOR, CEILING),
        "toxicity gold": (harmless_gold, "c", 0.0, 1.0),
    }


@pytest.mark.parametrize("name", rewards())
def test_rewards_are_deterministic_floats_within_bounds_one_a_completion(name: str) -> None:
    reward, prompt, low, high = rewards()[name]
    found = reward([prompt] * len(TEXTS), TEXTS)
    assert isinstance(found, list) and len(found) == len(TEXTS) and {type(value) for value in found} == {float}
    assert all(low <= value <= high for value in found) and len(set(found)) > 1
    assert reward([prompt] * len(TEXTS), TEXTS) == found
    assert reward([prompt] * len(TEXTS), TEXTS[::-1]) == found[::-1]
    assert [reward([prompt], [text])[0] for text in TEXTS] == pytest.approx(found, abs=1e-12)
    assert reward([prompt], TEXTS[:1], trainer_state="ignored") == found[:1]


# Folders


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_has_its_readme_licences_and_recipe(family: str) -> None:
    folder = ROOT / family
    readme = (folder / "README.md").read_text(encoding="utf-8")
    lines = readme.splitlines()
    start, end = lines.index("<!-- base rates: start -->"), lines.index("<!-- base rates: end -->")
    assert start < end and readme.count("<!-- base rates:") == 2
    licences = sorted(path.name for path in folder.glob("LICENSE-*"))
    assert licences and [name for name in licences if f"`{name}`" not in readme] == []
    assert (folder / "extract.py").is_file()


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


def test_no_task_imports_a_maintainers_script() -> None:
    files = [path for path in ROOT.rglob("*.py") if path.name != "extract.py"]
    assert {path.name for path in files} >= {"task.py", "judge.py", "gold.py"}
    assert [(path, name) for path in files for name in imported(path) if name.split(".")[-1] == "extract"] == []


def test_an_import_of_such_a_script_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text("def f():\n    from klbench_tasks.bias import extract\n", encoding="utf-8")
    assert "klbench_tasks.bias.extract" in imported(file)


def test_nothing_pickled_lies_in_the_tasks() -> None:
    assert [path for path in ROOT.rglob("*") if path.suffix in (".pkl", ".pickle", ".joblib", ".pt", ".h5")] == []
