"""`klbench accuracy`: every estimator's RMSE, bias and coverage against exact sums, beside what others compute from the same draws.

worlds     targets of which every figure is an exact sum        rivals     klbench's estimators and others', on the same draws
cells      replications to rows                                 criteria   what the rows have to show
report     how they are shown                                   plots      the page's two figures
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from klbench import executors
from klbench.accuracy import cells
from klbench.accuracy.cells import ADVERSARIES, QUICK, SETTINGS, Figures, Setting
from klbench.accuracy.report import Table, markdown
from klbench.errors import UserError, unknown
from klbench.executors import Event, Report
from klbench.record import write_atomically

REPLICATIONS: Final = 300
QUICK_REPLICATIONS: Final = 30
COLLAPSED_POLICIES: Final = 1000
CHUNK: Final = 100  # replications a worker does at a time


@dataclass(frozen=True)
class Chunk:
    """Replications first .. first + count - 1 of a setting: one worker's task."""

    setting: Setting
    seed: int
    first: int
    count: int

    @property
    def id(self) -> str:
        return f"{self.setting.name} #{self.first}"


def work(chunk: Chunk, tell: Report) -> None:
    """One chunk, in a worker; its figures travel as an event."""
    figures = cells.replications(chunk.setting, chunk.seed, chunk.first, chunk.count)
    tell({"phase": "figures", "figures": figures, "reach": cells.reach(chunk.setting, chunk.seed)})


def settings_of(targets: Sequence[str] | None, quick: bool) -> tuple[Setting, ...]:
    """The settings of the targets named, all when none is; the adversaries last. Raises UserError for a name that is none."""
    every = QUICK if quick else SETTINGS
    every += (Setting(ADVERSARIES, (), ("far",), replications=COLLAPSED_POLICIES),)
    if targets is None:
        return every
    known = dict.fromkeys(setting.target for setting in every)
    for name in targets:
        if name not in known:
            raise unknown("target", name, known)
    return tuple(setting for setting in every if setting.target in targets)


def run(
    replications: int | None = None, seed: int = 0, targets: Sequence[str] | None = None, *, quick: bool = False,
    workers: int | None = None,
    out: Path | None = None, docs: Path | None = None, command: str = "klbench accuracy",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Table:  # fmt: skip
    """The table, measured afresh; the same bytes for the same seed, whatever the workers (0: in this process).

    replications: a cell [default: 300, quick 30].  targets: names of `worlds.WORLDS` or "adversaries", None for all.  out: folder of
    accuracy.json, accuracy.csv and index.html.  docs: a markdown file.  on_event: as of `klbench.executors`, one cell a chunk.
    Raises UserError for what cannot be, and where a chunk fails.
    """
    count = replications or (QUICK_REPLICATIONS if quick else REPLICATIONS)
    if count < 2:
        raise UserError(f"at least 2 replications are needed for an RMSE, got {count}")
    chunks = [
        Chunk(setting, seed, first, min(CHUNK, (setting.replications or count) - first))
        for setting in settings_of(targets, quick)
        for first in range(0, setting.replications or count, CHUNK)
    ]
    found: dict[str, Figures] = {}
    reach: dict[str, float] = {}
    setting_of = {chunk.id: chunk.setting.name for chunk in chunks}

    def listen(event: dict[str, Any]) -> None:
        if event["phase"] == "figures":
            found[event["run"]] = event["figures"]
            if event["reach"] is not None:
                reach[setting_of[event["run"]]] = event["reach"]
        else:
            on_event(event)

    listen({"phase": "plan", "cells": len(chunks), "kept": 0})
    if workers == 0:
        for chunk in chunks:
            listen({"phase": "start", "run": chunk.id})
            work(chunk, lambda event, name=chunk.id: listen({"run": name, **event}))  # type: ignore[misc]
            listen({"phase": "done", "run": chunk.id})
    else:
        failures = executors.load("local")(chunks, work, workers or os.cpu_count() or 1, listen)
        if failures:
            raise UserError(f"{len(failures)} of {len(chunks)} parts of the table failed; {failures[0].id}: {failures[0].reason}")
    figures = cells.joined(found[chunk.id] for chunk in chunks)
    rows = tuple(cells.row_of(key, values) for key, values in figures.items())
    names = dict.fromkeys(setting_of.values())
    table = Table(rows, count, seed, {name: reach[name] for name in names if name in reach}, command)
    if out is not None:
        table.write(out)
    if docs is not None:
        write_atomically(docs, markdown(table).encode())
    return table
