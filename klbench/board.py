"""The board: records of one task side by side, as a table in the terminal, as JSON and as CSV; klbench/page/site.py makes its pages.

Ranks are those of klbench/ranks.py: an uncertified policy is ranked like any other, and only its absolute reverse_kl is guarded. The
posterior itself (the row of rejection sampling, status exact, reverse_kl 0) is shown and takes no rank. Conventions: nats; rows in
order of reverse_kl; what is written depends on the records alone and not on their order.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from klbench.errors import UserError
from klbench.estimate import BLOCKS, Estimate, finite_or_word, t_quantile
from klbench.measure import COLUMNS
from klbench.ranks import certain_bracket, contenders, rank_ranges
from klbench.record import Filed, FrontierPoint, Pooled, Record, checked_in, columns_json, digest, one_line, write_atomically
from klbench.standing import Standing, standings
from klbench.truths import Beside, beside

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA: Final = 1
NULLS: Final = ("ancestral", "uniform")  # methods that learned nothing and are on the board to be beaten

# What a status looks like where colour may be missing.
MARKS: Final = {"exact": "=", "certified": "", "wide": "~", "uncertified": "?", "lower": "≥", "upper": "≤", "infeasible": "×"}
NOTHING: Final = (None,) * 4  # a column that a row lacks, in a CSV file
GLOSSARY: Final = {
    "exact": "by construction or by summing over every outcome",
    "certified": "rejection would accept at least 30 prior draws at every prompt, so the interval can be trusted",
    "wide": "rejection would accept 1 to 30 prior draws at some prompt: the interval is truthful, and stretched for that",
    "uncertified": "rejection would accept less than one: no interval, but a bracket that holds for certain; the rank stands",
    "lower": "a lower bound",
    "upper": "an upper bound",
    "infeasible": "the constraint of the target cannot be met here",
}


@final
@dataclass(frozen=True)
class Row:
    """A policy on the board. columns: the record's, and over them the pooled ones where the table has a pool. rank: least and greatest
    place; None for the posterior itself. bracket: reverse_kl's certain ends, the upper None where it is not known; asked for where the
    status is uncertified. provenance: "recomputed" from the stored samples by `klbench leaderboard check`, or "self-reported"."""

    filed: Filed
    label: str
    columns: dict[str, Estimate]
    rank: tuple[int, int] | None
    bracket: tuple[float, float | None] | None
    provenance: str

    @property
    def id(self) -> str:
        return self.filed.id

    @property
    def record(self) -> Record:
        return self.filed.record

    @property
    def sha256(self) -> str:
        """Of what the record says, its machine's part left out."""
        return self.filed.sha256

    @property
    def role(self) -> str:
        return role(self.record)

    @property
    def status(self) -> str:
        """That of reverse_kl."""
        return self.columns["reverse_kl"].status if "reverse_kl" in self.columns else self.record.status

    def estimate(self, column: str) -> Estimate | None:
        """None where the record lacks the column or the column has no value."""
        found = self.columns.get(column)
        return None if found is None or found.value is None else found


@final
@dataclass(frozen=True)
class Table:
    """Records that may be compared: one task, prior, β and set of prompts. Rows in order of reverse_kl."""

    title: str
    rows: tuple[Row, ...]
    frontier: tuple[FrontierPoint, ...]
    pool: Pooled | None
    methods: tuple[Standing, ...] = ()

    @property
    def first(self) -> Record:
        return self.rows[0].record

    @property
    def shown(self) -> tuple[Row, ...]:
        """Rows for people: of a method that stands for itself, over its seeds, the first checkpoint alone."""
        seeds = {standing.method: standing.seeds[0] for standing in self.methods}
        return tuple(row for row in self.rows if seeds.get(row.record.run.method, row.record.run.seed) == row.record.run.seed)

    @property
    def truths(self) -> list[Beside]:
        """Figures whose exact value is known, beside it."""
        return [b for row in self.rows for b in beside(plain(self.title), plain(row.label), row.columns, row.record.truths)]


