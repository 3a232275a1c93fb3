"""The board in leaderboards/quick says what issue and README claim of it, and its page is what its records make."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from klbench import method
from klbench.board import Board, Row
from klbench.record import Record

QUICK = Path(__file__).parents[1] / "leaderboards" / "quick"
METHODS = QUICK.with_name("methods")
TASKS = ("bias", "factuality", "toxicity")


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Row]:
    return {(row.record.run.task, row.record.run.method): row for _, row in Board.read(QUICK).rows}


def value(row: Row, column: str) -> float:
    estimate = row.estimate(column)
    assert estimate is not None and estimate.value is not None
    return estimate.value


def test_three_tasks_and_at_least_ten_methods_all_certified(rows: dict[tuple[str, str], Row]) -> None:
    for task in TASKS:
        mine = [row for (t, _), row in rows.items() if t == task]
        assert sum(row.record.run.kind == "objective" for row in mine) >= 10
        assert all(row.record.status in ("certified", "exact") for row in mine)


@pytest.mark.parametrize("task, share", [("bias", 0.25), ("factuality", 0.25), ("toxicity", 0.5)])
def test_rloo_covers_the_distance(rows: dict[tuple[str, str], Row], task: str, share: float) -> None:
    assert value(rows[task, "rloo"], "reverse_kl") <= share * value(rows[task, "ancestral"], "reverse_kl")


@pytest.mark.parametrize("task", TASKS)
def test_reinforce_without_kl_collapses(rows: dict[tuple[str, str], Row], task: str) -> None:
    row = rows[task, "reinforce"]
    assert value(row, "entropy") <= 0.5 * value(row, "entropy_target")


@pytest.mark.parametrize("task", TASKS)
def test_rejection_is_exact_and_agrees_with_the_bank(rows: dict[tuple[str, str], Row], task: str) -> None:
    row = rows[task, "rejection"]
    assert row.record.status == "exact" and value(row, "reverse_kl") == 0.0
    pairs = [("reward", "reward_target"), ("kl_prior", "kl_prior_target")] + ([("moments", "moments_target")] if task == "bias" else [])
    for own, bank in pairs:
        a, b = row.estimate(own), row.estimate(bank)
        assert a is not None and b is not None and a.value is not None and b.value is not None
        error = ((a.stderr or 0) ** 2 + (b.stderr or 0) ** 2) ** 0.5
        assert abs(a.value - b.value) <= 3.5 * error, (own, a, b)


def test_no_policy_lies_above_the_frontier() -> None:
    assert Board.read(QUICK).above_frontier(0.999) == []


def test_files_are_what_the_records_make(tmp_path: Path) -> None:
    board = Board.read(QUICK)
    assert (QUICK / "board.json").read_text() == board.to_json()
    assert (QUICK / "board.csv").read_text() == board.to_csv()


def test_every_method_has_five_seeds_on_the_methods_board_and_its_files_are_what_the_records_make() -> None:
    board = Board.read(METHODS)
    (table,) = board.tables
    assert sorted(standing.method for standing in table.methods) == method.names("objectives")
    assert (METHODS / "board.json").read_text() == board.to_json()
    assert (METHODS / "methods.csv").read_text() == board.methods_csv()
    assert board.above_frontier(0.999) == []


def test_who_aims_at_the_posterior_halves_the_prior_s_distance_on_the_methods_board() -> None:
    (table,) = Board.read(METHODS).tables
    (prior,) = {value(row, "reverse_kl") for row in table.rows if row.record.run.method == "ancestral" and row.record.run.seed == 0}
    for standing in table.methods:
        if method.objective(standing.method).optimum == "target":
            assert (standing.columns["reverse_kl"].value or 0) < prior / 2, standing.method


def test_samples_are_the_ones_that_were_scored() -> None:
    paths = sorted((QUICK / "records").glob("*.json"))
    assert len(paths) >= 36
    for path in paths:
        record = Record.read(path)
        data = (QUICK / "samples" / f"{record.run.id}.npz").read_bytes()
        assert hashlib.sha256(data).hexdigest() == record.hashes["samples"]


def test_the_readme_says_what_the_board_says() -> None:
    script = Path(__file__).parents[1] / "ci" / "readme_board.py"
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0
