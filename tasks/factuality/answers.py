"""Answers to factual questions: what counts as one, what is a refusal or a hedge, and the questions that every variant asks.

Every continuation is one of four things, in this order: right (as the task's reward has it), a refusal, a hedge, an error. A refusal says
that it does not know or will not tell; a hedge names something and does not stand by it.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from abc import abstractmethod
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar, Final, Literal, final

from klbench.audit import AbstractAudit, Chosen, Drawn
from klbench.target import Policy, Reward, TiltedPrior
from klbench.task import AbstractTask

REFUSAL: Final = re.compile(
    r"\b(?:(?:do|does|did|can|could|will|would|may|must)(?: ?n[o']t|n[’']t|not) (?:know|say|tell|answer|help|recall|remember)"
    r"|no idea|not (?:known|sure|certain|able)|unknown|unsure|unable|cannot|refuse|sorry|as an ai)\b",
    re.IGNORECASE,
)
HEDGE: Final = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|presumably|apparently|seems?|likely|may be|might be|could be|either"
    r"|(?:i|we) (?:think|believe|guess|suppose))\b",
    re.IGNORECASE,
)
Outcome = Literal["refused", "hedged", "error"]


def fold(text: str) -> str:
    """Accents off; case stays."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


@functools.cache
def _pattern(answer: str) -> re.Pattern[str]:
    return re.compile(re.escape(fold(answer)) + r"(?!\w)")


def answers(completion: str, answer: str) -> bool:
    """Whether a continuation starts with an answer: blanks, a quotation mark or a bracket may come first, no letter or digit after."""
    return bool(_pattern(answer).match(fold(completion).lstrip(" \"'“‘(")))


@final
@dataclass(frozen=True)
class Right:
    """r(c, x) = 1[x starts with the answer to c]. Raises KeyError for a prompt that it does not know."""

    known: dict[str, str]

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        return [float(answers(x, self.known[p])) for p, x in zip(prompts, completions, strict=True)]


@final
@dataclass(frozen=True)
class Is:
    """1 where a continuation is this outcome: not right, and the first of refusal, hedge and error that it is."""

    outcome: Outcome
    right: Reward

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        right = self.right(prompts=prompts, completions=completions)
        return [float(not r and _wrong(x) == self.outcome) for r, x in zip(right, completions, strict=True)]


def _wrong(completion: str) -> Outcome:
    """What a continuation that is not right is."""
    return "refused" if REFUSAL.search(completion) else "hedged" if HEDGE.search(completion) else "error"


def outcomes(right: Reward) -> tuple[Drawn, ...]:
    """The shares of refusals, hedges and errors among the draws of the score prompts; with that of right answers they add up to 1."""
    formula = "P(not right and {})"
    return (
        Drawn(name="refused", title="refused", formula=formula.format("a refusal"), value=Is("refused", right)),
        Drawn(name="hedged", title="hedged", formula=formula.format("a hedge, no refusal"), value=Is("hedged", right)),
        Drawn(name="error", title="error", formula=formula.format("neither refusal nor hedge"), better="low", value=Is("error", right)),
    )


@final
@dataclass(frozen=True)
class Question:
    """A fact as multiple choice. ask: the question, as a sentence to go on with.  distractors: answers to others of its kind, never right.
    order: its four options as they are listed where they are shown.  sampled: one of the eighty that the costlier audits ask."""

    kind: str
    subject: str
    ask: str
    answer: str
    distractors: tuple[str, ...]
    order: tuple[str, ...]
    sampled: bool

    @property
    def texts(self) -> tuple[str, ...]:
        """The options as continuations, the right one first."""
        return tuple(f" {x}" for x in (self.answer, *self.distractors))


@functools.cache
def questions() -> tuple[Question, ...]:
    """All of questions.jsonl: 118 elements and the capitals that nobody disputes."""
    lines = files(__package__).joinpath("questions.jsonl").read_text(encoding="utf-8").splitlines()
    read: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return tuple(Question(**row | {"distractors": tuple(row["distractors"]), "order": tuple(row["order"])}) for row in read)


@functools.cache
def sampled() -> tuple[Question, ...]:
    """Forty elements and forty capitals; those of the bare task are among them."""
    return tuple(q for q in questions() if q.sampled)


def accuracy(prompts: list[str], texts: list[tuple[str, ...]]) -> Chosen:
    """Multiple choice by probability, the right text first."""
    formula = "share of items whose right text has the largest log q of all its texts"
    return Chosen(name="accuracy", title="accuracy", formula=formula, better="high", prompts=tuple(prompts), texts=tuple(texts))


@functools.cache
def rows(variant: str) -> tuple[dict[str, Any], ...]:
    """The prompts of a variant: {"split", "prompt", ...}."""
    return tuple(map(json.loads, files(__package__).joinpath(f"{variant}.jsonl").read_text(encoding="utf-8").splitlines()))


@dataclass(frozen=True)
class AbstractFactual(AbstractTask):
    """A variant: prompts from <variant>.jsonl, a reward of 0 or 1, audits beside it."""

    version: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 6
    beta: ClassVar[float] = 0.33

    @abstractmethod
    def reward(self) -> Reward:
        """1 where a continuation is right, else 0."""

    @abstractmethod
    def asked(self) -> tuple[AbstractAudit, ...]:
        """What else is measured, beside the outcomes."""

    def rows(self) -> tuple[dict[str, Any], ...]:
        """The variant's prompts with what is known of them."""
        return rows(self.name.partition("/")[2])

    def right(self) -> Right:
        """The reward of a variant whose rows have an answer each."""
        return Right({row["prompt"]: row["answer"] for row in self.rows()})

    def prompts(self, split: str) -> list[str]:
        return [row["prompt"] for row in self.rows() if row["split"] == split]

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, self.reward(), beta, 1.0)

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return None

    def audits(self) -> tuple[AbstractAudit, ...]:
        return (*self.asked(), *outcomes(self.reward()))
