"""The board: ranks worked by hand, what an interval may claim, and text that means harm."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from klbench import board
from klbench.board import Board
from klbench.errors import UserError
from klbench.estimate import Estimate, exactly, undefined
from klbench.page import axes, figures
from klbench.record import FrontierPoint, Record, Run, Sample, Score, Train


def certified(value: float, stderr: float = 0.01, up: float = 0.0) -> Estimate:
    """A certified figure of two prompts (14 degrees of freedom): t = 2.145."""
    half = 2.1447866879169273 * stderr
    return Estimate(value, value - half, value + half + up, stderr, 256)


def record(method: str, free: list[float], value: float | None = None, status: str = "certified", **change: Any) -> Record:
    """A made-up record; `change` replaces fields of the run, `columns` adds to the columns, other fields of the record by name."""
    value = sum(free) / len(free) if value is None else value
    run = {"task": "toy", "task_version": 1, "kind": "objective", "prior": "mini", "beta": 0.5, "max_new_tokens": 8}
    run |= {key: change.pop(key) for key in ("task", "kind", "beta", "seed", "prior") if key in change}
    doubt = Estimate(value, status="uncertified", reason="reach 0.2", stderr=0.01)
    columns = {
        "reverse_kl": doubt if status == "uncertified" else exactly(value) if status == "exact" else certified(value),
        "wasted_nats": certified(0.1),
        "reward": certified(0.4),
        "kl_prior": certified(0.3),
        "entropy": certified(20.0),
        "entropy_target": certified(18.0),
        "distinct_2": certified(0.5),
        "distinct_2_target": certified(0.6),
        **change.pop("columns", {}),
    }
    reach = {0.0: 90, 0.5: 40, 1.0: 3, 2.0: 0.1}
    frontier = [FrontierPoint(lam=x, reward=x, kl=x * x / 2, low=0.4 * x * x, high=0.6 * x * x, reach=a) for x, a in reach.items()]
    fields: dict[str, Any] = {
        "run": Run(method=method, train=Train(), score=Score(), **run),
        "status": status,
        "columns": columns,
        "prompt_ids": [f"p{i}" for i in range(len(free))],
        "prompts": {"free": free, "free_stderr": [0.1] * len(free), **change.pop("prompts", {})},
        "frontier": frontier,
        "samples": [Sample(prompt="Once", completion=" upon a time", reward=0.4, log_p0=-9.0, log_q=None)],
        "curve": [{"step": float(i), "reward": i / 5, "kl_prior": i / 9} for i in range(5)],
        "cost": {"samples": 256, "machine": {"seconds": 3.2}},
    }
    return Record(**{**fields, **change})


@pytest.fixture
def records() -> list[Record]:
    """p* itself, a clear winner, two that cannot be told apart (one of them uncertified), and the prior."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 2, 40)  # prompts differ much more than policies do

    def free(mean: float) -> list[float]:
        noise = rng.normal(0, 0.1, 40)
        return list(hard + mean + noise - noise.mean())

    return [
        record("ancestral", free(2.0), 2.0, kind="policy", curve=[]),
        record("rloo", free(0.1), 0.1),
        record("dpo", free(0.501), 0.501),
        record("grpo", free(0.5), 0.5, "uncertified", prompts={"reward_max": [1.0] * 40}),
        record("rejection", free(0.0), 0.0, "exact", kind="sampler", curve=[]),
    ]


def plain_lines(records: list[Record]) -> list[str]:
    out = io.StringIO()
    Board.of(records).render(Console(file=out, width=40, color_system=None))
    return out.getvalue().splitlines()


# --- ranks ---


def test_order_and_ranks(records: list[Record]) -> None:
    rows = Board.of(records).tables[0].rows
    assert [(r.label, r.rank, r.role) for r in rows] == [
        ("rejection", None, "target"),
        ("rloo", (1, 1), "objective"),
        ("grpo", (2, 3), "objective"),
        ("dpo", (2, 3), "objective"),
        ("ancestral", (4, 4), "null"),
    ]


def test_an_exact_figure_that_is_not_zero_is_ranked() -> None:
    rows = Board.of([record("a", [0.1, 0.2, 0.3], 0.2, "exact"), record("b", [1.1, 1.2, 1.3])]).tables[0].rows
    assert [r.rank for r in rows] == [(1, 1), (2, 2)]


