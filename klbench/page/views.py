"""A board as plain data: what the templates print and what the scripts of the pages read.

Every text is stripped of control characters here; Jinja escapes it, and `script` does for data. Figures for people are those of
klbench/board.py; data carries six digits, which is more than a page prints.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, final
from urllib.parse import quote

from markupsafe import Markup, escape

from klbench.board import (
    GLOSSARY,
    MARKS,
    Board,
    Row,
    Table,
    against,
    bracket_text,
    ends_text,
    figure_text,
    interval_text,
    place_text,
    plain,
    rank_text,
)
from klbench.estimate import Estimate, t_quantile
from klbench.measure import COLUMNS, Column
from klbench.page.axes import keys_of, ticks
from klbench.record import Record, Sample, Score, Train
from klbench.standing import TRUST, Standing
from klbench.truths import views

MAIN: Final = ("reverse_kl", "wasted_nats", "reward", "gold", "moments", "kl_prior")  # with their intervals on the front page
OPTIONAL: Final = ("gold", "moments")  # there where a task has them
SHARD: Final = 25  # policies whose draws share a file
AGAINST: Final = ("entropy", "distinct_2")  # beside the posterior's own
STATIC_ROWS: Final = 200  # rows in the HTML itself, for readers without scripts; the script has all
STATIC_TRUTHS: Final = 400
HEAD: Final = 600  # characters of a prompt or completion in sight
REST: Final = 6000  # and behind a click; the samples file has what is longer
POINTS: Final = 24  # of a training curve
CURVES: Final = 40  # a figure: the nearest to the posterior


@final
@dataclass(frozen=True)
class Part:
    """Rows of one heading on the board: the methods of a table over their seeds, or its policies."""

    table: Table
    index: int  # of the table
    methods: bool
    top: float  # nats at the right end of the interval marks

    @property
    def rows(self) -> Sequence[Standing | Row]:
        return self.table.methods if self.methods else self.table.rows


def parts(board: Board) -> list[Part]:
    """In the order of the board; a table with methods has two, methods first."""
    found = []
    for index, table in enumerate(board.tables):
        end = top(table)
        found += [Part(table, index, True, end)] if table.methods else []
        found.append(Part(table, index, False, end))
    return found


# --- the front page ---


def front(board: Board) -> dict[str, Any]:
    """What index.html.j2 prints beside the figures."""
    every = parts(board)
    room = max(STATIC_ROWS // len(every), 2)
    names = [n for n in MAIN if n not in OPTIONAL or any(n in row.columns for _, row in board.rows)]
    tasks = [table.first.run for table in board.tables]
    rows = board.rows
    truths = [{"task": b.task, **view} for b, view in zip(board.truths, views(board.truths), strict=True)]
    return {
        "title": ", ".join(dict.fromkeys(plain(run.task) or "unnamed" for run in tasks)),
        "names": names,
        "against": list(AGAINST),
        "parts": [_part_view(part, names[1:], room) for part in every],
        "filters": {
            "family": _choices(family(run.task) for run in tasks),
            "task": _choices(plain(run.task) for run in tasks),
            "method": _choices(plain(row.record.run.method) for _, row in rows),
            "prior": _choices(plain(run.prior) for run in tasks),
            "beta": [f"{beta:g}" for beta in sorted({run.beta for run in tasks})],
            "status": [s for s in TRUST if any(row.status == s for _, row in rows)],
        },
        "seeds": any(table.methods for table in board.tables),
        "truths": truths[:STATIC_TRUTHS],
        "more_truths": max(len(truths) - STATIC_TRUTHS, 0),
        "uncertified": any(row.status == "uncertified" for _, row in rows),
        "above": [f"{plain(row.label)} on {plain(row.record.run.task)}" for row in board.above_frontier()],
        "columns": COLUMNS,
        "glossary": [(s, MARKS[s], GLOSSARY[s]) for s in GLOSSARY if any(row.status == s for _, row in rows)],
        "manifest": [pair for pair in facts(board.manifest) if pair[0] != "command"],
        "command": plain(_command(board.manifest)),
    }


def _choices(texts: Any) -> list[str]:
    return sorted({text for text in texts if text})


def family(task: str) -> str:
    return plain(task.partition("/")[0])


def heading(table: Table) -> str:
    """Names the table beside all others: β and prior too."""
    run = table.first.run
    return f"{plain(run.task) or 'unnamed'} · β {run.beta:g} · {plain(run.prior)}"


def _part_view(part: Part, names: Sequence[str], room: int) -> dict[str, Any]:
    table, run = part.table, part.table.first.run
    kept: Sequence[Standing | Row] = table.methods if part.methods else table.shown
    prompts = len(table.first.prompt_ids)
    return {
        "anchor": f"{'methods' if part.methods else 'policies'}-{part.index + 1}",
        "title": plain(run.task) or "unnamed",
        "setting": f"β {run.beta:g} · prior {plain(run.prior)} · {prompts} prompt{'s' * (prompts != 1)} · {run.score.draws} draws",
        "methods": part.methods,
        "alone": not table.methods,
        "ticks": [(f"{t:g}", f"{place(t, part.top):.2f}") for t in ticks(part.top, 0.26)],
        "rows": [_standing_view(r, part.top, names) if isinstance(r, Standing) else _row_view(r, part.top, names) for r in kept[:room]],
        "more": len(part.rows) - len(kept[:room]),
    }


def _standing_view(standing: Standing, end: float, names: Sequence[str]) -> dict[str, Any]:
    reverse = standing.columns.get("reverse_kl")
    return {
        "rank": place_text(standing.rank),
        "label": plain(standing.method) or "unnamed",
        "href": "",
        "role": "objective",
        "under": f"{len(standing.seeds)} seeds",
        "status": reverse.status if reverse else "",
        "reason": plain(reverse.reason) if reverse else "",
        "provenance": "",
        "reverse": figure_text(reverse.value if reverse else None),
        "interval": ends_text(reverse),
        "bracket": "",
        "bar": bar(reverse, None, end),
        "cells": [(n, figure_text(_value(standing.columns, n)), ends_text(standing.columns.get(n))) for n in names],
        "against": [_pair(standing.columns, n) for n in AGAINST],
    }


UNDER: Final = {"target": "the posterior", "null": "null", "sampler": "sampler"}


def _row_view(row: Row, end: float, names: Sequence[str]) -> dict[str, Any]:
    reverse = row.estimate("reverse_kl")
    return {
        "rank": rank_text(row),
        "label": plain(row.label) or "unnamed",
        "href": f"pages/{quote(row.id)}.html",
        "role": row.role,
        "under": UNDER.get(row.role, ""),
        "status": plain(row.status),
        "reason": plain(row.columns["reverse_kl"].reason) if "reverse_kl" in row.columns else "",
        "provenance": row.provenance,
        "reverse": figure_text(reverse.value if reverse else None),
        "interval": interval_text(row, "reverse_kl"),
        "bracket": bracket_text(row),
        "bar": bar(reverse, row.bracket, end),
        "cells": [(n, figure_text(e.value if (e := row.estimate(n)) else None), interval_text(row, n)) for n in names],
        "against": [against(row, n).split(" / ") for n in AGAINST],
    }


def _value(columns: dict[str, Estimate], name: str) -> float | None:
    return None if name not in columns else columns[name].value


def _pair(columns: dict[str, Estimate], name: str) -> list[str]:
    """A figure and the posterior's own, to three digits as on the rows of policies."""
    values = (_value(columns, name), _value(columns, f"{name}_target"))
    return ["–" if x is None else f"{x:#.3g}".rstrip(".").replace("-", "−") for x in values]