@final
@dataclass(frozen=True)
class Board:
    """All records of a directory. Build it with `Board.of` or `Board.read`."""

    tables: tuple[Table, ...]
    manifest: dict[str, Any]

    @classmethod
    def of(
        cls, records: Iterable[Record], manifest: dict[str, Any] | None = None, pools: Sequence[Pooled] = (),
        checked: Mapping[str, str] | None = None,
    ) -> Board:  # fmt: skip
        """pools: figures of tables that were estimated together; one whose draws are not these records' is passed over.
        checked: digests of records that were computed again (`klbench.record.checked_in`).

        Raises UserError when there is no record, when two have one id, or when one lacks `free` at every prompt."""
        return cls.joined(map(Filed.of, records), manifest, pools, checked)

    @classmethod
    def joined(
        cls, filed: Iterable[Filed], manifest: dict[str, Any] | None = None, pools: Sequence[Pooled] = (),
        checked: Mapping[str, str] | None = None, work: Callable[[Sequence[Callable[[], Ranked]]], list[Ranked]] | None = None,
    ) -> Board:  # fmt: skip
        """The same of records that are hashed already. work: does what each table costs, and may share it out among processes."""
        ordered = sorted(filed, key=attrgetter("id"))
        if not ordered:
            raise UserError("a board needs at least one record")
        for one, next_one in itertools.pairwise(ordered):
            if one.id == next_one.id:
                raise UserError(f"two records have the id {one.id}")
        groups: dict[tuple[Any, ...], dict[str, Filed]] = {}
        for each in ordered:
            free, prompts = each.record.prompts.get("free", []), len(each.record.prompt_ids)
            if not prompts or len(free) != prompts:
                raise UserError(f"record {each.id}: prompts.free: a number a prompt expected, {max(prompts, 1)} in all, got {len(free)}")
            groups.setdefault(alike(each.record), {})[each.id] = each
        made = [(own, first.record.run, group) for group in groups.values() for own, first in [next(iter(group.items()))]]
        made.sort(key=lambda g: (g[1].task, g[1].prior, g[1].beta, g[0]))
        counts = Counter(run.task for _, run, _ in made)
        pieces = [partial(_ranked, group, pools) for *_, group in made]
        ranked = [piece() for piece in pieces] if work is None else work(pieces)
        tables = [_table(group, counts[run.task] > 1, own, checked or {}) for (_, run, group), own in zip(made, ranked, strict=True)]
        return cls(tuple(tables), manifest or {})

    @classmethod
    def read(cls, folder: Path) -> Board:
        """From DIR/records/*.json and, where there is one, DIR/manifest.json. Raises UserError."""
        paths = sorted((folder / "records").glob("*.json"))
        if not paths:
            raise UserError(f"no records in {folder / 'records'}")
        manifest: dict[str, Any] = {}
        if (folder / "manifest.json").is_file():
            try:
                manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{folder / 'manifest.json'}: not JSON: {error}") from None
            if not isinstance(manifest, dict):
                raise UserError(f"{folder / 'manifest.json'}: a mapping expected")
        return cls.joined(map(Filed.read, paths), manifest, Pooled.all_in(folder), checked_in(folder))

    @property
    def rows(self) -> list[tuple[Table, Row]]:
        return [(table, row) for table in self.tables for row in table.rows]

    @property
    def truths(self) -> list[Beside]:
        """Every figure whose exact value is known, beside it."""
        return [b for table in self.tables for b in table.truths]

    def above_frontier(self, level: float = 0.999) -> list[Row]:
        """Policies that seem to lie beyond the optimal frontier, by intervals that hold for all rows of the board at once at `level`.

            wasted + t_{1 − α/2K} · stderr + (c/3) · up < 0,   α = 1 − level,  c = −log(α/2K)

        up: the mean of log(1 + 3/A) at λ̂, read off the 95 % interval, which is value + t·stderr + up at its upper end. At another level
        the rule of three becomes a rule of c, and log(1 + cx) ≤ (c/3) log(1 + 3x) for c ≥ 3. An uncertified figure proves nothing.
        """
        alpha = (1 - level) / (2 * len(self.rows))
        stretch = max(-math.log(alpha) / 3, 1.0)
        found = []
        for _, row in self.rows:
            wasted = row.estimate("wasted_nats")
            if wasted is None or wasted.value is None or wasted.high is None or wasted.stderr is None:
                continue
            dof = min((BLOCKS - 1) * len(row.record.prompt_ids), 30)
            up = max(0.0, wasted.high - wasted.value - t_quantile(dof) * wasted.stderr)
            if wasted.value + t_quantile(dof, 1 - 2 * alpha) * wasted.stderr + stretch * up < -1e-9:
                found.append(row)
        return found

    # --- files ---

    def files(self) -> dict[str, Callable[[], str]]:
        """What makes board.json and board.csv, and methods.csv where there are methods with enough seeds."""
        methods = {"methods.csv": self.methods_csv} if any(table.methods for table in self.tables) else {}
        return {"board.json": self.to_json, "board.csv": self.to_csv, **methods}

    def write(self, folder: Path) -> None:
        """`files` into `folder`, each atomically."""
        for name, text in self.files().items():
            write_atomically(folder / name, text().encode("utf-8", "replace"), lasting=False)

    def to_json(self) -> str:
        """Ranks and brackets by record, each record with the hash of what it says; sorted keys, a row a line, one trailing newline."""
        above = _json({"level": 0.999, "ids": [row.id for row in self.above_frontier()]})
        tables = ",\n".join(map(_table_json, self.tables))
        return f'{{"above_frontier": {above}, "schema_version": {SCHEMA}, "tables": [\n{tables}\n]}}\n'

    def to_csv(self) -> str:
        """A row a policy; each column with `_low`, `_high` and `_status` beside it; empty where there is nothing."""
        extra = {name for _, row in self.rows for name in row.columns} - set(COLUMNS)
        names = [*COLUMNS, *sorted(extra)]
        costs = sorted({k for _, row in self.rows for k, v in row.record.cost.items() if k != "machine" and isinstance(v, int | float)})
        head = ["task", "prior", "beta", "method", "kind", "role", "seed", "id", "status", "rank_low", "rank_high"]
        head += ["reverse_kl_certain_low", "reverse_kl_certain_high"]
        head += [part for name in names for part in (name, f"{name}_low", f"{name}_high", f"{name}_status")]
        head += [f"cost.{key}" for key in costs]
        truths = {name for _, row in self.rows for name in row.record.truths}
        known = [name for name in names if name in truths]
        head += [f"{name}_truth" for name in known]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="")
        writer.writerow([_csv_cell(h) for h in head])
        for _, row in self.rows:
            run, columns = row.record.run, row.columns
            said = [run.task, run.prior, run.beta, run.method, run.kind, row.role, run.seed, row.id, row.status]
            figures: list[Any] = [*(row.rank or (None, None)), *(row.bracket or (None, None))]
            for name in names:
                figure = columns.get(name)
                figures += NOTHING if figure is None else (figure.value, figure.low, figure.high, figure.status)
            out.write("\n")
            writer.writerow([_csv_cell(cell) for cell in said])
            out.write(f",{_csv_figures(figures)}")
            if costs or known:
                out.write(",")
                writer.writerow([*(_csv_cell(row.record.cost.get(key)) for key in costs), *(row.record.truths.get(name) for name in known)])
        return f"{out.getvalue()}\n"

    def methods_csv(self) -> str:
        """A row a method with its figures over seeds, as `to_csv` writes those of policies."""
        every = [(table, standing) for table in self.tables for standing in table.methods]
        names = [name for name in COLUMNS if any(name in standing.columns for _, standing in every)]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = ["task", "prior", "beta", "method", "seeds", "rank_low", "rank_high"]
        writer.writerow([*head, *(part for name in names for part in (name, f"{name}_low", f"{name}_high", f"{name}_status"))])
        for table, standing in every:
            run = table.first.run
            line: list[Any] = [run.task, run.prior, run.beta, standing.method, len(standing.seeds), *standing.rank]
            for name in names:
                figure = standing.columns.get(name)
                line += [None] * 4 if figure is None else [figure.value, figure.low, figure.high, figure.status]
            writer.writerow([_csv_cell(cell) for cell in line])
        return out.getvalue()

    # --- terminal ---

    def render(self, console: Console) -> None:
        """One table a task; where the console is no terminal, one row a line and nothing but words and numbers."""
        if not console.is_terminal:
            for line in self.lines():
                console.out(line, highlight=False)
            return
        for table in (table for table in self.tables if table.methods):
            console.print(_methods_table(table))
            console.print()
        cells = [_terminal_cells(table) for table in self.tables]
        kept, gap = _fitting([line for lines in cells for line in lines], console.width)
        for table, lines in zip(self.tables, cells, strict=True):
            console.print(_terminal_table(table, lines, kept, gap))
            console.print()
        gone = [head for i, head in enumerate(HEADS) if i not in kept]
        if gone:
            console.print(f"A wider terminal, board.csv and index.html also show {', '.join(gone)}.", style="dim", highlight=False)
        statuses = {row.status for _, row in self.rows} - {"certified"}
        for status in (s for s in GLOSSARY if s in statuses):
            console.print(f"{MARKS[status]} {status}: {GLOSSARY[status]}", style="dim", highlight=False)
        for row in self.above_frontier():
            where = f"{plain(row.label)} on {plain(row.record.run.task)}"
            console.print(f"{where} lies beyond the frontier: a figure is wrong", style="red", markup=False, highlight=False)

    def lines(self) -> list[str]:
        """A heading and one line a policy: columns aligned by spaces, cells without spaces, `-` where there is nothing."""
        head = ["task", "rank", "method"]
        for name in ("reverse_kl", "wasted_nats"):
            head += [name, f"{name}_low", f"{name}_high"]
        single = ["reward", "kl_prior", "entropy", "entropy_target", "distinct_2", "distinct_2_target"]
        head += [*single, "status", "certain_low", "certain_high"]
        cells = [head]
        for of, standing in [(table, standing) for table in self.tables for standing in table.methods]:
            line = [of.title, place_text(standing.rank, "-"), f"{standing.method} x{len(standing.seeds)} seeds"]
            for name in ("reverse_kl", "wasted_nats"):
                figure = standing.columns.get(name)
                line += ["-"] * 3 if figure is None else [_number(figure.value), _number(figure.low), _number(figure.high)]
            line += [_number(figure.value) if (figure := standing.columns.get(name)) else "-" for name in single]
            status = standing.columns["reverse_kl"].status if "reverse_kl" in standing.columns else "uncertified"
            cells.append(["_".join(plain(cell).split()) or "-" for cell in [*line, status, "-", "-"]])
        for table, row in self.rows:
            line = [table.title, rank_text(row, "-"), row.label]
            for name in ("reverse_kl", "wasted_nats"):
                figure = row.estimate(name)
                line += ["-"] * 3 if figure is None else [_number(figure.value), _number(figure.low), _number(figure.high)]
            line += [_number(figure.value) if (figure := row.estimate(name)) else "-" for name in single]
            line += [row.status, *(_number(end) for end in row.bracket or (None, None))]
            cells.append(["_".join(plain(cell).split()) or "-" for cell in line])
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