def test_only_what_is_comparable_shares_a_table() -> None:
    one, other = record("a", [0.1, 0.2]), record("a", [0.1, 0.2], beta=1.0)
    longer, elsewhere = record("a", [0.1, 0.2, 0.3], seed=1), record("a", [0.1, 0.2], task="zoo")
    tables = Board.of([one, other, longer, elsewhere]).tables
    assert [len(t.rows) for t in tables] == [1, 1, 1, 1]
    assert [t.title for t in tables] == ["toy · β 0.5 · mini", "toy · β 0.5 · mini", "toy · β 1 · mini", "zoo"]


def test_seeds_of_a_method_have_their_own_names() -> None:
    rows = Board.of([record("a", [0.1, 0.2]), record("a", [0.3, 0.4], seed=3), record("b", [1.0, 2.0])]).tables[0].rows
    assert [r.label for r in rows] == ["a s0", "a s3", "b"]


def test_a_row_without_a_figure_comes_last() -> None:
    none = record("a", [0.0, 0.0], status="infeasible", columns={"reverse_kl": undefined("no solution", "infeasible")})
    assert [r.label for r in Board.of([none, record("b", [3.0, 4.0])]).tables[0].rows] == ["b", "a"]


# --- what is certain ---


def test_only_the_uncertified_row_has_a_bracket(records: list[Record]) -> None:
    rows = Board.of(records).tables[0].rows
    assert [r.label for r in rows if r.bracket] == ["grpo"]
    bracket = next(r.bracket for r in rows if r.bracket)
    assert bracket is not None and bracket[0] is not None and bracket[1] is not None
    # rloo is .4 better; r_max/beta is 2 nats
    free = np.mean(records[3].prompts["free"])
    assert 0.3 < bracket[0] < 0.4 and bracket[1] > free + 2.0


@pytest.mark.parametrize(
    ("wasted", "beyond"),
    [
        (certified(-0.5), True),
        (certified(-0.03), False),  # beyond a 95 % interval alone, not beyond the simultaneous one
        (certified(-0.5, up=0.6), False),  # the prior draws may have missed that much
        (certified(-0.5, up=0.1), True),
        (certified(0.2), False),
        (Estimate(-0.5, stderr=0.01, status="uncertified"), False),
        (exactly(-0.001), True),
        (exactly(0.0), False),
    ],
)
def test_above_the_frontier(wasted: Estimate, beyond: bool) -> None:
    records = [record("a", [0.1, 0.2], columns={"wasted_nats": wasted}), record("b", [0.1, 0.2])]
    made = Board.of(records)
    assert [r.label for r in made.above_frontier()] == (["a"] if beyond else [])
    assert len(json.loads(made.to_json())["above_frontier"]["ids"]) == int(beyond)


def test_frontier_is_solid_dashed_and_absent() -> None:
    points = [figures.Point(p.reward, p.kl, p.low, p.high, p.reach) for p in record("a", [0.0]).frontier]
    solid, dashed = figures.segments(points)
    assert [p.reward for p in solid] == [0, 0.5] and [p.reward for p in dashed] == [0.5, 1]
    assert figures.least_kl(points, 0.75) == pytest.approx(0.3125)
    assert figures.least_kl(points, -1) == 0.0 and figures.least_kl(points, 1.5) is None


@pytest.mark.parametrize("top", [0.003, 0.7, 1.0, 2.6, 11.4, 300.0])
def test_ticks_are_apart_and_inside(top: float) -> None:
    at = [math.sqrt(t / top) for t in axes.ticks(top, 0.2)]
    assert at[0] == 0.0 and len(at) >= 3 and at[-1] <= 1.0 and min(np.diff(at)) > 0.15


# --- text ---


@pytest.mark.parametrize(
    ("x", "text"),
    [(None, "–"), (0.12345, "0.123"), (-0.0001, "0.000"), (-1.5, "−1.500"), (12.346, "12.35"), (1234.5, "1,234.5"), (-math.inf, "−∞")],
)
def test_figure_text(x: float | None, text: str) -> None:
    assert board.figure_text(x) == text


def test_csv_reads_back_and_runs_no_formula() -> None:
    harm = record('=HYPERLINK("http://x")', [0.1, 0.2], task="@SUM(1)", prior="\t+1", columns={"forward_kl": exactly(math.inf)})
    fine = record("b", [-1.0, -2.0], -1.5, "uncertified", task="zoo")
    rows = list(csv.DictReader(io.StringIO(Board.of([harm, fine]).to_csv())))
    assert [r["method"] for r in rows] == ['\'=HYPERLINK("http://x")', "b"]
    assert rows[0]["task"] == "'@SUM(1)" and rows[0]["prior"] == "'+1"
    assert float(rows[1]["reverse_kl"]) == -1.5 and rows[1]["reverse_kl_low"] == "" and rows[1]["reverse_kl_status"] == "uncertified"
    assert float(rows[0]["reverse_kl_low"]) == pytest.approx(0.15 - 0.021447866879)
    assert rows[0]["forward_kl"] == "inf" and rows[0]["gold"] == "" and rows[0]["cost.samples"] == "256"
    assert rows[0]["rank_low"] == "1" and "cost.machine" not in rows[0]


