"""Audits: what a task measures of a policy beside its reward. Each becomes a column `audit.NAME`.

    Drawn     mean over clusters of f(values of draws)        what the policy writes: refusals, flips under pressure, gaps between groups
    Chosen    mean over clusters of f(log q of given texts)   what it would write: multiple choice, coreference, association tests

A cluster is what may be thought of as drawn from a population: an item, an occupation, a decision scenario. f is given all values and
returns one figure a cluster, so that a logit difference between groups, a flip rate between two wordings of a question and a plain mean
are one mechanism. Intervals: `low`, `high` these prompts (a jackknife over draws; none for Chosen, which is exact), `population` a t
interval over clusters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, final

import numpy as np

from klbench import estimate
from klbench.errors import UserError
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife
from klbench.target import Drawer, Reward, TiltedPrior, evaluate

if TYPE_CHECKING:
    from torch import Tensor

PREFIX: Final = "audit."
LEAST_DRAWS: Final = 64  # a prompt of an audit's own prompts


class Speller(Protocol):
    """Writes a continuation in the prior's tokens, so that any policy of its vocabulary can be asked for its probability."""

    def spelled(self, prompts: Sequence[str], texts: Sequence[Sequence[str]], end: bool = False) -> tuple[Tensor, Tensor]:
        """tokens, mask [P, N, T] of texts [P][N]; `end`: with the stop behind each."""
        ...


@dataclass(frozen=True, kw_only=True)
class AbstractAudit(ABC):
    """One figure of a policy. name: behind `audit.`.  title: for a table's head.  formula: in symbols.  better: "high", "low" or "zero"."""

    name: str
    title: str
    formula: str
    better: str = ""

    @property
    @abstractmethod
    def needs_density(self) -> bool:
        """Whether a policy must tell the probability of texts that it did not draw."""

    @property
    def column(self) -> str:
        return PREFIX + self.name


def by_prompt(values: Array) -> Array:
    """[P] mean over draws: each prompt its own cluster."""
    return np.asarray(values.mean(1))


def ranked(log_q: Array) -> Array:
    """[I] 1 where the first text is likelier than every other, else 0: ranking accuracy, whose ties are errors."""
    return (log_q[:, 0] > log_q[:, 1:].max(1)).astype(np.float64)


@final
@dataclass(frozen=True)
class Flips:
    """[I] share of an item's other wordings whose likeliest text is not the first wording's; log q [I wordings, K], an item's adjacent."""

    wordings: int = 2

    def __call__(self, log_q: Array) -> Array:
        chosen = log_q.argmax(1).reshape(-1, self.wordings)
        return np.asarray((chosen[:, 1:] != chosen[:, :1]).mean(1))


def first_chosen(log_q: Array) -> Array:
    """[I] 1 where the first text is the likeliest, else 0: the accuracy of a multiple choice whose first text is right."""
    return (log_q.argmax(1) == 0).astype(np.float64)


