"""The grid with a work function that costs nothing: what is resolved, done, kept, redone, refused; one owner a directory."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from rich.console import Console

from klbench import run as grid
from klbench import task
from klbench.errors import UserError
from klbench.estimate import Estimate, exactly
from klbench.executors import C, Event, Executor, Failure, Report
from klbench.executors.local import execute
from klbench.page import site
from klbench.progress import Progress, span
from klbench.record import Record, Run, write_atomically
from klbench.suite import Suite
from klbench.target import Policy, Reward, TiltedPrior

HERE = Path(__file__).parent

SUITE = {
    "name": "toys",
    "tasks": {"toy_a": {}, "toy_b": {"beta": 2.0, "score": {"draws": 64}}},
    "objectives": ["mine", "yours"],
    "seeds": [0, 1],
    "train": {"steps": 5},
    "methods": {"yours": {"lr": 0.01, "tasks": {"toy_b": {"steps": 9}}}},
}

OBJECTIVE = """
from dataclasses import dataclass
from klbench.method import AbstractObjective

@dataclass(frozen=True)
class It(AbstractObjective):
    optimum = "none"
    source = "a test"

    def loss(self, batch, beta):
        return batch.log_q.sum()
"""

SAMPLER = """
from dataclasses import dataclass
from klbench.method import AbstractSampler

@dataclass(frozen=True)
class Plain(AbstractSampler):
    n: int = 1
    source = "a test"

    def log_ratio(self, reward, law, beta, reward_max):
        return 0 * reward

    def pick(self, reward, beta, reward_max, draws, seed):
        return reward[:draws], draws

    def cost(self, law, beta, reward_max):
        return 1.0
