"""The grid: a suite becomes runs, the runs without a record are done, the records become a board.

    DIR/.lock            owner's process number, held by flock: it dies with its owner
    DIR/manifest.json    what was asked for last
    DIR/records/<id>.json and the rest of DESIGN.md section 8, each written by the cell that it belongs to

Killed at any moment and started again, a run goes on where it stopped: a cell with a sound record is not done twice, and a run is
addressed by the hash of what was asked, so that suites and settings may share a directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from klbench import method, task
from klbench.board import Board, records_of
from klbench.board import manifest_in as manifest_in
from klbench.errors import UserError, unknown
from klbench.executors import Executor, Failure, Report
from klbench.included import standing
from klbench.record import Pooled, Record, Run, Score, checked_in, write_atomically
from klbench.suite import Suite, TaskEntry
from klbench.suite import load as load_suite

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA: Final = 1  # of manifest.json
PRIOR_ROW: Final = "ancestral"  # the sampler that returns the prior's own draws: the row everything is compared with
PACKAGES: Final = ("klbench", "torch", "transformers", "numpy")

L = TypeVar("L")
Hashes = Callable[[task.AbstractTask, str, float, Score], dict[str, str]]


@dataclass(frozen=True)
class GridCell:
    """One run with all that a worker needs to do it."""

    run: Run
    out: Path
    include: tuple[Path, ...]
    device: str

    @property
    def id(self) -> str:
        return self.run.id


@dataclass(frozen=True)
class Outcome:
    """What a grid came to. board: None where no cell has a record."""

    records: list[Record]
    failures: list[Failure]
    board: Board | None


def work(cell: GridCell, report: Report) -> None:
    """Trains and scores one cell, in a worker: its record is on the disk when this returns."""
    import torch

    from klbench.score import cell as train_and_score

    torch.set_num_threads(1)  # figures must not depend on how many cores a machine has
    train_and_score(cell.run, cell.out, report, cell.include, cell.device)


def hashes_of(given: task.AbstractTask, prior: str, beta: float, score: Score) -> dict[str, str]:
    """Hashes of what a cell of this task rests on: the prior's weights, the bank, the prompts, the target."""
    from klbench.score import hashes

    return hashes(given, prior, beta, score)


def suite_of(
    name: str, settings: Iterable[str] = (), *, tasks: Iterable[str] = (), objectives: Iterable[str] = (), seed: int | None = None,
    include: tuple[Path, ...] = ()
) -> Suite:  # fmt: skip
    """A suite by name or path, narrowed to `tasks` and `objectives` and counted from `seed`; empty means as the suite has it.

    A task that the suite does not name joins it with its own defaults, and `settings` hold for it too. "all" names every objective
    that can be loaded. Samplers stay: they cost little and are what an objective is compared with. Raises UserError.
    """
    spelled = {_plain(t): t for t in load_suite(name).tasks}
    wanted = [spelled.get(t, t) for t in dict.fromkeys(_plain(t) for t in tasks)]
    for given in wanted:
        _loaded("task", given, lambda n: task.load(n, include))
    joining = [f"tasks.{t}={{}}" for t in wanted if _plain(t) not in spelled]
    suite = load_suite(name, [*joining, *settings])
    changes: dict[str, Any] = {}
    if wanted:
        changes["tasks"] = {t: suite.tasks[t] for t in wanted}
    chosen = list(objectives)
    if chosen:
        every = method.names("objectives", include)
        changes["objectives"] = list(dict.fromkeys(o for c in chosen for o in (every if c == "all" else [_plain(c)])))
    if seed is not None:
        changes["seeds"] = [seed + i for i in range(len(suite.seeds))]
    return suite.model_copy(update=changes)


