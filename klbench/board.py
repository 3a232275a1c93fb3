"""The board: records of one task side by side, as a table in the terminal, as JSON, as CSV and as one page.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from klbench.errors import UserError
from klbench.estimate import BLOCKS, Estimate, t_quantile
from klbench.measure import COLUMNS
from klbench.ranks import certain_bracket, rank_ranges
from klbench.record import FrontierPoint, Pooled, Record, digest, write_atomically
from klbench.standing import Standing, standings
from klbench.truths import Beside, beside, verdict, views

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA: Final = 1
NULLS: Final = ("ancestral", "uniform")  # methods that learned nothing and are on the board to be beaten

# What a status looks like where colour may be missing.
MARKS: Final = {"exact": "=", "certified": "", "wide": "~", "uncertified": "?", "lower": "≥", "upper": "≤", "infeasible": "×"}
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
    status is uncertified."""

    record: Record
    label: str
    columns: dict[str, Estimate]
    rank: tuple[int, int] | None
    bracket: tuple[float, float | None] | None

    @property
    def id(self) -> str:
        return self.record.run.id

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


@final
@dataclass(frozen=True)
class Board:
    """All records of a directory. Build it with `Board.of` or `Board.read`."""

    tables: tuple[Table, ...]
    manifest: dict[str, Any]

    @classmethod
    def of(cls, records: Iterable[Record], manifest: dict[str, Any] | None = None, pools: Sequence[Pooled] = ()) -> Board:
        """pools: figures of tables that were estimated together; one whose draws are not these records' is passed over.

        Raises UserError when there is no record, when two have one id, or when one lacks `free` at every prompt."""
        ordered = sorted(records, key=lambda r: r.run.id)
        if not ordered:
            raise UserError("a board needs at least one record")
        for one, next_one in itertools.pairwise(ordered):
            if one.run.id == next_one.run.id:
                raise UserError(f"two records have the id {one.run.id}")
        groups: dict[str, list[Record]] = {}
        for record in ordered:
            free = record.prompts.get("free", [])
            if not record.prompt_ids or len(free) != len(record.prompt_ids):
                wanted = max(len(record.prompt_ids), 1)
                raise UserError(f"record {record.run.id}: prompts.free: a number a prompt expected, {wanted} in all, got {len(free)}")
            groups.setdefault(comparable(record), []).append(record)
        made = sorted(groups.values(), key=lambda g: (g[0].run.task, g[0].run.prior, g[0].run.beta, g[0].run.id))
        counts = Counter(g[0].run.task for g in made)
        shared = {task for task, count in counts.items() if count > 1}
        return cls(tuple(_table(group, group[0].run.task in shared, pools) for group in made), manifest or {})

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
        return cls.of((Record.read(path) for path in paths), manifest, Pooled.all_in(folder))

    @property
    def rows(self) -> list[tuple[Table, Row]]:
        return [(table, row) for table in self.tables for row in table.rows]

    @property
    def truths(self) -> list[Beside]:
        """Every figure whose exact value is known, beside it."""
        return [b for table in self.tables for b in _truths(table)]

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

    def write(self, folder: Path) -> None:
        """board.json, board.csv and index.html in `folder`, each atomically; methods.csv where there are methods with enough seeds."""
        write_atomically(folder / "board.json", self.to_json().encode("utf-8", "replace"))
        write_atomically(folder / "board.csv", self.to_csv().encode("utf-8", "replace"))
        if any(table.methods for table in self.tables):
            write_atomically(folder / "methods.csv", self.methods_csv().encode("utf-8", "replace"))
        self.page(folder / "index.html")

    def to_json(self) -> str:
        """Ranks and brackets by record, each record with the hash of what it says; sorted keys, one trailing newline."""
        data = {
            "schema_version": SCHEMA,
            "above_frontier": {"level": 0.999, "ids": [row.id for row in self.above_frontier()]},
            "tables": [
                {
                    "task": table.first.run.task,
                    "task_version": table.first.run.task_version,
                    "prior": table.first.run.prior,
                    "beta": table.first.run.beta,
                    "prompts": len(table.first.prompt_ids),
                    "pool": None if table.pool is None else {"members": list(table.pool.members), "hash": table.pool.hash},
                    "rows": [
                        {
                            "id": row.id,
                            "sha256": digest(row.record.comparable()),
                            "method": row.record.run.method,
                            "kind": row.record.run.kind,
                            "role": row.role,
                            "seed": row.record.run.seed,
                            "status": row.status,
                            "rank": row.rank,
                            "reverse_kl_certain": row.bracket,
                            "columns": {name: row.columns[name].to_json() for name in sorted(row.columns)},
                            **({"truths": row.record.model_dump(mode="json")["truths"]} if row.record.truths else {}),
                        }
                        for row in table.rows
                    ],
                    **({"methods": [_standing_json(s) for s in table.methods]} if table.methods else {}),
                }
                for table in self.tables
            ],
        }
        return json.dumps(data, sort_keys=True, allow_nan=False, indent=1, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """A row a policy; each column with `_low`, `_high` and `_status` beside it; empty where there is nothing."""
        extra = {name for _, row in self.rows for name in row.columns} - set(COLUMNS)
        names = [*COLUMNS, *sorted(extra)]
        costs = sorted({k for _, row in self.rows for k, v in row.record.cost.items() if k != "machine" and isinstance(v, int | float)})
        head = ["task", "prior", "beta", "method", "kind", "role", "seed", "id", "status", "rank_low", "rank_high"]
        head += ["reverse_kl_certain_low", "reverse_kl_certain_high"]
        head += [part for name in names for part in (name, f"{name}_low", f"{name}_high", f"{name}_status")]
        head += [f"cost.{key}" for key in costs]
        known = [name for name in names if any(name in row.record.truths for _, row in self.rows)]
        head += [f"{name}_truth" for name in known]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([_csv_cell(h) for h in head])
        for _, row in self.rows:
            run = row.record.run
            line: list[Any] = [run.task, run.prior, run.beta, run.method, run.kind, row.role, run.seed, row.id, row.status]
            line += [*(row.rank or (None, None)), *(row.bracket or (None, None))]
            for name in names:
                figure = row.columns.get(name)
                line += [None] * 4 if figure is None else [figure.value, figure.low, figure.high, figure.status]
            line += [row.record.cost.get(key) for key in costs]
            line += [row.record.truths.get(name) for name in known]
            writer.writerow([_csv_cell(cell) for cell in line])
        return out.getvalue()

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
            line = [of.title, _place_text(standing.rank, "-"), f"{standing.method} x{len(standing.seeds)} seeds"]
            for name in ("reverse_kl", "wasted_nats"):
                figure = standing.columns.get(name)
                line += ["-"] * 3 if figure is None else [_number(figure.value), _number(figure.low), _number(figure.high)]
            line += [_number(figure.value) if (figure := standing.columns.get(name)) else "-" for name in single]
            status = standing.columns["reverse_kl"].status if "reverse_kl" in standing.columns else "uncertified"
            cells.append(["_".join(plain(cell).split()) or "-" for cell in [*line, status, "-", "-"]])
        for table, row in self.rows:
            line = [table.title, _rank(row, "-"), row.label]
            for name in ("reverse_kl", "wasted_nats"):
                figure = row.estimate(name)
                line += ["-"] * 3 if figure is None else [_number(figure.value), _number(figure.low), _number(figure.high)]
            line += [_number(figure.value) if (figure := row.estimate(name)) else "-" for name in single]
            line += [row.status, *(_number(end) for end in row.bracket or (None, None))]
            cells.append(["_".join(plain(cell).split()) or "-" for cell in line])
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]

    # --- page ---

    def page(self, path: Path) -> None:
        """One self-contained file: no script, no request. matplotlib draws its figures and is imported here alone."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FunctionLoader(lambda name: files("klbench.page").joinpath(name).read_text(encoding="utf-8")),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        text = environment.get_template("index.html.j2").render(
            style=files("klbench.page").joinpath("style.css").read_text(encoding="utf-8"),
            tables=[_table_view(table, i) for i, table in enumerate(self.tables)],
            verdict=verdict(self.truths) if self.truths else "",
            above=[f"{plain(row.label)} on {plain(row.record.run.task)}" for row in self.above_frontier()],
            columns=COLUMNS,
            glossary=[(s, MARKS[s], GLOSSARY[s]) for s in GLOSSARY if any(row.status == s for _, row in self.rows)],
            manifest=facts(self.manifest),
            command=plain(_command(self.manifest)),
        )
        write_atomically(path, text.encode("utf-8", "replace"))


# --- what may be compared, and ranks ---


def comparable(record: Record) -> str:
    """Equal for records whose reverse_kl may be ranked: the same prompts, prior, β, length and target. The bank may differ."""
    run = record.run
    hashes = {k: run.hashes.get(k) for k in ("prior", "prompts", "target")}
    return digest([run.task, run.task_version, run.prior, run.beta, run.max_new_tokens, hashes, record.prompt_ids])


def role(record: Record) -> str:
    """target: p* itself. null: learned nothing. sampler: decoding only, a point of reference. Else objective or policy."""
    figure = record.columns.get("reverse_kl")
    if record.status == "exact" and figure is not None and figure.value == 0.0:
        return "target"
    return "null" if record.run.method in NULLS else record.run.kind


def _table(records: list[Record], shared: bool, pools: Sequence[Pooled]) -> Table:
    """Rows of comparable records. `shared`: another table has the same task, so the title must say more."""
    pool = next((p for p in pools if p.fits(records)), None)
    better = {} if pool is None else pool.columns
    prompts = {r.run.id: r.prompts | ({} if pool is None else pool.prompts.get(r.run.id, {})) for r in records}
    free = {i: np.asarray(found["free"], dtype=np.float64) for i, found in prompts.items()}
    stderr = {i: np.asarray(found.get("free_stderr", np.zeros(len(free[i])))) for i, found in prompts.items()}
    ranked = [r for r in records if role(r) != "target"]
    ranges = dict(zip((r.run.id for r in ranked), rank_ranges(np.stack([free[r.run.id] for r in ranked])), strict=True)) if ranked else {}
    labels = _labels(records)
    rows = []
    for record in records:
        own, bracket = record.run.id, None
        columns = record.columns | better.get(own, {})
        if columns["reverse_kl"].status == "uncertified":
            others = [r.run.id for r in ranked if r.run.id != own]
            shape = (len(others), len(free[own]))
            cap = record.prompts.get("reward_max")
            cap_nats = np.asarray(cap, dtype=np.float64) / record.run.beta if cap and len(cap) == len(free[own]) else None
            far, errors = (np.array([x[i] for i in others]).reshape(shape) for x in (free, stderr))
            bracket = certain_bracket(free[own], stderr[own], far, errors, cap_nats)
        rows.append(Row(record, labels[own], columns, ranges.get(own), bracket))
    rows.sort(key=lambda row: _order(row, float(free[row.id].mean())))
    longest = max(records, key=lambda r: (max((p.reach for p in r.frontier), default=0.0), len(r.frontier)))
    run = records[0].run
    title = f"{run.task} · β {run.beta:g} · {run.prior}" if shared else run.task
    methods = standings(records, {row.id: row.columns for row in rows}, free)
    return Table(title, tuple(rows), tuple(sorted(longest.frontier, key=lambda p: p.reward)), pool, methods)


def _standing_json(standing: Standing) -> dict[str, Any]:
    return {
        "method": standing.method,
        "seeds": list(standing.seeds),
        "rank": standing.rank,
        "columns": {name: standing.columns[name].to_json() for name in sorted(standing.columns)},
        "curve": [list(point) for point in standing.curve],
    }


def _truths(table: Table) -> list[Beside]:
    return [b for row in table.rows for b in beside(plain(table.title), plain(row.label), row.columns, row.record.truths)]


def _order(row: Row, free: float) -> tuple[bool, bool, float, str]:
    """The posterior first, then by reverse_kl; rows without one come last, by the part of it that needs no log Z."""
    figure = row.estimate("reverse_kl")
    value = None if figure is None else figure.value
    return row.role != "target", value is None, free if value is None else value, row.id


def _labels(records: list[Record]) -> dict[str, str]:
    """Method names, with the seed where a method is there twice, with the id where that is not enough."""
    count = Counter(r.run.method for r in records)
    out = {r.run.id: r.run.method if count[r.run.method] == 1 else f"{r.run.method} s{r.run.seed}" for r in records}
    again = Counter(out.values())
    return {i: label if again[label] == 1 else f"{label} {i.rsplit('-', 1)[-1]}" for i, label in out.items()}


# --- text ---


def plain(text: str) -> str:
    """Without control, formatting and surrogate characters, which move cursors and turn the reading direction; runs of space as one."""
    kept = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return " ".join(kept.split())


def figure_text(x: float | None) -> str:
    """Three decimals below 10, two below 100, one above; an en dash for nothing."""
    if x is None:
        return "–"
    if not math.isfinite(x):
        return "∞" if x > 0 else "−∞"
    size = abs(x)
    text = f"{x:.3f}" if size < 9.9995 else f"{x:.2f}" if size < 99.995 else f"{x:,.1f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.replace("-", "")


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.6g}"


def _rank(row: Row, dash: str = "–") -> str:
    return "p*" if row.rank is None else _place_text(row.rank, dash)


def _place_text(rank: tuple[int, int], dash: str = "–") -> str:
    low, high = rank
    return f"{low}" if low == high else f"{low}{dash}{high}"


def _csv_cell(cell: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets a quote in front; numbers and empty cells stay."""
    if not isinstance(cell, str):
        return "" if cell is None else cell
    text = plain(cell)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")) else text


