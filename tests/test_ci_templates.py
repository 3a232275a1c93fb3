"""The CI templates: parsed, and their shell steps run as the CI systems run them, with a stand-in for what installs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import gated
import pytest
import yaml

from klbench import cli
from klbench.gate import sides

ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "ci" / "action" / "action.yml").read_text(encoding="utf-8"))
GITLAB: dict[str, Any] = yaml.safe_load((ROOT / "ci" / "gitlab.yml").read_text(encoding="utf-8"))
HOOKS: list[dict[str, Any]] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A repository's root with a baseline and two candidates; the worse one's folder has a name that a shell would stumble over."""
    sides.write(tmp_path / "base line.json", [gated.record("dpo"), gated.record("rloo")])
    gated.directory(tmp_path / "sound", [gated.record("dpo"), gated.record("rloo")])
    gated.directory(tmp_path / "it's $(touch stolen) worse", [gated.record("dpo", 0.5), gated.record("rloo")])
    (tmp_path / "gate.yaml").write_text("metrics: {reverse_kl: {direction: min, margin: 2}}", encoding="utf-8")
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    """The CI machine's: klbench is on the path, and python writes down what it was asked to install."""
    stand_in = home / "bin" / "python"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word"; done >{home}/installed\n', encoding="utf-8")
    stand_in.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}
    return kept | {"PATH": f"{stand_in.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


# --- GitHub ---


def filled(text: str, values: dict[str, str]) -> str:
    """What GitHub makes of `${{ name }}`."""
    return re.sub(r"\$\{\{ *([\w.]+) *\}\}", lambda found: values[found[1]], text)


def run_action(home: Path, **inputs: str) -> tuple[int, str]:
    """The exit code and the output of the action, step by step."""
    given = {f"inputs.{name}": inputs.get(name, spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
    values = given | {"runner.temp": str(home / "temp")}
    files = {"GITHUB_OUTPUT": home / "output", "GITHUB_STEP_SUMMARY": home / "summary", "GITHUB_ACTIONS": "true"}
    out = ""
    for step in ACTION["runs"]["steps"]:
        if "run" not in step or (step.get("if") == "inputs.install != ''" and not given["inputs.install"]):
            continue
        assert step["shell"] == "bash" and "${{" not in step["run"], "an input is substituted into a script"
        made = {name: filled(text, values) for name, text in step.get("env", {}).items()}
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(
            words, cwd=home, env={**environment(home), **made, **{k: str(v) for k, v in files.items()}}, capture_output=True, text=True
        )  # fmt: skip
        out += done.stdout
        if done.returncode:
            return done.returncode, out
    return 0, out


def test_the_action_is_a_composite_one_with_what_github_wants() -> None:
    assert ACTION["runs"]["using"] == "composite" and ACTION["name"] and ACTION["description"]
    for step in ACTION["runs"]["steps"]:
        assert ("run" in step) != ("uses" in step) and ("run" not in step or step["shell"] == "bash")
    used = set(re.findall(r"inputs\.(\w+)", json.dumps(ACTION["runs"])))
    assert used == set(ACTION["inputs"]) and all(spec["description"] for spec in ACTION["inputs"].values())
    upload = ACTION["runs"]["steps"][-1]
    assert upload["if"] == "always()" and upload["uses"].startswith("actions/upload-artifact@v4")


def test_the_action_passes_what_is_sound(home: Path) -> None:
    code, out = run_action(home, baseline="base line.json", candidate="sound")
    assert (code, out.splitlines()[-1].partition(":")[0]) == (0, "pass")
    assert (home / "output").read_text() == "code=0\n" and (home / "summary").read_text().startswith("## klbench check: pass")
    assert sorted(p.name for p in (home / "temp" / "klbench-check").iterdir()) == ["check.json", "junit.xml", "summary.md"]
    assert (home / "installed").read_text().split() == ["-m", "pip", "install", "--disable-pip-version-check", "klbench"]


def test_the_action_fails_on_a_regression_and_keeps_the_report(home: Path) -> None:
    code, out = run_action(home, baseline="base line.json", candidate="it's $(touch stolen) worse", install="")
    assert code == 1 and "::error title=klbench%3A regression::" in out
    assert (home / "output").read_text() == "code=1\n" and "## klbench check: regression" in (home / "summary").read_text()
    assert not (home / "installed").exists() and not (home / "stolen").exists()


def test_the_action_hands_on_the_gate_and_several_words_to_install(home: Path) -> None:
    code, _ = run_action(home, baseline="base line.json", candidate="it's $(touch stolen) worse", gate="gate.yaml", install="-e . *")
    assert code == 0 and (home / "installed").read_text().split("\n")[-4:] == ["-e", ".", "*", ""]


def test_the_action_says_2_for_a_file_that_is_not_there(home: Path) -> None:
    code, _ = run_action(home, baseline="nowhere", candidate="sound")
    assert code == 2 and (home / "output").read_text() == "code=2\n"


# --- GitLab ---


def run_gitlab(home: Path, **variables: str) -> int:
    job = GITLAB[".klbench-check"]
    script = "\n".join(job["script"])
    given = {**environment(home), **job["variables"], **variables}
    return subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=home, env=given, capture_output=True, text=True).returncode


def test_the_gitlab_job_compares_and_keeps_its_report(home: Path) -> None:
    names = {"KLBENCH_BASELINE": "base line.json", "KLBENCH_CANDIDATE": "it's $(touch stolen) worse"}
    assert run_gitlab(home, **names) == 1 and not (home / "stolen").exists()
    artifacts = GITLAB[".klbench-check"]["artifacts"]
    assert all((home / name).is_file() for name in (artifacts["reports"]["junit"], *artifacts["paths"])) and artifacts["when"] == "always"
    assert run_gitlab(home, **names, KLBENCH_GATE="gate.yaml") == 0
    assert run_gitlab(home, **names | {"KLBENCH_CANDIDATE": "sound"}) == 0


def test_the_example_in_its_head_is_a_job() -> None:
    head = [
        line.removeprefix("#") for line in (ROOT / "ci" / "gitlab.yml").read_text(encoding="utf-8").splitlines() if line.startswith("#   ")
    ]
    example = yaml.safe_load("\n".join(head))
    assert example["gate"]["extends"] in GITLAB and set(example["gate"]["variables"]) <= set(GITLAB[".klbench-check"]["variables"])


# --- pre-commit ---


def test_the_hook_runs_the_command_with_a_team_s_arguments(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (hook,) = HOOKS
    assert hook["id"] == "klbench-check" and hook["language"] == "system" and hook["pass_filenames"] is False
    monkeypatch.chdir(home)
    program, *words = shlex.split(hook["entry"])
    assert program == "klbench"
    assert cli.main([*words, "--baseline", "base line.json", "--candidate", "sound"]) == 0
    assert cli.main([*words, "--baseline", "base line.json", "--candidate", "it's $(touch stolen) worse"]) == 1
    capsys.readouterr()
