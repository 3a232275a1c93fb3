"""The contracts of the ways to a posterior: objectives that train a policy, samplers that draw from one.

One paper, one file: the module `klbench/objectives/<name>.py` holds one class whose docstring gives formula, gradient, optimum and
source. `objective(name)` and `sampler(spec)` load by name; a third party's come from entry points `klbench.objectives` and
`klbench.samplers`, or from a file named with `--include`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from klbench.batch import Batch
from klbench.errors import UserError, unknown
from klbench.estimate import Array

State = dict[str, Tensor]


@dataclass(frozen=True)
class AbstractObjective(ABC):
    """A loss whose minimum over policies is declared: `optimum` is "target" (p*), "own" (another closed form) or "none" (none known)."""

    optimum: ClassVar[str]
    source: ClassVar[str]
    draws: ClassVar[str] = "policy"  # whose draws it trains on: "policy" (fresh ones each step) or "prior"
    needs_prior: ClassVar[bool] = True  # False spares the prior's pass
    epochs: ClassVar[int] = 1  # optimiser steps on one batch of draws

    @abstractmethod
    def loss(self, batch: Batch, beta: float) -> Tensor:
        """Scalar to minimise; the trainer differentiates it through `batch.log_q` (and `batch.kl_token`)."""


@dataclass(frozen=True)
class AbstractStatefulObjective(ABC):
    """An objective with memory: tensors that are saved with the checkpoint. Those that require a gradient are trained beside the policy."""

    optimum: ClassVar[str]
    source: ClassVar[str]
    draws: ClassVar[str] = "policy"
    needs_prior: ClassVar[bool] = True
    epochs: ClassVar[int] = 1
    state_lr: ClassVar[float] = 0.1  # learning rate of the trained part of the state

    @abstractmethod
    def init(self, prompts: int) -> State:
        """The state before the first step, for a train split of so many prompts."""

    @abstractmethod
    def loss(self, batch: Batch, beta: float, state: State) -> tuple[Tensor, State]:
        """Scalar to minimise and the state after this batch."""


Objective = AbstractObjective | AbstractStatefulObjective


@runtime_checkable
class ClosedForm(Protocol):
    """An objective with an optimum of its own, p0 times a function of the reward."""

    def own(self, reward: Array, bank: Array, beta: float, draws: int) -> Array:
        """[N] log of the optimum over p0 at `reward`, the reward's law taken from the bank's rewards [N0]; draws: K of a group."""
        ...


@dataclass(frozen=True)
class AbstractSampler(ABC):
    """A decoding-time policy q(x) = p0(x) g(r(x)): it changes the prior by a function of the reward alone.

    Its log-density ratio needs no model, only the law of the reward under the prior, which the bank holds.
    """

    source: ClassVar[str]

    @abstractmethod
    def log_ratio(self, reward: Array, bank: Array, beta: float, reward_max: float) -> Array:
        """log q(x)/p0(x) of draws with `reward` [N], the reward's law taken from the bank's rewards [N0] of the same prompt."""

    @abstractmethod
    def pick(self, reward: Array, beta: float, reward_max: float, draws: int, seed: int) -> tuple[NDArray[np.int64], int]:
        """Indices [draws] of the prior draws (in order, rewards [M] given) that the sampler returns, and how many it used.

        Raises UserError when M prior draws are not enough.
        """

    @abstractmethod
    def cost(self, bank: Array, beta: float, reward_max: float) -> float:
        """Expected prior draws that one draw costs."""


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
            spec = importlib.util.spec_from_file_location(f"klbench_included_{name}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # a dataclass with postponed annotations looks its module up there
            spec.loader.exec_module(module)
            return _class_in(module, base)
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


def names(package: str) -> list[str]:
    """Names of all "objectives" or "samplers" that can be loaded, built in and installed."""
    return sorted({*_builtin(package), *(e.name for e in entry_points(group=f"klbench.{package}"))})


def objective(name: str, include: tuple[Path, ...] = ()) -> Objective:
    """The objective of that name with its paper's defaults. Raises UserError with the nearest name."""
    loaded: Objective = _load("objectives", "objective", name, (AbstractObjective, AbstractStatefulObjective), include)()
    return loaded


def sampler(spec: str, include: tuple[Path, ...] = ()) -> AbstractSampler:
    """`best_of_n:16` is the class of `best_of_n` with its first field 16. Raises UserError with the nearest name."""
    name, _, argument = spec.partition(":")
    made = _load("samplers", "sampler", name, (AbstractSampler,), include)
    if not argument:
        loaded: AbstractSampler = made()
        return loaded
    if not re.fullmatch(r"[0-9]{1,9}", argument):
        raise UserError(f"sampler {spec!r}: a whole number expected after the colon")
    with_argument: AbstractSampler = made(int(argument))
    return with_argument
