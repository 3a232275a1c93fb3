"""The contract of a task: prompts, a reward, the posterior they define; and loading by name, installed or from a folder of the user's."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import ClassVar, Final, final

from klbench import included
from klbench.audit import AbstractAudit
from klbench.errors import UserError, unknown
from klbench.target import Policy, Reward, TiltedPrior

SPLITS: Final = ("train", "dev", "score")
NAME: Final = re.compile(r"[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)?")


@dataclass(frozen=True)
class AbstractTask(ABC):
    """Prompts in three disjoint splits, a reward that reads the continuation alone, and a target.

    name: `family` or `family/variant` = entry point = command-line word.  version: raised by any edit that can move a score.
    summary: what the reward's mean says, one line.  max_new_tokens: length at which a continuation is cut.  beta: the suggested one.
    prior: the one that its prompts were chosen for and whose bank ships.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    max_new_tokens: ClassVar[int]
    beta: ClassVar[float]
    prior: ClassVar[str] = "mini"

    @abstractmethod
    def prompts(self, split: str) -> list[str]:
        """Prompts of "train", "dev" or "score"."""

    @abstractmethod
    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        """The posterior on this task at this beta."""

    @abstractmethod
    def gold(self) -> Reward | None:
        """A second, held-out reward, or None."""

    @abstractmethod
    def features(self) -> tuple[Reward, float] | None:
        """phi and the value its mean is wanted at, for a moment target; or None."""

    def audits(self) -> tuple[AbstractAudit, ...]:
        """What else is measured of a policy on this task, as columns `audit.NAME`."""
        return ()


def names(include: Sequence[Path] = ()) -> list[str]:
    """Names of all tasks that are installed or lie in an included folder."""
    return sorted({*_installed(), *_given(families(include))})


def load(name: str, include: Sequence[Path] = ()) -> AbstractTask:
    """The task of that name, hyphen equal to underscore; of an included folder only the family asked for is imported.

    Raises UserError with the nearest name, and for an included task that takes the name of an installed one.
    """
    wanted, installed = name.replace("-", "_"), _installed()
    near = families(include)
    given = _given([folder for folder in near if folder.name == wanted.partition("/")[0]])
    if wanted in given:
        return given[wanted]()
    if wanted not in installed:
        raise unknown("task", name, [*installed, *given, *(folder.name for folder in near)])
    try:
        made: Callable[[], AbstractTask] = installed[wanted].load()
        return made()
    except Exception as error:  # a plug-in's own code
        raise UserError(f"task {name!r} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}") from error


def families(include: Sequence[Path]) -> list[Path]:
    """The task folders of included ones: DIR/<family> with a task.py. Raises UserError for a DIR that is not there."""
    included.standing(include)
    return [path.parent for folder in include for path in sorted(folder.glob("*/task.py"))]


def in_folder(folder: Path) -> dict[str, type[AbstractTask]]:
    """The tasks of one folder by name: each @final class of AbstractTask that it defines with a name of its own, in their order.

    The bare family is the class of that name, else the first. Raises UserError for a name that is not `<folder>` or `<folder>/<variant>`.
    """
    module = included.package(folder, "task")
    path, package = folder / "task.py", module.__name__.partition(".")[0]
    found: dict[str, type[AbstractTask]] = {}
    for made in vars(module).values():
        if not (isinstance(made, type) and issubclass(made, AbstractTask) and made.__module__.partition(".")[0] == package):
            continue
        if not (getattr(made, "__final__", False) and "name" in vars(made)):
            continue
        if inspect.isabstract(made):
            raise UserError(f"{path}: {made.__name__} lacks {', '.join(sorted(made.__abstractmethods__))}")
        if not NAME.fullmatch(made.name) or made.name.partition("/")[0] != folder.name:
            raise UserError(f"{path}: {made.__name__} is named {made.name!r}; {folder.name!r} or '{folder.name}/<variant>' expected")
        if made.name in found:
            raise UserError(f"{path}: {made.__name__} and {found[made.name].__name__} have one name, {made.name!r}")
        found[made.name] = made
    if not found:
        raise UserError(f"{path}: no class of AbstractTask that is marked @final and has a name")
    return {folder.name: next(iter(found.values())), **found}


def code_hash(task: AbstractTask) -> str:
    """SHA-256 of the files of an included task, which may change between two runs under one name and version; "" for an installed one."""
    folder = included.folder_of(type(task).__module__)
    if folder is None:
        return ""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(("README", "LICENSE", "."))):
        found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _installed() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group="klbench.tasks")}


def _given(folders: Sequence[Path]) -> dict[str, type[AbstractTask]]:
    """The tasks of included task folders. One name is one task: another's is refused, and a bare family that is taken stays what it was."""
    installed = _installed()
    found: dict[str, type[AbstractTask]] = {}
    for folder in folders:
        for name, made in in_folder(folder).items():
            if name != made.name and (name in installed or name in found):
                continue
            if name in installed or name in found:
                other = "is installed already" if name in installed else "is in another included folder too"
                raise UserError(f"--include {folder.parent}: task {name!r} {other}; give yours a name of its own")
            found[name] = made
    return found


@final
@dataclass(frozen=True)
class GivenTask(AbstractTask):
    """Prompts and a reward handed in by a user: what `klbench.score(prompts=..., reward=...)` scores. It trains nothing."""

    given: tuple[str, ...]
    reward: Reward
    reward_max: float = math.inf
    max_new_tokens: int = field(default=16, kw_only=True)  # type: ignore[misc]  # a class variable of every other task

    name: ClassVar[str] = "given"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "prompts and reward given by the user"
    beta: ClassVar[float] = 1.0

    def prompts(self, split: str) -> list[str]:
        if split != "score":
            raise UserError(f"given prompts have a score split alone, not {split!r}")
        return list(self.given)

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, self.reward, beta, self.reward_max)

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return None
