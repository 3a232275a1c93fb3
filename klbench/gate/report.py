"""A verdict as people and CI systems read it: terminal, JUnit XML, Markdown, workflow annotations, JSON.

Names of tasks and methods come from strangers' records. In each format they are text and nothing else: no line of the terminal begins with
one, so that none can be a workflow command (`::stop-commands::`, `##[group]`), and characters that move cursors are spaces.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final
from xml.etree import ElementTree as ET

from klbench.errors import UserError
from klbench.gate.calibration import Calibration, Share
from klbench.gate.compare import ORDER, WHOLE, Comparison, Verdict, by_cell
from klbench.record import write_atomically
from klbench.terminal import table

HEAD: Final = ("verdict", "task", "metric", "policies", "worst", "whose", "at most", "margin", "detectable")
FIGURES: Final = ("baseline", "candidate", "worse", "at most", "margin", "detectable", "p")
ANNOTATIONS: Final = 10  # GitHub shows no more of a kind for one step
SUMMARY_BYTES: Final = 900_000  # GitHub refuses a job summary above 1 MiB
NAMED: Final = 5  # comparisons that a line names before it counts


@final
@dataclass(frozen=True)
class Line:
    """One metric on one task, over its policies. worst: the one that worsened most, of an `info` metric the one that moved most."""

    verdict: str
    task: str
    metric: str
    compared: int
    policies: int
    worst: Comparison | None
    seen: float | None

    def cells(self, named: Counter[tuple[str, str]]) -> list[str]:
        """What HEAD names. named: how many betas a method has on a task."""
        worst = self.worst
        if worst is None:
            return [self.verdict, self.task, self.metric, f"0 of {self.policies}", *[""] * 5]
        whole = worst.cell == WHOLE
        size = _moved(worst) if worst.worse is None else worst.worse
        method = "" if whole or not size else worst.cell.method
        if method and named[worst.cell.task, worst.cell.method] > 1:
            method += f" β {worst.cell.beta:g}"
        count = "all" if whole else str(self.compared) if self.compared == self.policies else f"{self.compared} of {self.policies}"
        sizes = map(_three, (worst.upper, worst.asked.margin, self.seen))
        return [self.verdict, self.task, self.metric, count, f"{size:+.3g}" if size else "0", method, *sizes]


def lines(verdict: Verdict) -> list[Line]:
    """The short table: by task, metrics in the gate's order, the estimators' own at the end."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    metrics = list(verdict.gate.metrics)
    for c in sorted(verdict.comparisons, key=lambda c: (c.cell == WHOLE, c.cell.task, metrics.index(c.metric))):
        groups.setdefault((c.cell.task, c.metric), []).append(c)
    found = []
    for (task, metric), group in groups.items():
        known = [c for c in group if c.worse is not None]
        moved = [c for c in group if c.verdict == "info" and not math.isnan(_moved(c))]
        worst = max(known, key=lambda c: c.worse or 0.0) if known else max(moved, key=lambda c: abs(_moved(c)), default=None)
        if known and known[0].asked.direction == "band":
            worst = max(known, key=lambda c: abs(c.worse or 0.0))
        first = min(group, key=lambda c: ORDER.index(c.verdict)).verdict
        seen = max((c.seen for c in known if c.seen is not None), default=None)
        found.append(Line(first, task, metric, len(known or moved), len(group), worst, seen))
    return found


