"""factuality/elements and factuality/capitals: one kind of fact each. The reward is the bare task's; the accuracy asks all facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from klbench.audit import AbstractAudit
from klbench.target import Reward
from klbench_tasks.factuality.answers import AbstractFactual, accuracy, questions


def _all_of(kind: str) -> tuple[AbstractAudit, ...]:
    asked = [q for q in questions() if q.kind == kind]
    return (accuracy([q.ask for q in asked], [q.texts for q in asked]),)


@final
@dataclass(frozen=True)
class Elements(AbstractFactual):
    """Symbols of elements; multiple choice over all 118."""

    name: ClassVar[str] = "factuality/elements"
    summary: ClassVar[str] = "symbols of elements, reward = exact first word; accuracy over all 118 by multiple choice"

    def reward(self) -> Reward:
        return self.right()

    def asked(self) -> tuple[AbstractAudit, ...]:
        return _all_of("element")


@final
@dataclass(frozen=True)
class Capitals(AbstractFactual):
    """Capitals of countries, accents folded; multiple choice over all that nobody disputes."""

    name: ClassVar[str] = "factuality/capitals"
    summary: ClassVar[str] = "capitals of countries, reward = exact first words, accents folded; accuracy over all by multiple choice"

    def reward(self) -> Reward:
        return self.right()

    def asked(self) -> tuple[AbstractAudit, ...]:
        return _all_of("capital")
