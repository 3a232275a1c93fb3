"""exact: rewards over the eight words of the `tiny` prior, whose every output can be listed, so that every figure has a known truth.

    w(x) = sum of the words' warmth      sun, warm +2 · calm +1 · fog 0 · rain, wind -1 · snow, cold -2
    dense    r = clip((3 + w)/8, 0, 1)                          graded, beta .3: rejection accepts about one prior draw in four
    scarce   r = clip(w/8, 0, 1)^2                              the same wish, beta .12: one in a hundred
    rare     r = 1 if x says "snow wind fog", else 0            prior mass about 1e-3, beta .15
    hidden   r = 1 if x says "wind snow calm", else dense/2     a mode of prior mass about 4e-4 above an ordinary reward, beta .11
    design   r = feasible(x) prod of motif shares               two motifs, neighbours that may not meet (`design.py`), beta .15
    moment   r = lambda_c phi, E_p*[phi | c] = 1/2              phi = +1 sun without rain, -1 rain without sun, else 0; beta 1

All rewards are whole multiples of 1/64 but for moment's, whose lambda_c solves the constraint by a sum over every output (`extract.py`).
"""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar, Final, final

from klbench.errors import UserError
from klbench.target import Policy, Reward, TiltedPrior
from klbench.task import AbstractTask
from klbench_tasks.exact.design import design, feasible

WARMTH: Final = {"sun": 2, "warm": 2, "calm": 1, "fog": 0, "rain": -1, "wind": -1, "snow": -2, "cold": -2}
RARE: Final = ("snow", "wind", "fog")
HIDDEN: Final = ("wind", "snow", "calm")
WANTED: Final = 0.5


def warmth(completion: str) -> int:
    """Sum over its words."""
    return sum(WARMTH.get(word, 0) for word in completion.split())


def says(completion: str, words: tuple[str, ...]) -> bool:
    """Whether the words come one after the other."""
    found = completion.split()
    return any(tuple(found[i : i + len(words)]) == words for i in range(len(found) - len(words) + 1))


def graded(completion: str) -> float:
    return min(max((3 + warmth(completion)) / 8, 0.0), 1.0)


def dense(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """How warm, in eighths."""
    return [graded(c) for c in completions]


def scarce(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """The square of a warmth that few outputs have, in 64ths."""
    return [min(max(warmth(c) / 8, 0.0), 1.0) ** 2 for c in completions]


def rare(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """1 for the rare phrase."""
    return [float(says(c, RARE)) for c in completions]


def hidden(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """1 for the hidden phrase, half of dense elsewhere."""
    return [1.0 if says(c, HIDDEN) else graded(c) / 2 for c in completions]


def variety(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """Different words, in quarters: the held-out reward of dense."""
    return [len(set(c.split())) / 4 for c in completions]


def sunny(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """phi: +1 sun without rain, -1 rain without sun, else 0."""
    words = [c.split() for c in completions]
    return [float(("sun" in w) - ("rain" in w)) for w in words]


@dataclass(frozen=True)
class Sunnier:
    """The reward lambda_c phi(x)."""

    lambdas: dict[str, float]

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        return [self.lambdas[p] * phi for p, phi in zip(prompts, sunny(prompts, completions), strict=True)]


@functools.cache
def _lambdas() -> dict[str, dict[str, float]]:
    """By weights of the prior, then by prompt."""
    data: dict[str, dict[str, float]] = json.loads(files(__package__).joinpath("lambda.json").read_text(encoding="utf-8"))
    return data


@dataclass(frozen=True)
class AbstractExact(AbstractTask):
    """What the variants share: prompts, four words an output, the prior they are made for."""

    version: ClassVar[int] = 1
    prior: ClassVar[str] = "tiny"
    max_new_tokens: ClassVar[int] = 4

    @abstractmethod
    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        """p0 exp(r / beta) / Z with the variant's reward and its ceiling."""

    def prompts(self, split: str) -> list[str]:
        rows = files(__package__).joinpath(f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["prompt"] for row in rows]

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return None


@final
@dataclass(frozen=True)
class Dense(AbstractExact):
    """The family's default; its gold reward is the variety that warmth costs."""

    name: ClassVar[str] = "exact/dense"
    summary: ClassVar[str] = "eight words, every figure also summed exactly: a graded reward"
    beta: ClassVar[float] = 0.3

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, dense, beta, 1.0)

    def gold(self) -> Reward | None:
        return variety


@final
@dataclass(frozen=True)
class Scarce(AbstractExact):
    """Most of the reward on few outputs."""

    name: ClassVar[str] = "exact/scarce"
    summary: ClassVar[str] = "eight words, every figure also summed exactly: a reward that few outputs have"
    beta: ClassVar[float] = 0.12

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, scarce, beta, 1.0)


@final
@dataclass(frozen=True)
class Rare(AbstractExact):
    """One phrase and nothing else."""

    name: ClassVar[str] = "exact/rare"
    summary: ClassVar[str] = "eight words, every figure also summed exactly: one output in a thousand is right"
    beta: ClassVar[float] = 0.15

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, rare, beta, 1.0)


@final
@dataclass(frozen=True)
class Hidden(AbstractExact):
    """What most draws never see is worth twice what they do."""

    name: ClassVar[str] = "exact/hidden"
    summary: ClassVar[str] = "eight words, every figure also summed exactly: a mode that draws miss, above an ordinary reward"
    beta: ClassVar[float] = 0.11

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, hidden, beta, 1.0)


@final
@dataclass(frozen=True)
class Design(AbstractExact):
    """Sequence design under a constraint; its gold reward is the constraint alone, so that the two are seen apart."""

    name: ClassVar[str] = "exact/design"
    summary: ClassVar[str] = "eight words, every figure also summed exactly: sequence design, a score and words that may not meet"
    beta: ClassVar[float] = 0.15

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, design, beta, 1.0)

    def gold(self) -> Reward | None:
        return feasible


@final
@dataclass(frozen=True)
class Moment(AbstractExact):
    """Sun a little more often than rain, after every prompt."""

    name: ClassVar[str] = "exact/moment"
    summary: ClassVar[str] = "eight words, every figure also summed exactly: a moment target, sun more often than rain"
    beta: ClassVar[float] = 1.0

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        """The moment target at beta = 1. Raises UserError for a prior that lambda.json does not know."""
        version = str(getattr(prior, "weights_hash", lambda: prior.name)())
        if version not in _lambdas():
            raise UserError(f"{self.name}: its lambdas solve the constraint for the prior {self.prior!r}, not for {prior.name!r}")
        lambdas = _lambdas()[version]
        return TiltedPrior(prior, Sunnier(lambdas), beta, ceilings={prompt: abs(lam) for prompt, lam in lambdas.items()})

    def features(self) -> tuple[Reward, float] | None:
        return sunny, WANTED