def top(table: Table) -> float:
    """The right end of the interval marks: the largest upper end of reverse_kl, but not far beyond the nearest null row's.

    Who is that much worse than having learned nothing stands at the edge with an arrow, and the others keep the room.
    """
    figures = [(row.role, e) for row in table.rows if (e := row.estimate("reverse_kl"))]
    ends = [(role, x) for role, e in figures for x in (e.value, e.high) if x is not None and math.isfinite(x)]
    most = max((x for _, x in ends), default=0.0)
    null = min((max(e.value or 0.0, e.high or 0.0) for role, e in figures if role == "null"), default=math.inf)
    return min(most, 2.5 * null if null > 0 else math.inf) * 1.04 or 1.0


def place(x: float, end: float) -> float:
    """Percent of the width at which x nats stand on a square-root axis that ends at `end`."""
    return 100.0 * min(math.sqrt(max(x, 0.0) / end), 1.0)


def bar(figure: Estimate | None, bracket: tuple[float, float | None] | None, end: float) -> dict[str, str] | None:
    """Where the dot and the line of an interval mark stand, in percent; the line of an uncertified figure is its bracket."""
    if figure is None or figure.value is None:
        return None
    low, high = figure.low, figure.high
    if low is None or high is None:
        low, high = bracket or (None, None)
        high = end if low is not None and high is None else high
    out = {"dot": f"{place(figure.value, end):.2f}", "beyond": "beyond" if figure.value > end else ""}
    if low is not None and high is not None and figure.status != "exact":
        out |= {"left": f"{place(low, end):.2f}", "width": f"{place(high, end) - place(low, end):.2f}"}
    return out


