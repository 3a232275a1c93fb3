"""What a person sees while a grid runs: bars with rates and time left on a terminal, one line a finished cell elsewhere.

It reads the events of `klbench.run` and of the executors: "plan" (with "cells" and "kept"), "notice" (with "text"), then each cell's
"start", "train" and "score" (with "step" and "of"), "retry" and "failed" (with "reason"), "done".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

TRAINING: Final = 0.8  # share of a trained cell's time that is training, for the time left alone
ROWS: Final = 12  # running cells shown at once


@dataclass
class Running:
    """A cell that has started: its phase, its steps and when the phase began."""

    began: float
    phase: str = "start"
    step: int = 0
    of: int = 0
    since: float = 0.0
    first: int = 0  # the step at which this phase was first seen: above 1 where training was resumed
    trained: bool = False

    def share(self) -> float:
        """Of its work, what is done: 0 to 1, roughly."""
        part = self.step / self.of if self.of else 0.0
        if self.phase == "train":
            return TRAINING * part
        return TRAINING + (1 - TRAINING) * part if self.trained else part

    def rate(self, now: float) -> float | None:
        """Steps a second in this phase, None before the second one."""
        steps, seconds = self.step - self.first, now - self.since
        return steps / seconds if steps > 0 and seconds > 0 else None


@dataclass
class Progress:
    """A context manager and the `on_event` of a run. Writes to `console`, which is best the one of stderr."""

    console: Console
    clock: Callable[[], float] = time.monotonic
    cells: int = 0
    finished: int = 0
    failed: int = 0
    running: dict[str, Running] = field(default_factory=dict)
    began: float = 0.0
    live: Live | None = None

    def __enter__(self) -> Progress:
        self.began = self.clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __call__(self, event: dict[str, Any]) -> None:
        phase = event["phase"]
        if phase == "plan":
            self._plan(int(event["cells"]), int(event["kept"]))
        elif phase == "notice":
            self._say(str(event["text"]))
        elif phase in ("done", "failed"):
            self._finish(str(event["run"]), str(event["reason"]) if phase == "failed" else "")
        elif phase == "retry":
            self.running.pop(event["run"], None)
            self._say(f"{event['run']}: {event['reason']}; starting it again")
        elif phase == "start":
            self.running[event["run"]] = Running(self.clock())
        else:
            self._step(event)

    def _plan(self, cells: int, kept: int) -> None:
        self.cells += cells  # a run plans twice: its cells, then the pools of their tables
        if kept:
            self._say(f"{kept} of {cells + kept} records are there already")
        if cells and self.console.is_terminal and self.live is None:
            self.live = Live(console=self.console, get_renderable=self.table, refresh_per_second=4, transient=True)
            self.live.start()

    def _step(self, event: dict[str, Any]) -> None:
        now = self.clock()
        cell = self.running.setdefault(event["run"], Running(now))
        step, of = int(event.get("step", 0)), int(event.get("of", 0))
        if event["phase"] != cell.phase:
            cell.phase, cell.since, cell.first = str(event["phase"]), now, step
        cell.step, cell.of = step, of
        cell.trained |= cell.phase == "train"

    def _finish(self, name: str, reason: str) -> None:
        cell = self.running.pop(name, None)
        self.finished += 1
        self.failed += bool(reason)
        width = len(str(self.cells))
        took = f"  {self.clock() - cell.began:.1f} s" if cell else ""
        left = f", about {span(self.left())} left" if self.finished < self.cells else ""
        outcome = f"  failed: {reason}" if reason else took
        self._say(f"[{self.finished:>{width}}/{self.cells}] {name}{outcome}  ({span(self.clock() - self.began)}{left})")
        if self.finished == self.cells:
            self._stop()  # the board is printed next, on the same terminal

    def left(self) -> float | None:
        """Seconds until all cells are done, at the pace so far; None before there is one."""
        done = self.finished + sum(cell.share() for cell in list(self.running.values()))
        elapsed = self.clock() - self.began
        return elapsed * (self.cells - done) / done if done > 0 else None

    def table(self) -> Table:
        """The live display: the whole grid, then each running cell."""
        now = self.clock()
        table = Table.grid(padding=(0, 2))
        done = self.finished + sum(cell.share() for cell in list(self.running.values()))
        failed = f", {self.failed} failed" if self.failed else ""
        table.add_row(
            Text(f"{self.finished} of {self.cells} cells{failed}", style="bold"),
            ProgressBar(total=max(self.cells, 1), completed=done, width=30),
            Text(span(now - self.began)),
            Text(f"about {span(self.left())} left"),
        )
        for name, cell in list(self.running.items())[:ROWS]:
            rate = cell.rate(now)
            ahead = None if rate is None else (cell.of - cell.step) / rate
            steps = f"{cell.phase} {cell.step}/{cell.of}" if cell.of else cell.phase
            table.add_row(
                Text(name),
                ProgressBar(total=max(cell.of, 1), completed=cell.step, width=30),
                Text(steps),
                Text("" if rate is None else f"{rate:.1f}/s, {span(ahead)} left"),
            )
        if len(self.running) > ROWS:
            table.add_row(Text(f"and {len(self.running) - ROWS} more"))
        return table

    def _say(self, line: str) -> None:
        text = Text("".join(c if c.isprintable() else " " for c in line))
        self.console.print(text, soft_wrap=True, highlight=False)


def span(seconds: float | None) -> str:
    """`1:02`, `2:03:04`, or `?` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """One changing line on stderr while something long is done; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("loading models") as shown:
        yield lambda text: shown.update(Text(text))
