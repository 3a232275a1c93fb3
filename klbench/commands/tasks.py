"""klbench tasks: the tasks in other tools' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klbench.errors import UserError

app = typer.Typer(help="Tasks for other tools.", rich_markup_mode=None, no_args_is_help=False)


@app.callback()
def tasks() -> None:
    """Tasks for other tools."""


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="directory for the YAML files")],
    task: Annotated[list[str] | None, typer.Option(help="this task alone; may be repeated  [default: all]")] = None,
    include: Annotated[list[Path] | None, typer.Option(help="directory with tasks of your own; may be repeated")] = None,
) -> None:
    """Write tasks as lm-eval YAML, klbench_FAMILY_VARIANT, for `lm_eval run --include_path DIR`."""
    from klbench import task as known
    from klbench.harness.tasks import export as write

    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; a directory for the YAML files expected")
    included = tuple(include or ())
    for path in write(directory, task or known.names(included), included):
        print(path)