# --- data of the front page: a list a field, so that ten thousand rows stay small ---


def data(board: Board, at: dict[str, int]) -> dict[str, Any]:
    """What pages/board.js holds. Tables as dicts; rows of all tables as columns, null where there is nothing. at: shard by row's id."""
    every = parts(board)
    names = [n for n in MAIN if any(n in row.columns for _, row in board.rows)]
    singles = [part for name in AGAINST for part in (name, f"{name}_target")]
    lists: dict[str, list[Any]] = {key: [] for key in ROW_KEYS}
    figures: dict[str, list[list[float | None]]] = {name: [[], [], []] for name in names}
    single: dict[str, list[float | None]] = {name: [] for name in singles}
    reasons: dict[str, int] = {"": 0}
    for part in every:
        seeds = {standing.method: standing.seeds[0] for standing in part.table.methods}
        for row in part.rows:
            if isinstance(row, Standing):
                columns, reverse = row.columns, row.columns.get("reverse_kl")
                values = [part.index, 1, plain(row.method), plain(row.method) or "unnamed", "", "objective"]
                values += [reverse.status if reverse else "", "", len(row.seeds), row.rank, None, 0, None]
            else:
                run, columns, reverse = row.record.run, row.columns, row.columns.get("reverse_kl")
                values = [part.index, 0, plain(run.method), plain(row.label) or "unnamed", row.id, row.role, plain(row.status)]
                values += [row.provenance, run.seed, row.rank, row.bracket and [short(x) for x in row.bracket]]
                values += [int(seeds.get(run.method, run.seed) != run.seed), at[row.id]]
            reason = plain(reverse.reason) if reverse else ""
            values.append(reasons.setdefault(reason, len(reasons)))
            for key, value in zip(ROW_KEYS, values, strict=True):
                lists[key].append(value)
            for name, kept in figures.items():
                figure = columns.get(name)
                ends = figure is not None and figure.value is not None and figure.status != "exact"
                kept[0].append(short(figure.value) if figure else None)
                kept[1].append(short(figure.low) if figure and ends else None)
                kept[2].append(short(figure.high) if figure and ends else None)
            for name, one in single.items():
                one.append(short(_value(columns, name)))
    words = {key: _coded(lists[key]) for key in ("method", "role", "status", "provenance")}
    return {
        "tables": [_table_data(table, end) for table, end in {p.index: (p.table, p.top) for p in every}.values()],
        "rows": {**{key: lists[key] for key in ROW_KEYS if key not in words}, **words},
        "figures": figures,
        "singles": single,
        "reasons": list(reasons),
    }


ROW_KEYS: Final = (
    "table", "methods", "method", "label", "id", "role", "status", "provenance", "seed", "rank", "bracket", "later", "shard", "reason",
)  # fmt: skip


def _coded(texts: list[str]) -> dict[str, Any]:
    """Few words, said often: each once, and a number a row."""
    words = list(dict.fromkeys(texts))
    at = {word: i for i, word in enumerate(words)}
    return {"words": words, "at": [at[text] for text in texts]}


def _table_data(table: Table, end: float) -> dict[str, Any]:
    run, prompts = table.first.run, len(table.first.prompt_ids)
    return {
        "heading": heading(table),
        "title": plain(run.task) or "unnamed",
        "family": family(run.task),
        "task": plain(run.task),
        "prior": plain(run.prior),
        "beta": f"{run.beta:g}",
        "setting": f"β {run.beta:g} · prior {plain(run.prior)} · {prompts} prompt{'s' * (prompts != 1)} · {run.score.draws} draws",
        "top": short(end),
        "ticks": [(f"{t:g}", f"{place(t, end):.2f}") for t in ticks(end, 0.26)],
        "frontier": [[short(x) for x in (p.reward, p.kl, p.low, p.high, p.reach)] for p in table.frontier],
        "t": short(t_quantile(prompts - 1)) if prompts > 1 else None,  # of a difference paired over prompts
    }


