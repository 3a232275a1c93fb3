"""The accuracy table as people read it: a summary on the terminal, rows in JSON and CSV, a page, and docs/accuracy.md.

A summary takes medians over cells: the typical RMSE of an estimator on policies of one kind, its worst bias, its mean coverage.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from klbench.accuracy import worlds
from klbench.accuracy.cells import ADVERSARIES, Key, Row, Tally
from klbench.accuracy.criteria import Criterion, criteria
from klbench.errors import UserError
from klbench.estimate import STATUSES
from klbench.record import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA: Final = 1
POLICIES: Final = {
    "near": "0.03 nat from the target",
    "mid": "1 nat from it",
    "far": "collapsed, 1.5 nats from it",
    "under": "barely trained: the posterior of 0.15 of the reward, with noise",
}
MEANINGS: Final = {
    "klbench": "the pool of the prior's draws and the policy's own, with control variates",
    "board": "the same with the draws of the other policies on the board as strata",
    "parts": "KL(q‖p0) regressed − E_q r regressed / β + log Z of the pool, as three separate figures",
    "parts, board": "the same with the board's log Z",
    "prior IS": "log Z as the log-mean of e^(r/β) over prior draws; forward KL, TV and JS by the weights of the prior's draws",
    "self IS": "log Z as the log-mean of p0 e^(r/β)/q over the policy's own draws",
    "k1": "mean log q/p0 over outputs",
    "k3": "mean p0/q − 1 − log p0/q over outputs",
    "RB": "mean Σ_t KL(q_t‖p0_t): Rao-Blackwell over the next token",
    "mean": "mean −log q; the plain mean of the reward",
    "disco": "what disco 1.1.2 reports: z and all divergences from the policy's own importance weights, KL(q‖p0) as k1",
    "TRL GRPO": "`kl` and `entropy` as GRPOTrainer logs them (trl 1.10.0.dev0), times tokens an output: token-wise k3 and H(q_t)",
    "TRL RLOO, PPO": "`kl` of RLOOTrainer times tokens an output, `objective/kl` and `objective/entropy` of PPOTrainer: k1 and −log q",
}
ORDER: Final = tuple(MEANINGS)
HIDDEN: Final = "a prompt each, with a hidden mode of prior mass 1e-4 to 1e-1, β 0.08 to 0.5, and a collapsed policy that never saw it"
LARGE: Final = " 1000+1000"  # settings that a summary speaks of
COLUMNS: Final = (
    "reverse_kl", "log_z", "wasted_nats", "forward_kl", "tv", "js", "chi2", "kl_prior", "entropy", "forgetting", "reward", "beta_implied",
    "kl_efficiency",
)  # fmt: skip


def _median(values: Iterable[float | None]) -> float | None:
    there = [x for x in values if x is not None]
    return float(np.median(there)) if there else None


@dataclass(frozen=True)
class Summary:
    """One estimator of one column on policies of one kind, over the cells of the settings of 1000 + 1000 draws."""

    column: str
    policy: str
    lineup: str
    estimator: str
    cells: int
    rmse: float | None
    bias: float | None  # the one farthest from 0
    coverage: float | None
    width: float | None
    interval: float  # share of figures with an interval

    @classmethod
    def of(cls, column: str, policy: str, lineup: str, estimator: str, rows: Sequence[Row]) -> Summary:
        covered = [row.coverage for row in rows if row.coverage is not None]
        biases = [row.bias for row in rows if row.bias is not None]
        return cls(
            column, policy, lineup, estimator, len(rows), _median(row.rmse for row in rows), max(biases, key=abs, default=None),
            float(np.mean(covered)) if covered else None, _median(row.width for row in rows),
            sum(row.intervals for row in rows) / max(1, sum(row.replications for row in rows)),
        )  # fmt: skip


@final
@dataclass(frozen=True)
class Table:
    """All rows of a run of `klbench accuracy`. reach: the true A of each setting's bank at the prompt where it is least."""

    rows: tuple[Row, ...]
    replications: int
    seed: int
    reach: dict[str, float]
    command: str = "klbench accuracy"

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(row.key.setting for row in self.rows))

    @property
    def criteria(self) -> list[Criterion]:
        return criteria(self.rows)

    def summaries(self) -> list[Summary]:
        """By column, policy, line-up and estimator, in the order of COLUMNS, POLICIES and MEANINGS."""
        groups: dict[tuple[str, str, str, str], list[Row]] = {}
        for row in self.rows:
            key = row.key
            if key.setting.endswith(LARGE) and key.policy in POLICIES:
                groups.setdefault((key.column, key.policy, key.lineup, key.estimator), []).append(row)
        places = list(POLICIES)
        order = sorted(groups, key=lambda g: (COLUMNS.index(g[0]), places.index(g[1]), ORDER.index(g[3])))
        return [Summary.of(*group, groups[group]) for group in order]

    # --- files ---

    def to_json(self) -> str:
        """Everything; the same bytes for the same seed. A row is a list of what `fields` names, and stands on one line."""
        document = {
            "schema": SCHEMA,
            "command": self.command,
            "seed": self.seed,
            "replications": self.replications,
            "criteria": [{**asdict(c), "verdict": c.verdict} for c in self.criteria],
            "targets": {name: worlds.WORLDS[name].says for name in worlds.WORLDS if any(s.startswith(f"{name} ") for s in self.settings)},
            "reach": self.reach,
            "estimators": MEANINGS,
            "fields": FIELDS,
        }
        head = json.dumps(document, indent=1, ensure_ascii=False)[:-2]
        rows = ",\n".join("  " + json.dumps(_written(row), ensure_ascii=False, allow_nan=False) for row in self.rows)
        return f'{head},\n "rows": [\n{rows}\n ]\n}}\n'

    @classmethod
    def read(cls, folder: Path) -> Table:
        """The table that `write` wrote. Raises UserError for a file that is none."""
        path = folder / "accuracy.json"
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            if (given["schema"], given["fields"]) != (SCHEMA, list(FIELDS)):
                raise ValueError(f"schema {given['schema']}, expected {SCHEMA}")
            rows = tuple(_read(line) for line in given["rows"])
            return cls(rows, given["replications"], given["seed"], given["reach"], given["command"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not an accuracy table ({error})") from None

    def to_csv(self) -> str:
        """The rows, a line each."""
        out = io.StringIO()
        flat = [_flat(row) for row in self.rows]
        writer = csv.DictWriter(out, list(flat[0]) if flat else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in flat)
        return out.getvalue()

    def write(self, folder: Path) -> None:
        """accuracy.json, accuracy.csv and index.html."""
        for name, text in (("accuracy.json", self.to_json()), ("accuracy.csv", self.to_csv()), ("index.html", page(self))):
            write_atomically(folder / name, text.encode())


FIELDS: Final = (*Key._fields, "truth", "replications", "defined", "bias", "rmse", "width", "by_status")  # of a row in JSON


def _written(row: Row) -> list[Any]:
    tallies = {status: [t.figures, t.intervals, t.below, t.above] for status, t in row.by_status.items()}
    return [*row.key, row.truth, row.replications, row.defined, row.bias, row.rmse, row.width, tallies]


def _read(line: list[Any]) -> Row:
    size = len(Key._fields)
    truth, replications, defined, bias, rmse, width, tallies = line[size:]
    by_status = {status: Tally(*counts) for status, counts in tallies.items()}
    return Row(Key(*line[:size]), truth, replications, defined, bias, rmse, width, by_status)


def _flat(row: Row) -> dict[str, Any]:
    """For CSV: counts of each status in columns of their own."""
    out = dict(zip(FIELDS[:-1], _written(row)[:-1], strict=True))
    out |= {"intervals": row.intervals, "misses": row.misses, "coverage": None if row.coverage is None else round(row.coverage, 6)}
    for status in STATUSES:
        tally = row.by_status.get(status, Tally(0, 0, 0, 0))
        out[status] = tally.figures
        if status in ("certified", "wide"):
            out[f"{status}_misses"] = tally.misses
    return out


# --- words ---


def number(x: float | None, sign: bool = False) -> str:
    """Three significant digits, or fewer where a thousandth is enough; "–" where there is none."""
    if x is None:
        return "–"
    if not math.isfinite(x):
        return "∞" if x > 0 else "−∞"
    size = abs(x)
    text = f"{size:.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.2f}" if size >= 1 else f"{size:.4f}"
    if size < 1:
        text = text.removeprefix("0") if float(text) else "0"
    return ("−" if x < 0 and float(text or 0) else "+" if sign and x > 0 and float(text or 0) else "") + text


def share(x: float | None) -> str:
    """.95, or "–"."""
    return "–" if x is None else f"{x:.3f}".removeprefix("0")


@dataclass(frozen=True)
class Block:
    """A table in words: heading, what it shows, heads of its columns, lines. numbers: columns that are aligned right, from this one."""

    name: str
    says: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    numbers: int = 1


def reverse_block(table: Table) -> Block:
    """RMSE, worst bias and coverage of reverse KL: policies down, estimators across, as in ESTIMATORS.md section 2."""
    found = {(s.policy, s.lineup, s.estimator): s for s in table.summaries() if s.column == "reverse_kl"}
    lines = []
    for lineup in dict.fromkeys(key[1] for key in found if key[1]):
        for policy in (p for p in POLICIES if (p, lineup, "board") in found):
            wanted = [("", "prior IS"), ("", "self IS"), ("", "disco"), (lineup, "parts, board"), ("", "klbench"), (lineup, "board")]
            cells = [found.get((policy, at, name)) for at, name in wanted]
            words = ["–" if s is None else f"{number(s.rmse)} / {number(s.bias, True)} / {share(s.coverage)}" for s in cells]
            lines.append((policy, lineup.replace("+", ", "), *words))
    head = ("policy", "board", "prior IS", "self IS", "disco", "parts", "klbench", "board")
    says = "Median RMSE over targets / bias farthest from 0 / mean coverage of the 95 % intervals that are printed; nats."
    return Block("Reverse KL", says, head, tuple(lines), 2)


def columns_block(table: Table) -> Block:
    """The other columns: estimators down, policies across."""
    groups: dict[tuple[str, str], dict[str, list[Summary]]] = {}
    for s in table.summaries():
        if s.column != "reverse_kl" and s.lineup in ("", "near+mid+far", "mid+far+under"):
            groups.setdefault((s.column, s.estimator), {}).setdefault(s.policy, []).append(s)
    lines = []
    for (column, estimator), by_policy in sorted(groups.items(), key=lambda g: (COLUMNS.index(g[0][0]), ORDER.index(g[0][1]))):
        rmse = [number(_median(s.rmse for s in by_policy.get(policy, []))) for policy in POLICIES]
        every = [s for mine in by_policy.values() for s in mine]
        biases = [s.bias for s in every if s.bias is not None]
        covered = [s.coverage for s in every if s.coverage is not None]
        held = float(np.mean(covered)) if covered else None
        lines.append((column, estimator, *rmse, number(max(biases, key=abs, default=None), True), share(held)))
    says = (
        "Median RMSE over targets by kind of policy, bias farthest from 0, mean coverage. A lower bound covers where the truth is above it."
    )
    return Block("Every column", says, ("column", "estimator", *POLICIES, "bias", "coverage"), tuple(lines), 2)


def targets_block(table: Table) -> Block:
    """Reverse KL by setting: reach, statuses, RMSE and coverage."""
    lines = []
    for setting in table.settings:
        mine = [row for row in table.rows if row.key.setting == setting and row.key.column == "reverse_kl"]
        by = {name: [row for row in mine if row.key.estimator == name] for name in ("prior IS", "klbench", "board")}
        ours = [*by["klbench"], *by["board"]]
        statuses = [float(np.mean([row.share(s) for row in ours])) for s in ("certified", "wide", "uncertified")]
        cells = [share(x) if x else "–" for x in statuses]
        cells += [number(_median(row.rmse for row in by[name])) for name in by]
        intervals, misses = sum(row.intervals for row in ours), sum(row.misses for row in ours)
        worst = max((row for row in ours if row.intervals), key=lambda row: row.misses / row.intervals, default=None)
        cells += [share(1 - misses / intervals) if intervals else "–", "–" if worst is None else f"{worst.misses} of {worst.intervals}"]
        lines.append((setting, number(table.reach.get(setting)), *cells))
    head = ("target, draws + bank (+ rest)", "reach", "certified", "wide", "uncertified", *by, "coverage", "most misses")
    says = "Least true reach A over prompts, share of figures by status, median RMSE of reverse_kl over policies, coverage by klbench."
    return Block("Targets", says, head, tuple(lines))


def criteria_block(table: Table) -> Block:
    lines = tuple((c.verdict, c.name, c.measured, c.bound.replace("<=", "≤").replace(">=", "≥"), c.where) for c in table.criteria)
    says = "What issue 4 asks of this table, measured. A cell is one column of one policy in one setting; coverage is counted by status."
    return Block("Criteria", says, ("", "criterion", "measured", "bound", "where"), lines, 2)


def blocks(table: Table) -> list[Block]:
    return [criteria_block(table), reverse_block(table), columns_block(table), targets_block(table)]


def show(table: Table, console: Console) -> None:
    """Tables on a terminal; elsewhere a row a line, fields between tabs, a heading before each table."""
    if not console.is_terminal:
        for block in blocks(table):
            for line in (("table", *block.head), *((block.name, *line) for line in block.lines)):
                console.file.write("\t".join(cell or "-" for cell in line) + "\n")  # not by rich, which turns tabs into spaces
        return
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    for block in blocks(table):
        grid = Grid(title=block.name, caption=block.says, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", pad_edge=False)
        for i, head in enumerate(block.head):
            grid.add_column(head, justify="right" if i >= block.numbers and head != "where" else "left")
        for line in block.lines:
            grid.add_row(*(Text(cell, style="red" if cell == "fails" else "") for cell in line))
        console.print(grid)


def markdown(table: Table) -> str:
    """docs/accuracy.md."""
    out = [
        "# Accuracy",
        "",
        f"Made by `{table.command}`; not to be edited. RMSE, bias and coverage against exact sums, {table.replications} replications a",
        "cell, 4 prompts, 1000 draws of the prior and of each policy unless a setting says otherwise (`draws+bank+rest`). Every figure is",
        "in `leaderboards/accuracy/`.",
        "",
    ]
    for block in blocks(table):
        out += [f"## {block.name}", "", block.says, ""]
        out.append("| " + " | ".join(head or "verdict" for head in block.head) + " |")
        right = [i >= block.numbers and head != "where" for i, head in enumerate(block.head)]
        out.append("|" + "|".join(" --: " if x else " :-- " for x in right) + "|")
        out += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in block.lines]
        out.append("")
    out += ["## Estimators", ""]
    out += [f"- **{name}**: {text}." for name, text in MEANINGS.items()]
    out += ["", "Sources of what disco and TRL report are cited in `klbench/accuracy/rivals.py`. Their figures carry no interval.", ""]
    out += ["## Policies and targets", ""]
    out += [f"- **{name}**: {text}." for name, text in POLICIES.items()]
    out += [
        "- On tables (V tokens, T positions) every output is summed over; on chains of 32 and 64 tokens, KL, entropy, reward, Z and chi2",
        "  come from forward and backward sums over states. Random laws, the same for the same seed.",
        "",
    ]
    seen = {setting.rpartition(" ")[0] for setting in table.settings}
    out += [f"- **{name}**: {worlds.WORLDS[name].says}." for name in worlds.WORLDS if name in seen]
    if ADVERSARIES in seen:
        out.append(f"- **{ADVERSARIES}**: {HIDDEN}.")
    return "\n".join(out) + "\n"


# --- page ---


def page(table: Table) -> str:
    """One self-contained file: no script, no request; light and dark."""
    import jinja2

    from klbench.accuracy import plots

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files("klbench.accuracy").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    seen = {setting.rpartition(" ")[0] for setting in table.settings}
    found = table.criteria
    return environment.get_template("page.html.j2").render(
        style=files("klbench.page").joinpath("style.css").read_text(encoding="utf-8"),
        criteria=found,
        failing=sum(c.holds is False for c in found),
        measured=sum(c.holds is not None for c in found),
        blocks=blocks(table)[1:],
        errors=plots.errors(table.rows),
        coverage=plots.coverage(table.rows),
        meanings=MEANINGS,
        policies=POLICIES,
        targets={name: target.says for name, target in worlds.WORLDS.items() if name in seen} | {ADVERSARIES: HIDDEN},
        replications=table.replications,
        seed=table.seed,
        command=table.command,
    )
