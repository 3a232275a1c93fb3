"""`klbench new`: what it writes is sound and runs, what it refuses leaves nothing behind."""

from __future__ import annotations

import csv
import os
import re
import shlex
from pathlib import Path

import pytest

from klbench import cli, convergence, laws, method
from klbench.commands import new
from klbench.task_checks import check_task


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    code = cli.main(["new", *words])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.count("\n") == 1, (code, out, err)
    return err


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("name, spelled", [("toy", "toy"), ("my-toy/first-one", "my_toy/first_one")])
def test_a_new_task_is_sound_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, spelled: str) -> None:
    from klbench import task

    assert cli.main(["new", "task", name, "--dir", str(tmp_path / "mine")]) == 0
    folder = tmp_path / "mine" / spelled.partition("/")[0]
    assert tree(folder) == ["LICENSE-data", "README.md", "dev.jsonl", "score.jsonl", "task.py", "train.jsonl"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(folder) and said[1] == f"next: klbench validate {folder}"
    assert said[2].split() == ["klbench", "run", "quick", "--task", spelled, "--include", str(tmp_path / "mine")]
    found = check_task(task.load(spelled, (tmp_path / "mine",)))
    assert [f for f in found if f.verdict != "ok"] == [] and len(found) == 12
    texts = [path.read_text(encoding="utf-8") for path in folder.iterdir()]
    assert not [text for text in texts if "{{" in text or "{%" in text or not text.endswith("\n")]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 140


def test_the_docs_done_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "add_a_task.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in re.findall(r"^    (klbench .*)$", text, re.M)]
    assert [words[0] for words in commands] == ["new", "validate", "validate", "run", "score"]
    few = [f"--set={s}" for s in ("train.steps=1", "samplers=[]", "score.draws=16", "score.bank=16", "score.prior_draws=64")]
    brief = {"run": [*few, "--workers", "1"], "score": ["--samples", "16"]}
    for words in commands:
        assert cli.main([*words, *brief.get(words[0], [])]) == 0
    with (tmp_path / "runs/quick/board.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["task"], row["method"]) for row in rows} == {("greeting", "ancestral"), ("greeting", "rloo")}


def test_a_new_objective_keeps_every_law(tmp_path: Path) -> None:
    assert cli.main(["new", "objective", "my-own", "--dir", str(tmp_path)]) == 0
    assert tree(tmp_path) == ["my_own.py"]
    made = method.objective("my_own", (tmp_path,))
    assert type(made).__name__ == "MyOwn"
    held = (*laws.check_objective(made), *convergence.check_ending(made))
    assert len(held) >= 8 and all(law.holds for law in held)
    path = tmp_path / "my_own.py"
    path.write_text(path.read_text().replace("return -(advantage", "return (advantage"))
    assert not all(law.holds for law in laws.check_objective(method.objective("my_own", (tmp_path,))))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["task", "toxicity"], "there is a task 'toxicity' already"),
        (["task", "exact/dense"], "there is a task 'exact/dense' already"),
        (["task", "Mine"], "small letters"),
        (["task", "a/b/c"], "`family` or `family/variant` expected"),
        (["task", "../up"], "`family` or `family/variant` expected"),
        (["task", "class"], "`family` or `family/variant` expected"),
        (["task", ""], "`family` or `family/variant` expected"),
        (["objective", "rloo"], "there is one called 'rloo' already: klbench ls objectives"),
        (["objective", "rejection"], "already: klbench ls samplers"),
        (["objective", "2fast"], "a Python name"),
        (["objective", "lambda"], "a Python name"),
        (["objective", "../up"], "a Python name"),
        (["taks", "mine"], "did you mean 'task'?"),
    ],
)
def test_bad_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in refused(capsys, words[0], words[1], "--dir", str(tmp_path / "deep"))
    assert tree(tmp_path) == []


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "mine.py").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for words in (["task", "toy"], ["task", "gone"], ["objective", "mine"]):
        assert "exists: another name, or another --dir" in refused(capsys, *words, "--dir", str(tmp_path))
    assert "no directory" in refused(capsys, "task", "other", "--dir", str(tmp_path / "mine.py"))
    assert tree(tmp_path) == ["gone", "mine.py", "toy"] and (tmp_path / "mine.py").read_text() == "mine"


@pytest.mark.parametrize("content", ["text", {"a": "text", "b": "text"}])
def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, str] | str) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(new.UserError, match="No space left"):
        new._write(tmp_path / "deep" / "deeper" / "x", content)
    assert tree(tmp_path) == []
    monkeypatch.undo()
    new._write(tmp_path / "deep" / "x", content)
    assert tree(tmp_path) == ["deep", "deep/x", *([] if isinstance(content, str) else ["deep/x/a", "deep/x/b"])]
