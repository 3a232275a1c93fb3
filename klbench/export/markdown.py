"""md: a table a task, for a README or an issue. What people named is text there: no pipe, tag, link or line end of theirs does anything."""

from __future__ import annotations

import math
import re
from typing import Final

from klbench.board import Board, Row, plain
from klbench.estimate import Estimate

HEAD: Final = ("rank", "method", "reverse_kl", "wasted_nats", "reward", "kl_prior", "status", "provenance")
ACTIVE: Final = re.compile(r"([\\`*_{}\[\]()#!|~])")


def text(board: Board) -> str:
    """All tables of a board."""
    parts = []
    for table in board.tables:
        lines = [HEAD, ("---:", "---", "---:", "---:", "---:", "---:", "---", "---"), *(_cells(row) for row in table.rows)]
        parts.append("\n".join([f"### {escaped(table.title)}", "", *("| " + " | ".join(line) + " |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def escaped(words: str) -> str:
    """Words that stand for themselves in Markdown and in the HTML it becomes."""
    safe = plain(words).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return ACTIVE.sub(r"\\\1", safe).replace("://", ":&#47;&#47;").replace("@", "&#64;") or "unnamed"


def _cells(row: Row) -> tuple[str, ...]:
    rank = "p\\*" if row.rank is None else "-".join(str(end) for end in sorted(set(row.rank)))
    figures = (_figure(row.columns.get(name)) for name in ("reverse_kl", "wasted_nats", "reward", "kl_prior"))
    return rank, escaped(row.label), *figures, escaped(row.status), escaped(row.provenance)


def _figure(figure: Estimate | None) -> str:
    if figure is None or figure.value is None:
        return ""
    value = _number(figure.value)
    if figure.low is None or figure.high is None or figure.status == "exact":
        return value
    return f"{value} ({_number(figure.low)} to {_number(figure.high)})"


def _number(x: float) -> str:
    return f"{x:.3f}" if math.isfinite(x) else "∞" if x > 0 else "-∞"
