"""Rewards by what people write. A reward is f(prompts, completions, **kwargs) -> one float a completion, the signature that TRL uses.

    NAME                            an installed one (entry points `klbench.rewards`); of an included folder, the function NAME of NAME.py
    DIR                             a reward model that `klbench train-reward` wrote
    hf:PATH_OR_NAME[:[-]LABEL]      a sequence classifier of transformers (classifier.py)
    evaluate:PATH_OR_NAME[:KEY]     a measurement of the library evaluate (measurement.py)
    module:function                 a function of yours, or anybody's; the working directory stands first on the path

A name comes before a directory: a directory that is called like one is ./NAME. What `load` returns reads texts and the messages of a chat
alike, and has `reward_max`, the value that no completion exceeds, infinite where nobody declared it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, Protocol

from klbench import included
from klbench.errors import UserError, unknown
from klbench.rewards import calling, classifier, measurement, trained

GROUP: Final = "klbench.rewards"
LOADED: Final = (calling.Called, classifier.Classified, measurement.Measured, trained.TrainedReward)
OTHERS: Final = "a directory, hf:NAME, evaluate:NAME or module:function expected"


class Loaded(Protocol):
    """A reward that says its ceiling and reads messages too."""

    @property
    def __name__(self) -> str: ...

    @property
    def reward_max(self) -> float: ...

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: object) -> list[float]: ...


def names() -> list[str]:
    """Names of all installed rewards."""
    return sorted(_installed())


def load(spec: str, include: Sequence[Path] = (), device: str = "cpu") -> Loaded:
    """The reward that `spec` names, hyphen equal to underscore. device: where a network runs.

    Raises UserError, of one line with the nearest name, for whatever is none.
    """
    kind, colon, rest = spec.partition(":")
    if colon and not rest:
        raise UserError(f"reward {spec!r}: nothing behind the colon")
    if kind == "hf" and colon:
        return classifier.open_classifier(rest, device)
    if kind == "evaluate" and colon:
        return measurement.open_measurement(rest)
    installed, wanted = _installed(), spec.replace("-", "_")
    included.standing(include)
    for folder in include:
        if wanted.isidentifier() and (folder / f"{wanted}.py").is_file():
            return calling.called(_named(included.module(folder / f"{wanted}.py"), wanted))
    if wanted in installed:
        return calling.called(installed[wanted].load())
    if Path(spec).is_dir():
        if not trained.is_reward(Path(spec)) and (Path(spec) / "config.json").is_file():
            raise UserError(f"{spec} holds a transformers model and no reward model of klbench: write hf:{spec}")
        return trained.read(Path(spec), device)
    if colon:
        return calling.called(function(spec))
    raise UserError(f"{unknown('reward', spec, installed)}; else {OTHERS}")


def described() -> list[tuple[str, str, float]]:
    """(name, first sentence of what is said of it, reward_max) of each installed reward."""
    found = []
    for name in names():
        made = _installed()[name].load()
        told = " ".join((inspect.getdoc(made) or "").split()).partition(". ")[0].rstrip(".")
        found.append((name, told, calling.called(made).reward_max))
    return found


def called(reward: Callable[..., Any]) -> Loaded:
    """A function handed over in Python, as `load` returns one; what is such a thing already comes back as it is."""
    return reward if isinstance(reward, LOADED) else calling.called(reward)


def function(spec: str) -> Callable[..., Any]:
    """`module:function`, the working directory first on the path. Raises UserError that says which half is missing."""
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise UserError(f"reward {spec!r}: module:function expected")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"reward {spec}: module {module_name} imports {error.name!r}, which is not installed") from None
        raise unknown("module", module_name, [p.stem for p in Path.cwd().glob("*.py")]) from None
    except Exception as error:
        raise UserError(f"reward {spec}: importing {module_name} raised {type(error).__name__}: {error}") from None
    return _named(module, name)


def _named(module: Any, name: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if callable(v) and n[0] != "_"]
        raise unknown(f"function in module {module.__name__.removeprefix(included.PREFIX)}", name, known)
    found: Callable[..., Any] = getattr(module, name)
    if not callable(found):
        raise UserError(f"reward {module.__name__.removeprefix(included.PREFIX)}:{name}: {name} is not a function")
    return found


def _installed() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=GROUP)}
