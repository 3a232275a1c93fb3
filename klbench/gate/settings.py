"""What a gate asks of a metric: a direction, a margin that matters, a share of the error rate. A YAML file, all of it checked on reading.

rate: 0.05                      # of false alarms, of the whole verdict
metrics:
  reverse_kl: {direction: min, margin: 0.1}
  gold: {direction: max, margin: 0.05, weight: 2}
  distinct_2: {direction: band, margin: 0.1}
  kl_prior: {direction: info}
tasks:                          # where a task's unit asks for another margin
  toxicity/threat: {reverse_kl: {margin: 0.3}}
methods:                        # or a method's nature; its word is last
  reinforce: {reverse_kl: {margin: 25}}
rewards_differ: false           # true: baseline and candidate were trained for different rewards
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

import yaml
from pydantic import Field, ValidationError, model_validator

from klbench.errors import UserError, unknown
from klbench.measure import COLUMNS, OPEN
from klbench.record import Grown, Strict, digest

ESTIMATOR: Final = ("stderr.", "error.")  # how good the figures of a column are: log of its standard error, distance to the truth


def base(metric: str) -> str:
    """The column that a metric is about."""
    return metric.partition(".")[2] if metric.startswith(ESTIMATOR) else metric


@final
class Metric(Strict):
    """direction: which way is better; a band asks that the figure moves neither way, info is shown and decides nothing.

    margin: the least worsening that matters, in the metric's own unit.  weight: its share of the error rate, relative to the others'.
    """

    direction: Literal["min", "max", "band", "info"]
    margin: float | None = Field(None, gt=0, allow_inf_nan=False)
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _whole(self) -> Metric:
        if (self.margin is None) != (self.direction == "info"):
            raise ValueError("info has no margin" if self.margin is not None else f"{self.direction} needs a margin")
        return self


@final
class Change(Strict):
    """Of a metric, on one task or for one method."""

    margin: float = Field(gt=0, allow_inf_nan=False)


@final
class Gate(Grown):
    """The whole file. See the module."""

    LATER: ClassVar[tuple[str, ...]] = ("methods",)

    rate: float = Field(0.05, gt=0, lt=0.5)
    metrics: dict[str, Metric]
    tasks: dict[str, dict[str, Change]] = Field(default_factory=dict)
    methods: dict[str, dict[str, Change]] = Field(default_factory=dict)
    rewards_differ: bool = False

    def metric(self, name: str, task: str, method: str = "") -> Metric:
        """As it holds for a method (`best_of_n:4` goes by its own name, else by `best_of_n`) on a task."""
        own = self.methods.get(method, self.methods.get(method.partition(":")[0], {}))
        change = own.get(name, self.tasks.get(task, {}).get(name))
        return self.metrics[name] if change is None else self.metrics[name].model_copy(update={"margin": change.margin})

    @property
    def sha256(self) -> str:
        """Of the settings, however the file is laid out."""
        return digest(self.model_dump(mode="json"))


# No margin is below what two boards of the suite `quick` can detect, seed 0 against seed 1 (tests/test_ci_gate.py). A method without a KL
# term ends wherever its seed leads it, and the prompts of toxicity differ most.
DEFAULT: Final = Gate(
    metrics={
        "reverse_kl": Metric(direction="min", margin=0.15),
        "gold": Metric(direction="max", margin=0.15),
        "reward": Metric(direction="info"),
        "kl_prior": Metric(direction="info"),
        "entropy": Metric(direction="info"),
        "distinct_2": Metric(direction="info"),
    },
    tasks={"toxicity": {"reverse_kl": Change(margin=0.6)}},
    methods={"reinforce": {"reverse_kl": Change(margin=25)}, "uniform": {"reverse_kl": Change(margin=2)}},
)


def load(path: Path) -> Gate:
    """Raises UserError, one line that names the file, the key and the nearest right name."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no gate file at {path}") from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    return read(data, str(path))


def read(data: Any, where: str) -> Gate:
    """From plain data. Raises UserError."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: a mapping with metrics expected")
    for key in data:
        if key not in Gate.model_fields:
            raise UserError(f"{where}: {unknown('key', str(key)[:60], Gate.model_fields)}")
    try:
        gate = Gate.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        at, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            fields = Metric.model_fields if first["loc"][0] == "metrics" else Change.model_fields
            message = str(unknown("key", str(first["loc"][-1])[:60], fields))
        raise UserError(f"{where}: {at[:120]}: {message}") from None
    for name in gate.metrics:
        column = base(name)
        if column not in COLUMNS and not column.startswith(OPEN):
            raise UserError(f"{where}: metrics: {unknown('column', column[:60], COLUMNS)}")
    for key, given in (("tasks", gate.tasks), ("methods", gate.methods)):
        for of, changes in given.items():
            for name in changes:
                if name not in gate.metrics:
                    raise UserError(f"{where}: {key}.{of[:60]}: {unknown('metric', name[:60], gate.metrics)}")
                if gate.metrics[name].direction == "info":
                    raise UserError(f"{where}: {key}.{of[:60]}.{name}: info has no margin")
    if all(metric.direction == "info" for metric in gate.metrics.values()):
        raise UserError(f"{where}: metrics: every one is info, so nothing could ever be a regression")
    return gate
