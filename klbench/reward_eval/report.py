"""The board of rewards for people: a table on the terminal, and rewards.json, rewards.csv and index.html in a folder."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from klbench import estimate, terminal
from klbench.estimate import Estimate
from klbench.record import write_atomically
from klbench.reward_eval import plots
from klbench.reward_eval.board import MEANINGS, Board, Card, Table

TITLES: Final = {
    "pairs.prior": "pairs, prior draws",
    "best_of_4": "best of 4",
    "functional.macro": "functional",
    "functional.best": "at best threshold",
    "functional.order": "twins in order",
    "functional.gap": "identity gap",
    "length.within": "ρ length",
    "prior.within": "ρ log p0",
}
ROLES: Final = {"reward": "the task's reward", "gold": "gold", "other": "", "null": "null"}
CURVES: Final = {"best_of_n": "best of n", "posterior": "posterior", "policies": "trained policies"}
KINDS: Final = {
    "auc": "AUC", "rho": "ρ label", "brier": "Brier", "log_loss": "log loss", "ece": "ECE", "slope": "slope", "platt": "Platt a",
}  # fmt: skip
BESIDE: Final = ("brier.", "functional.best", "functional.gap")  # on the page; too many for a terminal
NONE: Final = estimate.undefined("not measured")
RAW: Final = ("brier", "log_loss", "ece", "slope")
FORMS: Final = {"bon": "d (a − b d)", "rl": "d (a − b log d)"}


def number(x: float | None) -> str:
    """Three digits behind the point of what is below 1, else three figures."""
    if x is None:
        return ""
    if not math.isfinite(x):
        return "∞" if x > 0 else "−∞"
    text = f"{abs(x):.3f}" if abs(x) < 10 else f"{abs(x):.4g}"
    text = text.removeprefix("0") if abs(x) < 1 and float(text) < 1 else text
    return ("−" if x < 0 and float(text) else "") + ("0" if not float(text) else text)


def interval(e: Estimate) -> str:
    return "" if e.low is None or e.high is None or e.low == e.high else f"{number(e.low)} to {number(e.high)}"


def said(e: Estimate) -> str:
    """`.873 (.861 to .884)`."""
    return number(e.value) + (f" ({interval(e)})" if interval(e) else "")


def brief(e: Estimate) -> str:
    """`.873 ±.012`, the farther end of the interval."""
    if e.value is None or e.low is None or e.high is None or not interval(e):
        return number(e.value)
    return f"{number(e.value)} ±{number(max(e.high - e.value, e.value - e.low))}"


def edge(card: Card) -> str:
    """The largest certified 1/beta, in words."""
    return "" if card.edge is None else "every" if math.isinf(card.edge) else "none" if card.edge == 0 else number(card.edge)


def title(column: str) -> str:
    kind, _, file = column.partition(".")
    return TITLES.get(column) or f"{KINDS.get(kind, kind)}, {file.replace('_', ' ')}"


def shown(table: Table) -> list[str]:
    """Columns of the main table: those that some reward of it has. Figures on labelled texts have a table of their own on the page."""
    there = {name for card in table.cards for name, figure in card.columns.items() if figure.value is not None}
    pairs = sorted(name for name in there if name.startswith("pairs.") and name != "pairs.prior")
    wanted = ["pairs.prior", "best_of_4", *pairs, *list(TITLES)[2:]]
    return [name for name in wanted if name in there]


def labelled(table: Table) -> list[str]:
    """Names of the files of labelled texts."""
    return sorted({name.partition(".")[2] for card in table.cards for name in card.columns if name.startswith("auc.")})


def show(board: Board) -> None:
    """One table on a terminal; elsewhere a row a line, with tabs between."""
    columns: dict[str, None] = {}
    for table in board.tables:
        columns |= dict.fromkeys([*shown(table), *(f"{kind}.{file}" for file in labelled(table) for kind in ("auc", "rho", "brier"))])
    there = [c for c in columns if any(card.columns.get(c, NONE).value is not None for table in board.tables for card in table.cards)]
    if sys.stdout.isatty():
        there = [c for c in there if not c.startswith(BESIDE)]
    words = brief if sys.stdout.isatty() else said

    def rows() -> Iterable[list[str]]:
        for table in board.tables:
            for card in table.cards:
                yield [table.task, card.reward, card.role, *(words(card.columns.get(c, NONE)) for c in there), edge(card)]

    terminal.table(["task", "reward", "role", *map(title, there), "certified 1/β"], rows(), heading=True)
    for table in board.tables:
        for note in (*table.notes, *dict.fromkeys(f"{card.reward}: {note}" for card in table.cards for note in card.notes)):
            terminal.complain(f"{table.task}: {note}")


def write(board: Board, out: Path) -> None:
    """rewards.json, rewards.csv and index.html, each whole or not at all."""
    for name, text in (("rewards.json", board.to_json()), ("rewards.csv", board.to_csv()), ("index.html", page(board))):
        write_atomically(out / name, text.encode())


def page(board: Board) -> str:
    """One self-contained file: no script, no request; light and dark."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files("klbench.reward_eval").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        style=files("klbench.page").joinpath("style.css").read_text(encoding="utf-8"),
        board=board, tables=[_view(i, table) for i, table in enumerate(board.tables, 1)], meanings=MEANINGS, number=number,
        interval=interval, title=title, edge=edge, heads=KINDS | {f"raw_{kind}": f"{KINDS[kind]}, raw" for kind in RAW}, roles=ROLES,
        kinds=CURVES, forms=FORMS,
    )  # fmt: skip


def _kinds(table: Table, file: str) -> list[str]:
    """Of the figures on a labelled file those that some reward has."""
    names = [*KINDS, *(f"raw_{kind}" for kind in RAW)]
    return [k for k in names if any(card.columns.get(f"{k}.{file}", NONE).value is not None for card in table.cards)]


def _view(index: int, table: Table) -> dict[str, Any]:
    """What the template shows of a table."""
    tests = sorted({name for card in table.cards for name in card.columns if name.startswith("functional.is.")})
    groups = sorted({name for card in table.cards for name in card.columns if name.startswith("functional.group.")})
    tested = [card for card in table.cards if "functional.macro" in card.columns]
    return {
        "anchor": f"t{index}", "table": table, "columns": shown(table), "tested": tested,
        "labelled": [(file, kinds) for file in labelled(table) if (kinds := _kinds(table, file))],
        "tests": [(name.removeprefix("functional.is."), name) for name in tests],
        "groups": [(name.removeprefix("functional.group."), name) for name in groups],
        "sharp": [card for card in table.cards if card.sharpness],
        "curved": [card for card in table.cards if card.curves],
        "reliability": plots.reliability(table), "sharpness": plots.sharpness(table), "over_optimisation": plots.over_optimisation(table),
    }  # fmt: skip
