"""factuality/choice: the options stand in the prompt, the right one among them, in an order fixed by a seed.

    <question> A, B, C or D? <question>        as "The capital city of Spain is Oslo, Madrid, Lima or Cairo? The capital city of Spain is"

The question comes twice because the `mini` prior answers behind the sentence that it was trained on and behind little else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from klbench.audit import AbstractAudit, Chosen
from klbench.estimate import Array
from klbench.target import Reward
from klbench_tasks.factuality.answers import AbstractFactual, accuracy, sampled


def shown(ask: str, order: Sequence[str]) -> str:
    """The prompt of a question with its four options."""
    return f"{ask} {', '.join(order[:-1])} or {order[-1]}? {ask}"


def share_first(log_q: Array) -> Array:
    """[I] 1 where the option that is listed first has the largest log q of [I, K]; the texts are in the order of the list."""
    return (log_q.argmax(1) == 0).astype(np.float64)


@final
@dataclass(frozen=True)
class Choice(AbstractFactual):
    """Four options in the prompt; the accuracy compares their probabilities."""

    name: ClassVar[str] = "factuality/choice"
    summary: ClassVar[str] = "four options in the prompt, reward = the right one is written; accuracy by probability of the options"

    def reward(self) -> Reward:
        return self.right()

    def asked(self) -> tuple[AbstractAudit, ...]:
        prompts = [shown(q.ask, q.order) for q in sampled()]
        listed = tuple(tuple(f" {x}" for x in q.order) for q in sampled())
        first = Chosen(
            name="first_listed", title="first listed", formula="share of items whose first listed option is the likeliest; 1/4: no bias",
            prompts=tuple(prompts), texts=listed, combine=share_first,
        )  # fmt: skip
        return accuracy(prompts, [q.texts for q in sampled()]), first