def resolve(suite: Suite, include: tuple[Path, ...] = (), hashes: Hashes = hashes_of) -> list[Run]:
    """The runs of a suite: for each task the prior's own row, the samplers, and each objective at each seed.

    Every name is looked up before the first hash is taken. Raises UserError with the nearest name.
    """
    standing(include)
    tasks = {name: _loaded("task", name, lambda n: task.load(n, include)) for name in suite.tasks}
    objectives = list(dict.fromkeys(_plain(o) for o in suite.objectives))
    samplers = list(dict.fromkeys([PRIOR_ROW, *(_plain(s) for s in suite.samplers)]))
    for name in objectives:
        _loaded("objective", name, lambda n: method.objective(n, include))
    for name in samplers:
        _loaded("sampler", name, lambda n: method.sampler(n, include))
    known = {*method.names("objectives"), *(path.stem for folder in include for path in folder.glob("*.py"))}
    for name in suite.methods:
        if method.base(name) not in known:  # settings of an objective nobody knows would be passed over in silence
            raise unknown(f"objective (under methods of suite {suite.name})", name, known)
    if not tasks or not suite.seeds:
        raise UserError(f"suite {suite.name} names no {'seed' if tasks else 'task'}")
    trains = {(t, o): suite.train_of(t, o) for t in tasks for o in objectives}
    scores = {t: suite.score_of(t) for t in tasks}

    runs: list[Run] = []
    for name, loaded in tasks.items():
        beta = _beta(suite.tasks[name], loaded)
        base = Run(
            task=loaded.name, task_version=loaded.version, method=PRIOR_ROW, kind="sampler", prior=suite.prior, beta=beta,
            seed=suite.seeds[0], max_new_tokens=loaded.max_new_tokens, score=scores[name],
            hashes=hashes(loaded, suite.prior, beta, scores[name]),
        )  # fmt: skip
        for sampler in samplers:
            runs.append(_changed(base, method=sampler, hashes={**base.hashes, **_file_hash(method.base(sampler), include)}))
        for objective in objectives:
            found = {**base.hashes, **_file_hash(method.base(objective), include), **_data_hash(trains[name, objective].data)}
            for seed in suite.seeds:
                runs.append(_changed(base, method=objective, kind="objective", seed=seed, train=trains[name, objective], hashes=found))
    return runs


def run_suite(
    suite: Suite,
    out: Path,
    *,
    executor: Executor,
    console: Console,
    command: str = "",
    workers: int | None = None,
    device: str | None = None,
    include: tuple[Path, ...] = (),
    on_event: Report = lambda event: None,
    hashes: Hashes = hashes_of,
    work: Callable[[GridCell, Report], None] = work,
) -> Outcome:
    """Does what is missing of a suite in `out`, writes its board there and prints it on `console`.

    workers: None takes the cores this process may use, or one process on an accelerator.  device: None takes CUDA where there is any.
    Events go to `on_event` (klbench/progress.py lists them). A failed cell is in `failures` and has no record, the others go on.
    Raises UserError, before anything is written, for bad input and for a directory that is in use or is not a run's.
    """
    runs = resolve(suite, include, hashes)
    where, count, out = _place(out, workers, device)
    with owned(out):
        missing = missing_of(runs, out, on_event)
        _write_manifest(out, suite, runs, command, include)
        records, failures = complete(runs, missing, out, executor, count, where, include, on_event, work)
        failures += _pooled(records, suite.pool, out, include, where, executor, count, on_event)
        board = publish(out, records, manifest_in(out), console, Pooled.all_in(out), checked_in(out)) if records else None
    return Outcome(records, failures, board)


def rerun(
    suites: Sequence[Suite], out: Path, *, executor: Executor, workers: int | None = None, include: tuple[Path, ...] = (),
    on_event: Report = lambda event: None,
) -> list[list[Record]]:  # fmt: skip
    """The records of several suites that share a directory, each suite's by themselves; no board. What is there is not done again.

    The manifest is the last suite's. Raises UserError, as `run_suite`, and where a cell fails.
    """
    resolved = [resolve(suite, include) for suite in suites]
    where, count, out = _place(out, workers, None)
    runs = [run for each in resolved for run in each]
    with owned(out):
        missing = missing_of(runs, out, on_event)
        _write_manifest(out, suites[-1], runs, "", include)
        records, failures = complete(runs, missing, out, executor, count, where, include, on_event)
    if failures:
        raise UserError(f"{len(failures)} of {len(runs)} cells failed; {failures[0].id}: {failures[0].reason}")
    by_id = {record.run.id: record for record in records}
    return [[by_id[run.id] for run in each] for each in resolved]


