"""The pages of a board as files. Nothing on them is asked of a network, and they work from a disk as from a server.

    index.html            the board; its rows and figures stand in the HTML as far as STATIC_ROWS and STATIC_FIGURES go
    pages/<id>.html       a policy: all columns, its draws, its training curve, the command that makes it again
    pages/compare.html    two policies prompt by prompt; needs scripts
    pages/board.js        every row; curves-<n>.js the training curves of a table; draws-<n>.js figures a prompt and draws of some policies
    pages/*.js, *.css     the scripts and the style of the pages, and the libraries of klbench/page/vendor

What is written depends on the board alone. pages/ is made beside the old one and then takes its place.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeVar

import jinja2
from markupsafe import Markup
from threadpoolctl import threadpool_limits

from klbench import shares
from klbench.board import Board, Row, Table, alike, manifest_in, plain, records_of, span
from klbench.errors import UserError
from klbench.estimate import Estimate
from klbench.page import views
from klbench.page.views import Said
from klbench.record import Filed, Pooled, checked_in, write_atomically
from klbench.truths import verdict

T = TypeVar("T")

SCRIPTS: Final = ("shared.js", "front.js", "policy.js", "compare.js")
VENDOR: Final = {"d3.min.js": "LICENSE.d3", "plot.umd.min.js": "LICENSE.plot", "table-core.min.js": "LICENSE.table-core"}
WORTH: Final = 100  # policies for which a process is started
CHUNK: Final = 40  # policies in one piece of shared work, at least: what comes back of them is half a megabyte
CHUNKS: Final = 500  # pieces, at most
REMOVED: Final = 200  # files in one piece of removing
STATIC_FIGURES: Final = 6  # tables whose planes are also drawn into the HTML; one costs a third of a second
STATIC_PLACES: Final = 32  # policies on such a plane, the nearest to the posterior


def build(directory: Path, out: Path | None = None) -> Path:
    """Board and pages of a directory's records, in `out` or beside them; its index.html.

    What a record costs (reading, hashing, its page) is shared out among the cores. Raises UserError, before anything is written, for a
    record that cannot be read and where the records make no board.
    """
    manifest = manifest_in(directory)
    paths, where = records_of(directory, manifest), out or directory
    with _uncollected(), threadpool_limits(1):  # a product of small matrices is slower shared out than alone
        work = partial(shares.done, processes=_processes(paths))
        read = [each for chunk in work([partial(_read, c) for c in _chunks(paths, CHUNK)]) for each in chunk]
        board = Board.joined((filed for filed, _ in read), manifest, Pooled.all_in(directory), checked_in(directory), work)
        besides = [partial(_file, where / name, text) for name, text in board.files().items()]
        try:
            where.mkdir(parents=True, exist_ok=True)
            _write(board, where, {filed.id: said for filed, said in read}, besides)
        except OSError as error:
            raise UserError(f"{where} cannot be written: {error.strerror}") from None
    return where / "index.html"


def write(board: Board, folder: Path) -> None:
    """Every file of the site into `folder`. Raises UserError where pages/ there is somebody else's."""
    _write(board, folder, {}, [])


