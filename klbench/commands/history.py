"""klbench history: a metric over the commits of a baseline file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def history(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a baseline file under git")],
    metric: Annotated[str, typer.Option(help="column of the records")] = "reverse_kl",
    task: Annotated[list[str] | None, typer.Option(help="this task alone; may be repeated")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="mean over this method alone; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="picture: a page (.html) or an image (.png)")] = None,
) -> None:
    """A metric over the commits of a baseline file, with the commits at which it changed."""
    from klbench import history
    from klbench.terminal import complain, table

    kind = history.format_of(out) if out is not None else ""
    told = history.read(file, metric, tasks=task or (), policies=policy or (), passed_over=complain)
    table(history.HEAD, history.rows(told), heading=True)
    if out is not None:
        history.write(told, out, kind)
        print(out)
