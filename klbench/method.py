"""The contracts of the ways to a posterior: objectives that train a policy, samplers that draw from one.

One paper, one file: the module `klbench/objectives/<name>.py` holds one class whose docstring gives formula, gradient, optimum and
source. `objective(name)` and `sampler(spec)` load by name; a third party's come from entry points `klbench.objectives` and
`klbench.samplers`, or from a file named with `--include`. A sampler is of one of four kinds: it picks among whole outputs of the prior;
or, a decoding, it changes each next-token law; or, a blend, it mixes those of two models; or it steers the prior token by token.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol, TypeVar, final, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from klbench import included
from klbench.batch import Batch
from klbench.errors import UserError, unknown
from klbench.estimate import Array
from klbench.target import Draws, Steerable, TiltedPrior

State = dict[str, Tensor]


@dataclass(frozen=True)
class AbstractObjective(ABC):
    """A loss whose minimum over policies is declared: `optimum` is "target" (p*), "own" (another closed form) or "none" (none known)."""

    optimum: ClassVar[str]
    source: ClassVar[str]
    draws: ClassVar[str] = "policy"  # whose it trains on: "policy" (fresh each step), "prior", or "both" (first half the prior's)
    feedback: ClassVar[str] = (
        "reward"  # what it is told of a draw: "reward", "pairs" (which of two is better) or "success" (right or wrong)
    )
    needs_prior: ClassVar[bool] = True  # False spares the prior's pass
    needs_kl: ClassVar[bool] = False  # True: `batch.kl_token`
    needs_features: ClassVar[bool] = False  # True: `batch.features`
    needs_prompt: ClassVar[bool] = False  # True: `batch.prompt_log_q`
    controls: ClassVar[tuple[str, str] | None] = None  # two texts before the prompt: `log_q` is under the first, `other_log_q` the second
    epochs: ClassVar[int] = 1  # optimiser steps on one batch of draws

    @abstractmethod
    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar to minimise; the trainer differentiates it through `batch.log_q`, `batch.kl_token` and `batch.other_log_q`."""


@dataclass(frozen=True)
class AbstractStatefulObjective(ABC):
    """An objective with memory: tensors that are saved with the checkpoint. Those that require a gradient are trained beside the policy."""

    optimum: ClassVar[str]
    source: ClassVar[str]
    draws: ClassVar[str] = "policy"
    feedback: ClassVar[str] = "reward"
    needs_prior: ClassVar[bool] = True
    needs_kl: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False
    controls: ClassVar[tuple[str, str] | None] = None
    epochs: ClassVar[int] = 1
    state_lr: ClassVar[float] = 0.1  # learning rate of the trained part of the state

    @abstractmethod
    def init(self, prompts: int, width: int) -> State:
        """The state before the first step, for a train split of so many prompts and features of that width (0: none asked for)."""

    @abstractmethod
    def loss(self, batch: Batch, beta: float, state: State) -> tuple[Tensor, State]:
        """Scalar to minimise and the state after this batch."""


Objective = AbstractObjective | AbstractStatefulObjective


