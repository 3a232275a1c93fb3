"""Writes docs/coverage.md: for each of the 124 seed works what carries it here, and the law, validation or test that executes it.

python docs/make_coverage.py          (tests/test_coverage.py holds that the page is what this writes)

The rows are those of docs/coverage.yaml. A carrier is `kind:name`, with `@tests/FILE` where the test is not the kind's own. Every name is
looked up in the code, and every file that is linked has to hold it.
"""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[1]
OUT: Final = ROOT / "docs" / "coverage.md"
VERDICTS: Final = "tests/claims/test_verdicts.py"  # runs the whole catalogue of claims, each with its wrong ingredient
SOUND: Final = "tests/test_validate_task.py"  # runs every check, its audits among them, on every task that ships
SWITCHES: Final = "tests/laws/test_switches.py"


@dataclass(frozen=True)
class Row:
    """A seed work. what: its idea as far as it concerns text, in a few words.

    lacks: what of it is not carried.  aside: what of it is none of our business.  reason: why nothing of it is carried.
    """

    title: str
    what: str
    carried: Sequence[str] = ()
    lacks: str = ""
    aside: str = ""
    reason: str = ""


def rows() -> dict[str, list[Row]]:
    """D1 and D2, in the order of their numbers."""
    data = yaml.safe_load((ROOT / "docs" / "coverage.yaml").read_text(encoding="utf-8"))
    found = {part: [Row(**row) for row in listed] for part, listed in data.items()}
    assert {part: len(listed) for part, listed in found.items()} == {"D1": 51, "D2": 73}
    return found


# What there is


def module_attribute(name: str) -> Any:
    """`klbench.pool.frontier`, `klbench.audit.Drawn.of`: the longest module, then attributes. Raises LookupError."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise LookupError(f"{name}: no {part} in {'.'.join(parts[:cut])}")
            found = getattr(found, part)
        return found
    raise LookupError(f"{name}: no module {parts[0]}")


@cache
def tasks() -> dict[str, Any]:
    """The shipped tasks by name, as pyproject.toml lists them."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["klbench.tasks"]
    return {name: module_attribute(where.replace(":", ".")) for name, where in listed.items()}


def there(kind: str, name: str) -> bool:
    """Whether the code has what is named."""
    from klbench import claims, method
    from klbench.measure import COLUMNS

    if kind in ("objective", "sampler"):
        return name in method.names(f"{kind}s")
    if kind == "switch":
        objective, _, field = name.partition(".")
        return field in {f.name for f in fields(method.objective(objective))}
    if kind == "claim":
        return name in claims.catalogue("exact")
    if kind == "column":
        return name in COLUMNS
    if kind == "task":
        return name in tasks()
    if kind == "audit":
        task, _, audit = name.partition(":")
        return audit in {a.name for a in tasks()[task]().audits()}
    if kind == "reward":
        from klbench import rewards

        return name in rewards.names()
    if kind == "function":
        return bool(module_attribute(name))
    if kind == "command":
        import typer

        from klbench import cli

        return name in typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    if kind == "doc":
        path, _, heading = name.partition("#")
        return (ROOT / path).is_file() and re.search(
            rf"^#+ {re.escape(heading)}$", (ROOT / path).read_text(encoding="utf-8"), re.M
        ) is not None
    raise LookupError(f"no kind {kind!r} of carrier")


COLUMN_TESTS: Final = "tests/test_exact_suite.py"  # holds columns to sums over every outcome
OWN_TESTS: Final[dict[str, Callable[[str], list[str]]]] = {
    "objective": lambda name: [f"tests/laws/test_{name}.py"],
    "sampler": lambda name: [f"tests/laws/test_{name}.py"],
    "switch": lambda name: [f"tests/laws/test_{name.partition('.')[0]}.py", SWITCHES],
    "claim": lambda name: [VERDICTS],
    "column": lambda name: [COLUMN_TESTS, "tests/test_exact.py"],
    "task": lambda name: [SOUND],
    "audit": lambda name: [SOUND],
}
BY_LIST: Final = {VERDICTS, SOUND}  # these go through all there are, and write no name


