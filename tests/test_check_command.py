"""`klbench check`: exit codes, files, --update, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import gated
import pytest

from klbench import cli
from klbench.gate import sides

METHODS = ("dpo", "rloo")
FILES = ("junit.xml", "summary.md", "check.json")
Check = Callable[..., int]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run directories by what is wrong with them, and a baseline file of a sound one."""
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    sound = [gated.record(m) for m in METHODS]
    gated.directory(tmp_path / "sound", sound)
    gated.directory(tmp_path / "worse", [gated.record("dpo", 0.5), sound[1]])
    gated.directory(tmp_path / "noisy", [gated.record("dpo", 0.02, noise=80), sound[1]])
    gated.directory(tmp_path / "other", [gated.record(m, prompts="other") for m in METHODS])
    gated.directory(tmp_path / "fewer", sound[:1])
    gated.directory(tmp_path / "bare", [gated.changed(r, columns={"entropy": r.columns["entropy"]}, prompts={}) for r in sound])
    gated.directory(tmp_path / "empty", [])
    sides.write(tmp_path / "base.json", sound)
    return tmp_path


@pytest.fixture
def check(home: Path) -> Check:
    """Runs the command with all three files asked for."""

    def run(baseline: str, candidate: str, *words: str) -> int:
        for file in FILES:
            (home / file).unlink(missing_ok=True)
        asked = [word for file, option in zip(FILES, ("--junit", "--summary", "--json"), strict=True) for word in (option, file)]
        return cli.main(["check", "--baseline", baseline, "--candidate", candidate, *asked, *words])

    return run


CODES = {
    ("base.json", "sound"): (0, "pass"),
    ("sound", "base.json"): (0, "pass"),
    ("base.json", "worse"): (1, "regression"),
    ("worse", "sound"): (0, "pass"),
    ("base.json", "noisy"): (3, "inconclusive"),
    ("base.json", "other"): (4, "not comparable"),
    ("base.json", "fewer"): (4, "not comparable"),
    ("bare", "bare"): (5, "nothing measured"),
    ("empty", "empty"): (5, "nothing measured"),
}


