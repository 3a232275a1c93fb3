"""What a verdict looks like in each format: numbers where they belong, and names of strangers that do nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from klbench.gate import report
from klbench.gate.compare import WHOLE, Comparison, Shift, Verdict
from klbench.gate.settings import Gate, Metric
from klbench.gate.sides import Cell, Difference

GATE = Gate(
    metrics={
        "reverse_kl": Metric(direction="min", margin=0.1),
        "distinct_2": Metric(direction="band", margin=0.1),
        "entropy": Metric(direction="info"),
        "stderr.reverse_kl": Metric(direction="min", margin=0.3),
    }
)
HOSTILE = '::stop-commands::"><img src=x onerror=alert(1)>\n\r\x1b[31m\x00\u202e|a|`b` ##[error] ##vso[x] $x$ @all =cmd() %0A, *b* \ufffe'
WORSE = Shift(np.array([0.1, 0.3]))


def one(method: str, metric: str, verdict: str, worse: float | None = None, task: str = "bias", **more: object) -> Comparison:
    asked = GATE.metrics[metric]
    figures = {"worse": worse, "upper": worse + 0.1, "seen": 0.05, "p": 0.01, "shift": WORSE} if worse is not None else {}
    given = Comparison(Cell(task, method, 0.5), metric, asked, "0", verdict, 1.0, 1.2, **figures)  # type: ignore[arg-type]
    return replace(given, **more)  # type: ignore[arg-type]


def verdict(*comparisons: Comparison, outcome: str = "regression", differences: tuple[Difference, ...] = ()) -> Verdict:
    return Verdict(outcome, comparisons, differences, (), GATE)


MIXED = verdict(
    one("dpo", "reverse_kl", "regression", 0.2),
    one("rloo", "reverse_kl", "no regression", -0.3),
    one("ppo", "reverse_kl", "not compared", note="uncertified on both sides"),
    one("dpo", "distinct_2", "no regression", -0.4),
    one("rloo", "distinct_2", "no regression", 0.1),
    one("dpo", "entropy", "info"),
    one("dpo", "reverse_kl", "inconclusive", 0.07, task="a", seen=math.inf),
    replace(one("", "stderr.reverse_kl", "no regression", 0.01), cell=WHOLE),
)


def rows(given: Verdict) -> dict[tuple[str, str], report.Line]:
    return {(line.task, line.metric): line for line in report.lines(given)}


def test_a_line_has_the_largest_worsening_and_whose_it_is() -> None:
    line = rows(MIXED)["bias", "reverse_kl"]
    assert (line.verdict, line.compared, line.policies, line.seen) == ("regression", 2, 3, 0.05)
    assert line.worst is not None and (line.worst.cell.method, line.worst.worse, line.worst.upper) == ("dpo", 0.2, pytest.approx(0.3))


def test_in_a_band_the_largest_move_is_the_worst() -> None:
    worst = rows(MIXED)["bias", "distinct_2"].worst
    assert worst is not None and worst.worse == -0.4


def test_lines_stand_by_task_and_in_the_gate_s_order() -> None:
    assert list(rows(MIXED)) == [
        ("a", "reverse_kl"), ("bias", "reverse_kl"), ("bias", "distinct_2"), ("bias", "entropy"), (WHOLE.task, "stderr.reverse_kl"),
    ]  # fmt: skip


def test_the_gravest_is_said_first_and_the_outcome_last(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(MIXED, "mine")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "gate: mine" and said[1].split("\t") == list(report.HEAD)
    assert said[2].split("\t") == ["inconclusive", "a", "reverse_kl", "1", "+0.07", "dpo", "0.17", "0.1", "inf"]
    assert said[5].split("\t") == ["info", "bias", "entropy", "1", "+0.2", "dpo", "", "", ""]
    assert [line.partition(":")[0] for line in said[7:]] == ["regression", "inconclusive", "not compared", "regression"]
    assert said[-2] == "not compared: reverse_kl of bias ppo β 0.5: uncertified on both sides"
    assert not any("\x1b" in line for line in said)


def test_two_betas_of_a_method_are_told_apart() -> None:
    other = replace(one("dpo", "reverse_kl", "no regression", 0.1), cell=Cell("bias", "dpo", 0.1))
    given = verdict(one("dpo", "reverse_kl", "regression", 0.2), other)
    both = {("bias", "dpo"): 2}
    assert report.lines(given)[0].cells(both)[5] == "dpo β 0.5"  # type: ignore[arg-type]
    assert report.lines(given)[0].cells({("bias", "dpo"): 1})[5] == "dpo"  # type: ignore[arg-type]


# --- JUnit ---


def test_junit_counts_what_it_holds() -> None:
    root = ET.fromstring(report.junit(replace(MIXED, outcome="not comparable", differences=(Difference("bias x", "its prior differs"),))))
    assert root.tag == "testsuites"
    assert root.attrib == {"name": "klbench check", "tests": "9", "failures": "1", "errors": "2", "time": "0"}
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["comparable", "a", "bias", WHOLE.task]
    assert {k: suites["bias"].get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6", "failures": "1", "errors": "0", "skipped": "2",
    }  # fmt: skip
    for case in root.iter("testcase"):
        assert case.get("name") and case.get("classname") and case.get("time") == "0"
    failed = suites["bias"].find("testcase/failure")
    assert failed is not None and failed.get("type") == "regression" and "rose by 0.2" in str(failed.get("message"))
    assert json.loads(str(failed.text).splitlines()[1])["worse"] == 0.2


def test_where_nothing_was_measured_junit_has_an_error() -> None:
    root = ET.fromstring(report.junit(verdict(outcome="nothing measured")))
    assert (root.get("tests"), root.get("errors")) == ("1", "1")


# --- annotations ---


def test_at_most_ten_annotations_and_the_last_counts_the_rest() -> None:
    few = verdict(*(one(f"m{i}", "reverse_kl", "regression", 0.2) for i in range(10)))
    assert len(report.workflow_commands(few)) == 10 and "more" not in report.workflow_commands(few)[-1]
    many = verdict(*(one(f"m{i}", "reverse_kl", "regression", 0.2) for i in range(25)))
    commands = report.workflow_commands(many)
    assert len(commands) == 10 and commands[-1] == "::error title=klbench::16 more findings; the log and the summary have them all"
    assert all(c.startswith("::error title=klbench%3A regression::reverse_kl of m") for c in commands[:-1])


def test_doubt_is_a_warning_and_a_pass_is_silent() -> None:
    assert [c.split(" ")[0] for c in report.workflow_commands(MIXED)] == ["::error", "::warning"]
    assert report.workflow_commands(verdict(one("dpo", "reverse_kl", "within margin", 0.05), outcome="pass")) == []
    assert report.workflow_commands(verdict(outcome="nothing measured"))[0].startswith("::error title=klbench%3A nothing measured::")


def test_what_github_reads_as_syntax_is_escaped() -> None:
    command = report.workflow_commands(verdict(one("50 %0A, a:b", "reverse_kl", "regression", 0.2)))[0]
    assert "50 %250A, a:b" in command
    assert report._property("a:b,c%\r\n") == "a%3Ab%2Cc%25%0D%0A" and report._data("a:b,c%\r\n") == "a:b,c%25%0D%0A"


# --- JSON ---


def test_json_has_words_for_what_json_has_not() -> None:
    given = verdict(
        one("dpo", "reverse_kl", "regression", math.inf, shift=Shift(np.array([math.inf])), candidate=math.inf), outcome="regression"
    )
    text = report.document(given, Path("a"), Path("b"), "mine")
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    (found,) = data["comparisons"]
    assert (found["worse"], found["upper"], found["candidate"], found["stderr"]) == ("inf", "inf", "inf", None)
    assert (data["code"], data["outcome"], data["about"], data["gate_sha256"]) == (1, "regression", "mine", GATE.sha256)
    assert Gate.model_validate(data["gate"]) == GATE


# --- strangers' names ---


@pytest.fixture
def hostile() -> Verdict:
    bad = one(HOSTILE, "reverse_kl", "regression", 0.2, task=HOSTILE)
    return verdict(
        bad, one(HOSTILE, "entropy", "info", task=HOSTILE), differences=(Difference(HOSTILE, HOSTILE),), outcome="not comparable"
    )


def lines_are_harmless(lines: list[str]) -> bool:
    """No workflow command of a stranger's: none at the start of a line, none of the old kind anywhere; nothing that moves a cursor."""
    return all(line.isprintable() and "##" not in line and not line.lstrip().startswith("::") for line in lines)


