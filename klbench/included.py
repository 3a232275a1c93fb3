"""Code of users by path: what `--include DIR` names and `klbench validate FILE` checks, under module names that nothing installed has."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

from klbench.errors import UserError

PREFIX: Final = "klbench_included_"


def module(path: Path) -> ModuleType:
    """The module of one file, run anew at each call, so that an edited file is the one that counts."""
    return _run(f"{PREFIX}{path.stem}", path, None)


def package(folder: Path, part: str) -> ModuleType:
    """Module `part` of a folder as a package, so that its files may import each other; once a process, as any import.

    Two folders of one name are two packages. Raises UserError that names the file and what importing it raised.
    """
    name = f"{PREFIX}{folder.name}_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"
    before = set(sys.modules)
    try:
        if name not in sys.modules:
            _run(name, folder / "__init__.py", [str(folder)])
        return importlib.import_module(f"{name}.{part}")
    except UserError:
        raise
    except Exception as error:  # whatever code of a stranger raises is an answer about that code
        for half_made in {m for m in sys.modules if m == name or m.startswith(f"{name}.")} - before:
            del sys.modules[half_made]
        raise UserError(f"{folder / part}.py: importing it raised {type(error).__name__}: {' '.join(str(error).split())}") from error


def folder_of(name: str) -> Path | None:
    """The folder of an included package, by the name of one of its modules; None for what is installed."""
    top = sys.modules.get(name.partition(".")[0])
    if not name.startswith(PREFIX) or top is None or not getattr(top, "__path__", None):
        return None
    return Path(top.__path__[0])


def standing(include: Sequence[Path]) -> None:
    """Raises UserError for an included folder that is not there."""
    for folder in include:
        if not folder.is_dir():
            raise UserError(f"--include {folder}: no such directory")


def _run(name: str, path: Path, search: list[str] | None) -> ModuleType:
    """A package need not have an `__init__.py`: nothing is run then, and `importlib.resources` finds its files all the same."""
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=search)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # a dataclass with postponed annotations looks its module up there
    if search is None or path.is_file():
        spec.loader.exec_module(made)
    return made