@final
@dataclass(frozen=True, eq=False)
class RewardLaw:
    """The law of the reward under the prior at one prompt, all that a function of the reward needs to become a density.

    levels [S]: distinct rewards, ascending.  mass [S]: theirs, sum 1.  draws: prior draws behind it, infinite for a sum over every outcome.
    """

    levels: Array
    mass: Array
    draws: float = math.inf

    @classmethod
    def of(cls, reward: Array, mass: Array | None = None) -> RewardLaw:
        """Of rewards [N]: prior draws with equal weights, or every outcome with its `mass` (of any sum above 0)."""
        levels, at, times = np.unique(reward, return_inverse=True, return_counts=True)
        weight = times.astype(np.float64) if mass is None else np.bincount(at, weights=mass, minlength=len(levels))
        there = weight > 0
        return cls(levels[there], weight[there] / weight.sum(), math.inf if mass is not None else float(len(reward)))

    def merged(self, most: int) -> RewardLaw:
        """The same law on at most `most` levels: neighbours in equal parts of the range become their mean."""
        if len(self.levels) <= most:
            return self
        bins = np.digitize(self.levels, np.linspace(self.levels[0], self.levels[-1], most + 1)[1:-1])
        mass, first = np.bincount(bins, self.mass).astype(np.float64), np.bincount(bins, self.mass * self.levels)
        return RewardLaw(np.asarray(first[mass > 0] / mass[mass > 0]), mass[mass > 0], self.draws)

    def log_success(self, reward: Array) -> Array:
        """[N] log p0(.|right)/p0, right being the highest reward there is: -log of its share, -inf below it."""
        return np.where(np.asarray(reward) >= self.levels[-1], -math.log(self.mass[-1]), -math.inf)

    def log_mean_exp(self, tilt: Array) -> float:
        """log E_p0[exp(tilt)], tilt [S] a level."""
        top = float(np.max(tilt))
        return top + math.log(float(self.mass @ np.exp(tilt - top)))

    def log_best_of(self, reward: Array, n: int) -> Array:
        """[N] log of best-of-n's density over the prior's, [F(r)^n - F(r-)^n] / P0(r) = a^(n-1) (1 + c + ... + c^(n-1)).

        a = F(r), c = F(r-)/F(r): no division by P0(r), so a reward between two levels takes F of the nearest below it, c = 1, and the
        continuous limit n F^(n-1); one below every level takes the lowest one's.
        """
        cumulative = np.concatenate([[0.0], np.cumsum(self.mass)[:-1], [1.0]])
        at = np.maximum(np.asarray(reward, dtype=np.float64), self.levels[0])
        upto = cumulative[np.searchsorted(self.levels, at, side="right")]
        below = cumulative[np.searchsorted(self.levels, at, side="left")]
        return np.asarray((n - 1) * np.log(upto) + np.log(((below / upto)[:, None] ** np.arange(n)).sum(1)))


@runtime_checkable
class ClosedForm(Protocol):
    """An objective with an optimum of its own, p0 times a function of the reward."""

    def own(self, reward: Array, law: RewardLaw, beta: float, draws: int) -> Array:
        """[N] log of the optimum over p0 at `reward`, `law` that of the reward under the prior at this prompt; draws: K of a group."""
        ...


@runtime_checkable
class TiltedForm(Protocol):
    """An objective with an optimum of its own that reads more of an answer than its reward."""

    def own_tilt(self, log_p0: Array, reward: Array, beta: float, draws: int) -> Array:
        """[N] log of the optimum over p0, up to a constant a prompt."""
        ...


@runtime_checkable
class Watched(Protocol):
    """An objective with figures of its own for the training curve."""

    def watched(self, batch: Batch) -> dict[str, float]:
        """By name, of a step's last batch."""
        ...


def needed(objective: Objective) -> str:
    """The data that an objective is trained on, in words."""
    told = {"reward": "their rewards", "pairs": "which of two is better", "success": "which are right"}[objective.feedback]
    drawn = {"policy": "its own draws", "prior": "prior draws", "both": "prior and own draws"}[objective.draws]
    return f"{drawn}, {told}"


def described(sampler: Sampler) -> tuple[str, str]:
    """What is known of a sampler's law, and what it works on, in words."""
    if isinstance(sampler, AbstractSampler):
        return ("the posterior" if sampler.draws_target else "prior x function of the reward", "prior draws and their rewards")
    if isinstance(sampler, AbstractSteering):
        return ("no density", "the prior, token by token, and the reward")
    return ("next-token laws", "the policy's and the prior's" if isinstance(sampler, AbstractBlend) else "a policy's")