def _interval(row: Row, column: str) -> str:
    return _ends_text(row.estimate(column))


def _ends_text(figure: Estimate | None) -> str:
    if figure is None or figure.low is None or figure.high is None or figure.status == "exact":
        return ""
    return f"[{figure_text(figure.low)}, {figure_text(figure.high)}]"


def _bracket(row: Row) -> str:
    if row.bracket is None:
        return ""
    low, high = row.bracket
    return f"in {figure_text(low)} … {figure_text(high)}" if high is not None else f"at least {figure_text(low)}"


def _against(row: Row, column: str) -> str:
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
        made.add_row(_place_text(standing.rank), plain(standing.method)[:32], texts[0], _ends_text(figures[0]), *texts[1:], status)
    return made


def _terminal_cells(table: Table) -> list[list[str]]:
    """A list of texts a row, in the order of HEADS; the fourth is the interval or the bracket."""
    lines = []
    for row in table.shown:
        doubt = MARKS["uncertified"] if row.status == "uncertified" else ""
        line = [_rank(row), plain(row.label)[:32]]
        for name in ("reverse_kl", "wasted_nats", "reward", "kl_prior"):
            figure = row.estimate(name)
            line.append(figure_text(figure.value if figure else None) + (doubt if figure and COLUMNS[name].posterior else ""))
        line.insert(3, _interval(row, "reverse_kl") or _bracket(row))
        status = f"{MARKS.get(row.status, '')} {plain(row.status)}".strip()
        lines.append([*line, _against(row, "entropy"), _against(row, "distinct_2"), status])
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