def _write(board: Board, folder: Path, said: Mapping[str, Said], besides: Sequence[Callable[[], Any]]) -> None:
    """said: of records that were read by `build`, by id.  besides: what else is to be done on the way."""
    pages, fresh, old = (folder / name for name in ("pages", ".pages.new", ".pages.old"))
    if pages.exists() and not (pages / "compare.html").is_file():
        raise UserError(f"{pages} is not klbench's: it has no compare.html; move it away to have the pages written")
    work = partial(shares.done, processes=_processes(board.rows))
    for left in (fresh, old):
        _removed(left, work)
    fresh.mkdir(parents=True)
    told = _told(said)
    numbered = list(enumerate(views.shards(board)))
    pieces: list[Callable[[], Any]] = [partial(_front, board), *besides, partial(_put, fresh, partial(_shared, board, told))]
    pieces += [partial(_put, fresh, partial(_policies, board, c, told)) for c in _chunks(numbered, CHUNK // views.SHARD)]
    front, *_ = work(pieces)  # what takes longest is begun first
    if pages.exists():
        pages.rename(old)
    fresh.rename(pages)
    _file(folder / "index.html", lambda: front)
    _removed(old, work)


def _removed(folder: Path, work: Callable[[list[Callable[[], Any]]], Any]) -> None:
    """Thousands of files take a system a second to give up."""
    if folder.is_dir():
        work([partial(_unlink, chunk) for chunk in _chunks(sorted(folder.iterdir()), REMOVED)])
    shutil.rmtree(folder, ignore_errors=True)


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            os.unlink(path)


def _chunks(items: Sequence[T], least: int) -> list[Sequence[T]]:
    size = max(least, math.ceil(len(items) / CHUNKS))
    return [items[k : k + size] for k in range(0, len(items), size)]


def _processes(policies: Sequence[Any]) -> int:
    return max(1, min(shares.cores(), len(policies) // WORTH))


@contextmanager
def _uncollected() -> Iterator[None]:
    """A collection of garbage walks through every record and finds none: a third of what reading costs."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _read(paths: Sequence[Path]) -> list[tuple[Filed, Said]]:
    """Records with what is said of them, less what only that needs: what comes back from another process is paid for by its size.

    Of comparable records the first with the longest frontier keeps it, since no other's is drawn.
    """
    read = [Filed.read(path) for path in paths]
    longest: dict[tuple[Any, ...], tuple[tuple[float, int], int]] = {}
    for number, filed in enumerate(read):
        far = span(filed.record)
        if far > longest.setdefault(alike(filed.record), (far, number))[0]:
            longest[alike(filed.record)] = far, number
    kept = {number for _, number in longest.values()}
    return [(filed.lean(number in kept), Said.of(filed.record)) for number, filed in enumerate(read)]


def _put(folder: Path, made: Callable[[], Iterable[tuple[str, str]]]) -> None:
    for name, text in made():
        with open(f"{folder}/{name.removeprefix('pages/')}", "wb") as file:
            file.write(text.encode("utf-8", "replace"))


def _file(path: Path, text: Callable[[], str]) -> None:
    write_atomically(path, text().encode("utf-8", "replace"), lasting=False)  # all of it can be made again from the records


def _told(said: Mapping[str, Said]) -> Callable[[Row], Said]:
    return lambda row: said.get(row.id) or Said.of(row.record)


def site(board: Board) -> Iterator[tuple[str, str]]:
    """(path inside the folder, text) of every file."""
    told = _told({})
    yield "index.html", _front(board)
    yield from _shared(board, told)
    yield from _policies(board, list(enumerate(views.shards(board))), told)


def _front(board: Board) -> str:
    return _template("index.html.j2").render(**views.front(board), **_figures(board), verdict=verdict(board.truths))


def _shared(board: Board, told: Callable[[Row], Said]) -> Iterator[tuple[str, str]]:
    """What is in pages/ beside the policies' own files."""
    at = {row.id: number for number, (_, shard) in enumerate(views.shards(board)) for row in shard}
    yield "pages/compare.html", _template("compare.html.j2").render()
    yield "pages/board.js", views.script("board", views.data(board, at))
    for name in ("style.css", "site.css", *SCRIPTS):
        yield f"pages/{name}", asset(name)
    for name, licence in VENDOR.items():
        yield f"pages/{name}", f"/*\n{asset(f'vendor/{licence}')}*/\n{asset(f'vendor/{name}')}"
    for index, table in enumerate(board.tables):
        yield f"pages/curves-{index}.js", views.script("curves", views.curves(table, told))


def _policies(
    board: Board, shards: Iterable[tuple[int, tuple[Table, Sequence[Row]]]], told: Callable[[Row], Said]
) -> Iterator[tuple[str, str]]:
    """The pages of some policies, and the files of their draws."""
    page, origin = _template("policy.html.j2"), views.Origin.of(board.manifest)
    for number, (table, rows) in shards:
        said = {row.id: told(row) for row in rows}
        for row in rows:
            yield f"pages/{row.id}.html", page.render(views.policy(row, table, origin, said[row.id]))
        yield f"pages/draws-{number}.js", views.draws(said)


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
    from klbench.page import figures  # with matplotlib, which the processes that draw nothing do without

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
    from klbench.page import figures

    found = {plain(s.method): s.curve for s in table.methods if s.curve}
    return Markup(figures.learning(found, f"{index} {table.title}")) if found else None


def _ends(figure: Estimate) -> tuple[float, float, float]:
    """(value, low, high), the ends at the value where there is no finite interval."""
    value = figure.value or 0.0
    low, high = figure.low, figure.high
    return value, low if low is not None and math.isfinite(low) else value, high if high is not None and math.isfinite(high) else value