def _place(out: Path, workers: int | None, device: str | None) -> tuple[str, int, Path]:
    """Device, processes and absolute directory. Raises UserError for what cannot be."""
    where = device_of(device)
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    out = out.absolute()
    _fit_to_write(out)
    return where, workers or (_cores() if where == "cpu" else 1), out


def missing_of(runs: Sequence[Run], out: Path, on_event: Report) -> list[Run]:
    """Those without a sound record."""
    missing = [run for run in runs if _kept(run, out, on_event) is None]
    on_event({"phase": "plan", "cells": len(missing), "kept": len(runs) - len(missing)})
    return missing


def complete(
    runs: Sequence[Run], missing: Sequence[Run], out: Path, executor: Executor, count: int, device: str, include: tuple[Path, ...],
    on_event: Report, work: Callable[[GridCell, Report], None] = work,
) -> tuple[list[Record], list[Failure]]:  # fmt: skip
    """Does the missing runs in a directory that is owned; the records of all of them, and failures."""
    cells = [GridCell(run, out, include, device) for run in missing]
    failures = executor(cells, work, min(count, len(cells)), on_event) if cells else []
    failed = {failure.id for failure in failures}
    records = []
    for run in runs:
        record = None if run.id in failed else _kept(run, out, on_event)
        if record is not None:
            records.append(record)
        elif run.id not in failed:
            failures.append(Failure(run.id, "ended without a record"))
            on_event({"phase": "notice", "text": f"{run.id}  failed: ended without a record"})
    return records, failures


