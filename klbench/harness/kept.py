"""What a policy keeps of its other abilities: its figures on tasks of lm-eval, as columns `lm_eval.<task>.<metric>`.

The interval is value ± 1.96 standard errors as lm-eval reports them: of documents like these, so it is `population` too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from klbench.errors import UserError, unknown
from klbench.estimate import Estimate
from klbench.harness.tasks import OURS, by_harness_name, documents, export
from klbench.policies.causal_lm import CausalLM
from klbench.record import digest

PREFIX: Final = "lm_eval."
BATCH: Final = 32
RESAMPLES: Final = 1000  # where lm-eval has no formula for a standard error
SEED: Final = 0
NORMAL: Final = 1.96  # standard errors to each side of a 95 % interval


def rests_on(names: Sequence[str]) -> str:
    """What the figures rest on beside the policy: lm-eval's version, and the documents of klbench's tasks.

    Raises UserError, with the nearest name, for a task that neither lm-eval nor klbench knows.
    """
    ours = by_harness_name()
    theirs = [name for name in names if name not in ours]
    for name in theirs:
        if name.startswith(OURS) or name not in _of_lm_eval():
            raise unknown("task of lm-eval", name, ours if name.startswith(OURS) else _of_lm_eval())
    return digest([version("lm_eval"), {name: documents(ours[name]) for name in names if name in ours}])


def kept(policy: CausalLM, names: Sequence[str], limit: int | None = None) -> dict[str, Estimate]:
    """Columns of a policy on tasks of lm-eval, its own or `klbench_*`; limit: documents of a task, at most.

    Raises UserError for a policy that decodes otherwise than its model, and when lm-eval fails.
    """
    if policy.decodings or policy.chat or policy.system:
        raise UserError(f"{policy.name}: lm-eval reads the model alone, without its decodings, chat template or system prompt")
    ours = by_harness_name()
    mine = [name for name in names if name in ours]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        export(Path(folder), [ours[name] for name in mine])
        manager = TaskManager(include_path=[folder], include_defaults=len(mine) < len(names))
        words = copy.deepcopy(policy.tokenizer)  # lm-eval gives it a pad token and another padding side
        model = HFLM(pretrained=policy.model, tokenizer=words, batch_size=BATCH, device=str(policy.device))
        try:
            found = simple_evaluate(
                model=model, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False,
                random_seed=SEED, numpy_random_seed=SEED, torch_random_seed=SEED, fewshot_random_seed=SEED,
            )  # fmt: skip
        except Exception as error:  # lm-eval and its tasks raise whatever they meet, a data set that cannot be reached among it
            why = " ".join(str(error).split())[:300]
            raise UserError(f"lm-eval on {', '.join(names)}: {type(error).__name__}: {why}") from error
    return columns(found["results"], found["n-samples"])


@functools.cache
def _of_lm_eval() -> list[str]:
    """Names of lm-eval's own tasks: a walk over its thousands of files, once a process."""
    with _quiet():
        from lm_eval.tasks import TaskManager

        return list(TaskManager().all_tasks)


def columns(results: dict[str, dict[str, Any]], samples: dict[str, dict[str, int]]) -> dict[str, Estimate]:
    """Estimates of lm-eval's results: {task: {"metric,filter": value, "metric_stderr,filter": its error, ...}}.

    A filter other than "none" is part of the name. A metric without an error has no interval.
    """
    out = {}
    for task, figures in results.items():
        n = samples.get(task, {}).get("effective", 0)
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{PREFIX}{task}.{metric}" + (f".{filtered}" if filtered != "none" else "")
            out[name] = _with_error(float(value), figures.get(f"{metric}_stderr,{filtered}"), n)
    return out


def _with_error(value: float, stderr: Any, n: int) -> Estimate:
    if not isinstance(stderr, int | float) or stderr != stderr:
        return Estimate(value, n=n, status="uncertified", reason="lm-eval gives no standard error")
    ends = value - NORMAL * stderr, value + NORMAL * stderr
    return Estimate(value, *ends, float(stderr), n, reason="lm-eval's stderr", population=ends)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What lm-eval, datasets and the git that lm-eval calls say of their progress goes nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        from datasets.utils import logging as bars

        loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
        levels, shown, handle = [logger.level for logger in loggers], bars.is_progress_bar_enabled(), os.dup(2)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        bars.disable_progress_bar()
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(handle, 2)
            os.close(handle)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if shown:
                bars.enable_progress_bar()
