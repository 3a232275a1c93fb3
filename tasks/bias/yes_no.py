"""bias/yes_no: how readily a model says no.

The audits ask questions in twins, one whose answer is yes and one whose answer is no, so that the gold answers are balanced. With
n(c) = q(no) / (q(yes) + q(no)) after question c, spellings summed,

    negative bias = P(no | gold yes) - P(yes | gold no) = n(c_yes) + n(c_no) - 1        in [-1, 1], 0 without bias; our definition
    log-odds form = mean logit n - logit of the share of gold no (0 here)
    options       = the same with the answers as two options, A and B, the letters read; both orders averaged
    format        = negative bias - options: what the words yes and no add to the choice itself
    known, wrong, unknown    the negative bias of twins weighed by the probability that the prior, asked both, is right on both, wrong on
                             both, or gives them one answer: (1 - n(c_yes)) n(c_no), n(c_yes) (1 - n(c_no)) and the rest, exact

A prior's likeliest answers would split the twins harder, and leave nothing in two of the parts for a prior that says no to everything.

The posterior balances something that the `mini` prior can say: a continuation has a negation as often as not.

    phi(x) = +1 with a negation (not, n't, no, never, ...), -1 without        E_p*[phi | c] = 0
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np

from klbench.audit import AbstractAudit, Chosen, Drawn
from klbench.estimate import Array
from klbench.target import Policy
from klbench_tasks.bias.answers import logit, share
from klbench_tasks.bias.variant import AbstractMoment, Fit, Towards, per_prompt

NEGATION: Final = re.compile(r"\b(?:not|no|never|nothing|nobody|none|neither|nor|cannot|without)\b|n['’]t\b", re.IGNORECASE)
NUMBERS: Final = ((7, 3), (12, 5), (40, 14), (9, 8), (100, 20), (61, 16))
DUTIES: Final = (
    ("baker", "bake bread", "repair teeth"),
    ("plumber", "mend pipes", "teach children"),
    ("surgeon", "operate on patients", "cut the grass"),
    ("teacher", "teach children", "drive a train"),
    ("pilot", "fly planes", "bake bread"),
    ("librarian", "lend books", "put out fires"),
    ("firefighter", "put out fires", "lend books"),
    ("dentist", "repair teeth", "sell flowers"),
    ("farmer", "grow wheat", "fly planes"),
    ("hairdresser", "cut hair", "mend pipes"),
)
# (gold yes, gold no)
QUESTIONS: Final = (
    *((f"Is {a} greater than {b}?", f"Is {b} greater than {a}?") for a, b in NUMBERS),
    *((f"Does a {who} {does}?", f"Does a {who} {other}?") for who, does, other in DUTIES),
)
WORDS: Final = (" no", " No", " yes", " Yes")  # "no" first: the probability of the first answer is n(c)
LETTERS: Final = {"A": (" A", " (A"), "B": (" B", " (B")}


def negated(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """phi: +1 with a negation, -1 without."""
    return [1.0 if NEGATION.search(c) else -1.0 for c in completions]


def has_negation(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """1 with a negation, else 0."""
    return [float(value > 0) for value in negated(prompts, completions)]


def negative_bias(n: Array) -> Array:
    """[Q] n(c_yes) + n(c_no) - 1 from [Q, 2]."""
    return np.asarray(n[:, 0] + n[:, 1] - 1)


def in_words(log_q: Array) -> Array:
    """[Q] negative bias of the words yes and no; rows (gold yes, gold no) x (words, no = A, no = B)."""
    return negative_bias(share(log_q).reshape(-1, 2, 3)[:, :, 0])


def known(log_p0: Array) -> Array:
    """[Q] P(right on both twins); the same rows."""
    n = share(log_p0).reshape(-1, 2, 3)[:, :, 0]
    return np.asarray((1 - n[:, 0]) * n[:, 1])


def wrong(log_p0: Array) -> Array:
    """[Q] P(wrong on both twins); the same rows."""
    n = share(log_p0).reshape(-1, 2, 3)[:, :, 0]
    return np.asarray(n[:, 0] * (1 - n[:, 1]))


def unknown(log_p0: Array) -> Array:
    """[Q] P(one answer to both twins); the same rows."""
    return 1 - known(log_p0) - wrong(log_p0)


def in_options(log_q: Array) -> Array:
    """[Q] negative bias of the letters, both orders averaged; the same rows."""
    return negative_bias(share(log_q).reshape(-1, 2, 3)[:, :, 1:].mean(2))


def of_format(log_q: Array) -> Array:
    """[Q] words minus letters; the same rows."""
    return in_words(log_q) - in_options(log_q)


def in_log_odds(log_q: Array) -> Array:
    """[Q] mean logit n of the words; the same rows."""
    return np.asarray(logit(log_q).reshape(-1, 2, 3)[:, :, 0].mean(1))


def accuracy(log_q: Array) -> Array:
    """[Q] probability of the right word, mean of both questions; the same rows."""
    n = share(log_q).reshape(-1, 2, 3)[:, :, 0]
    return np.asarray((1 - n[:, 0] + n[:, 1]) / 2)


def questions() -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Prompts and texts of the rows that the audits read."""
    prompts: list[str] = []
    texts: list[tuple[str, ...]] = []
    for twin in QUESTIONS:
        for question in twin:
            prompts += [
                f"{question} Answer yes or no.\nAnswer:",
                f"{question}\nA: no\nB: yes\nAnswer:",
                f"{question}\nA: yes\nB: no\nAnswer:",
            ]
            texts += [WORDS, (*LETTERS["A"], *LETTERS["B"]), (*LETTERS["B"], *LETTERS["A"])]
    return tuple(prompts), tuple(texts)


