"""`klbench validate`: is a suite, an objective, a sampler or a task sound? Of a task it shows what was measured, a row a check."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klbench.errors import UserError
from klbench.terminal import complain, table

if TYPE_CHECKING:
    from klbench.task import AbstractTask

Paths = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="a suite (.yaml), an objective or sampler (.py), a task's folder, the name of a task"),
]
Include = Annotated[list[Path] | None, typer.Option(help="directory with tasks, objectives and samplers of your own; may be repeated")]
Rates = Annotated[bool, typer.Option("--rates", help="write the base rates of these tasks into their READMEs first")]


def validate(path: Paths, include: Include = None, rates: Rates = False) -> None:
    """Is my suite, objective, sampler or task sound? Exit 2 names what is not; of a task a table says what was measured."""
    mine, seen, broken = tuple(include or ()), 0, False
    for given in path:
        try:
            for sound in _checked(given, mine, rates):
                seen, broken = seen + 1, broken or not sound
        except UserError as error:
            complain(str(error))
            seen, broken = seen + 1, True
    if not seen:
        raise UserError(f"nothing to validate in {' '.join(path)}")
    if broken:
        raise typer.Exit(2)


def _checked(given: str, include: tuple[Path, ...], rates: bool) -> Iterator[bool]:
    """Whether each thing that an argument names is sound; a file of another kind, as a shell's * gives, is passed over with a word."""
    path = Path(given)
    if given.endswith((".yaml", ".yml")):
        yield _suite(given, include)
    elif path.is_dir() and (path / "task.py").is_file():
        yield from (_task(name, loaded, rates) for name, loaded in tasks_of(path).items())
    elif path.is_dir() or (path.is_file() and (path.suffix != ".py" or path.stem.startswith("_"))):
        print(f"{given}: passed over: neither a suite, an objective, a sampler nor a task's folder")
    elif path.name == "task.py" and path.is_file():
        yield from _checked(str(path.parent), include, rates)
    elif path.suffix == ".py":
        yield _plugin(path)
    else:
        from klbench import task

        loaded = task.load(given, include)
        yield _task(given, loaded, rates)


def tasks_of(folder: Path) -> dict[str, AbstractTask]:
    """The tasks of a folder: the installed ones where it is the folder that they are installed from."""
    from klbench import task

    here, found = (folder / "task.py").resolve(), list[str]()
    for entry in entry_points(group="klbench.tasks"):
        spec = find_spec(entry.module) if entry.module.rpartition(".")[0].endswith(f".{folder.resolve().name}") else None
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == here:
            found.append(entry.name)
    if found:  # a bare family is another name of one of its variants
        made = {loaded.name: loaded for loaded in (task.load(name) for name in sorted(found))}
    else:
        made = {one.name: one() for one in task.in_folder(folder.resolve()).values()}
    return dict(sorted(made.items()))


def _suite(given: str, include: tuple[Path, ...]) -> bool:
    from klbench import run as grid

    runs = grid.resolve(grid.suite_of(given, include=include), include, hashes=lambda *_: {})
    print(f"{given}: sound: {len({r.task for r in runs})} tasks, {len(runs)} runs")
    return True


def _task(name: str, loaded: AbstractTask, rates: bool) -> bool:
    """Prints the table of one task. The line that names what is broken goes to stderr."""
    from klbench import task_checks

    if rates:
        print(f"{task_checks.write_base_rates(loaded)}: base rates written")
    found = task_checks.check_task(loaded)
    table(["task", "check", "", "what was measured"], ([name, f.name, "" if f.verdict == "ok" else f.verdict, f.detail] for f in found))
    for finding in found:
        if not finding.ok:
            complain(f"task {name}: {finding.name}: {finding.detail}")
    return all(finding.ok for finding in found)


def _plugin(path: Path) -> bool:
    """Raises UserError unless the file holds one objective or one sampler, which keeps every law."""
    if not path.is_file():
        raise UserError(f"no file at {path}")
    if not path.stem.isidentifier():
        raise UserError(f"{path}: a file name that is a Python name expected, as the method is called by it")

    from klbench import convergence, laws, method

    try:
        try:
            objective = method.objective(path.stem, (path.parent,))
            held = (*laws.check_objective(objective), *convergence.check_ending(objective))
        except UserError as no_objective:
            if "found 0" not in str(no_objective):
                raise
            held = laws.check_sampler(method.sampler(path.stem, (path.parent,)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever code of a stranger raises is an answer about that code
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    for law in held:
        if not law.holds:
            raise UserError(f"{path}: the law {law.name!r} does not hold: {law.detail} (gap {law.gap:.3g})")
    print(f"{path}: sound: {len(held)} laws hold")
    return True
