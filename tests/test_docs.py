"""What the docs say, done as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file of docs/add_an_objective.md."""
    text = (ROOT / "docs" / "add_an_objective.md").read_text(encoding="utf-8")
    match = re.search(r"save it as\n`(my_objectives/\w+\.py)`:\n\n```python\n(.*?)```", text, re.S)
    assert match is not None
    path = tmp_path_factory.mktemp("docs") / match[1]
    path.parent.mkdir()
    path.write_text(match[2], encoding="utf-8")
    return path


def klbench(where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).with_name("klbench"), *words], cwd=where, capture_output=True, text=True, timeout=300)


def test_the_objective_of_the_docs_is_sound(written: Path) -> None:
    done = klbench(written.parents[1], "validate", "my_objectives/leave_one_out.py")
    assert (done.returncode, done.stderr) == (0, "") and "laws hold" in done.stdout


@pytest.mark.parametrize(
    "right, wrong", [("gain.mean(1, keepdim=True)", "gain.amax(1, keepdim=True)"), (".detach()", ""), ("beta * batch", "2 * beta * batch")]
)
def test_its_mutants_are_not(written: Path, tmp_path: Path, right: str, wrong: str) -> None:
    text = written.read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / "leave_one_out.py").write_text(text.replace(right, wrong), encoding="utf-8")
    done = klbench(tmp_path, "validate", "leave_one_out.py")
    assert done.returncode == 2 and "does not hold" in done.stderr


def test_it_runs_beside_the_others(written: Path) -> None:
    few = ["--set", "train.steps=2", "--set", "train.curve=0", "--set", "seeds=[0]", "--set", "score.draws=16", "--set", "score.bank=16"]
    done = klbench(
        written.parents[1], "run", "methods", "--objective", "leave_one_out", "--objective", "rloo", "--include", "my_objectives", *few,
        "--set", "samplers=[]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "leave_one_out" in done.stdout