# --- what a directory holds ---


def records_of(directory: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Files of the records that the manifest names, or all of them where it names none, by name. Raises UserError where there is none."""
    folder = directory / "records"
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not paths:
        raise UserError(f"no records in {directory}" if directory.is_dir() else f"no directory {directory}")
    if isinstance(manifest.get("runs"), list):
        named = set(map(str, manifest["runs"]))
        paths = [p for p in paths if p.stem in named]
        if not paths:
            raise UserError(f"{directory}: none of the runs in manifest.json has a record yet")
    return paths


def manifest_in(directory: Path) -> dict[str, Any]:
    """What manifest.json says, {} where there is none. Raises UserError for a file that klbench did not write."""
    path = directory / "manifest.json"
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or "suite" not in data or "runs" not in data:
        raise UserError(f"{path}: not the manifest of a klbench run")
    return data


# --- what may be compared, and ranks ---


ALIKE: Final = ("prior", "prompts", "target")  # hashes of a run


def alike(record: Record) -> tuple[Any, ...]:
    """Equal for records whose reverse_kl may be ranked: the same prompts, prior, β, length and target. The bank may differ."""
    run = record.run
    hashes = (run.hashes.get(key) for key in ALIKE)
    return run.task, run.task_version, run.prior, run.beta, run.max_new_tokens, *hashes, *record.prompt_ids


def comparable(record: Record) -> str:
    """`alike` as a hash."""
    run = record.run
    hashes = {key: run.hashes.get(key) for key in ALIKE}
    return digest([run.task, run.task_version, run.prior, run.beta, run.max_new_tokens, hashes, record.prompt_ids])


def span(record: Record) -> tuple[float, int]:
    """How far its frontier goes: the longest of a table is drawn."""
    return max((point.reach for point in record.frontier), default=0.0), len(record.frontier)


def role(record: Record) -> str:
    """target: p* itself. null: learned nothing. sampler: decoding only, a point of reference. Else objective or policy."""
    figure = record.columns.get("reverse_kl")
    if record.status == "exact" and figure is not None and figure.value == 0.0:
        return "target"
    return "null" if record.run.method in NULLS else record.run.kind


@final
@dataclass(frozen=True)
class Ranked:
    """What comparing the records of a table gives, by id: ranks, brackets of uncertified figures, free energies."""

    ranges: dict[str, tuple[int, int]]
    brackets: dict[str, tuple[float, float | None]]
    free: dict[str, float]
    methods: tuple[Standing, ...]
    pool: Pooled | None


def _ranked(filed: dict[str, Filed], pools: Sequence[Pooled]) -> Ranked:
    """Of comparable records, given by id."""
    records = {own: each.record for own, each in filed.items()}
    every = list(records.values())
    pool = next((p for p in pools if p.columns.keys() <= records.keys() and p.fits(every)), None)
    prompts = {i: r.prompts | ({} if pool is None else pool.prompts.get(i, {})) for i, r in records.items()}
    free = {i: np.asarray(found["free"], dtype=np.float64) for i, found in prompts.items()}
    stderr = {i: np.asarray(found.get("free_stderr", np.zeros(len(free[i])))) for i, found in prompts.items()}
    ranked = [i for i, r in records.items() if role(r) != "target"]
    shape = (len(ranked), len(every[0].prompt_ids))
    far, errors = (np.array([x[i] for i in ranked]).reshape(shape) for x in (free, stderr))
    ranges = dict(zip(ranked, rank_ranges(far), strict=True)) if ranked else {}
    best = contenders(far, errors)
    columns = {own: _columns(record, own, pool) for own, record in records.items()}
    brackets = {}
    for own, record in records.items():
        if columns[own]["reverse_kl"].status == "uncertified":
            others = [k for k in best if ranked[k] != own]
            cap = record.prompts.get("reward_max")
            cap_nats = np.asarray(cap, dtype=np.float64) / record.run.beta if cap and len(cap) == len(free[own]) else None
            count = len(ranked) - (own in ranges)
            brackets[own] = certain_bracket(free[own], stderr[own], far[others], errors[others], cap_nats, count)
    return Ranked(ranges, brackets, {i: float(x.mean()) for i, x in free.items()}, standings(records, columns, free), pool)


def _columns(record: Record, own: str, pool: Pooled | None) -> dict[str, Estimate]:
    """The record's, and over them the pooled ones."""
    return record.columns if pool is None or own not in pool.columns else record.columns | pool.columns[own]


def _table(filed: dict[str, Filed], shared: bool, ranked: Ranked, checked: Mapping[str, str]) -> Table:
    """Rows of comparable records, given by id. `shared`: another table has the same task, so the title must say more."""
    records = {own: each.record for own, each in filed.items()}
    labels = _labels(records)
    rows = [
        Row(
            each,
            labels[own],
            _columns(each.record, own, ranked.pool),
            ranked.ranges.get(own),
            ranked.brackets.get(own),
            "recomputed" if checked.get(own) == each.sha256 else "self-reported",
        )
        for own, each in filed.items()
    ]
    rows.sort(key=lambda row: _order(row, ranked.free[row.id]))
    longest = max(records.values(), key=span)
    run = rows[0].record.run
    title = f"{run.task} · β {run.beta:g} · {run.prior}" if shared else run.task
    return Table(title, tuple(rows), tuple(sorted(longest.frontier, key=lambda p: p.reward)), ranked.pool, ranked.methods)


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, allow_nan=False, ensure_ascii=False)


