"""klbench leaderboard: boards and pages from records, checked, joined by submissions, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klbench.terminal import complain, table

leaderboard = typer.Typer(help="Boards and pages from records: build, check, add, merge.", rich_markup_mode=None, no_args_is_help=False)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="directory of a run or of a published board")]
Include = Annotated[list[Path] | None, typer.Option(help="directory with tasks, objectives and samplers of your own; may be repeated")]


@leaderboard.command()
def build(
    directory: Directory,
    out: Annotated[Path | None, typer.Option(help="directory for the pages  [default: DIR]")] = None,
) -> None:
    """Build board.json, board.csv and the pages from records."""
    from klbench.page import site

    print(site.build(directory, out))


@leaderboard.command()
def check(
    directory: Directory,
    mark: Annotated[
        bool, typer.Option("--mark", help="write checked.json, which marks rows as recomputed, and build the pages anew")
    ] = False,
    include: Include = None,
) -> None:
    """Compute every cell again from the stored samples; name what differs and what cannot be; exit 1 where something differs."""
    from rich.console import Console
    from rich.progress import Progress

    from klbench import recompute

    _one_thread()
    with Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal) as progress:
        bar = progress.add_task("records")
        report = lambda done, of: progress.update(bar, completed=done, total=of)  # noqa: E731
        found = recompute.check(directory, report, tuple(include or ()), files=not mark)
    if found.differences:
        rows = ([d.where, d.cell, d.stored, d.found] for d in found.differences)
        table(["where", "cell", "stored", "recomputed"], rows, heading=True)
    for why, (cells, count) in found.missing.items():
        print(f"not recomputed: {', '.join(cells)} ({_records(count)}): {why}")
    if mark:
        recompute.mark(directory, found.verdicts)
        build(directory)
    good = sum(v.recomputed for v in found.verdicts)
    compared = sum(v.cells for v in found.verdicts)
    differ = f"{len(found.differences):,} cells differ" if found.differences else "nothing differs"
    print(f"{directory}: {compared:,} cells of {_records(len(found.verdicts))} compared, {good:,} of them recomputed; {differ}")
    if found.differences:
        complain(f"{directory} is not what its samples and records make")
        raise typer.Exit(1)


@leaderboard.command()
def add(
    directory: Directory,
    given: Annotated[list[Path], typer.Argument(metavar="PATH...", help="run directories, or records in them")],
    include: Include = None,
) -> None:
    """Join submissions with a board: validated, recomputed, scored again where their weights or samplers are there; all of them or none."""
    from klbench import submission

    _one_thread()
    accepted = submission.add(directory, given, tuple(include or ()))
    table(["record", "vouched for by"], ([one.record.run.id, one.how] for one in accepted))
    print(f"{directory}: {_records(len(accepted))} joined" if accepted else f"{directory} has them all already")


@leaderboard.command()
def merge(
    one: Annotated[Path, typer.Argument(metavar="A", help="directory of a board")],
    other: Annotated[Path, typer.Argument(metavar="B", help="directory of another")],
    out: Annotated[Path, typer.Option(help="new directory for both")],
) -> None:
    """Join two boards in a new directory; a run that both have with other figures is refused by name."""
    from klbench import submission

    print(f"{out / 'index.html'}: {_records(submission.merge(one, other, out))}")


def _one_thread() -> None:
    """As runs are scored: with more, sums round otherwise."""
    import torch

    torch.set_num_threads(1)


def _records(count: int) -> str:
    return f"{count:,} record" + ("" if count == 1 else "s")