def publish(
    out: Path, records: Sequence[Record], manifest: dict[str, Any], console: Console | None = None, pools: Sequence[Pooled] = (),
    checked: Mapping[str, str] | None = None,
) -> Board:  # fmt: skip
    """Writes board.json, board.csv and the pages (index.html, pages/) of these records into `out`; prints the table on a console.

    Raises UserError, before anything is written, where the records make no board.
    """
    from klbench.page import site
    from klbench.truths import render as render_truths

    board = Board.of(records, manifest, pools, checked)
    try:
        out.mkdir(parents=True, exist_ok=True)
        board.write(out)
        site.write(board, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    if console is not None:
        board.render(console)
        render_truths(board.truths, console)
    return board


def records_in(directory: Path) -> list[Record]:
    """The records of a run directory that its manifest names, or all of them where there is no manifest; sorted by id.

    Raises UserError where there is none, and for one that cannot be read.
    """
    return [Record.read(path) for path in records_of(directory, manifest_in(directory))]


def device_of(name: str | None) -> str:
    """`cpu`, `cuda`, `cuda:1`, `mps`, checked against this machine; None takes CUDA where there is any. Raises UserError."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps"):
        raise unknown("device", name, ["cpu", "cuda", "mps"])
    if number and not (kind == "cuda" and number.isdecimal()):
        raise UserError(f"device {name!r}: cpu, mps, cuda or cuda:N expected")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[kind]
    if not there or (number and int(number) >= torch.cuda.device_count()):
        raise UserError(f"device {name!r} is not on this machine")
    return name


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Makes the directory and holds its lock. Raises UserError when another process has it, or when it cannot be written.

    The descriptor is not inherited by workers (Python opens it so), and the kernel drops the lock with this process, however it ends.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
            raise UserError(f"{out} is in use by process {owner or 'unknown'}") from None
        except OSError as error:
            raise UserError(f"{out} cannot be locked: {error.strerror}") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _pooled(
    records: Sequence[Record], most: int, out: Path, include: tuple[Path, ...], device: str, executor: Executor, count: int,
    on_event: Report,
) -> list[Failure]:  # fmt: skip
    """The pools that are missing: one a table with two or more policies, made by the executor like any cell."""
    from klbench import pooled
    from klbench.board import comparable

    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(comparable(record), []).append(record)
    cells = [pooled.PoolCell(tuple(group), pooled.members_of(group, most), out, include, device) for group in groups.values()]
    there = Pooled.all_in(out)
    missing = [c for c in cells if c.members and len(c.records) > 1 and not any(p.hash == c.hash for p in there)]
    if not missing:
        return []
    on_event({"phase": "plan", "cells": len(missing), "kept": 0})
    return executor(missing, pooled.work, min(count, len(missing)), on_event)


def _kept(run: Run, out: Path, on_event: Report) -> Record | None:
    """The record of a run, or None where it is to be made. Raises UserError for one that this version or this run did not write.

    A file that is no JSON is what a failing disk leaves behind (klbench replaces whole files): it is redone, with a notice.
    """
    path = out / "records" / f"{run.id}.json"
    try:
        json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        on_event({"phase": "notice", "text": f"{path}: cut short, this cell is done again"})
        return None
    record = Record.read(path)
    if record.run != run:
        raise UserError(f"{path}: the record of another run ({record.run.id}); move it away to have this cell done")
    return record


def _fit_to_write(out: Path) -> None:
    """Refuses a file, and a folder of other things: `--out .` must not replace somebody's index.html."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a directory")
    if not out.is_dir():
        return
    try:
        there = [p.name for p in out.iterdir() if not p.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{out} cannot be read: {error.strerror}") from None
    if there and "manifest.json" not in there:
        raise UserError(f"{out} is not empty and has no manifest.json: it is not the directory of a run")
    manifest_in(out)


def _write_manifest(out: Path, suite: Suite, runs: list[Run], command: str, include: tuple[Path, ...]) -> None:
    data = {
        "schema_version": SCHEMA,
        "command": command,
        "suite": suite.model_dump(mode="json"),
        "seeds": suite.seeds,
        "include": [str(path) for path in include],
        "hashes": {run.task: run.hashes for run in reversed(runs)},  # of the prior's own row, the first of its task
        "versions": {**{name: _version(name) for name in PACKAGES}, "python": platform.python_version()},
        "git": _revision(),
        "runs": [run.id for run in runs],
    }
    text = json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    path = out / "manifest.json"
    try:
        if not (path.exists() and path.read_text(encoding="utf-8") == text):
            write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Commit of the checkout that this file is in, with `+` where it has changes; None for an installed package or without git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        state = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "--", "klbench", "tasks"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if state.stdout.strip() else "")


def _loaded(kind: str, name: str, load: Callable[[str], L]) -> L:
    """`load(name)`, in which whatever a plugin's own code raises is told as bad input: its kind, its name and what it raised."""
    try:
        return load(name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{kind} {name!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _beta(entry: TaskEntry, loaded: task.AbstractTask) -> float:
    return loaded.beta if entry.beta is None else entry.beta


def _changed(run: Run, **fields: Any) -> Run:
    return Run.model_validate({**run.model_dump(), **{k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in fields.items()}})


def _plain(name: str) -> str:
    """Hyphen equals underscore in a name; what stands behind a colon are values."""
    head, colon, rest = name.partition(":")
    return head.replace("-", "_") + colon + rest


def _included(name: str, include: tuple[Path, ...]) -> Path | None:
    return next((path for folder in include if (path := folder / f"{name}.py").is_file()), None)


def _data_hash(data: str) -> dict[str, str]:
    """Of a file of training data, which decides what is learnt as much as the settings do. Raises UserError where there is none."""
    if not data:
        return {}
    if not Path(data).is_file():
        raise UserError(f"train.data {data}: no such file")
    return {"data": hashlib.sha256(Path(data).read_bytes()).hexdigest()}


def _file_hash(name: str, include: tuple[Path, ...]) -> dict[str, str]:
    """An included file may change between two runs under one name: its hash is part of what was asked."""
    path = _included(name, include)
    return {} if path is None else {"method": hashlib.sha256(path.read_bytes()).hexdigest()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