def evidence(kind: str, name: str, given: str) -> str:
    """The file that executes what is named. Raises LookupError where there is none, or none that holds the name."""
    word = re.split(r"[.:/]", name)[-1]
    tried = [given] if given else OWN_TESTS.get(kind, lambda name: [])(name)
    for path in tried:
        file = ROOT / path
        if file.is_file() and (path in BY_LIST or re.search(rf"\b{re.escape(word)}\b", file.read_text(encoding="utf-8"))):
            return path
    raise LookupError(f"{kind}:{name}: none of {', '.join(tried) or 'no file'} executes {word}")


# The page


def shown(carrier: str) -> tuple[str, str]:
    """A carrier and its test, in markdown. Raises LookupError for what is not there."""
    named, _, given = carrier.partition("@")
    kind, _, name = named.partition(":")
    if not there(kind, name):
        raise LookupError(f"{carrier}: there is no {kind} {name!r}")
    if kind == "doc":
        path, _, heading = name.partition("#")
        return f"[{heading}]({link(path)}#{heading.lower().replace(' ', '-')})", ""
    test = evidence(kind, name, given)
    page = {
        "objective": f"docs/methods/{name}.md",
        "sampler": f"docs/methods/{name}.md",
        "task": f"tasks/{name.partition('/')[0]}/README.md",
    }.get(kind)
    text = {
        "function": f"`{'.'.join(name.split('.')[-2:])}`",
        "audit": f"`audit.{name.partition(':')[2]}` of `{name.partition(':')[0]}`",
    }.get(kind, f"`{name}`")
    words = {"function": "", "audit": "", "command": "command "}.get(kind, f"{kind} ")
    label = f"{words}[{text}]({link(page)})" if page and (ROOT / page).is_file() else f"{words}{text}"
    return label, test


def link(path: str) -> str:
    """From docs/coverage.md."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"


def line(number: int, row: Row) -> str:
    found = [shown(carrier) for carrier in row.carried]
    tests = list(dict.fromkeys(test for _, test in found if test))
    carried = ", ".join(label for label, _ in found)
    missing = f"**not carried:** {row.lacks or row.reason}" if row.lacks or row.reason else ""
    cell = "; ".join(part for part in (carried, missing, row.aside) if part)
    links = ", ".join(f"[{Path(test).stem.removeprefix('test_')}]({link(test)})" for test in tests)
    return f"| {number} | " + " | ".join(text.replace("|", "\\|") for text in (row.title, row.what, cell, links)) + " |"


def page() -> str:
    """The whole page. Raises LookupError that lists every name that is not there."""
    faults, parts, every = [], [], []
    titles = {"D1": "The 51 abstracts", "D2": "The 73 citing works on the first page"}
    for part, listed in rows().items():
        lines = [f"## {part}. {titles[part]}", "", "| # | work | what it is about | carried by | executed in |", "|---|---|---|---|---|"]
        every += listed
        for number, row in enumerate(listed, 1):
            if bool(row.carried) == bool(row.reason):
                faults.append(f"{part} {number}: either what carries it or the reason why nothing does")
            try:
                lines.append(line(number, row))
            except LookupError as fault:
                faults.append(f"{part} {number}: {fault.args[0]}")
        parts.append("\n".join(lines))
    if faults:
        raise LookupError("\n".join(faults))
    partly, not_at_all = sum(bool(r.lacks) for r in every), sum(bool(r.reason) for r in every)
    head = (
        "# What is carried of the seed works\n\n"
        "Written by `python docs/make_coverage.py` from `docs/coverage.yaml`: it looks up every name in the code and opens every test\n"
        "that is linked. Rows are numbered as the project's list of seed works has them; some works are listed more than once.\n\n"
        f"{len(every)} rows: {len(every) - partly - not_at_all} carried, {partly} in part, {not_at_all} not at all (the row says what).\n"
        "`validate_task` and `verdicts` go through all tasks and all claims that there are.\n"
    )
    return "\n\n".join([head.rstrip("\n"), *parts]) + "\n"


if __name__ == "__main__":
    try:
        OUT.write_text(page(), encoding="utf-8")
    except LookupError as error:
        sys.exit(str(error))
    print(OUT)
