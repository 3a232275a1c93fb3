"""What `klbench validate` says of tasks: a sound one passes, and each check rejects the mutant that it is there for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from klbench import bank as banks
from klbench import cli, included, task, task_checks
from klbench.errors import UserError
from klbench.included import folder_of
from klbench.task_checks import Finding, check_task

ROOT = Path(__file__).parents[1]
HEAD = "from __future__ import annotations\n"
GOLD = """    def gold(self) -> Reward | None:
        \"\"\"A second reward that nothing is trained on, to see whether the first is gamed; or None.\"\"\"
        return None"""
INFINITE = GOLD.replace("return None", "return lambda prompts, completions, **kw: [float('inf')] * len(prompts)")
RETURN = "return [1.0 if GOOD.search(completion) else 0.0 for completion in completions]"
AUDITS = f"""{GOLD}

    def audits(self):
        from klbench.audit import Chosen, Drawn
        import numpy as np
        told = Drawn(name="had", title="had", formula="had", value=reward)
        own = Drawn(name="own", title="own", formula="own", value=reward, prompts=("The nurse was tired because",))
        she = Chosen(name="she", title="she", formula="she", prompts=("The nurse was tired because",) * 2, texts=((" she", " he"),) * 2)
        return (told, own, she)"""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few draws, and one interpreter started for the check of imports alone."""
    monkeypatch.setattr(task_checks, "DRAWS", 64)
    monkeypatch.setattr(task_checks, "_loads_torch", lambda module, folder: "no")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """The folder that `klbench new task toy` writes."""
    assert cli.main(["new", "task", "toy", "--dir", str(tmp_path)]) == 0
    return tmp_path / "toy"


