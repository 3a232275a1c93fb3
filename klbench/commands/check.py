"""klbench check: is the candidate worse than the baseline, by an amount that matters, beyond noise?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klbench.errors import UserError

if TYPE_CHECKING:
    from klbench.gate.compare import SeedNoise, Verdict
    from klbench.gate.settings import Gate
    from klbench.record import Record

EPILOG = "Exit codes: 0 pass, 1 regression, 2 usage, 3 inconclusive (too little data), 4 not comparable, 5 nothing measured."


def check(
    baseline: Annotated[Path, typer.Option(help="run directory, board, record or baseline file to compare with")],
    candidate: Annotated[Path | None, typer.Option(help="the same, of what is on trial")] = None,
    gate: Annotated[Path | None, typer.Option(help="YAML file of metrics, directions and margins  [default: reverse_kl and gold]")] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML file: a case a policy and metric")] = None,
    summary: Annotated[Path | None, typer.Option(help="Markdown file; appended to where it is $GITHUB_STEP_SUMMARY")] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file: every comparison with its numbers")] = None,
    update: Annotated[bool, typer.Option("--update", help="afterwards make the candidate the baseline file")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="measure the gate's false alarms and power on the baseline's run")] = False,
    retrainings: Annotated[int, typer.Option(help="with --calibrate: boards to train with other seeds")] = 200,
    comparisons: Annotated[int, typer.Option(help="with --calibrate: of equals with equals, in all")] = 1000,
    workers: Annotated[int | None, typer.Option(min=1, help="with --calibrate: processes  [default: the cores]")] = None,
    include: Annotated[list[Path] | None, typer.Option(help="with --calibrate: directory of your own tasks and objectives")] = None,
) -> None:
    """Compare a candidate with a baseline: one verdict, with a known rate of false alarms."""
    if calibrate:
        if candidate is not None or update:
            raise UserError("--calibrate compares the baseline with its equals: it takes no --candidate and no --update")
        _calibrate(baseline, gate, retrainings, comparisons, workers, tuple(include or ()), json)
        return
    if candidate is None:
        raise UserError("check needs a --candidate (or --calibrate)")
    if update:
        _replaceable(baseline)
        if not baseline.exists():
            _update(baseline, _side(candidate))
            return

    from klbench.gate import report, settings

    asked = settings.DEFAULT if gate is None else settings.load(gate)
    noise, about = _measured(asked, gate)
    verdict = _compared(baseline, candidate, asked, noise)
    report.show(verdict, about)
    if junit is not None:
        report.write(junit, report.junit(verdict))
    if summary is not None:
        report.summarise(summary, verdict, about)
    if json is not None:
        report.write(json, report.document(verdict, baseline, candidate, about))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in report.workflow_commands(verdict):
            print(line)
    if not update:
        raise typer.Exit(verdict.code)
    _update(baseline, _side(candidate))


def _calibrate(
    baseline: Path, file: Path | None, retrainings: int, comparisons: int, workers: int | None, include: tuple[Path, ...], json: Path | None
) -> None:
    """Measures the gate of a file and writes what was found beside it; exit 1 where it does not hold its rate."""
    if file is None:
        raise UserError("--calibrate needs --gate FILE: what is measured is kept beside it")
    from rich.console import Console

    from klbench.gate import calibration, report, settings
    from klbench.gate.calibrate import run
    from klbench.progress import Progress
    from klbench.terminal import command_line

    asked = settings.load(file)
    with Progress(Console(stderr=True)) as progress:
        found = run(
            baseline, asked, retrainings=retrainings, comparisons=comparisons, workers=workers, include=include, command=command_line(),
            on_event=progress,
        )  # fmt: skip
    found.write(calibration.place_of(file))
    if json is not None:
        found.write(json)
    report.show_calibration(found)
    print(f"{calibration.place_of(file)}")
    if not found.held:
        raise typer.Exit(1)


def _measured(asked: Gate, file: Path | None) -> tuple[SeedNoise, str]:
    """The noise of training seeds as the gate's calibration measured it, and what to say of the gate."""
    if file is None:
        margins = ", ".join(f"{name} {metric.margin:g}" for name, metric in asked.metrics.items() if metric.margin is not None)
        return {}, f"the built-in margins ({margins}); --gate FILE sets your own"
    from klbench.gate import calibration

    return calibration.noise_for(asked, file)


def _compared(baseline: Path, candidate: Path, gate: Gate, noise: SeedNoise) -> Verdict:
    """The verdict. A side of another schema is not comparable, whatever else is there."""
    from klbench.gate import compare, sides
    from klbench.record import OtherSchemaError

    read = []
    for name, path in (("baseline", baseline), ("candidate", candidate)):
        try:
            read.append(sides.read(path))
        except OtherSchemaError as error:
            return compare.Verdict("not comparable", (), (sides.Difference(f"the {name}", str(error)),), (), gate)
    return compare.check(read[0], read[1], gate, noise)


def _side(path: Path) -> list[Record]:
    from klbench.gate import sides

    return sides.read(path)


# --- --update ---


def _replaceable(baseline: Path) -> None:
    """Raises UserError for what is there and is no baseline file."""
    from klbench.gate import sides

    if baseline.is_dir():
        raise UserError(f"--update writes a baseline file, and {baseline} is a directory; name a file, as baseline.json")
    if baseline.exists() and not sides.is_baseline(baseline):
        raise UserError(f"--update writes over baseline files alone, and {baseline} is none")


def _update(baseline: Path, records: list[Record]) -> None:
    """Writes the baseline and says what changed. Raises UserError for no records, and for two of one policy."""
    from klbench.gate import settings, sides

    if not records:
        raise UserError("--update: the candidate has no record, and a baseline of nothing compares nothing")
    sides.pairs([], records, settings.DEFAULT)
    try:
        was = {record.run.id: record for record in sides.read(baseline)} if baseline.exists() else {}
    except UserError:  # of another schema: all of it goes
        was = {}
    now = {record.run.id: record for record in records}
    sides.write(baseline, records)
    same = sum(1 for i in now.keys() & was.keys() if now[i].columns == was[i].columns)
    both = len(now.keys() & was.keys())
    print(f"{baseline}: {len(now)} records written; {len(now) - both} new, {both - same} changed, {same} as before, {len(was) - both} gone")
