"""The contract of an executor: it runs cells somewhere, each at most once to success, and says which ones failed.

`load("local")` is `execute` of `klbench/executors/local.py`. An executor decides where a cell runs and nothing else: a cell writes its
own record, so the records are the same whichever executor ran them.

Events are plain dicts: {"run": id, "phase": ..., ...}. The work reports "train" and "score" with "step" and "of"; the executor itself
adds "start", "retry" and "failed" (with "reason") and "done", and puts the cell's id into each event that lacks it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from klbench.errors import UserError, unknown

Event = dict[str, Any]
Report = Callable[[Event], None]


class Cell(Protocol):
    """One unit of work, picklable; `id` names it in events and failures."""

    @property
    def id(self) -> str: ...


@dataclass(frozen=True)
class Failure:
    """A cell that gave no result. reason: one line for a person.  trace: the traceback, "" where the process died without one."""

    id: str
    reason: str
    trace: str = ""


C = TypeVar("C", bound=Cell)


class Executor(Protocol):
    """Runs `work(cell, report)` for each cell in at most `workers` processes; returns the failures in the order of the cells.

    `work` is a module-level function: it travels by name. A cell that raises, or whose process dies, costs itself alone.
    KeyboardInterrupt stops all of them and is raised again.
    """

    def __call__(self, cells: Sequence[C], work: Callable[[C, Report], None], workers: int, on_event: Report) -> list[Failure]: ...


NAMES: Final = ("local",)
EXTRAS: Final = {"ray": "ray"}  # executors that are a package's extra


def load(name: str) -> Executor:
    """The executor of that name. Raises UserError with the nearest name, or with the extra that brings it."""
    if name in EXTRAS:
        raise UserError(f"executor {name!r} is not in this version; it comes with the extra: pip install 'klbench[{EXTRAS[name]}]'")
    if name not in NAMES:
        raise unknown("executor", name, [*NAMES, *EXTRAS])
    execute: Executor = importlib.import_module(f"klbench.executors.{name}").execute
    return execute