@pytest.mark.parametrize(("sides_", "expected"), CODES.items(), ids=lambda x: " ".join(map(str, x)))
def test_each_outcome_has_its_code_and_its_files(
    sides_: tuple[str, str], expected: tuple[int, str], check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(*sides_) == expected[0]
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith(f"{expected[1]}: ") and err == ""
    data = json.loads(Path("check.json").read_text(encoding="utf-8"))
    assert (data["code"], data["outcome"]) == expected and (data["baseline"], data["candidate"]) == sides_
    assert Path("summary.md").read_text(encoding="utf-8").startswith(f"## klbench check: {expected[1]}\n")
    root = ET.fromstring(Path("junit.xml").read_bytes())
    red = int(str(root.get("failures"))) + int(str(root.get("errors")))
    assert (red > 0) == (expected[0] != 0)


def test_without_a_gate_it_says_whose_margins_these_are(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    check("base.json", "sound")
    assert capsys.readouterr().out.splitlines()[0] == "gate: the built-in margins (reverse_kl 0.15, gold 0.15); --gate FILE sets your own"


def test_a_gate_of_one_s_own_decides(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wide.yaml").write_text("metrics: {reverse_kl: {direction: min, margin: 2}, gold: {direction: info}}", encoding="utf-8")
    assert check("base.json", "worse", "--gate", "wide.yaml") == 0
    said = capsys.readouterr().out
    assert "within margin: reverse_kl of dpo" in said and "built-in" not in said


def test_a_pipe_gets_a_row_a_line_without_boxes(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    check("base.json", "worse")
    out = capsys.readouterr().out
    rows = [line.split("\t") for line in out.splitlines() if "\t" in line]
    assert {len(row) for row in rows} == {9} and rows[1][:6] == ["regression", "bias", "reverse_kl", "2", "+0.5", "dpo"]
    assert not set(out) & set("\x1b─│┃")


def test_annotations_are_for_github_alone(check: Check, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check("base.json", "worse")
    assert "::error" not in capsys.readouterr().out
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert check("base.json", "worse") == 1
    assert sum(line.startswith("::error ") for line in capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("side", ["baseline", "candidate"])
@pytest.mark.parametrize("kind", ["record", "file"])
def test_another_schema_is_not_comparable(side: str, kind: str, home: Path, check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "file":
        Path("alien").write_text((home / "base.json").read_text().replace('"klbench_baseline": 1', '"klbench_baseline": 9'))
    else:
        gated.directory(home / "alien", [gated.record()])
        (file,) = (home / "alien" / "records").iterdir()
        file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    assert check(*(("alien", "sound") if side == "baseline" else ("sound", "alien"))) == 4
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(f"not comparable: the {side}: ") and "schema 9; this klbench reads schema 1" in said[-1]
    assert all((home / file).is_file() for file in FILES)


REFUSED = {
    "no file": (["nowhere.json", "sound"], "no file or directory nowhere.json"),
    "no run directory": ([".", "sound"], "a run directory expected"),
    "no gate": (["base.json", "sound", "--gate", "no.yaml"], "no gate file at no.yaml"),
    "no records to make a baseline of": (["new.json", "empty", "--update"], "a baseline of nothing"),
    "a directory to write over": (["sound", "worse", "--update"], "sound is a directory"),
    "a record to write over": (["one.json", "worse", "--update"], "one.json is none"),
    "a folder that is not there": (["base.json", "sound", "--junit", "base.json/x.xml"], "cannot be written"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_code_2(words: list[str], said: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.json").write_text(gated.record().to_json(), encoding="utf-8")
    before = {f: f.read_bytes() for f in home.rglob("*") if f.is_file()}
    assert cli.main(["check", "--baseline", words[0], "--candidate", *words[1:]]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err
    assert {f: f.read_bytes() for f in home.rglob("*") if f.is_file()} == before


# --- --update ---


def test_a_first_baseline_has_nothing_to_compare(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--update", "--baseline", "gate/new.json", "--candidate", "sound"]) == 0
    assert capsys.readouterr().out == "gate/new.json: 2 records written; 2 new, 0 changed, 0 as before, 0 gone\n"
    assert (home / "gate" / "new.json").read_bytes() == (home / "base.json").read_bytes()


def test_an_update_shows_the_comparison_and_says_what_changed(check: Check, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("base.json", "worse", "--update") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("regression: ") and said[-1] == "base.json: 2 records written; 0 new, 1 changed, 1 as before, 0 gone"
    assert json.loads((home / "check.json").read_text(encoding="utf-8"))["code"] == 1
    assert check("base.json", "worse") == 0


def test_without_the_word_nothing_is_written(check: Check, home: Path) -> None:
    before = (home / "base.json").read_bytes()
    assert check("base.json", "worse") == 1
    assert (home / "base.json").read_bytes() == before


def test_a_baseline_of_another_schema_is_replaced_on_purpose(check: Check, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = (home / "base.json").read_bytes()
    (home / "base.json").write_bytes(sound.replace(b'"klbench_baseline": 1', b'"klbench_baseline": 9'))
    assert check("base.json", "sound", "--update") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "base.json: 2 records written; 2 new, 0 changed, 0 as before, 0 gone"
    assert (home / "base.json").read_bytes() == sound


def test_two_records_of_one_policy_make_no_baseline(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = gated.record()
    gated.directory(home / "twice", [one, gated.changed(one, run=one.run.model_copy(update={"max_new_tokens": 6}))])
    assert cli.main(["check", "--update", "--baseline", "new.json", "--candidate", "twice"]) == 2
    assert "two records of bias, dpo" in capsys.readouterr().err and not (home / "new.json").exists()


def test_the_help_names_every_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(word in said for word in ("0 pass", "1 regression", "2 usage", "3 inconclusive", "4 not comparable", "5 nothing measured"))


def test_a_comparison_needs_no_torch(home: Path) -> None:
    code = "import sys; from klbench import cli; code = cli.main(sys.argv[1:]); print(code, 'torch' in sys.modules, 'rich' in sys.modules)"
    words = ["check", "--baseline", "base.json", "--candidate", "worse", "--junit", "j.xml", "--summary", "s.md", "--json", "c.json"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=home, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 False False"