def curves(table: Table, said: Callable[[Row], Said]) -> dict[str, Any]:
    """Training curves of the nearest policies of a table, by label, and of its methods: what pages/curves-N.js holds."""
    drawn = itertools.islice(((row, steps) for row in table.shown if (steps := said(row).curve)), CURVES)
    return {
        "policies": [{"label": plain(row.label), "id": row.id, **json.loads(steps)} for row, steps in drawn],
        "methods": [
            {
                "label": plain(s.method),
                "samples": [short(x) for x, _, _ in s.curve],
                "reverse_kl": [short(y) for _, y, _ in s.curve],
                "wasted_nats": [short(y) for _, _, y in s.curve],
            }
            for s in table.methods[:CURVES]
            if s.curve
        ],
    }


def curve(record: Record) -> dict[str, list[float | None]]:
    """A training curve as columns, at most POINTS evenly taken points with the last among them; `x` counts draws, or else steps."""
    points = record.curve
    stride = max(1, math.ceil(len(points) / POINTS))
    kept = points[len(points) - 1 :: -stride][::-1] if points else []
    unit = "samples" if all("samples" in p for p in kept) else "step"
    keys = [k for k in keys_of(points) if k not in ("samples", "step", "tokens")]
    axis: dict[str, list[float | None]] = {unit: [p.get(unit, float(i)) for i, p in enumerate(kept)]}
    return axis | {k: [x if (x := p.get(k)) is not None and math.isfinite(x) else None for p in kept] for k in keys}


# --- the page of a policy ---


@final
@dataclass(frozen=True)
class Said:
    """What the pages say of a record whoever else is on the board, as text that is ready to be written.

    curve, draws: JSON for scripts, the first "" where nothing was trained.  rows, samples: HTML of its own page, a row a point of the
    training curve (of these `keys`) and a part a draw; points, drawn: how many there are.
    """

    curve: str
    draws: str
    keys: tuple[str, ...]
    rows: str
    points: int
    samples: str
    drawn: int

    @classmethod
    def of(cls, record: Record) -> Said:
        steps = curve(record)
        cells = [[f'<td class="figure">{figure_text(x)}</td>' for x in column] for column in steps.values()]
        rows = [f"<tr>{''.join(row)}</tr>\n" for row in zip(*cells, strict=True)]
        texts = [(cut(s.prompt), cut(s.completion)) for s in record.samples]
        shown = _escaped([part for said in texts for head, rest, _ in said for part in (head, rest)])
        samples = "".join(_sample(texts[k], shown[4 * k : 4 * k + 4], draw) for k, draw in enumerate(record.samples))
        drawn = _object({k: _digits(steps[k]) for k in sorted(steps)}) if rows else ""
        return cls(drawn, _draws(record, texts), tuple(steps), "".join(rows), len(rows), samples, len(texts))


def _sample(said: tuple[Cut, Cut], shown: Sequence[str], draw: Sample) -> str:
    """shown: of prompt and completion what is in sight and what is behind a click, as HTML."""
    return (
        f'<div class="sample">\n<div class="said" dir="auto"><span class="prompt" dir="auto">{shown[0]}{_more(said[0], shown[1])}</span>'
        f'<span class="completion" dir="auto">{shown[2]}{_more(said[1], shown[3])}</span></div>\n'
        f'<p class="numbers">reward {figure_text(draw.reward)} · log <i>p</i><sub>0</sub> {figure_text(draw.log_p0)}'
        f" · log <i>q</i> {figure_text(draw.log_q)}</p>\n</div>\n"
    )


def _more(given: Cut, rest: str) -> str:
    """HTML of what is not in sight, "" where all of it is."""
    left = given[2]
    if not rest and not left:
        return ""
    more = f" … and {left:,} in the record" if left else ""
    return f'<details class="rest"><summary>{len(given[1]) + left:,} characters more</summary>{rest}{more}</details>'


