"""The contract of a task: prompts, a reward, the posterior they define; and loading by name through entry points."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import ClassVar, Final, final

from klbench.audit import AbstractAudit
from klbench.errors import UserError, unknown
from klbench.target import Policy, Reward, TiltedPrior

SPLITS: Final = ("train", "dev", "score")


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


def names() -> list[str]:
    """Names of all installed tasks."""
    return sorted(e.name for e in entry_points(group="klbench.tasks"))


def load(name: str) -> AbstractTask:
    """The task of that name, hyphen equal to underscore. Raises UserError with the nearest name."""
    wanted = name.replace("-", "_")
    found = {e.name: e for e in entry_points(group="klbench.tasks")}
    if wanted not in found:
        raise unknown("task", name, found)
    made: Callable[[], AbstractTask] = found[wanted].load()
    return made()


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