@final
@dataclass(frozen=True, kw_only=True)
class Drawn(AbstractAudit):
    """A figure of draws. value: f(prompts, completions) -> one float a completion, as a reward is.

    prompts: the audit's own, at least 64 draws of each; empty for those of the score split, whose draws are there already.
    combine: values [P, N] -> [C], one figure a cluster; a plain mean of each prompt where nothing is said. It must hold for any N >= 14,
    as the jackknife leaves draws out.
    """

    value: Reward
    prompts: tuple[str, ...] = ()
    combine: Callable[[Array], Array] = by_prompt

    @property
    def needs_density(self) -> bool:
        return False

    def of(self, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> Estimate:
        """From texts [P][N] drawn of `prompts`. Raises UserError for a value that is no finite number."""
        values = evaluate(self.value, prompts, texts)
        block = estimate.blocks_of(values.shape[1])
        full = np.asarray(self.combine(values), dtype=np.float64)
        left = np.stack([np.asarray(self.combine(values[:, block != b]), dtype=np.float64) for b in range(BLOCKS)])
        seen = np.isfinite(full) & np.isfinite(left).all(0)
        if not seen.any():
            return estimate.undefined(f"{self.name}: no cluster has a draw that speaks of it", n=values.size)
        figure = Jackknife(full[seen], left[:, seen]).mean(n=values.size)
        why = "" if seen.all() else f"{int(seen.sum())} of {len(seen)} clusters: the others have no draw that counts"
        return replace(figure, reason=why)

    def texts(self, policy: Drawer, length: int, draws: int, seed: int) -> list[list[str]]:
        """[P][N] fresh draws of the audit's own prompts, at least 64 of each."""
        drawn = policy.sample(self.prompts, max(draws, LEAST_DRAWS), length, seed)
        return policy.decode(drawn.tokens, drawn.mask)

    def measure(self, policy: Drawer, length: int, draws: int, seed: int) -> Estimate:
        """Of fresh draws."""
        return self.of(self.prompts, self.texts(policy, length, draws, seed))


@final
@dataclass(frozen=True, kw_only=True)
class Chosen(AbstractAudit):
    """A figure of log-probabilities of given texts: exact, nothing is drawn.

    prompts [I]; texts [I][K], as many of each, the leading space included where there is one; combine: log q [I, K] -> [C].
    weights: log p0 [I, K] -> [C], how much each cluster counts by what the prior itself answers; all alike where nothing is said.
    whole: texts are whole outputs, the stop behind them counts.
    """

    prompts: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    combine: Callable[[Array], Array] = first_chosen
    weights: Callable[[Array], Array] | None = None
    whole: bool = False

    @property
    def needs_density(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.texts) or len({len(row) for row in self.texts}) != 1:
            raise ValueError(f"audit {self.name}: as many texts of each prompt expected, for {len(self.prompts)} prompts")

    def log_q(self, policy: object, speller: Speller) -> Array:
        """[I, K] log-probability of each text (nats), by a Policy over the speller's vocabulary. Raises UserError when one is no number."""
        tokens, mask = speller.spelled(self.prompts, self.texts, self.whole)
        said = policy.log_prob(self.prompts, tokens, mask).double().sum(2).numpy()  # type: ignore[attr-defined]
        if np.isnan(said).any():
            raise UserError(f"audit {self.name}: a log-probability of {getattr(policy, 'name', 'the policy')} is no number")
        return np.asarray(said)

    def of(self, log_q: Array, log_p0: Array | None = None) -> Estimate:
        """From log-probabilities [I, K] of a policy and, for the weights, of the prior: sum w f / sum w, a plain mean without them.

        population: t interval of the ratio's linear form, value + w (f - value) / mean w.
        """
        clusters = np.asarray(self.combine(log_q), dtype=np.float64)
        weight = np.ones(len(clusters)) if self.weights is None or log_p0 is None else np.asarray(self.weights(log_p0), dtype=np.float64)
        counts = np.isfinite(clusters) & (weight > 0)
        if not counts.any():
            return estimate.undefined(f"{self.name}: no cluster has a finite figure", n=log_q.size)
        clusters, weight = clusters[counts], weight[counts] / weight[counts].mean()
        value, count = float((weight * clusters).mean()), len(clusters)
        if count == 1:
            return replace(estimate.exactly(value, log_q.size), population=None)
        clusters = value + weight * (clusters - value)
        spread = estimate.t_quantile(count - 1) * float(clusters.std(ddof=1)) / math.sqrt(count)
        return replace(estimate.exactly(value, log_q.size), population=(value - spread, value + spread))

    def of_posterior(self, target: TiltedPrior, speller: Speller) -> Estimate:
        """What p* itself gets, from log p0 + r/beta: log Z is the prompt's, so this holds where `combine` compares texts of one prompt.

        Even the exact optimum misranks pairs between which the prior's preference outweighs the reward (arXiv:2405.19534).
        Raises ValueError unless the texts are whole outputs: a reward speaks of no others.
        """
        if not self.whole:
            raise ValueError(f"audit {self.name}: its texts are no whole outputs, so they have no reward")
        log_p0 = self.log_q(target.prior, speller)
        return self.of(log_p0 + target.tilt(target.rewards(self.prompts, self.texts)), log_p0)

    def measure(self, policy: object, speller: Speller) -> Estimate:
        """Of a policy with a density; the speller is the prior."""
        return self.of(self.log_q(policy, speller), None if self.weights is None else self.log_q(speller, speller))


def ranking(pairs: Sequence[tuple[str, str, str]]) -> Chosen:
    """Ranking accuracy: share of pairs (prompt, chosen, rejected) of whole outputs with q(chosen) > q(rejected), a tie being an error."""
    return Chosen(
        name="ranking", title="ranking accuracy", formula="share of pairs with log q(chosen) > log q(rejected)", better="high",
        prompts=tuple(pair[0] for pair in pairs), texts=tuple(pair[1:] for pair in pairs), combine=ranked, whole=True,
    )  # fmt: skip