def edited(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (file, old, text.count(old))
    path.write_text(text.replace(old, new), encoding="utf-8")


def findings(folder: Path) -> dict[str, Finding]:
    return {f.name: f for f in check_task(task.load("toy", (folder.parent,)))}


def broken(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if not finding.ok]


def test_what_new_writes_is_sound_but_for_few_draws(toy: Path) -> None:
    found = findings(toy)
    assert broken(found) == []
    wanted = ["declared", "splits", "licence", "readme", "import", "prompts", "reward", "base rate", "reach", "bank", "base rates"]
    wanted.append("lm-eval")
    assert list(found) == wanted
    assert found["splits"].detail == "train 16, dev 8, score 8, disjoint"
    assert {name for name, f in found.items() if f.verdict == "warning"} == {"reach", "base rates"}  # 64 draws in place of 512


LONG = "The nurse " + "was very " * 600 + "tired because"
MUTANTS = [
    ("declared", "task.py", 'version: ClassVar[int] = 1', 'version: ClassVar[int] = 0', "version 0"),
    ("declared", "task.py", '"a first task: the', '"a first\\ntask: the', "one line"),
    ("declared", "task.py", "ClassVar[float] = 0.33", "ClassVar[float] = -1.0", "beta -1.0"),
    ("declared", "task.py", "ClassVar[int] = 6", "ClassVar[int] = 0", "max_new_tokens 0"),
    ("declared", "task.py", GOLD, AUDITS.replace('name="own"', 'name="had"'), "two audits are called audit.had"),
    ("splits", "dev.jsonl", "The teacher went home early", "The teacher was tired", "in split dev and again in score"),
    ("splits", "dev.jsonl", "The teacher went home early", "the  TEACHER was tired", "as 'the  TEACHER was tired"),
    ("splits", "dev.jsonl", "The nurse", "The teacher", "twice in split dev"),
    ("splits", "dev.jsonl", "The teacher went home early because", " ", "which is no prompt"),
    ("splits", "task.py", 'for line in lines]', 'for line in lines][: 0 if split == "dev" else None]', "split dev is empty"),
    ("licence", "README.md", ": `LICENSE-data`", "", "LICENSE-data is not named"),
    ("readme", "README.md", "## Known weaknesses", "## Praise", "nothing under '## Known weaknesses'"),
    ("prompts", "dev.jsonl", "The teacher went home early because", LONG, "with 6 new ones over 512"),
    ("reward", "task.py", RETURN, "import random\n    return [random.random() for _ in completions]", "then"),
    ("reward", "task.py", RETURN, "return [(i % 7) / 7 for i in range(len(completions))]", "in another order"),
    ("reward", "task.py", RETURN, "return [1 / len(completions) for _ in completions]", "in a batch of its own"),
    ("reward", "task.py", RETURN, 'return [float("nan") if not c else float("had" in c) for c in completions]', "not a finite number"),
    ("reward", "task.py", RETURN, "return [len(c) / 10 for c in completions]", "above its declared maximum 1"),
    ("reward", "task.py", RETURN, "return [0.0 for c in completions[1:]]", "values for"),
    ("reward", "task.py", RETURN, "return [float(c[0] == ' ') for c in completions]", "IndexError"),
    ("reward", "task.py", RETURN, "return [0.5 for c in completions]", None),
    ("gold", "task.py", GOLD, INFINITE, "inf"),
    ("audits", "task.py", GOLD, AUDITS.replace('a="had",', 'a="had", combine=lambda v: v.mean(1) * np.nan,'), "audit.had is None"),
    ("audits", "task.py", GOLD, AUDITS.replace('(" she", " he")', '(" she", "")'), "audit.she: UserError"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "file", "old", "new", "says"), MUTANTS)
def test_each_check_rejects_its_mutant(toy: Path, check: str, file: str, old: str, new: str, says: str | None) -> None:
    edited(toy, file, old, new)
    found = findings(toy)
    if says is None:
        assert broken(found) == ["reward range"] and "8 of 8 prompts" in found["reward range"].detail
        return
    assert check in broken(found) and says in found[check].detail, found
    assert set(broken(found)) <= {check, "reward"}


def test_sound_audits_are_shown(toy: Path) -> None:
    edited(toy, "task.py", GOLD, AUDITS)
    found = findings(toy)["audits"]
    assert found.ok and [word.split()[0] for word in found.detail.split(", ")] == ["had", "own", "she"]


def test_lm_eval_gets_what_can_be_written(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(toy)["lm-eval"].detail == "klbench_toy: drawn, 128 documents"
    monkeypatch.setattr(task_checks.harness, "export", lambda *_: 1 / 0)
    assert broken(findings(toy)) == ["lm-eval"]


def test_licences_and_readme_have_to_be_there(toy: Path) -> None:
    (toy / "LICENSE-data").write_text(" \n")
    assert findings(toy)["licence"].detail == "LICENSE-data is empty"
    (toy / "LICENSE-data").unlink()
    assert "no LICENSE file" in findings(toy)["licence"].detail
    (toy / "README.md").unlink()
    assert broken(findings(toy)) == ["licence", "readme"]


@pytest.fixture
def strictly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    yield lambda shipped: monkeypatch.setattr(task_checks, "is_shipped", lambda _: shipped)


@pytest.mark.parametrize(("word", "low"), [("had", False), ("not", True)])
@pytest.mark.parametrize("shipped", [False, True])
def test_rates_that_are_low_are_a_warning_and_broken_where_klbench_ships_them(
    toy: Path, strictly: Callable[[bool], None], word: str, low: bool, shipped: bool
) -> None:
    strictly(shipped)
    edited(toy, "task.py", r"\bhad\b", rf"\b{word}\b")
    found = findings(toy)
    wrong = "broken" if shipped else "warning"
    assert found["base rate"].verdict == (wrong if low else "ok")
    assert found["reach"].verdict == wrong  # 64 draws are few either way
    assert found["bank"].verdict == ("broken" if shipped else "ok")
    assert ("have under 5% of prior draws at the cap" in found["base rate"].detail) == low


def test_a_reward_without_a_ceiling_is_warned_of(toy: Path) -> None:
    edited(toy, "task.py", "TiltedPrior(prior, reward, beta, CEILING)", "TiltedPrior(prior, reward, beta)")
    found = findings(toy)
    assert found["reward range"].verdict == "warning" and "no declared ceiling" in found["reward range"].detail
    assert not {"base rate", "reach"} & set(found)


def test_the_table_of_base_rates_is_written_and_found_stale(toy: Path, strictly: Callable[[bool], None]) -> None:
    load = lambda: task.load("toy", (toy.parent,))  # noqa: E731
    path = task_checks.write_base_rates(load())
    assert path == toy / "README.md" and path.read_text(encoding="utf-8").count("<!-- base rates: start -->") == 1
    assert findings(toy)["base rates"].verdict == "ok"
    text = path.read_text(encoding="utf-8")
    task_checks.write_base_rates(load())
    assert path.read_text(encoding="utf-8") == text
    row = next(line for line in text.splitlines() if line.startswith("| prior's mean reward"))
    path.write_text(text.replace(row, "| prior's mean reward | 0.45 |"), encoding="utf-8")
    stale = findings(toy)["base rates"]
    assert stale.verdict == "warning" and "prior's mean reward" in stale.detail and "--rates" in stale.detail
    strictly(True)
    assert findings(toy)["base rates"].verdict == "broken"
    with pytest.raises(UserError, match="script that made its bank"):
        task_checks.write_base_rates(load())
    strictly(False)
    path.write_text("# toy\n", encoding="utf-8")
    assert "has no table" in findings(toy)["base rates"].detail
    task_checks.write_base_rates(load())
    assert path.read_text(encoding="utf-8").startswith("# toy\n\n<!-- base rates: start -->")


@pytest.mark.parametrize(
    ("value", "word", "same"),
    [(0.3831, "0.383", True), (0.3837, "0.383", False), (163.4, "163", True), (163.6, "163", False), (0.0171, "0.02", False),
     (0.0171, "0.017", True), (-0.21, "−0.210", True), (2848.0, "2.85e+03", True), (0.0002, "0", False), (1234.4, "1,234", True)],
)  # fmt: skip
def test_a_printed_number_is_a_value_that_rounds_to_it(value: float, word: str, same: bool) -> None:
    assert task_checks._matches(value, task_checks._printed(word)) == same


def test_a_bank_of_another_version_or_with_other_rewards_is_seen(toy: Path) -> None:
    loaded, prior = task.load("toy", (toy.parent,)), task_checks._opened("mini")
    bank = banks.draw(loaded, prior, loaded.target(prior, loaded.beta), 256)
    (toy / "banks").mkdir()
    at = toy / "banks" / "mini.npz"
    at.write_bytes(bank.to_bytes())
    found = findings(toy)
    assert found["bank"].verdict == "ok" and "256 draws of 8 prompts" in found["bank"].detail
    at.write_bytes(replace(bank, reward=1 - bank.reward).to_bytes())
    assert "its rewards are not the task's" in findings(toy)["bank"].detail
    at.write_bytes(replace(bank, meta={**bank.meta, "version": 2}).to_bytes())
    assert "drawn for another version" in findings(toy)["reward"].detail
    at.write_bytes(bank.to_bytes())
    edited(toy, "task.py", "What it measures, for whom.", "What it measures.")
    found = findings(toy)
    assert found["bank"].verdict == "warning" and "drawn for other files" in found["bank"].detail


def test_where_every_outcome_is_listed_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {f.name: f for f in check_task(task.load("exact/rare"))}
    assert broken(found) == [] and {f.verdict for f in found.values()} == {"ok"}
    assert "all 4,681 outcomes summed" in found["base rate"].detail
    assert found["reach"].detail == "not needed: every outcome is listed"


def test_importing_torch_is_seen_in_a_fresh_interpreter(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    edited(toy, "task.py", "import re\n", "import re\nimport torch\n")
    loaded = task.load("toy", (toy.parent,))
    (finding,) = task_checks._import(loaded)
    assert not finding.ok and "imports torch" in finding.detail
    (finding,) = task_checks._import(task.load("exact"))
    assert finding.ok


# Folders of the user's


def test_included_tasks_load_by_name_and_by_family(tmp_path: Path) -> None:
    assert cli.main(["new", "task", "fam/one", "--dir", str(tmp_path)]) == 0
    (tmp_path / "fam" / "words.py").write_text("GOOD = 'had'\n")
    edited(
        tmp_path / "fam",
        "task.py",
        "from klbench.task import AbstractTask\n",
        "from klbench.task import AbstractTask\nfrom .words import GOOD as G\n",
    )
    loaded = task.load("fam/one", (tmp_path,))
    assert loaded.name == "fam/one" and task.load("fam", (tmp_path,)) == loaded and sys.modules[type(loaded).__module__].G == "had"
    assert {"fam", "fam/one", "toxicity"} <= set(task.names((tmp_path,))) and "fam" not in task.names()
    assert folder_of(type(loaded).__module__) == tmp_path / "fam" and folder_of("klbench_tasks.exact.task") is None
    with pytest.raises(UserError, match=r"no task 'fam/onne'; did you mean 'fam/one'\?"):
        task.load("fam/onne", (tmp_path,))
    with pytest.raises(UserError, match="no such directory"):
        task.names((tmp_path / "nowhere",))


def test_one_name_is_one_task(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert cli.main(["new", "task", "fam", "--dir", str(tmp_path / folder)]) == 0
    with pytest.raises(UserError, match="'fam' is in another included folder too"):
        task.load("fam", (tmp_path / "a", tmp_path / "b"))
    (tmp_path / "c").mkdir()
    os.rename(tmp_path / "b" / "fam", tmp_path / "c" / "exact")
    with pytest.raises(UserError, match="is named 'fam'; 'exact' or 'exact/<variant>' expected"):
        task.load("exact", (tmp_path / "c",))
    (tmp_path / "d").mkdir()
    os.rename(tmp_path / "c" / "exact", tmp_path / "d" / "exact")
    edited(tmp_path / "d" / "exact", "task.py", 'name: ClassVar[str] = "fam"', 'name: ClassVar[str] = "exact/rare"')
    with pytest.raises(UserError, match="'exact/rare' is installed already"):
        task.load("exact/rare", (tmp_path / "d",))


def test_a_variant_beside_an_installed_family_leaves_its_bare_name(tmp_path: Path) -> None:
    assert cli.main(["new", "task", "exact/mine", "--dir", str(tmp_path)]) == 0
    assert task.load("exact", (tmp_path,)).name == "exact/dense" and task.load("exact/mine", (tmp_path,)).name == "exact/mine"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("@final\n", "", "no class of AbstractTask that is marked @final"),
        ("    def prompts(self", "    def prompts_of(self", "Toy lacks prompts"),
        (HEAD, HEAD + "1 / 0\n", r"task.py: importing it raised ZeroDivisionError"),
        (HEAD, HEAD + "from .nowhere import x\n", "importing it raised ModuleNotFoundError"),
    ],
)
def test_a_folder_without_a_task_is_refused(toy: Path, old: str, new: str, says: str) -> None:
    edited(toy, "task.py", old, new)
    before = set(sys.modules)
    with pytest.raises(UserError, match=says):
        task.load("toy", (toy.parent,))
    assert "raised" not in says or not {m for m in set(sys.modules) - before if m.startswith(included.PREFIX)}


def test_the_files_of_an_included_task_are_part_of_what_was_asked(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    loaded, prior = task.load("toy", (toy.parent,)), task_checks._opened("mini")
    first, meta = task.code_hash(loaded), banks.meta_of(loaded, prior, 0)
    assert meta["code"] == first != "" and task.code_hash(task.load("exact")) == ""
    (toy / "README.md").write_text("other words")
    assert task.code_hash(loaded) == first
    edited(toy, "task.py", r"\bhad\b", r"\bhas\b")
    assert task.code_hash(loaded) != first


# The command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["validate", *words])
    return (code, *capsys.readouterr())


def test_several_arguments_some_of_which_are_no_tasks(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy.parent / "__pycache__").mkdir()
    (toy.parent / "__init__.py").touch()
    every = sorted(str(p) for p in toy.parent.iterdir())
    code, out, err = run(capsys, *every)
    assert code == 0 and err == "" and out.count("passed over") == 2
    rows = [line.split("\t") for line in out.splitlines() if line.startswith("toy\t")]
    assert len(rows) == 12 and {len(row) for row in rows} == {4} and ["toy", "import", "", "without torch"] in rows
    assert [row[1] for row in rows if row[2]] == ["reach", "base rates"]
    assert run(capsys, str(toy / "task.py"))[0] == 0
    code, out, err = run(capsys, str(toy.parent / "__init__.py"))
    assert code == 2 and err == f"klbench: nothing to validate in {toy.parent / '__init__.py'}\n"
    assert "no task 'nowhere'" in run(capsys, "nowhere")[2]


def test_what_is_broken_is_named_and_the_others_are_still_checked(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited(toy, "dev.jsonl", "The teacher went home early", "The teacher was tired")
    code, out, err = run(capsys, str(toy), "no_such_task", "exact/dense")
    assert code == 2 and len(err.splitlines()) == 2
    assert err.startswith("klbench: task toy: splits: prompt 'The teacher was tired because' is in split dev and again in score")
    assert "toy\tsplits\tbroken\t" in out and "exact/dense\treach\t\t" in out


def test_rates_go_into_the_readme(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--rates", "toy", "--include", str(toy.parent))
    assert code == 0 and "base rates written" in out and "toy\tbase rates\t\tas README.md has them" in out


def test_a_folder_of_klbench_s_own_is_the_installed_family(capsys: pytest.CaptureFixture[str]) -> None:
    from klbench.commands.validate import tasks_of

    assert list(tasks_of(ROOT / "tasks" / "exact")) == [f"exact/{v}" for v in ("dense", "design", "hidden", "moment", "rare", "scarce")]
    assert all(type(t).__module__ == "klbench_tasks.exact.task" for t in tasks_of(ROOT / "tasks" / "exact").values())


FAMILIES = sorted(path.parent.name for path in (ROOT / "tasks").glob("*/task.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_that_ships_is_sound(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from klbench.commands.validate import tasks_of

    monkeypatch.undo()
    for loaded in tasks_of(ROOT / "tasks" / family).values():
        assert [f"{loaded.name}: {f.name}: {f.detail}" for f in check_task(loaded) if f.verdict != "ok"] == []