@dataclass(frozen=True)
class AbstractSampler(ABC):
    """A decoding-time policy q(x) = p0(x) g(r(x)): it changes the prior by a function of the reward alone.

    Its log-density ratio needs no model, only the law of the reward under the prior: the bank's, or the exact one. draws_target: what it
    returns follows p* exactly.
    """

    source: ClassVar[str]
    draws_target: ClassVar[bool] = False

    @abstractmethod
    def log_ratio(self, reward: Array, law: RewardLaw, beta: float, reward_max: float) -> Array:
        """log q(x)/p0(x) of draws with `reward` [N], `law` that of the reward under the prior at the same prompt."""

    @abstractmethod
    def pick(self, reward: Array, beta: float, reward_max: float, draws: int, seed: int) -> tuple[NDArray[np.int64], int]:
        """Indices [draws] of the prior draws (in order, rewards [M] given) that the sampler returns, and how many it used.

        Raises UserError when M prior draws are not enough.
        """

    @abstractmethod
    def cost(self, law: RewardLaw, beta: float, reward_max: float) -> float:
        """Expected prior draws that one draw costs."""


@dataclass(frozen=True)
class AbstractDecoding(ABC):
    """A decoding-time policy that changes each next-token law by itself: q(.|prefix) is a function of p(.|prefix) alone.

    It has a density wherever the model under it has one.
    """

    source: ClassVar[str]

    @abstractmethod
    def law(self, log_probs: Tensor) -> Tensor:
        """[..., V] log-probabilities of the next token to those of the decoded law: normalised, -inf where truncated, dtype kept."""


@dataclass(frozen=True)
class AbstractBlend(ABC):
    """A decoding-time mixture of two models: each next-token law is a function of the policy's and of the prior's. It has a density."""

    source: ClassVar[str]

    @abstractmethod
    def law(self, log_q: Tensor, log_p0: Tensor) -> Tensor:
        """[..., V] log-probabilities of the next token under both to those of the mixture: normalised, dtype kept."""


@dataclass(frozen=True)
class Steered:
    """What a steering gives. draws: their log_q is the prior's.

    log_z [P, N]: of each draw x by itself, with E[exp(log_z)] = Z and E[exp(log_z) f(x)] = Z E_p*[f] for every f; None where it has none.
    prior_tokens: tokens that the prior wrote in all.  reward_calls: texts that the reward was asked for.
    """

    draws: Draws
    log_z: Array | None
    prior_tokens: int
    reward_calls: int


@dataclass(frozen=True)
class AbstractSteering(ABC):
    """A decoding-time policy that runs the prior step by step and looks at the reward or a value on the way: nobody knows its density."""

    source: ClassVar[str]
    why: ClassVar[str]  # why its density is not known, for people

    @abstractmethod
    def steer(self, prior: Steerable, target: TiltedPrior, prompts: Sequence[str], draws: int, length: int, seed: int) -> Steered:
        """`draws` draws of each prompt, independent of each other; the same seed gives the same."""


Found = TypeVar("Found", bound=type)


def _builtin(package: str) -> list[str]:
    spec = importlib.util.find_spec(f"klbench.{package}")
    assert spec is not None and spec.submodule_search_locations is not None
    return sorted(m.name for m in pkgutil.iter_modules(spec.submodule_search_locations))


def _class_in(module: Any, base: tuple[type, ...]) -> type:
    found = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, base) and c.__module__ == module.__name__]
    if len(found) != 1:
        raise UserError(f"{module.__name__}: one class of {' or '.join(b.__name__ for b in base)} expected, found {len(found)}")
    return found[0]


def _load(package: str, kind: str, name: str, base: tuple[type, ...], include: tuple[Path, ...]) -> type:
    name = name.replace("-", "_")
    for folder in include:
        path = folder / f"{name}.py"
        if path.is_file():
            return _class_in(included.module(path), base)
    if name in _builtin(package):
        return _class_in(importlib.import_module(f"klbench.{package}.{name}"), base)
    plugins = {e.name: e for e in entry_points(group=f"klbench.{package}")}
    if name in plugins:
        loaded = plugins[name].load()
        if not (inspect.isclass(loaded) and issubclass(loaded, base)):
            raise UserError(f"entry point {name} of klbench.{package} is no {kind} class")
        return loaded
    here = [p.stem for folder in include for p in folder.glob("*.py")]
    raise unknown(kind, name, [*_builtin(package), *plugins, *here])


