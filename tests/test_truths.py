"""Estimates beside truths: which intervals count, which hold, what chance allows, and how it is printed."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from klbench.estimate import Estimate, exactly, undefined
from klbench.truths import Beside, beside, by_chance, lines, render, verdict, views

SOUND = Estimate(0.5, 0.4, 0.6, 0.05, 64)


def figure(truth: float, estimate: Estimate = SOUND, column: str = "reverse_kl", method: str = "rloo") -> Beside:
    return Beside("exact/dense", method, column, estimate, truth)


@pytest.mark.parametrize("truth, held", [(0.4, True), (0.6, True), (0.5, True), (0.39, False), (0.61, False), (math.inf, False)])
def test_an_interval_holds_what_lies_in_it(truth: float, held: bool) -> None:
    assert figure(truth).held is held and figure(truth).counts and figure(truth).mark == ("" if held else "✗")


def test_an_open_end_holds_everything_on_its_side() -> None:
    lower = replace(SOUND, high=None, status="lower")
    assert figure(99.0, lower).held and figure(math.inf, lower).held and not figure(0.3, lower).held
    upper = replace(SOUND, low=None, status="upper")
    assert figure(-99.0, upper).held and not figure(0.7, upper).held


def test_what_has_no_interval_is_not_counted() -> None:
    blind = replace(SOUND, low=None, high=None, status="uncertified")
    assert figure(0.5, blind).held is None and not figure(0.5, blind).counts and figure(0.5, blind).mark == "?"


def test_what_is_exact_by_construction_is_checked_and_not_counted() -> None:
    assert figure(1e-12, exactly(0.0)).held and not figure(1e-12, exactly(0.0)).counts
    assert figure(1e-3, exactly(0.0)).held is False
    assert figure(math.inf, exactly(math.inf)).held and figure(1.0, exactly(math.inf)).held is False


def test_only_columns_with_both_and_in_the_boards_order() -> None:
    columns = {"tv": SOUND, "reward": SOUND, "log_z": undefined("none"), "own": SOUND, "ess": SOUND}
    found = beside("t", "m", columns, {"own": 1.0, "tv": 2.0, "reward": 3.0, "log_z": 4.0, "js": 5.0})
    assert [(b.column, b.truth) for b in found] == [("reward", 3.0), ("tv", 2.0), ("own", 1.0)]


@pytest.mark.parametrize("n", [0, 1, 5, 60, 400])
def test_chance_by_summing_the_binomial_law(n: int) -> None:
    mass = [math.comb(n, k) * 0.95**k * 0.05 ** (n - k) for k in range(n + 1)]
    low, high = by_chance(n)
    assert sum(mass[:low]) < 0.025 <= sum(mass[: low + 1]) and sum(mass[:high]) < 0.975 <= sum(mass[: high + 1]) + 1e-12


def test_the_verdict_counts_and_speaks_up() -> None:
    good = [figure(0.5 + i / 1e4) for i in range(95)] + [figure(0.9 + i) for i in range(5)]
    assert verdict(good) == "95 of 100 intervals (95 %) hold their truth; by chance 90 to 99."
    blind = figure(0.5, replace(SOUND, low=None, high=None, status="uncertified"))
    bad = [*good[:80], *(figure(0.9 + i) for i in range(20)), blind, figure(0.0, exactly(0.0))]
    assert verdict(bad).startswith("80 of 100 intervals (95 %) hold their truth; by chance 90 to 99: FEWER THAN CHANCE ALLOWS; 1 more fig")


def test_what_every_method_repeats_counts_once() -> None:
    same = [figure(0.9, column="log_z", method=m) for m in ("rloo", "dpo", "grpo")]
    assert verdict([*same, figure(0.5)]).startswith("1 of 2 ")
    assert verdict([replace(same[0], task="another"), *same]).startswith("0 of 2 ")


@pytest.fixture
def found() -> list[Beside]:
    wide = replace(SOUND, status="wide", high=math.inf)
    return [figure(0.5), figure(0.7, column="tv"), figure(math.inf, wide, "forward_kl", "best of 4")]


def test_lines_are_one_row_a_figure(found: list[Beside]) -> None:
    head, *rows, last = lines(found)
    assert head.split() == ["task", "method", "column", "value", "low", "high", "truth", "status", "held"]
    assert rows[0].split() == ["exact/dense", "rloo", "reverse_kl", "0.5", "0.4", "0.6", "0.5", "certified", "yes"]
    assert rows[1].split()[-1] == "NO" and rows[2].split()[1:2] == ["best_of_4"] and rows[2].split()[5:] == ["inf", "inf", "wide", "yes"]
    assert last == verdict(found)
    assert len({line.index("certified") for line in rows[:2]}) == 1


def shown(found: list[Beside], width: int, terminal: bool = True) -> str:
    out = io.StringIO()
    render(found, Console(file=out, force_terminal=terminal, width=width, color_system=None, legacy_windows=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_terminal_gets_a_table_and_every_miss(found: list[Beside], width: int) -> None:
    text = shown(found, width)
    assert "exact/dense: estimate / truth" in text and "0.5000 / 0.5000" in text
    assert "✗ exact/dense rloo tv: 0.5000 in [0.4000, 0.6000], truth 0.7000" in text and "2 of 3 intervals" in text
    table = text.split("✗ exact")[0]
    assert all(len(line.rstrip()) <= width for line in table.splitlines())
    assert ("0.5000✗ / 0.7000" in table) == (width > 50)  # what does not fit leaves whole


def test_elsewhere_the_lines(found: list[Beside]) -> None:
    assert shown(found, 60, terminal=False) == "".join(f"{line}\n" for line in lines(found))
    assert shown([], 80) == shown([], 80, terminal=False) == ""


def test_views_are_texts(found: list[Beside]) -> None:
    names = ("method", "column", "value", "interval", "truth", "status", "mark")
    assert views(found)[2] == dict(zip(names, ("best of 4", "forward_kl", "0.5000", "[0.4000, ∞]", "∞", "wide", ""), strict=True))
