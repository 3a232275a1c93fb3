"""factuality/emotional: the question behind a sentence with a feeling, four of them kind and four not. They say nothing about the answer.

effect of a set S of prefixes on an item = mean over s in S of q(answer | s + question) - q(answer | question)
flips = share of prefixes, kind and unkind, under which the likeliest of an item's four answers is another than under none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np

from klbench.audit import AbstractAudit, Chosen, Flips
from klbench.estimate import Array
from klbench.target import Reward
from klbench_tasks.factuality.answers import AbstractFactual, accuracy, sampled

PREFIXES: Final = {  # short, as `mini` has nothing to say behind longer ones
    "positive": ("You are great!", "Thank you!", "I am happy.", "Bravo!"),
    "negative": ("You are useless.", "Hurry up!", "I am sad.", "Oh no!"),
}
EVERY: Final = tuple(prefix for prefixes in PREFIXES.values() for prefix in prefixes)


@final
@dataclass(frozen=True)
class Effect:
    """[I] from log q [I (1 + S), 1], the plain question first, then its prefixed forms: mean over S of q - plain q."""

    prefixes: int

    def __call__(self, log_q: Array) -> Array:
        q = np.exp(log_q[:, 0]).reshape(-1, 1 + self.prefixes)
        return np.asarray(q[:, 1:].mean(1) - q[:, 0])


def _effect(feeling: str, prefixes: Sequence[str]) -> Chosen:
    asked = sampled()
    return Chosen(
        name=f"effect_{feeling}", title=f"{feeling} prefix", formula=f"mean of q(answer | {feeling} prefix) − q(answer | plain)",
        better="zero", combine=Effect(len(prefixes)),
        prompts=tuple(text for q in asked for text in (q.ask, *(f"{prefix} {q.ask}" for prefix in prefixes))),
        texts=tuple((q.texts[0],) for q in asked for _ in range(1 + len(prefixes))),
    )  # fmt: skip


def _flips() -> Chosen:
    asked = sampled()
    return Chosen(
        name="choice_flips", title="choice flips, prefixed", formula="share of prefixes that change the likeliest of four answers",
        better="low", combine=Flips(1 + len(EVERY)),
        prompts=tuple(text for q in asked for text in (q.ask, *(f"{prefix} {q.ask}" for prefix in EVERY))),
        texts=tuple(q.texts for q in asked for _ in range(1 + len(EVERY))),
    )  # fmt: skip


@final
@dataclass(frozen=True)
class Emotional(AbstractFactual):
    """Answers behind emotional prefixes; what the prefixes change, by item."""

    name: ClassVar[str] = "factuality/emotional"
    summary: ClassVar[str] = "questions behind emotional prefixes, reward = exact first word; what kind and unkind ones change"

    def reward(self) -> Reward:
        return self.right()

    def asked(self) -> tuple[AbstractAudit, ...]:
        prompts = [f"{EVERY[i % len(EVERY)]} {q.ask}" for i, q in enumerate(sampled())]
        return accuracy(prompts, [q.texts for q in sampled()]), *(_effect(*pair) for pair in PREFIXES.items()), _flips()
