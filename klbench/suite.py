"""A suite is a YAML file: a named grid of tasks and methods, resolved to a list of runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from klbench.errors import UserError, unknown
from klbench.record import Score, Strict, Train

M = TypeVar("M", bound=BaseModel)


class TaskEntry(Strict):
    """A task of the grid; `beta` None takes the task's own, `lr` scales no one else's."""

    beta: float | None = Field(None, gt=0, allow_inf_nan=False)
    train: dict[str, Any] = Field(default_factory=dict)
    score: dict[str, Any] = Field(default_factory=dict)


class Suite(Strict):
    """The grid. `methods` overrides train settings by objective, `tasks` by task; the method's word is last. An objective with settings of
    its own, `rebel:huber=0.7`, takes those of its name unless it has a line itself.

    pool: trained policies, at most, whose draws stand behind every figure of a table (klbench/pooled.py); 0 for none.
    lm_eval: tasks of lm-eval for every trained policy and for the prior, lm_eval_limit documents of each at most; a task may name its own
    among its score settings.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    summary: str = ""
    prior: str = "mini"
    tasks: dict[str, TaskEntry]
    objectives: list[str]
    samplers: list[str] = Field(default_factory=list)
    seeds: list[int] = Field(default_factory=lambda: [0])
    train: Train = Train()
    score: Score = Score()
    pool: int = Field(8, ge=0, le=8)
    lm_eval: list[str] = Field(default_factory=list)
    lm_eval_limit: int | None = Field(None, ge=1)
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def train_of(self, task: str, objective: str) -> Train:
        """Settings of one cell: the suite's, then the task's, then the method's. Raises UserError on an unknown key."""
        own = self.methods.get(objective, self.methods.get(objective.partition(":")[0], {}))
        by_task = own.get("tasks", {}).get(task, {})
        return merged(
            self.train,
            f"train settings of {objective} on {task}",
            self.tasks[task].train,
            {k: v for k, v in own.items() if k != "tasks"},
            by_task,
        )

    def score_of(self, task: str) -> Score:
        """Scoring of one task: the suite's, then the task's."""
        kept = {"lm_eval": tuple(self.lm_eval), "lm_eval_limit": self.lm_eval_limit}
        found = merged(self.score, f"score settings of {task}", {k: v for k, v in kept.items() if v}, self.tasks[task].score)
        if found.common and self.pool:
            raise UserError(f"suite {self.name}: policies that are pooled need draws of their own: score.common is for pool: 0")
        return found


def merged(model: M, where: str, *changes: dict[str, Any]) -> M:
    """The model with keys replaced in order; an unknown key or a bad value is a UserError that names it."""
    data = model.model_dump()
    for change in changes:
        for key, value in change.items():
            if key not in type(model).model_fields:
                raise unknown(f"key in {where}", key, type(model).model_fields)
            data[key] = value
    return checked(type(model), data, where)


def checked(model: type[M], data: Any, where: str) -> M:
    """`model` from plain data, or a UserError with the key's path and the nearest known key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors()
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # a misspelt key is also a missing one
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise unknown(f"key in {where}", path, _keys_at(model, first["loc"])) from None
        raise UserError(f"{where}: {path}: {first['msg']}, got {first.get('input')!r}"[:500]) from None


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Dotted names of the fields beside the unknown key at `loc`."""
    prefix = ".".join(str(part) for part in loc[:-1])
    fields: Iterable[str] = model.model_fields
    for part in loc[:-1]:
        annotation = getattr(model.model_fields.get(str(part)), "annotation", None)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model, fields = annotation, annotation.model_fields
        else:
            fields = TaskEntry.model_fields
    return [f"{prefix}.{f}" if prefix else f for f in fields]


def names() -> list[str]:
    """Names of the suites that ship."""
    return sorted(p.name.removesuffix(".yaml") for p in files("klbench.suites").iterdir() if p.name.endswith(".yaml"))


def load(name_or_path: str, settings: Iterable[str] = ()) -> Suite:
    """A shipped suite by name or any YAML file by path, with `key.path=value` settings applied. Raises UserError."""
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise UserError(f"no suite file at {path}")
        text, where = path.read_text(encoding="utf-8", errors="replace"), str(path)
    else:
        name = name_or_path.replace("-", "_")
        if name not in names():
            raise unknown("suite", name_or_path, names())
        text, where = files("klbench.suites").joinpath(f"{name}.yaml").read_text(encoding="utf-8"), f"suite {name}"
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: a mapping expected")
    checked(Suite, data, where)
    for setting in settings:
        apply(data, setting)
    suite = checked(Suite, data, where if not settings else "--set")
    for method, own in suite.methods.items():
        by_task = own.get("tasks", {})
        if not isinstance(by_task, dict) or not all(isinstance(change, dict) for change in by_task.values()):
            raise UserError(f"{where}: methods.{method}.tasks: train settings by task expected, got {by_task!r}")
        for task in by_task.keys() - suite.tasks.keys():
            raise unknown(f"task under methods.{method}.tasks in {where}", task, suite.tasks)
    for task in suite.tasks:
        suite.score_of(task)
        for method in dict.fromkeys([*suite.objectives, *suite.methods]):
            suite.train_of(task, method)
    return suite


def apply(data: dict[str, Any], setting: str) -> None:
    """Put one `key.path=value` (value in YAML) into plain data; `beta=0.1` sets it for every task. Raises UserError."""
    match = re.fullmatch(r"([\w./:-]+)=(.*)", setting, re.S)
    if not match:
        raise UserError(f"--set {setting!r}: key=value expected")
    path = match.group(1).split(".")
    try:
        value = yaml.safe_load(match.group(2))
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--set {setting!r}: the value is not YAML") from None
    if path == ["beta"]:
        tasks = data["tasks"]
        if not isinstance(tasks, dict) or not all(isinstance(entry, dict | None) for entry in tasks.values()):
            raise UserError(f"--set {setting!r}: the tasks hold no keys")
        data["tasks"] = {name: {**(entry or {}), "beta": value} for name, entry in tasks.items()}
        return
    for key, model in (("train", Train), ("score", Score)):
        if path[0] == key and len(path) == 2 and path[1] not in model.model_fields:
            raise unknown("setting", match.group(1), [f"{key}.{f}" for f in model.model_fields])
    if path[0] not in Suite.model_fields:
        raise unknown("setting", match.group(1), [*Suite.model_fields, "beta", *(f"train.{f}" for f in Train.model_fields)])
    at = data
    for part in path[:-1]:
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict):
            raise UserError(f"--set {setting!r}: {part} holds no keys")
    at[path[-1]] = value
    if path[0] in ("train", "score") and len(path) == 2:
        _forget(data, *path)


def _forget(data: dict[str, Any], group: str, key: str) -> None:
    """Take a key out of what tasks and methods say of it: the word of whoever starts the run is the last."""
    tasks, methods = (x if isinstance(x, dict) else {} for x in (data["tasks"], data.get("methods")))  # what is none is refused by `load`
    held = [entry.get(group) for entry in tasks.values() if isinstance(entry, dict)]
    if group == "train":
        own = [settings for settings in methods.values() if isinstance(settings, dict)]
        held += [*own, *(by for settings in own if isinstance(settings.get("tasks"), dict) for by in settings["tasks"].values())]
    for settings in held:
        if isinstance(settings, dict):
            settings.pop(key, None)
