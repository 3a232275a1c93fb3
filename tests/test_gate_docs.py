"""docs/gate.md, followed word by word in a fresh repository: every block is run, or parsed and held against what it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from klbench.gate import settings

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
SHELL = [text for language, text in BLOCKS if language == "sh"]
YAML = [text for language, text in BLOCKS if language == "yaml"]
SAVED = dict(re.findall(r"[Ss]ave it as\s+`([\w./]+)`:\n\n```yaml\n(.*?)```", PAGE, re.S))


def ran(block: str, home: Path) -> subprocess.CompletedProcess[str]:
    who = {f"GIT_{role}_{part}": "x" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {**{k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}, **who, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-eo", "pipefail", "-c", block], cwd=home, env=given, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[subprocess.CompletedProcess[str]]]]:
    """The repository after all shell blocks, with what each printed."""
    home = tmp_path_factory.mktemp("team")
    subprocess.run(["git", "init", "-q"], cwd=home, check=True)
    for name, text in SAVED.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text, encoding="utf-8")
    yield home, [ran(block, home) for block in SHELL]


def test_every_block_is_run_or_parsed() -> None:
    assert Counter(language for language, _ in BLOCKS) == {"sh": 4, "yaml": 5}
    assert list(SAVED) == ["gate/suite.yaml", "gate/gate.yaml"] and set(SAVED.values()) < set(YAML)


def test_the_page_can_be_followed(followed: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    home, (first, broken, same, drawn) = followed
    assert first.returncode == 0, first.stderr
    assert "gate/baseline.json: 3 records written; 3 new" in first.stdout
    tracked = subprocess.run(["git", "ls-files"], cwd=home, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(tracked) == [".gitignore", "gate/baseline.json", "gate/gate.yaml", "gate/suite.yaml"]
    assert broken.returncode == 0, broken.stderr
    assert broken.stdout.endswith("blocked: 1\n") and "regression: reverse_kl of rloo on factuality/capitals rose by" in broken.stdout
    assert (same.returncode, same.stdout.splitlines()[-1].partition(":")[0]) == (0, "pass"), same.stderr
    assert (home / "junit.xml").is_file() and (home / "check.json").is_file()
    assert drawn.returncode == 0 and "The gate's first baseline" in drawn.stdout and (home / "history.html").is_file()


def test_the_gates_are_gates() -> None:
    found = [settings.read(yaml.safe_load(text), "docs/gate.md") for text in YAML if "metrics:" in text]
    assert len(found) == 2 and [gate.rewards_differ for gate in found] == [False, True]


def test_the_workflow_calls_the_action_with_inputs_that_it_has(followed: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    (workflow,) = (yaml.safe_load(text) for text in YAML if "jobs:" in text)
    action = yaml.safe_load((ROOT / "ci" / "action" / "action.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["gate"]["steps"]
    (call,) = (step for step in steps if "klbench/ci/action" in step.get("uses", ""))
    needed = {name for name, spec in action["inputs"].items() if spec.get("required")}
    assert needed <= set(call["with"]) <= set(action["inputs"])
    home, _ = followed
    assert all((home / call["with"][name]).is_file() for name in ("baseline", "gate"))
    (train,) = (step["run"] for step in steps if "klbench run" in step.get("run", ""))
    assert train.split()[2] in SAVED and train.split()[-1] == call["with"]["candidate"]


def test_the_pre_commit_hook_is_there() -> None:
    (config,) = (yaml.safe_load(text) for text in YAML if "hooks:" in text)
    known = {hook["id"] for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))}
    assert {hook["id"] for repository in config["repos"] for hook in repository["hooks"]} <= known


def test_every_exit_code_has_a_line() -> None:
    from klbench.gate.compare import CODES

    lines = dict(re.findall(r"^\| (\d) \| (.+?) \|", PAGE, re.M))
    assert set(lines) == {"0", "1", "2", "3", "4", "5"}
    assert all(lines[str(code)].startswith(name) for name, code in CODES.items() if name != "pass")
