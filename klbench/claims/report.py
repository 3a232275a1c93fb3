"""Verdicts for people: a table in the terminal, `claims.json`, and a page without scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from klbench import __version__
from klbench.claims import Line
from klbench.claims.contract import Check
from klbench.estimate import finite_or_word
from klbench.record import write_atomically

HEAD: Final = ("claim", "verdict", "statement", "measured", "predicted", "paper")


def number(x: float | None) -> str:
    """Four figures, no more noughts than are needed."""
    if x is None:
        return "-"
    if not math.isfinite(x):
        return "inf" if x > 0 else "-inf" if x < 0 else "not a number"
    return "0" if x == 0 else f"{x:.2e}" if abs(x) < 1e-3 or abs(x) >= 1e5 else f"{x:.4g}"


def range_of(check: Check) -> str:
    """Where the claim puts the number; "it" is the predicted one."""
    if math.isinf(check.least) and math.isinf(check.most):
        return "any"
    if math.isinf(check.most):
        return f"at least {number(check.least)}"
    if math.isinf(check.least):
        return f"at most {number(check.most)}"
    middle, reach = (check.least + check.most) / 2, (check.most - check.least) / 2
    if check.predicted is not None and abs(middle - check.predicted) <= 1e-9 * max(1.0, abs(middle)) + 1e-3 * reach:
        return f"within {reach:.1g} of it"
    return f"{number(check.least)} to {number(check.most)}"


def measured(check: Check) -> str:
    if check.low is None or check.high is None or check.low == check.high:
        return number(check.measured)
    return f"{number(check.measured)} ({number(check.low)} to {number(check.high)})"


def telling(line: Line) -> Check:
    """The check that decides, to stand for the claim in a table: the first that does not hold, else the first with a prediction."""
    for check in line.verdict.checks:
        if check.verdict != "holds":
            return check
    return next((check for check in line.verdict.checks if check.predicted is not None), line.verdict.checks[0])


def row(line: Line) -> tuple[str, ...]:
    check = telling(line)
    word = line.verdict.verdict + ("" if line.sound else " (!)")
    wanted = number(check.predicted) if check.predicted is not None else range_of(check)
    return (line.claim.id, word, line.claim.statement, f"{check.name}: {measured(check)}", wanted, line.claim.source)


def summary(lines: Sequence[Line]) -> str:
    """One sentence."""
    count = {v: sum(line.verdict.verdict == v for line in lines) for v in ("holds", "fails", "inconclusive")}
    odd = [line.claim.id for line in lines if not line.sound]
    end = f"not as expected: {', '.join(odd)}" if odd else "each as expected, and none with its wrong ingredient"
    return f"{len(lines)} claims: {count['holds']} hold, {count['fails']} fail, {count['inconclusive']} inconclusive; {end}"


def show(lines: Sequence[Line], console: Console) -> None:
    """A table on a terminal; elsewhere a row a line, fields between tabs."""
    if not console.is_terminal:
        for cells in (HEAD, *map(row, lines)):
            console.file.write("\t".join(cells) + "\n")
        console.file.write(f"{summary(lines)}\n")
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in HEAD[:-1]:
        table.add_column(head, no_wrap=head in ("claim", "verdict"))
    for line in lines:
        cells = row(line)
        colour = "" if line.sound else "red"
        table.add_row(*(Text(cell, style=colour if i == 1 else "") for i, cell in enumerate(cells[:-1])))
    console.print(table)
    console.print(summary(lines), highlight=False)


def _plain(check: Check) -> dict[str, Any]:
    """A check for JSON, which has neither infinity nor NaN."""
    numbers = {name: value for name, value in vars(check).items() if name != "name"}
    words = {name: "nan" if x is not None and math.isnan(x) else finite_or_word(x) for name, x in numbers.items()}
    return {"name": check.name, **words, "verdict": check.verdict}


def data(lines: Sequence[Line], command: str) -> dict[str, Any]:
    """What `claims.json` holds."""
    return {
        "klbench": __version__,
        "command": command,
        "claims": [
            {
                "id": line.claim.id,
                "statement": line.claim.statement,
                "source": line.claim.source,
                "verdict": line.verdict.verdict,
                "expected": line.claim.expected,
                "wrong_ingredient": line.claim.wrong,
                "verdict_with_it": line.with_wrong,
                "note": line.claim.note,
                "checks": [_plain(check) for check in line.verdict.checks],
            }
            for line in lines
        ],
    }


def write(lines: Sequence[Line], out: Path, command: str) -> None:
    """claims.json and index.html in a folder."""
    write_atomically(out / "claims.json", (json.dumps(data(lines, command), indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(out / "index.html", page(lines, command).encode())


def page(lines: Sequence[Line], command: str) -> str:
    """One self-contained file: no script, no request; light and dark."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files("klbench.claims").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        style=files("klbench.page").joinpath("style.css").read_text(encoding="utf-8"),
        lines=lines, summary=summary(lines), command=command, number=number, measured=measured, range_of=range_of, link=link,
    )  # fmt: skip


def link(source: str) -> str:
    """Where a source can be read, "" where it has no address."""
    kind, _, rest = source.partition(":")
    return {"arXiv": f"https://arxiv.org/abs/{rest}", "doi": f"https://doi.org/{rest}"}.get(kind, "")