def test_on_the_terminal_they_are_text(hostile: Verdict, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(hostile)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == out.count("\n") == 1 + 2 + 3
    assert lines_are_harmless([line.replace("\t", " ") for line in out.splitlines()])
    assert not lines_are_harmless([f"{HOSTILE}: regression"]), "the check must be able to fail"


def test_an_annotation_stays_one_line(hostile: Verdict) -> None:
    for command in report.workflow_commands(hostile):
        assert re.fullmatch(r"::error title=klbench%3A [a-z ]+::[^\r\n]+", command)
        assert command.isprintable() and "##" not in command


def test_junit_stays_well_formed(hostile: Verdict) -> None:
    root = ET.fromstring(report.junit(hostile))
    assert [part.tag for part in root.iter()].count("testcase") == 3 and root.find(".//img") is None
    with pytest.raises(ET.ParseError):
        ET.fromstring(ET.tostring(ET.Element("testcase", name=HOSTILE)))  # as it comes, it is no XML


def test_markdown_keeps_its_table_and_has_no_tag(hostile: Verdict) -> None:
    text = report.markdown(hostile)
    assert set(re.findall(r"<[a-z/][^>]*>", text)) == {"<details>", "<summary>", "</summary>", "</details>"}
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(report.HEAD) + 1, 4 + len(report.FIGURES) + 1}
    assert "\x1b" not in text and "$" not in text and "@all" not in text


def test_a_summary_never_exceeds_what_github_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SUMMARY_BYTES", 6_000)
    text = report.markdown(verdict(*(one(f"method{i}", "reverse_kl", "regression", 0.2) for i in range(200))))
    assert len(text.encode()) < 7_000 and re.search(r"And 1\d\d more, which --json has", text) and text.rstrip().endswith("</details>")


def test_the_step_s_summary_is_appended_to_and_another_file_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, mine = tmp_path / "step", tmp_path / "mine.md"
    for file in (step, mine):
        file.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    for file in (step, mine):
        report.summarise(file, MIXED)
    assert step.read_text(encoding="utf-8").startswith("before\n## klbench check: regression")
    assert mine.read_text(encoding="utf-8").startswith("## klbench check: regression")
