"""`klbench check --calibrate`: a gate's false-alarm rate and power, measured on a baseline compared with its equals.

retrained   the suite of the baseline trained again with R other sets of seeds, each board compared with the next, in a ring. The noise of
            training seeds in a verdict is that of the ring's other half, so that no board helps to judge itself
split       two random halves of the draws of each policy of one board: equal policies, other draws
reseeded    a policy that is not trained drawn with two seeds (the samplers of the retrained boards), the trained ones held equal
power       the retrained comparisons with one metric of one policy (each in turn) worsened by k times what the gate says that it detects

    alarm = the whole verdict is a regression            found = that metric's p, after Holm, is at most the rate

Two neighbours of the ring share a board, the candidate of one and the baseline of the other: what makes it look worse in one makes it look
better in the other, so that alarms of neighbours are not positively correlated and the binomial interval of their share holds.

Cells that were done are not done again: the work lies in DIR/calibration and a killed calibration goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from klbench import executors
from klbench import run as grid
from klbench.errors import UserError
from klbench.gate.calibration import Calibration, Power, Share
from klbench.gate.compare import PER_PROMPT, SeedNoise, Verdict, check, decide, key
from klbench.gate.settings import ESTIMATOR, Gate
from klbench.gate.sides import Cell
from klbench.recompute import Recomputer
from klbench.record import Record
from klbench.suite import Suite

PLACE: Final = "calibration"  # folder in the baseline's directory
TIMES: Final = (0.5, 1.0, 1.5, 2.0)  # of the printed detectable worsening
RETRAININGS: Final = 200
COMPARISONS: Final = 1000
LEAST: Final = 8  # boards: half of them tell the noise for the other half

Board = Sequence[Record]


def run(
    directory: Path, gate: Gate, *, retrainings: int = RETRAININGS, comparisons: int = COMPARISONS, workers: int | None = None,
    include: tuple[Path, ...] = (), command: str = "", on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Calibration:  # fmt: skip
    """Measures a gate on the baseline in a run directory.

    retrainings: boards, of which each is a comparison.  comparisons: in all; what retraining and reseeding leave is made of splits.
    Raises UserError for a directory without a suite or samples, and where training fails.
    """
    if retrainings < LEAST:
        raise UserError(f"at least {LEAST} retrainings are needed to know the noise of training seeds, got {retrainings}")
    made = retrained(directory, retrainings, workers, include, on_event)
    boards = [_as_labelled(board) for board in made]
    alarms, undecided, power, detectable = _retrained(boards, gate)
    kinds = {"retrained": alarms}
    reseeded = _reseeded(boards, gate)
    if reseeded:
        kinds["reseeded"] = reseeded
    left = comparisons - sum(len(found) for found in kinds.values())
    kinds["split"] = _split(directory / PLACE, made, gate, max(left, 0), include, on_event)
    return Calibration(
        gate.sha256,
        gate.rate,
        {kind: Share(sum(found), len(found)) for kind, found in kinds.items() if found},
        undecided,
        power,
        noise_of(boards, gate),
        detectable,
        command,
    )


def retrained(
    directory: Path, count: int, workers: int | None, include: tuple[Path, ...], on_event: Callable[[dict[str, Any]], None]
) -> list[list[Record]]:
    """The suite of a run directory with `count` other sets of seeds, none of which is the baseline's or another's."""
    manifest = grid.manifest_in(directory)
    if not manifest:
        raise UserError(f"{directory}: no manifest.json; to calibrate, the baseline must be the directory of a run")
    suite = Suite.model_validate(manifest["suite"])
    span = max(suite.seeds) - min(suite.seeds) + 1
    suites = [suite.model_copy(update={"seeds": [s + (i + 1) * span for s in suite.seeds]}) for i in range(count)]
    return grid.rerun(suites, directory / PLACE, executor=executors.load("local"), workers=workers, include=include, on_event=on_event)


def _as_labelled(board: Board) -> list[Record]:
    """With seed labels that count from 0, by which policies are paired, in place of the seeds they were trained with."""
    seeds = {seed: label for label, seed in enumerate(sorted({r.run.seed for r in board}))}
    return [r.model_copy(update={"run": r.run.model_copy(update={"seed": seeds[r.run.seed]})}) for r in board]


def noise_of(boards: Sequence[Board], gate: Gate) -> dict[str, tuple[float, float]]:
    """By cell and metric the standard deviation over training seeds of a policy's figure (its draws' own error in it), and its dof."""
    values: dict[str, list[float]] = {}
    for record in (r for board in boards for r in board):
        if record.run.kind != "objective":
            continue
        cell = Cell(record.run.task, record.run.method, record.run.beta)
        for metric, asked in gate.metrics.items():
            if asked.direction == "info" or metric.startswith(ESTIMATOR):
                continue
            array = record.prompts.get(PER_PROMPT.get(metric, metric))
            figure = record.columns.get(metric)
            value = float(np.mean(array)) if array else None if figure is None else figure.value
            if value is not None and np.isfinite(value):
                values.setdefault(key(cell, metric), []).append(value)
    return {name: (float(np.std(x, ddof=1)), float(len(x) - 1)) for name, x in sorted(values.items()) if len(x) > 2}


def _ring(boards: Sequence[Board], gate: Gate) -> list[tuple[Board, Board, SeedNoise]]:
    """Each board with the next, and the noise of training seeds that boards other than these two show: the other half of the ring's, or
    where the two are of both halves that of all others."""
    half = len(boards) // 2
    noise = [noise_of(boards[:half], gate), noise_of(boards[half:], gate)]
    out: list[tuple[Board, Board, SeedNoise]] = []
    for i, board in enumerate(boards):
        at = (i + 1) % len(boards)
        inside = (i < half) == (at < half)
        own = noise[i < half] if inside else noise_of([b for j, b in enumerate(boards) if j not in (i, at)], gate)
        out.append((board, boards[at], own))
    return out


def _retrained(boards: Sequence[Board], gate: Gate) -> tuple[list[bool], Share, tuple[Power, ...], dict[str, float]]:
    verdicts = [check(a, b, gate, noise) for a, b, noise in _ring(boards, gate)]
    alarms = [v.outcome == "regression" for v in verdicts]
    undecided = Share(sum(v.outcome == "inconclusive" for v in verdicts), len(verdicts))
    return alarms, undecided, tuple(_power(verdicts, times, gate) for times in TIMES), detectable(verdicts)


def detectable(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """By metric the least worsening that is found four times in five, margins aside: the median of a cell's comparisons, at its worst cell.

    A metric of which some cell could detect nothing is left out.
    """
    found: dict[str, dict[Cell, list[float]]] = {}
    for verdict in verdicts:
        deciding = [c for c in verdict.comparisons if c.decides]
        shares = verdict.gate.rate / sum(c.asked.weight for c in deciding) if deciding else 0.0
        for c in deciding:
            assert c.shift is not None
            least = c.shift.seen(shares * c.asked.weight, 0.0, c.asked.direction == "band")
            found.setdefault(c.metric, {}).setdefault(c.cell, []).append(least)
    worst = {metric: max(float(np.median(x)) for x in cells.values()) for metric, cells in found.items()}
    return {metric: x for metric, x in worst.items() if np.isfinite(x)}


def _power(verdicts: Sequence[Verdict], times: float, gate: Gate) -> Power:
    """Of `times` the detectable worsening, one metric of one policy at a time, each in turn over the pairs."""
    found = blocked = of = 0
    for i, verdict in enumerate(verdicts):
        deciding = sorted((j for j, c in enumerate(verdict.comparisons) if c.decides), key=lambda j: str(verdict.comparisons[j].cell))
        if not deciding:
            continue
        at = deciding[i % len(deciding)]
        given = verdict.comparisons[at]
        if not given.seen or not np.isfinite(given.seen) or given.shift is None:
            continue
        shifted = replace(given, shift=replace(given.shift, values=given.shift.values + times * given.seen))
        again = decide([shifted if j == at else c for j, c in enumerate(verdict.comparisons)], (), (), gate)
        result = next(c for c in again.comparisons if c.cell == given.cell and c.metric == given.metric)
        of += 1
        found += result.p is not None and result.p <= gate.rate
        blocked += again.outcome == "regression"
    return Power(times, Share(found, of), Share(blocked, of))


def _reseeded(boards: Sequence[Board], gate: Gate) -> list[bool]:
    """Each board with itself, of which what is not trained was drawn with the next board's seed."""
    found = []
    for i, board in enumerate(boards):
        drawn = [r for r in boards[(i + 1) % len(boards)] if r.run.kind == "sampler"]
        if drawn:
            found.append(check(board, [*(r for r in board if r.run.kind != "sampler"), *drawn], gate).outcome == "regression")
    return found


def _split(
    place: Path, boards: Sequence[Board], gate: Gate, count: int, include: tuple[Path, ...], on_event: Callable[[dict[str, Any]], None]
) -> list[bool]:
    """`count` comparisons of two halves of the draws of one board, each board in turn."""
    if not count:
        return []
    recomputer = Recomputer(place, include)
    found = []
    on_event({"phase": "plan", "cells": 1, "kept": 0})
    on_event({"phase": "start", "run": "splits"})
    for i in range(count):
        on_event({"phase": "split", "run": "splits", "step": i, "of": count})
        halves = [recomputer.halves(record, i) for record in boards[i % len(boards)]]
        found.append(check([a for a, _ in halves], [b for _, b in halves], gate).outcome == "regression")
    on_event({"phase": "done", "run": "splits"})
    return found