def _table_json(table: Table) -> str:
    run = table.first.run
    about = {
        "beta": run.beta,
        "pool": None if table.pool is None else {"members": list(table.pool.members), "hash": table.pool.hash},
        "prior": run.prior,
        "prompts": len(table.first.prompt_ids),
        "task": run.task,
        "task_version": run.task_version,
    }
    lists = [("methods", map(_standing_json, table.methods))] if table.methods else []
    rest = "".join(f', "{name}": [\n' + ",\n".join(items) + "\n]" for name, items in [*lists, ("rows", map(_row_json, table.rows))])
    return f"{_json(about)[:-1]}{rest}}}"


def _row_json(row: Row) -> str:
    run = row.record.run
    rest = {
        "id": row.id,
        "kind": run.kind,
        "method": run.method,
        "provenance": row.provenance,
        "rank": row.rank,
        "reverse_kl_certain": row.bracket,
        "role": row.role,
        "seed": run.seed,
        "sha256": row.sha256,
        "status": row.status,
        **({"truths": {name: finite_or_word(x) for name, x in row.record.truths.items()}} if row.record.truths else {}),
    }
    columns = columns_json(row.columns) if row.columns != row.record.columns else row.filed.columns
    return f'{{"columns": {columns}, {_json(rest)[1:]}'