def _escaped(texts: Sequence[str]) -> list[str]:
    """HTML of texts from `cut`, in one go: none holds a NUL."""
    return str(escape("\0".join(texts))).split("\0") if texts else []


@final
@dataclass(frozen=True)
class Origin:
    """What the pages of all policies of a board say of its run: the words of its command, and versions as HTML."""

    words: tuple[str, ...]
    facts: str

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Origin:
        words = shlex.split(_command(manifest)) if manifest.get("command") else []
        kept, skip = [], False
        for word in words:
            if skip or word.split("=")[0] in OF_A_RUN:
                skip = not skip and "=" not in word
            else:
                kept.append(word)
        return cls(tuple(kept), _listed(facts({key: manifest.get(key) for key in ("git", "versions")})))


OF_A_RUN: Final = ("--out", "--task", "--objective", "--seed", "--workers", "--executor", "--device")


def policy(row: Row, table: Table, origin: Origin, said: Said) -> dict[str, Any]:
    """What policy.html.j2 prints."""
    record, run = row.record, row.record.run
    names = [*(n for n in COLUMNS if n in row.columns), *sorted(set(row.columns) - set(COLUMNS))]
    return {
        "label": plain(row.label) or "unnamed",
        "heading": heading(table),
        "id": plain(row.id),
        "url": quote(row.id),
        "seed": run.seed,
        "under": UNDER.get(row.role, ""),
        "rank": rank_text(row),
        "status": plain(row.status),
        "says": GLOSSARY.get(row.status, ""),
        "provenance": row.provenance,
        "reason": plain(row.columns["reverse_kl"].reason) if "reverse_kl" in row.columns else "",
        "bracket": bracket_text(row),
        "headline": [_headline(row, n) for n in ("reverse_kl", "wasted_nats", "reward", "kl_prior") if n in row.columns],
        "columns": Markup("".join(_column(name, row.columns[name]) for name in names)),
        "notes": [plain(note) for note in record.notes],
        "said": said,
        "facts": Markup(_made(record) + origin.facts),
        "digest": row.sha256,
        "command": again(row, origin),
    }


# What many pages have many of is put together here, a template being ten times as slow.


def _column(name: str, figure: Estimate) -> str:
    """A row of the table of all columns."""
    before, unit, formula, guarded = _about(name)
    interval = ends_text(figure) if figure.value is not None else ""
    return (
        f'{before}<td class="figure">{figure_text(figure.value)}{unit}</td><td class="left">{interval or "–"}</td>'
        f"<td{_title(figure.reason)}>{figure.status if guarded else '–'}</td>{formula}</tr>\n"
    )


@lru_cache(4096)  # many policies share a bank, and with it the reasons
def _title(reason: str) -> str:
    """An attribute."""
    shown = plain(reason)
    return f' title="{escape(shown)}"' if shown else ""


@cache
def _about(name: str) -> tuple[str, str, str, bool]:
    """Of a column as HTML the start of its row, its unit and its formula; and whether a status guards it."""
    about = COLUMNS.get(name) or Column(name, "", "", True, "")
    unit = f'<span class="of"> {escape(about.unit)}</span>' if about.unit else ""
    return f'<tr><th scope="row">{escape(plain(name))}</th>', unit, f'<td class="formula">{escape(about.formula)}</td>', about.posterior


def _made(record: Record) -> str:
    """What was asked and what it cost."""
    run = record.run
    cost = {key: value for key, value in record.cost.items() if key != "machine"}
    own = {"cost": cost, "hash": {**run.hashes, **record.hashes}}
    return _listed(facts(own)) + _asked(run.max_new_tokens, run.score, run.task_version, run.train)


@lru_cache
def _asked(max_new_tokens: int, score: Score, version: int, train: Train | None) -> str:
    given = {"score": score.model_dump(), "train": train and train.model_dump()}
    return _listed(facts({"max_new_tokens": max_new_tokens, "task version": version, **given}))