def sentences(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """(what, sentence), the gravest first: each difference, regression and figure in doubt; then what was left out, and why, in groups."""
    for difference in verdict.differences:
        yield "not comparable", str(difference)
    for what in ("regression", "inconclusive", "within margin"):
        for c in verdict.of(what):
            yield what, c.why
    left = [("not compared", c) for c in verdict.of("not compared")]
    noted = [
        ("note", c)
        for c in verdict.comparisons
        if c.decides and c.note and c.verdict not in ("regression", "inconclusive", "within margin")
    ]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for what, c in (*left, *noted):
        groups.setdefault((what, c.metric, c.note or "no figure on one side"), []).append(str(c.cell))
    for (what, metric, note), cells in groups.items():
        yield what, f"{metric} of {_few(cells)}: {note}"
    if verdict.new:
        yield "new", f"only the candidate has {_few([str(c) for c in verdict.new])}"


def show(verdict: Verdict, about: str = "") -> None:
    """On the terminal, or down a pipe: the short table, a sentence a finding, the outcome as the last line. about: the gate."""
    if about:
        print(f"gate: {_plain(about)}")
    betas = Counter((c.task, c.method) for c in {c.cell for c in verdict.comparisons})
    if verdict.comparisons:
        table(HEAD, ([_plain(text) for text in line.cells(betas)] for line in lines(verdict)), heading=True)
    for what, sentence in sentences(verdict):
        print(f"{what}: {_plain(sentence)}")
    print(f"{verdict.outcome}: {_plain(verdict.sentence)}")


def workflow_commands(verdict: Verdict) -> list[str]:
    """Workflow commands of GitHub, at most ANNOTATIONS; the last says how many more there would be."""
    grave = {"not comparable": "error", "regression": "error", "inconclusive": "warning"}
    found = [(grave[what], what, sentence) for what, sentence in sentences(verdict) if what in grave]
    if verdict.outcome == "nothing measured":
        found.append(("error", verdict.outcome, verdict.sentence))
    kept = found if len(found) <= ANNOTATIONS else found[: ANNOTATIONS - 1]
    commands = [f"::{level} title={_property(f'klbench: {what}')}::{_data(_plain(sentence))}" for level, what, sentence in kept]
    if len(found) > len(kept):
        commands.append(
            f"::{found[len(kept)][0]} title=klbench::{len(found) - len(kept)} more findings; the log and the summary have them all"
        )
    return commands


def junit(verdict: Verdict) -> bytes:
    """A suite a task, a case a policy and metric. Regressions fail, what is inconclusive or not comparable is an error, the rest skips."""
    root = ET.Element("testsuites", name="klbench check")
    by_task: dict[str, list[Comparison]] = {}
    for one, group in by_cell(verdict.comparisons):
        by_task.setdefault(one.task, []).extend(group)
    if verdict.differences or verdict.outcome == "nothing measured":
        suite = ET.SubElement(root, "testsuite", name="comparable")
        whys = [(d.where, d.what) for d in verdict.differences] or [("every policy", verdict.sentence)]
        for where, what in whys:
            case = ET.SubElement(suite, "testcase", classname="comparable", name=_plain(where), time="0")
            ET.SubElement(case, "error", type=verdict.outcome, message=_plain(what)).text = _plain(f"{where}: {what}")
    for task, comparisons in by_task.items():
        suite = ET.SubElement(root, "testsuite", name=_plain(task))
        for c in comparisons:
            name = c.metric if c.cell == WHOLE else f"{c.cell.method} β {c.cell.beta:g} {c.metric}"
            case = ET.SubElement(suite, "testcase", classname=_plain(task), name=_plain(name), time="0")
            why = _plain(c.why)
            if c.verdict in ("regression", "inconclusive"):
                kind = "failure" if c.verdict == "regression" else "error"
                ET.SubElement(case, kind, type=c.verdict, message=why).text = f"{why}\n{_plain(json.dumps(_numbers(c)))}"
            elif c.verdict in ("not compared", "info"):
                ET.SubElement(case, "skipped", message=f"{why} ({_four(c.baseline)} to {_four(c.candidate)})")
            else:
                ET.SubElement(case, "system-out").text = why
    for part in (*root, root):
        for kind, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            part.set(kind, str(sum(1 for _ in part.iter(tag))))
        part.set("time", "0")
    del root.attrib["skipped"]  # Jenkins' schema has it on suites alone
    ET.indent(root, " ")
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def markdown(verdict: Verdict, about: str = "") -> str:
    """A job summary: the outcome, the short table, the findings, and every comparison folded away, in SUMMARY_BYTES at most."""
    from klbench.export.markdown import escaped

    def text(words: str) -> str:
        return escaped(_plain(words)).replace("$", "&#36;") if words else ""

    betas = Counter((c.task, c.method) for c in {c.cell for c in verdict.comparisons})
    parts = [f"## klbench check: {verdict.outcome}", "", f"{text(verdict.sentence)}.", ""]
    if about:
        parts += [f"Gate: {text(about)}.", ""]
    if verdict.comparisons:
        rows = (" | ".join(map(text, line.cells(betas))) for line in lines(verdict))
        parts += [
            "| " + " | ".join(HEAD) + " |",
            "|" + "---|" * 3 + "---:|" * 2 + "---|" + "---:|" * 3,
            *(f"| {row} |" for row in rows),
            "",
        ]
    parts += _within([f"- **{what}** {text(sentence)}" for what, sentence in sentences(verdict)], SUMMARY_BYTES // 3)
    every = [
        "| " + " | ".join(map(text, [c.verdict, str(c.cell), c.metric, c.seeds, *map(_four, _figures(c))])) + " |"
        for _, group in by_cell(verdict.comparisons)
        for c in group
    ]
    if every:
        head = ["| verdict | policy | metric | seeds | " + " | ".join(FIGURES) + " |", "|" + "---|" * 4 + "---:|" * len(FIGURES)]
        room = SUMMARY_BYTES - len("\n".join(parts).encode())
        parts += ["", f"<details><summary>All {len(every):,} comparisons</summary>", "", *head, *_within(every, room), "", "</details>"]
    return "\n".join(parts) + "\n"


def document(verdict: Verdict, baseline: Path, candidate: Path, about: str = "") -> str:
    """JSON of everything, sorted keys, strict: infinite numbers are the words "inf" and "-inf"."""
    data = {
        "outcome": verdict.outcome,
        "code": verdict.code,
        "sentence": verdict.sentence,
        "baseline": str(baseline),
        "candidate": str(candidate),
        "about": about,
        "gate": verdict.gate.model_dump(mode="json"),
        "gate_sha256": verdict.gate.sha256,
        "comparisons": [_numbers(c) for c in verdict.comparisons],
        "differences": [{"where": d.where, "what": d.what} for d in verdict.differences],
        "new": [{"task": c.task, "method": c.method, "beta": c.beta} for c in verdict.new],
    }
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write(path: Path, text: str | bytes, append: bool = False) -> None:
    """A file atomically, or behind what is there already. Raises UserError."""
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    try:
        if append:
            with path.open("ab") as file:
                file.write(data)
        else:
            write_atomically(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def summarise(path: Path, verdict: Verdict, about: str = "") -> None:
    """The Markdown. $GITHUB_STEP_SUMMARY belongs to the whole step, so it is appended to; any other file is this summary alone."""
    given = os.environ.get("GITHUB_STEP_SUMMARY", "")
    write(path, markdown(verdict, about), append=bool(given) and path.resolve() == Path(given).resolve())


def _numbers(c: Comparison) -> dict[str, Any]:
    shift = c.shift
    return {
        "task": c.cell.task, "method": c.cell.method, "beta": c.cell.beta, "metric": c.metric, "unit": c.unit, "seeds": c.seeds,
        "direction": c.asked.direction, "margin": c.asked.margin, "weight": c.asked.weight,
        "verdict": c.verdict, "why": c.why, "note": c.note,
        "baseline": _word(c.baseline), "candidate": _word(c.candidate), "worse": _word(c.worse), "upper": _word(c.upper),
        "seen": _word(c.seen), "p": _word(c.p),
        "stderr": _word(shift.stderr if shift is not None and math.isfinite(shift.mean) else None),
        "clusters": None if shift is None else len(shift.values),
    }  # fmt: skip


def _word(x: float | None) -> float | str | None:
    return x if x is None or math.isfinite(x) else f"{x:g}"


def _figures(c: Comparison) -> list[float | None]:
    """What FIGURES names."""
    return [c.baseline, c.candidate, c.worse, c.upper, c.asked.margin, c.seen, c.p]


def _four(x: float | None) -> str:
    return "–" if x is None else f"{x:.4g}"


def _three(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


def _moved(c: Comparison) -> float:
    return math.nan if c.baseline is None or c.candidate is None else c.candidate - c.baseline


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _within(rows: Iterable[str], size: int) -> list[str]:
    """As many rows as fit, and how many do not."""
    kept: list[str] = []
    rows = list(rows)
    for row in rows:
        size -= len(row.encode("utf-8", "replace")) + 1
        if size < 0:
            return [*kept, "", f"And {len(rows) - len(kept):,} more, which --json has."]
        kept.append(row)
    return kept


def _plain(text: str) -> str:
    """One line in which nothing moves a cursor, ends a line or starts a command of GitHub's, Azure's or TeamCity's logs; fit for XML."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("##", "# #")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


# --- a calibration ---

ENOUGH: Final = 1.3  # times the stated rate, which the upper limit of the measured one may be
KINDS: Final = {
    "retrained": "trained again with another seed",
    "reseeded": "drawn again with another seed",
    "split": "two halves of the same draws",
}


def calibrated(found: Calibration) -> tuple[list[list[str]], list[list[str]]]:
    """Two tables: false alarms by what was compared with what, and what is found of a worsening."""
    alarms = [[KINDS.get(kind, kind), *_share(share)] for kind, share in found.alarms.items()]
    alarms.append(["all", *_share(found.whole)])
    return alarms, [[f"{p.times:g} x detectable", *_share(p.found)[1:], *_share(p.blocked)[1:]] for p in found.power]


def _share(share: Share) -> list[str]:
    return [f"{share.of:,}", str(share.count), f"{100 * share.value:.1f} %", f"{100 * share.low:.1f} to {100 * share.high:.1f} %"]


def show_calibration(found: Calibration) -> None:
    """What was measured of a gate, for people."""
    alarms, power = calibrated(found)
    table(("equals compared", "comparisons", "false alarms", "rate", "95 %"), alarms, heading=True)
    table(("worsening", "found", "rate", "95 %", "blocked", "rate", "95 %"), power, heading=True)
    print("detectable, whatever the margin: " + ", ".join(f"{metric} {x:.3g}" for metric, x in found.detectable.items()))
    print(f"inconclusive among the retrained: {found.inconclusive}")
    shown = "held" if found.whole.high <= ENOUGH * found.rate else "not refuted, and too few comparisons to show it"
    print(f"stated false-alarm rate {100 * found.rate:g} %: {shown if found.held else 'NOT HELD'}")
