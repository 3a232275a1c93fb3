"""Writes the table of leaderboards/quick/board.csv into README.md, between its two board marks.

python ci/readme_board.py [--check]      --check changes nothing and exits 1 when the README says something else
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- board: start -->", "<!-- board: end -->"


def table() -> str:
    """Methods by their mean rank over tasks, reverse KL with its 95 % interval."""
    with open(ROOT / "leaderboards" / "quick" / "board.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tasks = sorted({row["task"] for row in rows})
    cells: dict[str, dict[str, str]] = {}
    order: dict[str, float] = {}
    for row in rows:
        figure = f"{float(row['reverse_kl']):.3f}"
        if row["status"] != "exact":
            figure += f" ({float(row['reverse_kl_low']):.3f} to {float(row['reverse_kl_high']):.3f})"
        cells.setdefault(row["method"], {})[row["task"]] = figure if row["status"] != "exact" else "0, exact"
        order[row["method"]] = order.get(row["method"], 0.0) + float(row["rank_low"] or 0) + float(row["rank_high"] or 0)
    lines = [f"| method | {' | '.join(tasks)} |", "|---|" + "---|" * len(tasks)]
    lines += [f"| {m} | {' | '.join(cells[m].get(t, '–') for t in tasks)} |" for m in sorted(cells, key=lambda m: order[m])]
    return "\n".join(lines)


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    before, rest = old.split(START)
    new = f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
