"""Records for the gate's tests: a policy on 16 prompts whose reverse KL is what a test says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from klbench.estimate import Estimate
from klbench.record import Record, Run, Score, Train

PROMPTS = 16
NOISE = np.linspace(-0.02, 0.02, PROMPTS)  # of free over the prompts, with mean 0


def record(method: str = "dpo", worse: float = 0.0, task: str = "bias", seed: int = 0, noise: float = 1.0, **hashes: str) -> Record:
    """reverse_kl is 0.2 + worse at each prompt, up to `noise` times NOISE, which differs from prompt to prompt."""
    free = 0.1 + worse + noise * (NOISE if worse else -NOISE)
    value = 0.2 + worse
    run = Run(
        task=task, task_version=1, method=method, kind="objective", prior="mini", beta=0.5, seed=seed, max_new_tokens=5, train=Train(),
        score=Score(), hashes={"prior": "p" * 64, "prompts": "q" * 64, "target": "t" * 64, **hashes},
    )  # fmt: skip
    columns = {
        "reverse_kl": Estimate(value, value - 0.02, value + 0.02, 0.01),
        "gold": Estimate(0.5 - worse, 0.45 - worse, 0.55 - worse, 0.01),
        "entropy": Estimate(3.0, 2.9, 3.1, 0.05),
    }
    prompts = {"free": free.tolist(), "free_stderr": [0.01] * PROMPTS}
    ids = [f"prompt{i}" for i in range(PROMPTS)]
    return Record(
        run=run, status="certified", columns=columns, prompt_ids=ids, prompts=prompts, frontier=[], samples=[], cost={}, curve=[],
    )  # fmt: skip


def directory(path: Path, records: Iterable[Record]) -> Path:
    """A run directory."""
    (path / "records").mkdir(parents=True)
    (path / "manifest.json").write_text("{}", encoding="utf-8")
    for one in records:
        (path / "records" / f"{one.run.id}.json").write_text(one.to_json(), encoding="utf-8")
    return path


def changed(one: Record, **fields: Any) -> Record:
    return one.model_copy(update=fields)
