"""Writes the calibration table of docs/gate.md from ci/gate.calibration.json.

python docs/make_gate.py          (tests/test_ci_gate.py holds that the page is what this writes)
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from klbench.gate import calibration, settings
from klbench.gate.calibration import Calibration
from klbench.gate.report import calibrated

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "gate.md"
GATE: Final = ROOT / "ci" / "gate.yaml"
START, END = "<!-- calibration: start -->\n", "<!-- calibration: end -->\n"


def _rows(head: list[str], rows: list[list[str]]) -> list[str]:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)]


def table(found: Calibration) -> str:
    """What was measured, as Markdown."""
    gate = settings.load(GATE)
    alarms, power = calibrated(found)
    margins = [
        [f"`{name}`", "none" if name not in found.detectable else f"{found.detectable[name]:.3g}", f"{metric.margin:g}"]
        for name, metric in gate.metrics.items()
        if metric.margin is not None
    ]
    said = [
        f"`{found.command}`, at a stated rate of {100 * found.rate:g} %:",
        "",
        *_rows(["equals compared", "comparisons", "false alarms", "rate", "95 %"], alarms),
        "",
        f"Of the retrained comparisons {found.inconclusive} were inconclusive.",
        "",
        "One metric of one policy made worse, in multiples of what a verdict's table calls detectable:",
        "",
        *_rows(["worsening", "found", "rate", "95 %", "blocked", "rate", "95 %"], power),
        "",
        "Detectable whatever the margin, at the policy where that is hardest, and the margin of `ci/gate.yaml`:",
        "",
        *_rows(["metric", "detectable", "margin"], margins),
    ]
    return "\n".join(said) + "\n"


def page(text: str, found: Calibration) -> str:
    """The page with its table. Raises ValueError where the two marks are not there."""
    head, rest = text.split(START)
    _, tail = rest.split(END)
    return f"{head}{START}\n{table(found)}\n{END}{tail}"


def main() -> None:
    found = calibration.read(GATE)
    if found is None:
        raise SystemExit(f"no {calibration.place_of(GATE)}: klbench check --calibrate makes it")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