"""


@dataclass(frozen=True)
class ToyTask(task.AbstractTask):
    """A task with its own name; nothing of it is ever drawn."""

    name: str = "toy_a"  # type: ignore[misc]
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "nothing"
    max_new_tokens: ClassVar[int] = 4
    beta: ClassVar[float] = 0.5

    def prompts(self, split: str) -> list[str]:
        return [split]

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        raise NotImplementedError

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return None


@pytest.fixture
def include(tmp_path: Path) -> tuple[Path, ...]:
    folder = tmp_path / "plugins"
    folder.mkdir()
    for name in ("mine", "yours"):
        (folder / f"{name}.py").write_text(OBJECTIVE)
    for name in ("ancestral", "best"):
        (folder / f"{name}.py").write_text(SAMPLER)
    return (folder,)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, include: tuple[Path, ...] = ()) -> ToyTask:
        if name not in ("toy_a", "toy_b", "toy_c"):
            raise UserError(f"no task {name!r}")
        return ToyTask(name)

    monkeypatch.setattr(task, "load", load)
    monkeypatch.setattr(site, "write", lambda board, folder: (folder / "index.html").write_text("figures take a second to draw"))


def hashes(given: task.AbstractTask, prior: str, beta: float, score: object) -> dict[str, str]:
    return {"prior": prior, "prompts": f"{given.name} {beta}"}


def suite(**changes: object) -> Suite:
    return Suite.model_validate({**SUITE, **changes})


def record_of(run: Run) -> Record:
    value = (int(run.id[-8:], 16) % 1000) / 1000
    figure = Estimate(value, value - 0.1, value + 0.1, 0.05, 128)
    columns = {name: figure for name in ("reward", "kl_prior", "reverse_kl", "wasted_nats", "entropy")}
    return Record(
        run=run, status="certified", columns={**columns, "log_z": exactly(0.5)}, prompt_ids=["p0", "p1", "p2"],
        prompts={"free": [value, value + 0.1, value - 0.1]}, frontier=[], samples=[],
        cost={"samples": 1, "machine": {"seconds": time.time()}},
    )  # fmt: skip


def write(cell: grid.GridCell, report: Report) -> None:
    """Notes each attempt, then leaves the record; a cell whose marker says so raises, and one that is to be slow waits."""
    marks = cell.out.parent / "marks"
    with open(cell.out.parent / "attempts", "a") as file:
        file.write(cell.id + "\n")
    if (marks / f"{cell.id}.raise").exists() or (marks / "all.raise").exists():
        raise UserError("reward f gave nan")
    if (marks / f"{cell.id}.forget").exists():
        return
    if (marks / "slow").exists():
        time.sleep(0.3)
    report({"phase": "score", "step": 1, "of": 1})
    write_atomically(cell.out / "records" / f"{cell.id}.json", record_of(cell.run).to_json().encode())


def at_once(cells: Sequence[C], work: Callable[[C, Report], None], workers: int, on_event: Report) -> list[Failure]:
    """An executor without processes: what a run comes to does not depend on who runs its cells."""
    failures = []
    for cell in cells:
        try:
            work(cell, on_event)
        except UserError as error:
            failures.append(Failure(cell.id, str(error)))
    return failures


def go(
    tmp_path: Path, include: tuple[Path, ...], events: list[Event] | None = None, asked: Suite | None = None, out: str = "out",
    executor: Executor = at_once,
) -> grid.Outcome:  # fmt: skip
    return grid.run_suite(
        asked or suite(), tmp_path / out, executor=executor, console=Console(file=io.StringIO()), command="klbench run toys", workers=2,
        device="cpu", include=include, on_event=(events if events is not None else []).append, hashes=hashes, work=write,
    )  # fmt: skip


def attempts(tmp_path: Path) -> list[str]:
    path = tmp_path / "attempts"
    done = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return sorted(done)


# resolve


def test_a_suite_is_the_prior_the_samplers_and_objectives_by_seeds(include: tuple[Path, ...]) -> None:
    runs = grid.resolve(suite(samplers=["best:4", "ancestral"]), include, hashes)
    of_a = [(r.method, r.kind, r.seed) for r in runs if r.task == "toy_a"]
    assert of_a == [
        ("ancestral", "sampler", 0), ("best:4", "sampler", 0),
        ("mine", "objective", 0), ("mine", "objective", 1), ("yours", "objective", 0), ("yours", "objective", 1),
    ]  # fmt: skip
    assert len(runs) == 12 and len({r.id for r in runs}) == 12
    by = {(r.task, r.method, r.seed): r for r in runs}
    assert by["toy_a", "mine", 0].beta == 0.5 and by["toy_b", "mine", 0].beta == 2.0
    assert by["toy_a", "mine", 0].score.draws == 128 and by["toy_b", "best:4", 0].score.draws == 64
    trains = {key: r.train for key, r in by.items() if r.train is not None}
    assert trains["toy_a", "mine", 0].steps == 5 and trains["toy_b", "yours", 1].steps == 9 and trains["toy_b", "yours", 1].lr == 0.01
    assert by["toy_a", "ancestral", 0].train is None
    assert {r.task_version for r in runs} == {3} and {r.max_new_tokens for r in runs} == {4}
    assert by["toy_b", "yours", 1].hashes["prompts"] == "toy_b 2.0"


def test_an_included_file_is_part_of_what_was_asked(include: tuple[Path, ...]) -> None:
    before = {r.method: r.id for r in grid.resolve(suite(seeds=[0], tasks={"toy_a": {}}), include, hashes)}
    (include[0] / "mine.py").write_text(OBJECTIVE + "# edited\n")
    after = {r.method: r.id for r in grid.resolve(suite(seeds=[0], tasks={"toy_a": {}}), include, hashes)}
    assert {m for m in before if before[m] != after[m]} == {"mine"}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"objectives": ["mien"]}, "no objective 'mien'; did you mean 'mine'"),
        ({"samplers": ["bst:4"]}, "no sampler 'bst'; did you mean 'best'"),
        ({"methods": {"yuors": {"lr": 1.0}}}, "no objective .* 'yuors'; did you mean 'yours'"),
        ({"tasks": {"toy_z": {}}}, "no task 'toy_z'"),
        ({"tasks": {}}, "names no task"),
        ({"seeds": []}, "names no seed"),
        ({"methods": {"mine": {"stesp": 1}}}, "'stesp'; did you mean 'steps'"),
    ],
)
def test_names_are_looked_up_before_the_first_hash(include: tuple[Path, ...], changes: dict[str, object], says: str) -> None:
    def never(*_: object) -> dict[str, str]:
        raise AssertionError("a hash was taken of a suite that is not sound")

    with pytest.raises(UserError, match=says):
        grid.resolve(suite(**changes), include, never)


def test_a_plugin_that_cannot_be_imported_is_named(include: tuple[Path, ...]) -> None:
    (include[0] / "mine.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="objective 'mine' cannot be loaded: ModuleNotFoundError"):
        grid.resolve(suite(), include, hashes)
    with pytest.raises(UserError, match="no such directory"):
        grid.resolve(suite(), (include[0] / "nowhere",), hashes)


def test_suite_of_narrows_and_counts_seeds(tmp_path: Path, include: tuple[Path, ...]) -> None:
    path = tmp_path / "toys.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    asked = grid.suite_of(
        str(path), ["beta=0.25", "train.steps=7"], tasks=["toy-b", "toy_c"], objectives=["yours"], seed=5, include=include
    )
    assert list(asked.tasks) == ["toy_b", "toy_c"] and asked.objectives == ["yours"] and asked.seeds == [5, 6]
    assert {e.beta for e in asked.tasks.values()} == {0.25} and asked.train.steps == 7
    assert asked.tasks["toy_b"].score == {"draws": 64}
    assert {"mine", "yours"} <= set(grid.suite_of(str(path), objectives=["all"], include=include).objectives)
    assert not {"best", "ancestral"} & set(grid.suite_of(str(path), objectives=["all"], include=include).objectives)
    with pytest.raises(UserError, match="no task 'toy_z'"):
        grid.suite_of(str(path), tasks=["toy_z"])
    with pytest.raises(UserError, match="'train.stesp'; did you mean 'train.steps'"):
        grid.suite_of(str(path), ["train.stesp=3"])


# run_suite


def test_a_run_writes_records_manifest_and_board_and_does_nothing_twice(tmp_path: Path, include: tuple[Path, ...]) -> None:
    outcome = go(tmp_path, include)
    out = tmp_path / "out"
    ids = [run.id for run in grid.resolve(suite(), include, hashes)]
    assert attempts(tmp_path) == sorted(ids) and len(ids) == 10
    assert [r.run.id for r in outcome.records] == ids and outcome.failures == []
    assert {p.name for p in out.iterdir()} == {".lock", "manifest.json", "records", "board.json", "board.csv", "index.html"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["runs"] == ids and manifest["suite"]["name"] == "toys" and manifest["seeds"] == [0, 1]
    assert manifest["hashes"]["toy_b"]["prompts"] == "toy_b 2.0" and manifest["versions"]["torch"] and manifest["versions"]["python"]

    before = {p: p.stat().st_mtime_ns for p in [*(out / "records").iterdir(), out / "manifest.json"]}
    events: list[Event] = []
    go(tmp_path, include, events)
    assert attempts(tmp_path) == []
    assert events == [{"phase": "plan", "cells": 0, "kept": 10}]  # no cell has so much as started
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_two_settings_share_a_directory(tmp_path: Path, include: tuple[Path, ...]) -> None:
    first = go(tmp_path, include)
    other = suite(train={"steps": 6}, methods={})
    second = go(tmp_path, include, asked=other)
    assert len(list((tmp_path / "out" / "records").iterdir())) == 10 + 8  # the prior's rows are the same
    assert len(second.records) == 10
    on_board = {row["id"] for t in json.loads((tmp_path / "out" / "board.json").read_text())["tables"] for row in t["rows"]}
    assert on_board == {r.run.id for r in second.records} != {r.run.id for r in first.records}
    assert {r.run.id for r in grid.records_in(tmp_path / "out")} == on_board
    attempts(tmp_path)
    go(tmp_path, include)
    assert attempts(tmp_path) == []


def test_a_truncated_record_is_redone_with_a_notice(tmp_path: Path, include: tuple[Path, ...]) -> None:
    outcome = go(tmp_path, include)
    hurt = outcome.records[3]
    path = tmp_path / "out" / "records" / f"{hurt.run.id}.json"
    path.write_bytes(path.read_bytes()[:100])
    attempts(tmp_path)
    events: list[Event] = []
    again = go(tmp_path, include, events)
    assert attempts(tmp_path) == [hurt.run.id]
    assert [str(path) in e["text"] for e in events if e["phase"] == "notice"] == [True]
    assert Record.read(path).comparable() == hurt.comparable() == again.records[3].comparable()


def test_a_record_of_another_run_or_schema_is_named_and_kept(tmp_path: Path, include: tuple[Path, ...]) -> None:
    outcome = go(tmp_path, include)
    folder = tmp_path / "out" / "records"
    a, b = (folder / f"{r.run.id}.json" for r in outcome.records[:2])
    whole = a.read_text()
    for text, says in (
        (b.read_text(), "the record of another run"),
        (whole.replace('"schema_version": 1', '"schema_version": 9'), "schema"),
    ):
        a.write_text(text)
        with pytest.raises(UserError, match=says) as refused:
            go(tmp_path, include)
        assert str(a) in str(refused.value) and a.read_text() == text


def test_a_failing_cell_costs_itself_and_is_tried_again(tmp_path: Path, include: tuple[Path, ...]) -> None:
    ids = [run.id for run in grid.resolve(suite(), include, hashes)]
    marks = tmp_path / "marks"
    marks.mkdir()
    (marks / f"{ids[2]}.raise").touch()
    (marks / f"{ids[4]}.forget").touch()
    events: list[Event] = []
    outcome = go(tmp_path, include, events)
    assert [e["text"] for e in events if e["phase"] == "notice"] == [f"{ids[4]}  failed: ended without a record"]
    assert [(f.id, f.reason) for f in outcome.failures] == [(ids[2], "reward f gave nan"), (ids[4], "ended without a record")]
    assert len(outcome.records) == 8 and outcome.board is not None
    for mark in marks.iterdir():
        mark.unlink()
    attempts(tmp_path)
    assert go(tmp_path, include).failures == []
    assert attempts(tmp_path) == sorted([ids[2], ids[4]])


def test_when_every_cell_fails_there_is_no_board(tmp_path: Path, include: tuple[Path, ...]) -> None:
    (tmp_path / "marks").mkdir()
    (tmp_path / "marks" / "all.raise").touch()
    outcome = go(tmp_path, include)
    assert outcome.board is None and outcome.records == [] and len(outcome.failures) == 10
    assert not (tmp_path / "out" / "index.html").exists()


def test_bad_input_leaves_no_directory(tmp_path: Path, include: tuple[Path, ...]) -> None:
    with pytest.raises(UserError, match="no objective"):
        go(tmp_path, include, asked=suite(objectives=["mien"]))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="device 'tpu'"):
        grid.run_suite(suite(), tmp_path / "out", executor=at_once, console=Console(), device="tpu", include=include, hashes=hashes)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, include: tuple[Path, ...]) -> None:
    other = tmp_path / "site"
    other.mkdir()
    (other / "index.html").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        go(tmp_path, include, out="site")
    (other / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(UserError, match="not the manifest of a klbench run"):
        go(tmp_path, include, out="site")
    assert {p.name: p.read_text() for p in other.iterdir()} == {"index.html": "mine", "manifest.json": '{"name": "a web app"}'}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a directory"):
        go(tmp_path, include, out="file")


def test_the_second_owner_of_a_directory_is_told_who_the_first_is(tmp_path: Path, include: tuple[Path, ...]) -> None:
    with grid.owned(tmp_path / "out"):
        with pytest.raises(UserError, match=f"out is in use by process {os.getpid()}$"):
            go(tmp_path, include)
        assert attempts(tmp_path) == []
    assert go(tmp_path, include).failures == []


OWNER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_run
from klbench import task
task.load = lambda name, include=(): test_run.ToyTask(name)
if __name__ == "__main__":
    test_run.go(Path({folder!r}), (Path({plugins!r}),), executor=test_run.execute)
"""


