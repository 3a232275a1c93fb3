"""The pages of a board as files. Nothing on them is asked of a network, and they work from a disk as from a server.

    index.html            the board; its rows and figures stand in the HTML as far as STATIC_ROWS and STATIC_FIGURES go
    pages/<id>.html       a policy: all columns, its draws, its training curve, the command that makes it again
    pages/compare.html    two policies prompt by prompt; needs scripts
    pages/board.js        every row; curves-<n>.js the training curves of a table; draws-<n>.js figures a prompt and draws of some policies
    pages/*.js, *.css     the scripts and the style of the pages, and the libraries of klbench/page/vendor

What is written depends on the board alone. pages/ is made beside the old one and then takes its place.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from klbench.board import Board, Row, Table, plain
from klbench.errors import UserError
from klbench.estimate import Estimate
from klbench.page import figures, views
from klbench.record import write_atomically
from klbench.truths import verdict

SCRIPTS: Final = ("shared.js", "front.js", "policy.js", "compare.js")
VENDOR: Final = {"d3.min.js": "LICENSE.d3", "plot.umd.min.js": "LICENSE.plot", "table-core.min.js": "LICENSE.table-core"}
SHARE: Final = 1000  # policies whose pages are worth a process
STATIC_FIGURES: Final = 6  # tables whose planes are also drawn into the HTML; one costs a third of a second
STATIC_PLACES: Final = 32  # policies on such a plane, the nearest to the posterior


def write(board: Board, folder: Path) -> None:
    """Every file of the site into `folder`. Raises UserError where pages/ there is somebody else's.

    Pages of thousands of policies are shared out among the cores."""
    pages, fresh, old = (folder / name for name in ("pages", ".pages.new", ".pages.old"))
    if pages.exists() and not (pages / "compare.html").is_file():
        raise UserError(f"{pages} is not klbench's: it has no compare.html; move it away to have the pages written")
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    fresh.mkdir(parents=True)
    rows = board.rows
    shares = max(1, min(os.cpu_count() or 1, len(rows) // SHARE))
    helpers = [_forked(partial(_put, fresh, _policies(board, rows[k::shares]))) for k in range(1, shares)]
    try:
        _put(fresh, _shared(board))
        _put(fresh, _policies(board, rows[::shares]))
    finally:
        failed = [pid for pid in helpers if os.waitpid(pid, 0)[1]]
    if failed:
        raise OSError(errno.EIO, "a process that wrote pages failed")
    if pages.exists():
        pages.rename(old)
    fresh.rename(pages)
    write_atomically(folder / "index.html", _front(board).encode("utf-8", "replace"))
    shutil.rmtree(old, ignore_errors=True)


def _put(folder: Path, made: Iterable[tuple[str, str]]) -> None:
    for name, text in made:
        (folder / name.removeprefix("pages/")).write_bytes(text.encode("utf-8", "replace"))


def _forked(work: Callable[[], None]) -> int:
    """The process number of a child that does the work and ends: 0 where it was done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child formats text and writes files
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def site(board: Board) -> Iterator[tuple[str, str]]:
    """(path inside the folder, text) of every file."""
    yield "index.html", _front(board)
    yield from _shared(board)
    yield from _policies(board, board.rows)


def _front(board: Board) -> str:
    return _template("index.html.j2").render(**views.front(board), **_figures(board), verdict=verdict(board.truths))


def _shared(board: Board) -> Iterator[tuple[str, str]]:
    """What is in pages/ beside the policies' own pages."""
    shards = views.shards(board)
    at = {row.id: number for number, shard in enumerate(shards) for row in shard}
    yield "pages/compare.html", _template("compare.html.j2").render()
    yield "pages/board.js", views.script("board", views.data(board, at))
    for name in ("style.css", "site.css", *SCRIPTS):
        yield f"pages/{name}", asset(name)
    for name, licence in VENDOR.items():
        yield f"pages/{name}", f"/*\n{asset(f'vendor/{licence}')}*/\n{asset(f'vendor/{name}')}"
    for index, table in enumerate(board.tables):
        yield f"pages/curves-{index}.js", views.script("curves", views.curves(table))
    for number, shard in enumerate(shards):
        yield f"pages/draws-{number}.js", views.script("draws", {row.id: views.draws(row) for row in shard})


def _policies(board: Board, rows: Iterable[tuple[Table, Row]]) -> Iterator[tuple[str, str]]:
    page, origin = _template("policy.html.j2"), views.Origin.of(board.manifest)
    for table, row in rows:
        yield f"pages/{row.id}.html", page.render(views.policy(row, table, origin))


@cache
def asset(name: str) -> str:
    return files("klbench.page").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(asset), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)


# --- figures that stand in the HTML: matplotlib draws them, and the scripts put livelier ones in their place ---


def _figures(board: Board) -> dict[str, Any]:
    drawn = board.tables[:STATIC_FIGURES]
    found = [{"heading": views.heading(t), "plane": _plane(t, i), "learning": _learning(t, i)} for i, t in enumerate(drawn)]
    return {"figures": [f for f in found if f["plane"] or f["learning"]], "undrawn": len(board.tables) - len(drawn)}


def _plane(table: Table, index: int) -> Markup | None:
    places = []
    standing_for = {standing.method: standing.columns for standing in table.methods}
    for row in table.shown[:STATIC_PLACES]:
        columns = standing_for.get(row.record.run.method, row.columns)
        reward, kl = columns.get("reward"), columns.get("kl_prior")
        label = row.record.run.method if row.record.run.method in standing_for else row.label
        if reward is not None and kl is not None and all(e.value is not None and math.isfinite(e.value) for e in (reward, kl)):
            places.append(figures.Place(plain(label), row.role, _ends(reward), _ends(kl)))
    frontier = [figures.Point(p.reward, p.kl, p.low, p.high, p.reach) for p in table.frontier]
    return Markup(figures.plane(places, frontier, f"{index} {table.title}")) if places else None


def _learning(table: Table, index: int) -> Markup | None:
    found = {plain(s.method): s.curve for s in table.methods if s.curve}
    return Markup(figures.learning(found, f"{index} {table.title}")) if found else None


def _ends(figure: Estimate) -> tuple[float, float, float]:
    """(value, low, high), the ends at the value where there is no finite interval."""
    value = figure.value or 0.0
    low, high = figure.low, figure.high
    return value, low if low is not None and math.isfinite(low) else value, high if high is not None and math.isfinite(high) else value