def answers() -> tuple[AbstractAudit, ...]:
    """Negative bias in words, as options, their difference, in log-odds, and by what the prior knows; the probability of the right word."""
    prompts, texts = questions()

    def audit(
        name: str, title: str, formula: str, better: str, combine: Callable[[Array], Array],
        weights: Callable[[Array], Array] | None = None,
    ) -> AbstractAudit:  # fmt: skip
        return Chosen(
            name=name, title=title, formula=formula, better=better, prompts=prompts, texts=texts, combine=combine, weights=weights
        )

    parts = (("known", known), ("wrong", wrong), ("unknown", unknown))
    return (
        audit("negative_bias", "negative bias", "n(gold yes) + n(gold no) − 1", "zero", in_words),
        audit("negative_bias_options", "negative bias, options", "n(gold yes) + n(gold no) − 1 of letters", "zero", in_options),
        audit("negative_bias_format", "negative bias, format", "words − options", "zero", of_format),
        audit("negative_bias_logit", "negative bias, log-odds", "mean logit n", "zero", in_log_odds),
        *(
            audit(f"negative_bias_{part}", f"negative bias, {part}", f"the same, twins weighed by P0({part})", "zero", in_words, weights)
            for part, weights in parts
        ),
        audit("yes_no_accuracy", "P(right), yes/no", "mean P(gold)", "high", accuracy),
    )


@final
@dataclass(frozen=True)
class YesNo(AbstractMoment):
    """Occupations in plain sentences, negated as often as not; negative bias on questions with balanced answers."""

    name: ClassVar[str] = "bias/yes_no"
    summary: ClassVar[str] = "sentences about occupations, moment target: negated as often as not; negative bias in yes/no answers"
    data: ClassVar[str] = "yes_no"

    def phi(self) -> Towards:
        return Towards(negated, ("negated", "plain"))

    def fit(self, prior: Policy, draws: int) -> Fit:
        return per_prompt(self.name, prior, self.every_prompt(), self.max_new_tokens, draws, self.phi())

    def audits(self) -> tuple[AbstractAudit, ...]:
        return Drawn(name="negation", title="P(negation)", formula="P_q(not, n't, no, ...)", value=has_negation), *answers()
