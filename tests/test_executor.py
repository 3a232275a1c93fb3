"""The local executor: cells that record, raise, die and hang; and workers that do not outlive their parent."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from klbench import executors
from klbench.errors import UserError
from klbench.executors import Event, Failure, Report
from klbench.executors.local import execute

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Toy:
    """A cell that does `what` and leaves a file."""

    id: str
    what: str
    folder: Path


def toil(cell: Toy, report: Report) -> None:
    pid = cell.folder / f"{cell.id}.pid"
    again = pid.exists()
    pid.write_text(str(os.getpid()))
    if cell.what == "raise":
        raise ValueError("three\nlines\nof it")
    if cell.what == "refuse":
        raise UserError("reward f gave nan")
    if cell.what == "leave":
        raise SystemExit(3)
    if cell.what == "eof":
        raise EOFError("the file ends here")
    if cell.what == "die" or (cell.what == "die once" and not again):
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.what == "hang" or (cell.what == "hang once" and not again):
        time.sleep(600)
    if cell.what == "tidy":
        try:
            time.sleep(600)
        finally:
            (cell.folder / f"{cell.id}.tidied").write_text("")
    report({"phase": "train", "step": 1, "of": 2})
    report({"phase": "train", "step": 2, "of": 2, "threads": os.environ.get("OMP_NUM_THREADS")})
    (cell.folder / cell.id).write_text(cell.what)


def run(folder: Path, whats: list[str], workers: int) -> tuple[list[Failure], list[Event]]:
    events: list[Event] = []
    cells = [Toy(f"c{i}", what, folder) for i, what in enumerate(whats)]
    return execute(cells, toil, workers, events.append), events


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def gone(pid: int) -> bool:
    """No such process, or one that has ended and that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def pid_of(path: Path) -> int:
    assert until(lambda: path.exists() and path.read_text() != ""), f"no worker wrote {path}"
    return int(path.read_text())


@pytest.mark.parametrize("workers", [1, 3])
def test_every_cell_is_done_once_and_reports(tmp_path: Path, workers: int) -> None:
    failures, events = run(tmp_path, ["a", "b", "c", "d"], workers)
    assert failures == []
    assert [(tmp_path / f"c{i}").read_text() for i in range(4)] == ["a", "b", "c", "d"]
    for i in range(4):
        own = [e for e in events if e["run"] == f"c{i}"]
        assert [e["phase"] for e in own] == ["start", "train", "train", "done"]
        assert own[2] == {"run": f"c{i}", "phase": "train", "step": 2, "of": 2, "threads": "1"}
    assert len({(tmp_path / f"c{i}.pid").read_text() for i in range(4)}) <= workers


def test_the_environment_of_the_parent_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    _, events = run(tmp_path, ["a"], 1)
    assert [e["threads"] for e in events if "threads" in e] == ["1"]
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ


def test_a_cell_that_raises_costs_itself_alone(tmp_path: Path) -> None:
    failures, events = run(tmp_path, ["raise", "a", "refuse", "leave", "eof", "b"], 2)
    assert [f.id for f in failures] == ["c0", "c2", "c3", "c4"]
    assert failures[0].reason.startswith("ValueError: three lines of it (test_executor.py:")
    assert failures[1].reason == "reward f gave nan"
    assert failures[2].reason.startswith("SystemExit: 3")
    assert failures[3].reason.startswith("EOFError: the file ends here")
    assert "raise ValueError" in failures[0].trace
    assert (tmp_path / "c1").exists() and (tmp_path / "c5").exists()
    assert [e["reason"] for e in events if e["phase"] == "failed" and e["run"] == "c2"] == ["reward f gave nan"]


def test_a_killed_worker_costs_its_cell_one_more_start(tmp_path: Path) -> None:
    failures, events = run(tmp_path, ["die once", "a", "b"], 2)
    assert failures == []
    assert {e["run"] for e in events if e["phase"] == "retry"} == {"c0"}
    assert sorted(e["run"] for e in events if e["phase"] == "done") == ["c0", "c1", "c2"]


def test_a_cell_that_kills_its_worker_twice_has_failed(tmp_path: Path) -> None:
    failures, _ = run(tmp_path, ["a", "die", "b"], 1)
    assert [(f.id, "SIGKILL" in f.reason) for f in failures] == [("c1", True)]
    assert (tmp_path / "c0").exists() and (tmp_path / "c2").exists()


def test_a_hanging_worker_killed_from_outside(tmp_path: Path) -> None:
    killer = threading.Thread(target=lambda: os.kill(pid_of(tmp_path / "c0.pid"), signal.SIGKILL))
    killer.start()
    failures, _ = run(tmp_path, ["hang once", "a"], 1)
    killer.join()
    assert failures == []
    assert (tmp_path / "c0").exists() and (tmp_path / "c1").exists()


def test_no_worker_is_left_when_all_is_done(tmp_path: Path) -> None:
    run(tmp_path, ["a", "b"], 2)
    assert all(gone(int(p.read_text())) for p in tmp_path.glob("*.pid"))


def test_a_function_that_cannot_travel_is_an_error_here(tmp_path: Path) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match="(?i)pickle"):
        execute([Toy("c0", "a", tmp_path)], lambda cell, report: None, 1, print)


def test_no_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one worker"):
        execute([Toy("c0", "a", tmp_path)], toil, 0, print)


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_executor import Toy, execute, toil
if __name__ == "__main__":
    try:
        execute([Toy("c0", "tidy", Path({folder!r})), Toy("c1", "tidy", Path({folder!r}))], toil, 2, lambda event: None)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def parent(folder: Path) -> subprocess.Popen[bytes]:
    script = folder / "parent.py"
    script.write_text(PARENT.format(here=str(HERE), folder=str(folder)))
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started in the background ignore it, and so would this child
    try:
        return subprocess.Popen([sys.executable, str(script)], env=environment, start_new_session=True, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, heard)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_workers_die_with_their_parent(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = parent(tmp_path)
    workers = [pid_of(tmp_path / f"c{i}.pid") for i in range(2)]
    assert not any(gone(pid) for pid in workers)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to the parent and to the workers at once
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert until(lambda: all(gone(pid) for pid in workers), 5.0)
    assert errors == b""
    assert [(tmp_path / f"c{i}.tidied").exists() for i in range(2)] == [number != signal.SIGKILL] * 2


ORPHAN = """
import os, sys, time
sys.platform = "other"
from klbench.executors.local import _die_with
if os.fork() == 0:
    _die_with(os.getppid())
    print(os.getpid(), flush=True)
    time.sleep(600)
sys.stdin.readline()
os._exit(0)
"""


def test_the_watcher_does_without_prctl() -> None:
    done = subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=HERE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert done.stdin is not None and done.stdout is not None
    child = int(done.stdout.readline())
    assert not gone(child)
    done.stdin.write("leave\n")
    done.stdin.close()
    assert done.wait(30) == 0
    assert until(lambda: gone(child), 5.0)
    done.stdout.close()


def test_a_worker_whose_parent_died_before_it_looked_ends_at_once() -> None:
    text = "from klbench.executors.local import _die_with; _die_with(1 << 22); print('alive')"
    done = subprocess.run([sys.executable, "-c", text], cwd=HERE.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_executors_load_by_name() -> None:
    assert executors.load("local") is execute
    with pytest.raises(UserError, match=r"klbench\[ray\]"):
        executors.load("ray")
    with pytest.raises(UserError, match="did you mean 'local'"):
        executors.load("locl")
