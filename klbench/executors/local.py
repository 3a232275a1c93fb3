"""Cells in processes of this machine: spawned, one thread each, dying with their parent.

The parent owns the list of cells and gives each idle worker the next one; a worker keeps what it has loaded (the prior, a bank) from
cell to cell. Each worker has a pipe of its own rather than a share in one queue: a process killed while it holds a queue's lock would
leave every other worker waiting for ever.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Final

from klbench.executors import C, Event, Failure, Report

# Two processes of one thread beat two threads, and sums come out the same on any number of cores.
ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore:resource_tracker",  # joblib's semaphores go with the worker that is killed at the end
}
TRIES: Final = 2  # a worker killed from outside costs its cell one more start; a cell that kills two workers has failed
GRACE: Final = 2.0  # seconds in which a stopped worker may remove its half-written files
PR_SET_PDEATHSIG: Final = 1


def execute(cells: Sequence[C], work: Callable[[C, Report], None], workers: int, on_event: Report) -> list[Failure]:
    """Runs `work(cell, report)` for each cell in at most `workers` processes; failures in the order of the cells.

    `on_event` is called in this thread. SIGTERM (when this is the main thread) and KeyboardInterrupt stop the workers; the first is
    raised as SystemExit(143). Raises ValueError when `workers` < 1.
    """
    if workers < 1:
        raise ValueError(f"at least one worker needed, got {workers}")
    waiting = deque(range(len(cells)))
    tries = [0] * len(cells)
    failures: dict[int, Failure] = {}
    pool: list[_Worker] = []

    def hand_out(worker: _Worker) -> None:
        worker.index = waiting.popleft()
        tries[worker.index] += 1
        on_event({"run": cells[worker.index].id, "phase": "start", "worker": worker.process.pid})
        worker.send((work, cells[worker.index]))

    def finish(index: int, failure: Failure | None) -> None:
        if failure is not None:
            failures[index] = failure
            on_event({"run": failure.id, "phase": "failed", "reason": failure.reason})
        else:
            on_event({"run": cells[index].id, "phase": "done"})

    def listen(worker: _Worker) -> None:
        """Takes what the worker has sent; `closed` is set when nothing more can come."""
        try:
            while not worker.closed and worker.pipe.poll():
                kind, content = worker.pipe.recv()
                assert worker.index is not None
                if kind == "event":
                    on_event(content)
                    continue
                index, worker.index = worker.index, None
                finish(index, None if kind == "done" else Failure(cells[index].id, *content))
        except (EOFError, OSError):
            worker.closed = True

    with _sigterm_as_exit():
        try:
            while waiting or any(w.index is not None for w in pool):
                for worker in pool:
                    if worker.index is None and waiting and not worker.closed:
                        hand_out(worker)
                while waiting and len(pool) < workers:
                    pool.append(_start())
                    hand_out(pool[-1])
                # The time limit is for a worker whose pipe a stray child of its own holds open after its death.
                ready = wait([*(w.pipe for w in pool), *(w.process.sentinel for w in pool)], timeout=1.0)
                for worker in list(pool):
                    dead = not worker.process.is_alive()  # asked before listening: what a dead worker sent is in the pipe by now
                    if dead or worker.pipe in ready:
                        listen(worker)
                    if not (dead or worker.closed):
                        continue
                    pool.remove(worker)
                    worker.process.join(GRACE)
                    how = _how_it_died(worker.process.exitcode)
                    worker.stop()
                    if worker.index is None:
                        continue
                    cell, index = cells[worker.index], worker.index
                    if tries[index] < TRIES:
                        waiting.appendleft(index)
                        on_event({"run": cell.id, "phase": "retry", "reason": how})
                    else:
                        finish(index, Failure(cell.id, f"{how}, {TRIES} times"))
        finally:
            _stop_all(pool)
    return [failures[i] for i in sorted(failures)]


@dataclass
class _Worker:
    """A process, this end of its pipe, and the index of the cell it has."""

    process: BaseProcess
    pipe: Connection
    index: int | None = None
    closed: bool = False

    def send(self, message: Any) -> None:
        try:
            self.pipe.send(message)
        except OSError:  # it died just now: the loop sees that next and retries the cell
            self.closed = True

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _start() -> _Worker:
    """A fresh process, in an environment of one thread, that Ctrl-C in the terminal does not reach: the parent decides."""
    context = get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, os.getpid()), name="klbench-worker", daemon=True)
    with _environment(ENVIRONMENT), _interrupts_held():
        process.start()
    theirs.close()  # so that the worker's death reads as the end of the pipe
    return _Worker(process, mine)


def _stop_all(pool: list[_Worker]) -> None:
    """Asks, waits a moment, kills."""
    for worker in pool:
        if worker.index is None:
            worker.stop()
        else:
            worker.process.terminate()
    until = time.monotonic() + GRACE
    for worker in pool:
        if worker.index is not None:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.stop()


def _how_it_died(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process ended with code {code}"


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """The variables are set in os.environ while a child is started, since they are read when torch is imported."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """SIGINT is blocked while a child is started; the child inherits that and keeps it, here it is delivered afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM unwinds the stack as SystemExit(143), where this thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# What follows runs in the worker.


class _Stopped(BaseException):
    """The parent's SIGTERM, told apart from a SystemExit that a plugin raises."""


def _serve(pipe: Connection, parent: int) -> None:
    """Takes (work, cell) after (work, cell) until the parent closes the pipe or dies."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    signal.signal(signal.SIGTERM, leave)
    sending = threading.Lock()  # a reward may report from a thread of its own

    def send(kind: str, content: Any) -> None:
        try:
            with sending:
                pipe.send((kind, content))
        except OSError:
            os._exit(1)  # nobody is left to tell

    try:
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError):
                os._exit(0)
            failure = None
            try:
                work, cell = pickle.loads(message)  # from the parent alone; imports the work's module: what that raises is this cell's
                work(cell, _reporter(cell.id, send))
            except _Stopped:
                raise
            except BaseException as error:  # a SystemExit of third-party code too: it ends the cell, not the worker
                failure = (_reason(error), traceback.format_exc())
            send("done" if failure is None else "failed", failure)
    except _Stopped:
        os._exit(0)  # half-written files are gone by now; an orderly shutdown with torch loaded would take a second more


def _reporter(cell_id: str, send: Callable[[str, Event], None]) -> Report:
    def report(event: Event) -> None:
        send("event", {"run": cell_id, **event})

    return report


def _reason(error: BaseException) -> str:
    """One line: the text of a ValueError-like error that speaks for itself, else the type, the text and the line that raised it."""
    text = " ".join(str(error).split())[:500]
    if type(error).__name__ == "UserError":
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


def _die_with(parent: int) -> None:
    """Linux kills this process when its parent dies, however it dies; elsewhere, and besides, a thread looks twice a second."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() != parent:  # it died before the request above
        os._exit(1)
    threading.Thread(target=watch, name="klbench-parent-watch", daemon=True).start()
