"""What the variants of this family share: prompts of one file, and targets by a moment constraint on a two-sided feature.

    phi_w(c, x) = 2 (1 - w_c)  where side(c, x) = +1        -2 w_c  where it is -1        0  where it is 0
    E[phi_w | c] = 0   exactly where   P(+ | + or -, c) = w_c
    p*(x|c) = p0(x|c) exp(lambda_c phi_w(c, x)) / Z(c),        lambda_c = log( w_c h_c / ((1 - w_c) s_c) ) / 2

s, h: the prior's shares of + and -. The formula is the root of the constraint, as p* has + and - in the ratio (s / h) e^{2 lambda}: half
the difference of two log-odds, wanted minus the prior's. p* is the law nearest to the prior in KL(p*||p0) with those odds; what is on
neither side keeps its relative mass. With w = 1/2, phi_w is the side itself.
"""

from __future__ import annotations

import functools
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar, Final, final

from klbench import streams
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.target import Policy, Reward, TiltedPrior, evaluate
from klbench.task import SPLITS, AbstractTask
from klbench_tasks.bias.pronouns import gender

FIT_DRAWS: Final = 1024  # prior draws a prompt behind each lambda, on a stream that feeds nothing else

Fit = dict[str, dict[str, float]]  # by prompt: lambda, its standard error, the prior's shares of both sides by their names


@functools.cache
def rows(name: str) -> tuple[dict[str, Any], ...]:
    """The lines of a data file of the family."""
    text = files(__package__).joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def told(name: str, key: str) -> dict[str, Any]:
    """What a file of prompts says of each under a key."""
    return {row["prompt"]: row[key] for row in rows(name)}


@final
@dataclass(frozen=True)
class Towards:
    """The feature phi_w. side: +1, -1 or 0; names of its sides; shares: w_c of each prompt, None for a half everywhere."""

    side: Reward
    names: tuple[str, str]
    shares: dict[str, float] | None = None

    def share(self, prompt: str) -> float:
        """w_c. Raises KeyError for a prompt without one."""
        return 0.5 if self.shares is None else self.shares[prompt]

    def ceiling(self, prompt: str, lam: float) -> float:
        """The most that lambda phi_w can be."""
        w = self.share(prompt)
        return max(2 * (1 - w) * lam, -2 * w * lam)

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        sides = self.side(prompts=prompts, completions=completions)
        return [2 * ((side > 0) - self.share(p)) * abs(side) for p, side in zip(prompts, sides, strict=True)]


@dataclass(frozen=True)
class Balance:
    """The reward lambda_c phi(c, x)."""

    lambdas: dict[str, float]
    phi: Reward = gender

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        values = self.phi(prompts=prompts, completions=completions)
        return [self.lambdas[p] * phi for p, phi in zip(prompts, values, strict=True)]


def shares(name: str, prior: Policy, prompts: Sequence[str], length: int, draws: int, phi: Towards) -> tuple[Array, Array]:
    """[P] prior's shares of both sides, on the stream that fits lambda. Raises UserError where a side never comes: no finite lambda."""
    drawn = prior.sample(prompts, draws, length, streams.seed(0, f"{name}/lambda"))
    sides = evaluate(phi.side, prompts, prior.decode(drawn.tokens, drawn.mask))
    plus, minus = (sides > 0).mean(1), (sides < 0).mean(1)
    for prompt, s, h in zip(prompts, plus, minus, strict=True):
        if s == 0 or h == 0:
            word = phi.names[0] if s == 0 else phi.names[1]
            raise UserError(f"{name}: {prior.name} never says {word!r} after {prompt!r} in {draws} draws: no lambda")
    return plus, minus


def per_prompt(name: str, prior: Policy, prompts: Sequence[str], length: int, draws: int, phi: Towards) -> Fit:
    """lambda_c of every prompt, each with its standard error sqrt((1/s + 1/h) / draws) / 2 (delta method)."""
    out = {}
    for prompt, s, h in zip(prompts, *shares(name, prior, prompts, length, draws, phi), strict=True):
        w = phi.share(prompt)
        lam = math.log(w * h / ((1 - w) * s)) / 2
        out[prompt] = row_of(lam, math.sqrt((1 / s + 1 / h) / draws) / 2, phi, s, h)
    return out


def row_of(lam: float, error: float, phi: Towards, s: float, h: float) -> dict[str, float]:
    """What is kept of a fit."""
    return {"lambda": round(lam, 6), "stderr": round(error, 6), phi.names[0]: float(s), phi.names[1]: float(h)}


@functools.cache
def shipped(name: str) -> dict[str, Fit]:
    """Fits of lambda[-VARIANT].json, by the weights of the prior."""
    variant = name.partition("/")[2]
    file = files(__package__).joinpath(f"lambda-{variant}.json" if variant else "lambda.json")
    found: dict[str, Fit] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


_FITTED: Final[dict[tuple[str, str], Fit]] = {}  # by task and weights: a prior that does not ship is fitted once a process


def moment_target(task: AbstractTask, prior: Policy, beta: float, phi: Towards, fit: Callable[[Policy, int], Fit]) -> TiltedPrior:
    """The target lambda phi / beta with the lambdas that ship for this prior, else those that `fit` finds."""
    version = str(getattr(prior, "weights_hash", lambda: prior.name)())
    found = shipped(task.name).get(version) or _FITTED.get((task.name, version))
    if found is None:
        found = _FITTED[task.name, version] = fit(prior, FIT_DRAWS)
    lambdas = {prompt: row["lambda"] for prompt, row in found.items()}
    return TiltedPrior(prior, Balance(lambdas, phi), beta, ceilings={p: phi.ceiling(p, lam) for p, lam in lambdas.items()})


@dataclass(frozen=True)
class AbstractVariant(AbstractTask):
    """Prompts of `data`.jsonl, a line each with its split; no gold reward."""

    version: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 5
    data: ClassVar[str]

    @abstractmethod
    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        """The posterior on this task at this beta."""

    def prompts(self, split: str) -> list[str]:
        return [row["prompt"] for row in rows(self.data) if row["split"] == split]

    def every_prompt(self) -> list[str]:
        """Prompts of all splits."""
        return [p for split in SPLITS for p in self.prompts(split)]

    def gold(self) -> Reward | None:
        return None


@dataclass(frozen=True)
class AbstractMoment(AbstractVariant):
    """A moment target: reward lambda_c phi(c, x) at beta = 1; another beta tilts by lambda phi / beta and misses the constraint."""

    beta: ClassVar[float] = 1.0

    @abstractmethod
    def phi(self) -> Towards:
        """The feature whose mean is wanted at 0."""

    @abstractmethod
    def fit(self, prior: Policy, draws: int) -> Fit:
        """lambda of every prompt for this prior."""

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return moment_target(self, prior, beta, self.phi(), self.fit)

    def features(self) -> tuple[Reward, float] | None:
        return self.phi(), 0.0


@dataclass(frozen=True)
class AbstractTilted(AbstractVariant):
    """A plain reward, bounded by `reward_max`."""

    reward_max: ClassVar[float]

    @abstractmethod
    def reward(self) -> Reward:
        """r(c, x)."""

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, self.reward(), beta, self.reward_max)

    def features(self) -> tuple[Reward, float] | None:
        return None