def _standing_json(standing: Standing) -> str:
    rest = {"curve": standing.curve, "method": standing.method, "rank": standing.rank, "seeds": standing.seeds}
    return f'{{"columns": {columns_json(standing.columns)}, {_json(rest)[1:]}'


def _order(row: Row, free: float) -> tuple[bool, bool, float, str]:
    """The posterior first, then by reverse_kl; rows without one come last, by the part of it that needs no log Z."""
    figure = row.estimate("reverse_kl")
    value = None if figure is None else figure.value
    return row.role != "target", value is None, free if value is None else value, row.id


def _labels(records: dict[str, Record]) -> dict[str, str]:
    """Method names, with the seed where a method is there twice, with the id where that is not enough."""
    count = Counter(r.run.method for r in records.values())
    out = {i: r.run.method if count[r.run.method] == 1 else f"{r.run.method} s{r.run.seed}" for i, r in records.items()}
    again = Counter(out.values())
    return {i: label if again[label] == 1 else f"{label} {i.rsplit('-', 1)[-1]}" for i, label in out.items()}


# --- text ---


def plain(text: str) -> str:
    """Without control, formatting and surrogate characters, which move cursors and turn the reading direction; runs of space as one."""
    if not text.isprintable():
        kept = (" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
        text = "".join(kept)
    return " ".join(text.split())


def figure_text(x: float | None) -> str:
    """Three decimals below 10, two below 100, one above; an en dash for nothing."""
    if x is None:
        return "–"
    if 0.0 < x < 9.9995:
        return f"{x:.3f}"  # most of them
    size = abs(x)
    if size < 9.9995:
        text = f"{x:.3f}"
    elif not math.isfinite(x):
        return "∞" if x > 0 else "−∞"
    else:
        text = f"{x:.2f}" if size < 99.995 else f"{x:,.1f}"
    if text[0] != "-":
        return text
    return f"−{text[1:]}" if float(text.replace(",", "")) else text[1:]


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.6g}"