def test_json_names_each_record_by_its_hash(records: list[Record]) -> None:
    data = json.loads(Board.of(records).to_json())
    rows = data["tables"][0]["rows"]
    assert [r["rank"] for r in rows] == [None, [1, 1], [2, 3], [2, 3], [4, 4]]
    assert rows[1]["id"] == records[1].run.id and len({r["sha256"] for r in rows}) == 5
    changed = records[1].model_copy(update={"columns": {**records[1].columns, "reward": certified(0.41)}})
    again = json.loads(Board.of([*records[:1], changed, *records[2:]]).to_json())["tables"][0]["rows"]
    assert [a["sha256"] == b["sha256"] for a, b in zip(rows, again, strict=True)] == [True, False, True, True, True]


def test_off_a_terminal_one_row_a_line(records: list[Record]) -> None:
    lines = plain_lines(records)
    assert len(lines) == 6 and len({len(line.split()) for line in lines}) == 1  # the console is 40 wide: nothing wraps
    head = lines[0].split()
    grpo = dict(zip(head, lines[3].split(), strict=True))
    assert grpo["method"] == "grpo" and grpo["rank"] == "2-3" and grpo["status"] == "uncertified" and grpo["reverse_kl_low"] == "-"
    assert 0.3 < float(grpo["certain_low"]) < 0.4
    assert all(ord(c) < 128 for line in lines for c in line)


def test_control_characters_reach_no_terminal() -> None:
    harm = record("a\x1b[31mb\x07\nc \u202ed", [0.1, 0.2], task="[bold]x[/bold]")
    assert plain_lines([harm])[1].split()[:3] == ["[bold]x[/bold]", "1", "a[31mb_c_d"]
    out = io.StringIO()
    Board.of([harm]).render(Console(file=out, force_terminal=True, color_system=None, width=120))
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())  # rich's own
    assert "a[31mb c d" in text and "[bold]x[/bold]" in text
    assert not set("\x1b\x07\u202e") & set(text)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_terminal_table_never_breaks_a_row(records: list[Record], width: int) -> None:
    out = io.StringIO()
    Board.of(records).render(Console(file=out, force_terminal=True, color_system=None, width=width))
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if " grpo " in line)
    assert "0.500?" in row and row.rstrip().endswith("? uncertified") and " in 0.3" in row
    assert ("distinct-2" in lines[1]) == (width == 160)


def test_the_same_records_give_the_same_bytes(records: list[Record], tmp_path: Path) -> None:
    shuffled = list(records)
    random.Random(1).shuffle(shuffled)
    assert shuffled != records
    Board.of(records).write(tmp_path / "a")
    Board.of(shuffled).write(tmp_path / "b")
    names = ["board.csv", "board.json"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    assert [(tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names] == [True] * 2


# --- reading ---


def test_read_from_a_directory(records: list[Record], tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    for one in records:
        (tmp_path / "records" / f"{one.run.id}.json").write_text(one.to_json(), encoding="utf-8")
    (tmp_path / "manifest.json").write_text('{"command": "klbench run"}', encoding="utf-8")
    read = Board.read(tmp_path)
    assert read.to_json() == Board.of(records).to_json() and read.manifest == {"command": "klbench run"}
    (tmp_path / "manifest.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json: a mapping expected"):
        Board.read(tmp_path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records in"):
        Board.read(tmp_path)
    with pytest.raises(UserError, match="at least one record"):
        Board.of([])
    one = record("a", [0.1, 0.2])
    with pytest.raises(UserError, match=f"two records have the id {one.run.id}"):
        Board.of([one, record("b", [0.1, 0.2]), one])
    with pytest.raises(UserError, match=r"prompts\.free: a number a prompt expected, 2 in all, got 0"):
        Board.of([one.model_copy(update={"prompts": {}})])


def test_the_board_loads_no_torch_and_no_plots() -> None:
    names = ("torch", "transformers", "matplotlib", "jinja2", "rich", "numpy")
    code = f"import sys, klbench.board; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "['numpy']"
