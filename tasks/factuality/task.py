"""factuality: name an element's symbol or a country's capital; the reward is 1 when the continuation starts with the answer.

r(c, x) = 1[ the first word or words of x are an answer to c ]        accents folded; symbols keep their case

The variants, each in a file of its own, ask more of the same facts and carry audits; this bare task has none, as it is in the quick suite.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar, final

from klbench.target import Policy, Reward, TiltedPrior
from klbench.task import SPLITS, AbstractTask
from klbench_tasks.factuality.answers import Right
from klbench_tasks.factuality.choice import Choice
from klbench_tasks.factuality.emotional import Emotional
from klbench_tasks.factuality.pressure import Pressure
from klbench_tasks.factuality.recall import Capitals, Elements
from klbench_tasks.factuality.statements import Statements

__all__ = ["Capitals", "Choice", "Elements", "Emotional", "Factuality", "Pressure", "Statements", "correct"]


@functools.cache
def _rows(split: str) -> list[dict[str, str]]:
    text = files(__package__).joinpath(f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(row) for row in text.splitlines()]


@functools.cache
def _right() -> Right:
    return Right({row["prompt"]: row["answer"] for split in SPLITS for row in _rows(split)})


def correct(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """1.0 where the continuation starts with the answer, else 0.0. Raises KeyError for a prompt that is not of this task."""
    return _right()(prompts, completions)


correct.reward_max = 1.0  # type: ignore[attr-defined]  # read by whoever needs a ceiling and was not told one


@final
@dataclass(frozen=True)
class Factuality(AbstractTask):
    """Facts that the prior half knows, asked in wordings that differ between the splits."""

    name: ClassVar[str] = "factuality"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "symbols of elements and capitals of countries, reward = exact first word"
    max_new_tokens: ClassVar[int] = 6
    beta: ClassVar[float] = 0.33

    def prompts(self, split: str) -> list[str]:
        return [row["prompt"] for row in _rows(split)]

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, correct, beta, 1.0)

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return None