# --- page: plain data for the template, every text already stripped, escaped by Jinja ---

SHOWN: Final = ("wasted_nats", "reward", "gold", "moments", "kl_prior")
OPTIONAL: Final = ("gold", "moments")  # on the table of a task that has them
LONGEST: Final = 1200  # characters of a prompt or completion on the page; the samples file has the rest


def _table_view(table: Table, index: int) -> dict[str, Any]:
    from markupsafe import Markup

    from klbench.page import figures

    places = []
    standing_for = {standing.method: standing.columns for standing in table.methods}
    for row in table.shown:
        columns = standing_for.get(row.record.run.method, row.columns)
        reward, kl = columns.get("reward"), columns.get("kl_prior")
        label = row.record.run.method if row.record.run.method in standing_for else row.label
        if reward is not None and kl is not None and all(e.value is not None and math.isfinite(e.value) for e in (reward, kl)):
            places.append(figures.Place(plain(label), row.role, _ends(reward), _ends(kl)))
    frontier = [figures.Point(p.reward, p.kl, p.low, p.high, p.reach) for p in table.frontier]
    trained = [row for row in table.shown if figures.keys_of(row.record.curve)]
    axes = figures.limits([row.record.curve for row in trained])
    top = _top(table)
    run = table.first.run
    names = [n for n in SHOWN if n not in OPTIONAL or any(n in row.columns for row in table.rows)]
    return {
        "names": names,
        "anchor": f"task-{index + 1}",
        "title": plain(table.title) or "unnamed",
        "beta": f"{run.beta:g}",
        "prior": plain(run.prior),
        "prompts": len(table.first.prompt_ids),
        "draws": run.score.draws,
        "rows": [_row_view(row, top, names) for row in table.shown],
        "hidden": len(table.rows) - len(table.shown),
        "methods": [_standing_view(standing, top) for standing in table.methods],
        "learning": Markup(figures.learning({plain(s.method): s.curve for s in table.methods if s.curve}, f"{index} {table.title}"))
        if any(s.curve for s in table.methods)
        else None,
        "ticks": [(f"{t:g}", f"{_place(t, top):.2f}") for t in figures.ticks(top, 0.2)],
        "plane": Markup(figures.plane(places, frontier, f"{index} {table.title}")) if places else None,
        "curves": [
            {"label": plain(row.label), "svg": Markup(figures.training(row.record.curve, axes, f"{index} {row.id}"))} for row in trained
        ],
        "truths": views(_truths(table)),
        "uncertified": any(row.status == "uncertified" for row in table.rows),
    }


