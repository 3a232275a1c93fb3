"""What every command says on a terminal or down a pipe: tables, figures, complaints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def console() -> Any:
    """Where boxes and colours go."""
    from rich.console import Console

    return Console()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], heading: bool = False) -> None:
    """A table on a terminal; elsewhere a row a line with tabs between, with the column names first where `heading` says so."""
    clean = [["".join(c if c.isprintable() else " " for c in value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [list(columns), *clean] if heading else clean:
            print("\t".join(row))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in clean:
        table.add_row(*(Text(value) for value in row))
    console().print(table)


def records_of(frame: Any) -> list[dict[str, Any]]:
    """The rows of a data frame, or of a list of dicts."""
    return frame.to_dict("records") if hasattr(frame, "to_dict") else list(frame)


def cell(value: Any) -> str:
    """A value as a table shows it: four digits, nothing for what is not there."""
    return "" if value is None or value != value else f"{value:.4g}" if isinstance(value, float) else str(value)


def complain(text: str) -> None:
    """One line on stderr, in which nothing can move the cursor or change the title of the terminal."""
    print("klbench: " + "".join(c if c.isprintable() else "?" for c in " ".join(text.split())), file=sys.stderr)


def debugging() -> bool:
    """Whether whoever runs this wants tracebacks."""
    return os.environ.get("KLBENCH_DEBUG", "") not in ("", "0")


def command_line() -> str:
    """The words that started this process."""
    import shlex

    return shlex.join(["klbench", *sys.argv[1:]])
