"""klbench export: records in other tools' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    path: Annotated[Path, typer.Argument(metavar="DIR|RECORD", help="directory of a run or board, or one record's file")],
    to: Annotated[str, typer.Option(help="lm-eval | hf | eee (Every Eval Ever) | json | csv | md")],
    out: Annotated[Path | None, typer.Option(help="file, or folder where a format has a file a policy  [default: the terminal]")] = None,
) -> None:
    """Write records as other tools read them."""
    from klbench import run as grid
    from klbench.board import Board
    from klbench.errors import UserError
    from klbench.export import documents
    from klbench.record import Pooled, Record, checked_in, write_atomically

    if path.is_dir():
        records, manifest = grid.records_in(path), grid.manifest_in(path)
        board = Board.of(records, manifest, Pooled.all_in(path), checked_in(path))
    else:
        home = path.absolute().parent.parent
        board = Board.of([Record.read(path)], grid.manifest_in(home), checked=checked_in(home))
    found = documents(board, to)
    if len(found) > 1 and (out is None or out.is_file()):
        raise UserError(f"{to} has a file a policy, {len(found)} here: --out FOLDER expected")
    if out is None:
        print(next(iter(found.values())), end="")
        return
    for name, text in found.items():
        place = out / name if len(found) > 1 or out.is_dir() else out
        if place.is_dir():
            raise UserError(f"{place} is a directory: --out FILE expected")
        try:
            write_atomically(place, text.encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(f"{place} cannot be written: {error.strerror}") from None
    print(f"{out}: {len(found):,} file" + ("" if len(found) == 1 else "s"))