def test_killed_at_any_moment_it_goes_on_where_it_stopped(tmp_path: Path, include: tuple[Path, ...]) -> None:
    """kill -9 while cells run: the lock is free although workers were alive, what was done is kept, the rest is done once."""
    whole = {r.run.id: r.comparable() for r in go(tmp_path, include, out="whole").records}
    attempts(tmp_path)
    (tmp_path / "marks").mkdir()
    (tmp_path / "marks" / "slow").touch()
    script = tmp_path / "owner.py"
    script.write_text(OWNER.format(here=str(HERE), folder=str(tmp_path), plugins=str(include[0])))
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    records = tmp_path / "out" / "records"
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None and len(list(records.glob("*.json"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    kept = {p.stem for p in records.glob("*.json")}
    assert 3 <= len(kept) < 10
    (tmp_path / "marks" / "slow").unlink()
    attempts(tmp_path)
    outcome = go(tmp_path, include, executor=execute)
    assert attempts(tmp_path) == sorted(set(whole) - kept)
    assert {r.run.id: r.comparable() for r in outcome.records} == whole


def test_records_in_refuses_what_holds_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records in"):
        grid.records_in(tmp_path)
    with pytest.raises(UserError, match="no directory"):
        grid.records_in(tmp_path / "nowhere")


# progress


def test_progress_off_a_terminal_is_one_line_a_finished_cell() -> None:
    now = [0.0]
    text = io.StringIO()
    with Progress(Console(file=text, width=40), clock=lambda: now[0]) as progress:
        progress({"phase": "plan", "cells": 4, "kept": 2})
        for name in ("a", "b"):
            progress({"run": name, "phase": "start"})
        now[0] = 30.0
        progress({"run": "a", "phase": "done"})
        progress({"run": "b", "phase": "failed", "reason": "no [red]luck[/red]\x1b[2J"})
    assert text.getvalue().splitlines() == [
        "2 of 6 records are there already",
        "[1/4] a  30.0 s  (0:30, about 1:30 left)",
        "[2/4] b  failed: no [red]luck[/red] [2J  (0:30, about 0:30 left)",
    ]


def test_progress_on_a_terminal_shows_phase_rate_and_time_left() -> None:
    now = [0.0]
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    with Progress(console, clock=lambda: now[0]) as progress:
        progress({"phase": "plan", "cells": 2, "kept": 0})
        progress({"run": "a", "phase": "start"})
        progress({"run": "a", "phase": "train", "step": 1, "of": 41})
        now[0] = 10.0
        progress({"run": "a", "phase": "train", "step": 21, "of": 41})
        with console.capture() as shown:
            console.print(progress.table())
        assert progress.live is not None
        assert progress.left() == pytest.approx(10 * (2 - 0.8 * 21 / 41) / (0.8 * 21 / 41))
        for name in ("a", "b"):
            progress({"run": name, "phase": "done"})
        assert progress.live is None  # before the board is printed, not when the block ends
    assert "0 of 2 cells" in shown.get() and "train 21/41" in shown.get() and "2.0/s, 0:10 left" in shown.get()


@pytest.mark.parametrize("seconds, text", [(None, "?"), (0.4, "0:00"), (62, "1:02"), (7384, "2:03:04")])
def test_span(seconds: float | None, text: str) -> None:
    assert span(seconds) == text
