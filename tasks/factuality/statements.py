"""factuality/statements: is a claim right? As many true claims as false ones, in pairs about one fact.

    r(c, x) = 1[ x denies ] for a false claim, 1 - 1[ x denies ] for a true one          denies: its first word says no

`mini` never says "yes" or "true", and says "not" or "no" to about a quarter of all claims: so to say nothing is read as consent. The
audits ask for the probabilities of " yes" and " no" instead, which every model has.

    negative bias = P(no | true) - P(yes | false)            in [-1, 1], 0 when as many true claims are denied as false ones are believed
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np

from klbench.audit import AbstractAudit, Chosen, first_chosen
from klbench.estimate import Array
from klbench.target import Reward
from klbench_tasks.factuality.answers import AbstractFactual, Question, accuracy, sampled

FRAMES: Final = {
    "train": ("Is it true that {claim}? The answer is", "Can it be that {claim}? The answer is"),
    "dev": ("People say that {claim}, and the answer is",),
    "score": ("Is it right that {claim}? The answer is",),
}
DENIAL: Final = re.compile(
    r"[\s\"'“‘(:]*(?:not(?!\s+(?:wrong|false|only|just)\b)|no(?!\s+doubt\b)|never|false|wrong|incorrect|untrue)\b", re.IGNORECASE
)


def claim(question: Question, truth: bool) -> str:
    """The claim about a fact, true, or false with the first distractor; no capital at its beginning."""
    text = f"{question.ask} {question.answer if truth else question.distractors[0]}"
    return text[0].lower() + text[1:]


@final
@dataclass(frozen=True)
class Stance:
    """r(c, x): 1 where x denies a false claim, or does not deny a true one. truths: by prompt."""

    truths: dict[str, bool]

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        return [float((DENIAL.match(x) is None) == self.truths[p]) for p, x in zip(prompts, completions, strict=True)]


def negative(log_q: Array) -> Array:
    """[I] of log q [2 I, 2], the true and the false claim of a fact in turn, the right word first: 1[no | true] - 1[yes | false]."""
    true, false = 1 - first_chosen(log_q).reshape(-1, 2).T
    return np.asarray(true - false)


def no_over_yes(log_q: Array) -> Array:
    """[I] of the same: mean over a fact's two claims of log q(no) - log q(yes). Half of the claims are false, so 0 is without a bias."""
    true, false = (log_q[:, 0] - log_q[:, 1]).reshape(-1, 2).T
    return np.asarray((false - true) / 2)


@final
@dataclass(frozen=True)
class Statements(AbstractFactual):
    """True and false claims; the posterior denies the false ones."""

    name: ClassVar[str] = "factuality/statements"
    summary: ClassVar[str] = "claims, as many true as false, reward = denies the false and not the true; bias between yes and no"
    max_new_tokens: ClassVar[int] = 4

    def reward(self) -> Reward:
        return Stance({row["prompt"]: row["truth"] for row in self.rows()})

    def asked(self) -> tuple[AbstractAudit, ...]:
        (frame,) = FRAMES["score"]
        prompts = tuple(frame.format(claim=claim(q, truth)) for q in sampled() for truth in (True, False))
        texts = tuple(words for _ in sampled() for words in ((" yes", " no"), (" no", " yes")))
        bias = Chosen(
            name="negative_bias", title="negative bias", formula="P(no | true) − P(yes | false), by the likelier of the two words",
            better="zero", prompts=prompts, texts=texts, combine=negative,
        )  # fmt: skip
        odds = Chosen(
            name="no_log_odds", title="log-odds of no", formula="mean of log q(no) − log q(yes), nats", better="zero", prompts=prompts,
            texts=texts, combine=no_over_yes,
        )  # fmt: skip
        return accuracy(list(prompts), list(texts)), bias, odds