def _standing_view(standing: Standing, top: float) -> dict[str, Any]:
    names = ("wasted_nats", "reward", "kl_prior", "own_kl")
    reverse = standing.columns.get("reverse_kl")
    return {
        "rank": _place_text(standing.rank),
        "label": plain(standing.method) or "unnamed",
        "seeds": len(standing.seeds),
        "reverse": figure_text(reverse.value if reverse else None),
        "interval": _ends_text(reverse),
        "status": reverse.status if reverse else "",
        "reason": plain(reverse.reason) if reverse else "",
        "bar": _bar_of(reverse, None, top),
        "cells": [
            (n, figure_text(f.value if (f := standing.columns.get(n)) else None), _ends_text(standing.columns.get(n))) for n in names
        ],
    }


def _row_view(row: Row, top: float, shown_names: list[str]) -> dict[str, Any]:
    reverse = row.estimate("reverse_kl")
    run = row.record.run
    names = [*(n for n in COLUMNS if n in row.columns), *sorted(set(row.columns) - set(COLUMNS))]
    train = run.train.model_dump() if run.train else None
    cost = {key: value for key, value in row.record.cost.items() if key != "machine"}
    return {
        "label": plain(row.label) or "unnamed",
        "role": row.role,
        "id": plain(row.id),
        "rank": _rank(row),
        "status": plain(row.status),
        "mark": MARKS.get(row.status, ""),
        "reason": plain(row.columns["reverse_kl"].reason) if "reverse_kl" in row.columns else "",
        "reverse": figure_text(reverse.value if reverse else None),
        "interval": _interval(row, "reverse_kl"),
        "bracket": _bracket(row),
        "bar": _bar(row, top),
        "cells": [(n, figure_text(e.value if (e := row.estimate(n)) else None), _interval(row, n)) for n in shown_names],
        "against": [(n, _against(row, n).split(" / ")) for n in ("entropy", "distinct_2")],
        "columns": [_column_view(row, name) for name in names],
        "facts": facts({"kind": run.kind, "seed": run.seed, "train": train, "score": run.score.model_dump(), "cost": cost}),
        "notes": [plain(note) for note in row.record.notes],
        "samples": [
            {
                "prompt": shown(s.prompt),
                "completion": shown(s.completion),
                "reward": figure_text(s.reward),
                "log_p0": figure_text(s.log_p0),
                "log_q": figure_text(s.log_q),
            }
            for s in row.record.samples
        ],
    }


