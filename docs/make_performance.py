"""Writes docs/performance.md from what the benchmarks measured: benchmarks/results/*.json.

python docs/make_performance.py          (tests/test_benchmarks.py holds that the page is what this writes)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGE: Final = ROOT / "docs" / "performance.md"
ORDER: Final = ("training", "sampling", "scoring", "limit", "growth")
HEADINGS: Final = {
    "training": "A training step, against TRL and disco",
    "sampling": "Sampling, against `generate`",
    "scoring": "Log-likelihoods, against lm-eval",
    "limit": "Against the machine",
    "growth": "Growth",
}
ABOUT: Final = {
    "training": """Model, prompts, lengths, draws, reward and threads are the same, contestants take turns, and a ratio is that of one
round. klbench runs `klbench.train.train`; TRL and disco run their own loops.""",
    "sampling": "klbench also returns the log-probability of every token; `generate` returns tokens.",
    "scoring": "lm-eval reads texts through `loglikelihood`. klbench reads them too, or the ids that it drew itself.",
    "limit": """Arithmetic counts only what the work needs (a prompt read once, logits where they are asked for), so that what is done twice
or for nothing lowers the share.""",
    "growth": "The least-squares slope of log time over log size; 1 is linear. CPU time, children included.",
}
HEAD: Final = """# How fast klbench is

`make bench` remakes the tables, and this page with them (`python docs/make_performance.py`). A figure is a median over rounds with the
least and the greatest beside it. Machines differ, and so do hours on a shared one: ratios inside a table carry over, seconds do not.
"""


def results(folder: Path) -> list[dict[str, Any]]:
    """What was measured, in the order of the page; several files of one benchmark by their names."""
    found = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    return [data for _, data in sorted(found, key=lambda each: (ORDER.index(each[1]["name"]), each[0]))]


def grid(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, the first column to the left and the others to the right."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in (columns, marks, *rows)]


def verdicts(found: list[dict[str, Any]]) -> list[str]:
    """Every goal beside what was reached."""
    rows = []
    for data in found:
        for goal in data["goals"]:
            kept = goal["reached"] >= goal["wanted"] if goal["sign"] == "at least" else goal["reached"] <= goal["wanted"]
            threads = "one thread" if data["threads"] == 1 else f"{data['threads']} threads"
            subject = data["model"] or "small"
            rows.append(
                [
                    f"{data['name']}, {subject}, {threads}: {goal['what']}",
                    f"{goal['sign']} {goal['wanted']:g}",
                    f"{goal['reached']:.3g}{goal['unit']}",
                    "yes" if kept else "**no**",
                ]
            )
    missed = sum(row[3] != "yes" for row in rows)
    said = f"{len(rows) - missed} of {len(rows)} goals are reached." if missed else f"All {len(rows)} goals are reached."
    return ["## Goals", "", said, "", *grid(["goal", "wanted", "measured", "reached"], rows), ""]


def section(data: dict[str, Any]) -> list[str]:
    """One run of one benchmark."""
    machine, versions = data["machine"], data["versions"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; load {machine['load']} at the end"
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [f"`{data['command']}`", ""]
    for table in data["tables"]:
        lines += [f"{table['title']}:", "", *grid(table["columns"], table["rows"]), ""]
    lines += [f"- {note}" for note in data["notes"]] + ([""] if data["notes"] else [])
    lines += [f"{data['date']}, {data['clock']}, {data['rounds']} rounds. {where}. {told}.", ""]
    return lines


def page(found: list[dict[str, Any]]) -> str:
    """The whole page. Raises ValueError for the result of an unknown benchmark."""
    lines = [HEAD, *verdicts(found)]
    for name in ORDER:
        mine = [data for data in found if data["name"] == name]
        if mine:
            lines += [f"## {HEADINGS[name]}", "", ABOUT[name], ""]
        for data in mine:
            lines += section(data)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    PAGE.write_text(page(results(RESULTS)), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