def _listed(found: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>\n" for key, value in found)


def _headline(row: Row, name: str) -> dict[str, str]:
    figure = row.estimate(name)
    return {
        "title": COLUMNS[name].title,
        "unit": COLUMNS[name].unit if COLUMNS[name].unit == "nats" else "",
        "value": figure_text(figure.value if figure else None),
        "interval": interval_text(row, name),
        "doubt": "?" if row.status == "uncertified" and COLUMNS[name].posterior and figure else "",
    }


def shards(board: Board) -> list[tuple[Table, Sequence[Row]]]:
    """Policies by the file that holds their draws: at most SHARD a file, none of two tables."""
    return [(table, table.rows[k : k + SHARD]) for table in board.tables for k in range(0, len(table.rows), SHARD)]


def _draws(record: Record, texts: Sequence[tuple[Cut, Cut]]) -> str:
    """The figures of each prompt and the draws, each [prompt, completion, reward, log p0, log q]: what a draws-N.js holds of a policy."""
    found = {name: record.prompts.get(name, []) for name in ("free", "kl_prior", "reverse_kl", "reward")}
    figures = {name: _digits(values) for name, values in found.items() if len(values) == len(record.prompt_ids)}
    samples = [f"{_safe(said)[:-1]},{_digits((s.reward, s.log_p0, s.log_q))[1:]}" for said, s in zip(texts, record.samples, strict=True)]
    prompts = _safe([cut(p)[0] for p in record.prompt_ids])
    return _object({"figures": _object(figures), "prompts": prompts, "samples": f"[{','.join(samples)}]"})


def draws(said: Mapping[str, Said]) -> str:
    """A draws-N.js: policies by id."""
    return f'klbench.take("draws",{_object({own: said[own].draws for own in sorted(said)})});\n'


def again(row: Row, origin: Origin) -> str:
    """The command that makes the policy again: that of the run, narrowed to its task, objective and seed; "" where none is known."""
    run, words = row.record.run, list(origin.words)
    if words[:2] == ["klbench", "run"]:
        words += ["--task", run.task, *(["--objective", run.method] if run.kind == "objective" else [])]
        words += ["--set", f"seeds=[{run.seed}]", "--out", "runs/again"]
    return plain(shlex.join(words))


# --- text and data ---


Cut = tuple[str, str, int]


def cut(text: str) -> Cut:
    """A text of a sample as (in sight, behind a click, characters left out).

    Line ends and tabs stay, other control and direction characters become �.
    """
    if len(text) <= HEAD and text.isprintable():
        return text, "", 0
    safe = text[: HEAD + REST]
    if not safe.isprintable():
        safe = "".join(c if c in "\n\t\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\ufffd" for c in safe)
    return safe[:HEAD], safe[HEAD:], max(len(text) - HEAD - REST, 0)


def facts(data: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested data as (dotted key, text) pairs; what `machine` holds differs between equal runs and stays out."""
    return list(_facts(data, name))


def _facts(data: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(data, dict):
        for key in sorted((key for key in data if key != "machine"), key=str):
            yield from _facts(data[key], f"{name}.{key}" if name else str(key))
        return
    if data is None or data == "" or data == []:
        return
    if isinstance(data, list | tuple):
        if any(isinstance(item, dict | list) for item in data):
            for i, item in enumerate(data):
                yield from _facts(item, f"{name}.{i}")
            return
        data = ", ".join(str(item) for item in data)
    yield plain(name), plain(f"{data:g}" if isinstance(data, float) else str(data))[:400]


def _command(manifest: dict[str, Any]) -> str:
    command = manifest.get("command", "")
    return " ".join(str(part) for part in command) if isinstance(command, list) else str(command)


def short(x: float | None) -> float | None:
    """Six digits; None for NaN, which no JSON has."""
    return None if x is None or x != x else float(f"{x:.6g}")


def _digits(numbers: Sequence[float | None]) -> str:
    """JSON of `short` numbers."""
    if None in numbers or not all(map(math.isfinite, numbers)):  # type: ignore[arg-type]
        return _safe([short(x) for x in numbers])
    return f"[{','.join([f'{x:.6g}' for x in numbers])}]"


def _object(parts: Mapping[str, str]) -> str:
    """JSON from that of its parts."""
    return f"{{{','.join([f'{_word(key)}:{part}' for key, part in parts.items()])}}}"


def script(name: str, value: Any) -> str:
    """A script that hands `value` to the page as `name`. Nothing in it can end a script element: ASCII alone, and no `<`."""
    return f"klbench.take({_safe([name, value])[1:-1]});\n"


def _safe(value: Any) -> str:
    """JSON that may stand in a script element."""
    return JSON.encode(value).replace("<", "\\u003c")


_word = lru_cache(_safe)  # of keys, which all policies share


JSON: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True)