def rank_text(row: Row, dash: str = "–") -> str:
    return "p*" if row.rank is None else place_text(row.rank, dash)


def place_text(rank: tuple[int, int], dash: str = "–") -> str:
    low, high = rank
    return f"{low}" if low == high else f"{low}{dash}{high}"


def _csv_figures(figures: Sequence[float | str | None]) -> str:
    """Cells of numbers and known words, which need no quotes: a large table has a million numbers, and `csv` is slow to write them."""
    return one_line(figures)[1:-1].replace("null", "").replace('"', "").replace("Infinity", "inf")


def _csv_cell(cell: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets a quote in front; numbers and empty cells stay."""
    if not isinstance(cell, str):
        return "" if cell is None else cell
    text = plain(cell)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")) else text


def interval_text(row: Row, column: str) -> str:
    return ends_text(row.estimate(column))


def ends_text(figure: Estimate | None) -> str:
    if figure is None or figure.low is None or figure.high is None or figure.status == "exact":
        return ""
    return f"[{figure_text(figure.low)}, {figure_text(figure.high)}]"


def bracket_text(row: Row) -> str:
    if row.bracket is None:
        return ""
    low, high = row.bracket
    return f"in {figure_text(low)} … {figure_text(high)}" if high is not None else f"at least {figure_text(low)}"


def against(row: Row, column: str) -> str:
    """A figure / the posterior's own, to three digits: it is their distance that counts."""
    own, target = row.estimate(column), row.estimate(f"{column}_target")
    return " / ".join("–" if e is None or e.value is None else f"{e.value:#.3g}".rstrip(".").replace("-", "−") for e in (own, target))


# --- terminal ---


HEADS: Final = ("rank", "method", "reverse_kl", "", "wasted_nats", "reward", "kl_prior", "entropy / p*", "distinct-2 / p*", "status")
LEFT: Final = (1, 3, 9)  # columns of words


def _methods_table(table: Table) -> Any:
    """Methods over their seeds, as a rich table without a frame."""
    from rich.table import Table as RichTable
    from rich.text import Text

    seeds = min(len(standing.seeds) for standing in table.methods)
    title = f"{plain(table.title)}: methods, at least {seeds} training seeds each"
    made = RichTable(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    heads = ("rank", "method", "reverse_kl", "95 % over seeds", "wasted_nats", "reward", "kl_prior", "own_kl", "status")
    for head in heads:
        made.add_column(
            Text(head, style="dim"), justify="left" if head in ("method", "95 % over seeds", "status") else "right", no_wrap=True
        )
    for standing in table.methods:
        figures = [standing.columns.get(name) for name in ("reverse_kl", "wasted_nats", "reward", "kl_prior", "own_kl")]
        texts = [figure_text(f.value if f else None) for f in figures]
        status = figures[0].status if figures[0] else ""
        made.add_row(place_text(standing.rank), plain(standing.method)[:32], texts[0], ends_text(figures[0]), *texts[1:], status)
    return made


def _terminal_cells(table: Table) -> list[list[str]]:
    """A list of texts a row, in the order of HEADS; the fourth is the interval or the bracket."""
    lines = []
    for row in table.shown:
        doubt = MARKS["uncertified"] if row.status == "uncertified" else ""
        line = [rank_text(row), plain(row.label)[:32]]
        for name in ("reverse_kl", "wasted_nats", "reward", "kl_prior"):
            figure = row.estimate(name)
            line.append(figure_text(figure.value if figure else None) + (doubt if figure and COLUMNS[name].posterior else ""))
        line.insert(3, interval_text(row, "reverse_kl") or bracket_text(row))
        status = f"{MARKS.get(row.status, '')} {plain(row.status)}".strip()
        lines.append([*line, against(row, "entropy"), against(row, "distinct_2"), status])
    return lines


def _fitting(lines: list[list[str]], width: int) -> tuple[list[int], int]:
    """Indices of HEADS that fit, and the gap between columns: one that does not fit leaves whole, for a wrapped number is none."""
    from rich.cells import cell_len

    widths = [max(cell_len(text) for text in column) for column in zip(HEADS, *lines, strict=True)]
    kept = list(range(len(HEADS)))
    if sum(widths) + 2 * len(kept) - 2 <= width:
        return kept, 2
    for leaving in (8, 7, 6, 5, 4):
        if sum(widths[i] + 1 for i in kept) - 1 <= width:
            break
        kept.remove(leaving)
    return kept, 1


def _terminal_table(table: Table, lines: list[list[str]], kept: list[int], gap: int) -> Any:
    """A rich table without a frame."""
    from rich.table import Table as RichTable
    from rich.text import Text

    run = table.first.run
    title = f"{plain(table.title)}  β {run.beta:g}, prior {plain(run.prior)}, {len(table.first.prompt_ids)} prompts"
    made = RichTable(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for i in kept:
        made.add_column(Text(HEADS[i], style="dim"), justify="left" if i in LEFT else "right", no_wrap=True)
    for row, line in zip(table.shown, lines, strict=True):
        style = {"target": "green", "null": "dim", "sampler": "cyan"}.get(row.role, "")
        doubt = row.status in ("uncertified", "infeasible")
        made.add_row(*(Text(line[i], style="yellow" if doubt and i in (2, 3, 4, 9) else "dim" if i in (3, 9) else style) for i in kept))
    return made