def names(package: str, include: tuple[Path, ...] = ()) -> list[str]:
    """Names of all "objectives" or "samplers" that can be loaded, built in, installed and included.

    A file in an included folder that holds none, or that cannot be imported, is passed over.
    """
    load: Callable[[str, tuple[Path, ...]], object] = {"objectives": objective, "samplers": sampler}[package]
    found = {*_builtin(package), *(e.name for e in entry_points(group=f"klbench.{package}"))}
    for path in (path for folder in include for path in folder.glob("*.py")):
        with suppress(Exception):
            load(path.stem, include)
            found.add(path.stem)
    return sorted(found)


def base(spec: str) -> str:
    """The name alone of `rebel:huber=0.7` or `best_of_n:16`, hyphens as underscores."""
    return spec.partition(":")[0].replace("-", "_")


def objective(spec: str, include: tuple[Path, ...] = ()) -> Objective:
    """`rebel` has its paper's defaults, `rebel:huber=0.7,...` other values of its fields. Raises UserError with the nearest name."""
    made = _load("objectives", "objective", base(spec), (AbstractObjective, AbstractStatefulObjective), include)
    loaded: Objective = made(**_settings(spec, made))
    return loaded


def _settings(spec: str, made: type) -> dict[str, int | float | bool | str]:
    """Fields of an objective as they stand behind its name. Raises UserError for an unknown one, with the nearest, and for a bad value."""
    name, colon, text = spec.partition(":")
    known = {f.name: f for f in fields(made)}
    found: dict[str, int | float | bool | str] = {}
    for part in text.split(",") if colon else ():
        key, equals, value = part.partition("=")
        key = key.replace("-", "_")
        if not equals:
            raise UserError(f"objective {spec!r}: NAME:setting=value,... expected")
        if key not in known:
            raise unknown(f"setting of {name}", key, known) if known else UserError(f"objective {spec!r}: {name} has no settings")
        if known[key].type in ("bool", bool):
            if value not in ("true", "false"):
                raise UserError(f"objective {spec!r}: {key} is true or false")
            found[key] = value == "true"
        elif known[key].type in ("str", str):
            found[key] = value  # the class knows which words it takes
        else:
            found[key] = _number(f"objective {spec!r}: {key}:", known[key].type, value)
    return found


Sampler = AbstractSampler | AbstractDecoding | AbstractBlend | AbstractSteering
SAMPLERS: Final = (AbstractSampler, AbstractDecoding, AbstractBlend, AbstractSteering)


def sampler(spec: str, include: tuple[Path, ...] = ()) -> Sampler:
    """`best_of_n:16` is the class of `best_of_n` with its first field 16, `temperature:0.7` a decoding with its first field 0.7.

    What may stand after the colon is the type of that field: int a whole number, float any. Raises UserError with the nearest name.
    """
    name, _, argument = spec.partition(":")
    made = _load("samplers", "sampler", name, SAMPLERS, include)
    loaded: Sampler = made(_argument(spec, made, argument)) if argument else made()
    return loaded


def _argument(spec: str, made: type, text: str) -> int | float:
    first = next(iter(fields(made)), None)
    if first is None:
        raise UserError(f"sampler {spec!r}: {spec.partition(':')[0]} takes nothing after the colon")
    return _number(f"sampler {spec!r}: behind the colon", first.type, text)


def _number(where: str, kind: object, text: str) -> int | float:
    """Of a field's type: int a whole number, float any."""
    if kind in ("float", float):
        if not re.fullmatch(r"-?([0-9]{1,9}(\.[0-9]{0,17})?|\.[0-9]{1,17})(e-?[0-9]{1,2})?", text):
            raise UserError(f"{where} a number expected, got {text!r}")
        return float(text)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{where} a whole number expected, got {text!r}")
    return int(text)
