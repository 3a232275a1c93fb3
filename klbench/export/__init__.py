"""Records in other tools' formats: one file a format, text from rows of a board.

Formats of whole boards (json, csv, md) make one document; those of single policies (lm-eval, hf, eee) one a record, under a name that the
tool looks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from klbench.board import Board, Row
from klbench.errors import unknown
from klbench.export import every_eval_ever, harness, hugging_face, markdown

BOARDS: Final[dict[str, Callable[[Board], str]]] = {"json": Board.to_json, "csv": Board.to_csv, "md": markdown.text}
POLICIES: Final[dict[str, Callable[[Board, Row], tuple[str, str]]]] = {  # name of a file and its text
    "lm-eval": harness.document,
    "hf": hugging_face.document,
    "eee": every_eval_ever.document,
}


def documents(board: Board, to: str) -> dict[str, str]:
    """Texts by file name; of a whole board one, without a name. Raises UserError with the nearest name for an unknown format."""
    wanted = to.replace("_", "-")
    if wanted in BOARDS:
        return {"": BOARDS[wanted](board)}
    if wanted not in POLICIES:
        raise unknown("format", to, [*BOARDS, *POLICIES])
    return dict(POLICIES[wanted](board, row) for _, row in board.rows)
