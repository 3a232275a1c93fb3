"""What lm-eval asks klbench for while it runs an exported task: the reward of one draw."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from klbench import models
from klbench import task as tasks
from klbench.target import TiltedPrior


@functools.cache
def _target(name: str) -> TiltedPrior:
    """The task's target at its own beta; a reward may depend on the prior that the task was made for."""
    task = tasks.load(name)
    return task.target(models.open_prior(task.prior), task.beta)


def earned(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """{"reward": of the continuation}: lm-eval's `process_results`. Raises UserError for a reward that is no finite number."""
    return {"reward": float(_target(doc["klbench_task"]).rewards([doc["prompt"]], [[results[0]]])[0, 0])}