def _column_view(row: Row, name: str) -> dict[str, str]:
    figure = row.columns[name]
    about = COLUMNS.get(name)
    return {
        "name": plain(name),
        "formula": about.formula if about else "",
        "unit": about.unit if about else "",
        "value": figure_text(figure.value),
        "interval": _interval(row, name),
        "status": plain(figure.status) if (about is None or about.posterior) else "",
        "reason": plain(figure.reason),
    }


def _ends(figure: Estimate) -> tuple[float, float, float]:
    """(value, low, high), the ends at the value where there is no finite interval."""
    value = figure.value or 0.0
    low, high = figure.low, figure.high
    return value, low if low is not None and math.isfinite(low) else value, high if high is not None and math.isfinite(high) else value


def _top(table: Table) -> float:
    """The right end of the interval marks: the largest upper end of reverse_kl, but not far beyond a null row's.

    Who is that much worse than having learned nothing stands at the edge with an arrow, and the others keep the room.
    """
    figures = [(row.role, e) for row in table.rows if (e := row.estimate("reverse_kl"))]
    ends = [(role, x) for role, e in figures for x in (e.value, e.high) if x is not None and math.isfinite(x)]
    top = max((x for _, x in ends), default=0.0)
    null = max((x for role, x in ends if role == "null"), default=math.inf)
    return min(top, 1.25 * null if null > 0 else math.inf) * 1.04 or 1.0


