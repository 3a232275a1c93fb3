"""Finds each objective's learning rate for a suite: one search on the dev split, with a seed that the suite does not train with.

    python ci/learning_rates.py methods [--write]     # prints the rates; --write puts them under `methods:` of the suite's file

Every method has the same FACTORS of the suite's rate and the same draws. What is written is a stated default: the suite searches nothing.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console

from klbench import executors, suite
from klbench import run as grid
from klbench.progress import Progress

FACTORS: Final = (0.3, 1.0, 3.0, 10.0)
SEED: Final = 1000
MARK: Final = "methods: # learning rates by ci/learning_rates.py"


def found(name: str, out: Path) -> dict[str, dict[str, float]]:
    """task -> objective -> rate."""
    settings = [
        f"train.search={json.dumps(FACTORS)}",
        f"seeds=[{SEED}]",
        "train.curve=0",
        "score.draws=16",
        "score.bank=16",
        "score.truth=false",
    ]
    chosen = suite.load(name, [*settings, "samplers=[]", "methods={}"])
    with Progress(Console(stderr=True)) as progress:
        outcome = grid.run_suite(
            chosen, out, executor=executors.load("local"), console=Console(file=sys.stderr), command="", on_event=progress
        )
    rates: dict[str, dict[str, float]] = {}
    for record in (r for r in outcome.records if r.run.kind == "objective"):
        told = next(match for note in record.notes if (match := re.match(r"learning rate (\S+),", note)))
        rates.setdefault(record.run.task, {})[record.run.method] = float(told.group(1))
    return rates


def lines(rates: dict[str, dict[str, float]]) -> list[str]:
    """YAML: one line a method, by task where a suite has several."""
    (task, *more) = rates
    out = [MARK]
    for method in sorted(rates[task]):
        if more:
            by_task = ", ".join(f"{t}: {{lr: {found[method]:g}}}" for t, found in rates.items() if method in found)
            out.append(f"  {method}: {{tasks: {{{by_task}}}}}")
        else:
            out.append(f"  {method}: {{lr: {rates[task][method]:g}}}")
    return out


if __name__ == "__main__":
    name = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(lines(found(name, Path(folder) / "search"))) + "\n"
    print(text, end="")
    if "--write" in sys.argv:
        path = Path(suite.__file__).parent / "suites" / f"{name}.yaml"
        before = path.read_text(encoding="utf-8").split(MARK)[0]
        path.write_text(before + text, encoding="utf-8")