def _place(x: float, top: float) -> float:
    """Percent of the width at which x nats stand on a square-root axis that ends at `top`."""
    return 100.0 * min(math.sqrt(max(x, 0.0) / top), 1.0)


def _bar(row: Row, top: float) -> dict[str, str] | None:
    """Where the dot and the line of an interval mark stand, in percent; the line of an uncertified figure is its bracket."""
    return _bar_of(row.estimate("reverse_kl"), row.bracket, top)


def _bar_of(figure: Estimate | None, bracket: tuple[float, float | None] | None, top: float) -> dict[str, str] | None:
    if figure is None or figure.value is None:
        return None
    low, high = figure.low, figure.high
    if low is None or high is None:
        low, high = bracket or (None, None)
        high = top if low is not None and high is None else high
    out = {"dot": f"{_place(figure.value, top):.2f}", "beyond": "beyond" if figure.value > top else ""}
    if low is not None and high is not None:
        out |= {"left": f"{_place(low, top):.2f}", "width": f"{_place(high, top) - _place(low, top):.2f}"}
    return out


def shown(text: str) -> str:
    """A sample's text: line ends and tabs stay, other control and direction characters become �, what is too long is cut and says so."""
    head = text[:LONGEST]
    kept = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") or c == "\u200d" else "\ufffd" for c in head)
    return kept + (f" … ({len(text) - LONGEST:,} characters more)" if len(text) > LONGEST else "")


def facts(data: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested data as (dotted key, text) pairs; what `machine` holds differs between equal runs and stays out."""
    if isinstance(data, dict):
        keys = sorted((key for key in data if key != "machine"), key=str)
        return [pair for key in keys for pair in facts(data[key], f"{name}.{key}" if name else str(key))]
    if data is None or data == "" or data == []:
        return []
    if isinstance(data, list):
        if any(isinstance(item, dict | list) for item in data):
            return [pair for i, item in enumerate(data) for pair in facts(item, f"{name}.{i}")]
        data = ", ".join(str(item) for item in data)
    return [(plain(name), plain(f"{data:g}" if isinstance(data, float) else str(data))[:400])]


def _command(manifest: dict[str, Any]) -> str:
    command = manifest.get("command", "")
    return " ".join(str(part) for part in command) if isinstance(command, list) else str(command)
