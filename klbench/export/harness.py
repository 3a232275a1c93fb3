"""lm-eval: the aggregated results file of lm-evaluation-harness 0.4.9 and later, `<model>/results_<date>.json`.

    results.<task>["<column>,none"], ["<column>_stderr,none"]    "none" is lm-eval's word for "no filter"; an absent error is "N/A"
    versions, configs, n-shot, n-samples, higher_is_better       by task, `klbench_<family>_<variant>` as `klbench tasks export` names it

Intervals and statuses have no place in that file: they stand under `configs.<task>.metadata.figures`, which lm-eval passes on unread.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from klbench.board import Board, Row
from klbench.estimate import finite_or_word
from klbench.measure import COLUMNS


def document(board: Board, row: Row) -> tuple[str, str]:
    """Name and text of one policy's results."""
    run, record = row.record.run, row.record
    task = f"klbench_{run.task.replace('/', '_')}"
    there = {name: figure for name, figure in sorted(row.columns.items()) if figure.value is not None}
    metrics: dict[str, Any] = {}
    for name, figure in there.items():
        metrics[f"{name},none"] = finite_or_word(figure.value)
        metrics[f"{name}_stderr,none"] = "N/A" if figure.stderr is None else finite_or_word(figure.stderr)
    direction = {"high": True, "low": False}
    prompts = len(record.prompt_ids)
    machine = record.cost.get("machine", {})
    date = str(machine.get("date", "")) or "1970-01-01T00:00:00Z"
    data: dict[str, Any] = {
        "results": {task: {"name": task, "alias": task, "sample_len": prompts, **metrics}},
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "output_type": "generate_until",
                "test_split": "score",
                "num_fewshot": 0,
                "repeats": run.score.draws,
                "generation_kwargs": {"do_sample": True, "temperature": 1.0, "max_gen_toks": run.max_new_tokens},
                "metadata": {
                    "version": run.task_version,
                    "prior": run.prior,
                    "beta": run.beta,
                    "status": row.status,
                    "provenance": row.provenance,
                    "figures": {name: figure.to_json() for name, figure in there.items()},
                },
            }
        },
        "versions": {task: run.task_version},
        "n-shot": {task: 0},
        "higher_is_better": {task: {name: direction.get(COLUMNS[name].better) if name in COLUMNS else None for name in there}},
        "n-samples": {task: {"original": prompts, "effective": prompts}},
        "config": {"model": "klbench", "model_args": {"method": run.method, "prior": run.prior, "seed": run.seed}, "random_seed": run.seed},
        "git_hash": board.manifest.get("git"),
        "date": datetime.strptime(date, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp(),
        "model_source": "klbench",
        "model_name": row.id,
        "model_name_sanitized": row.id,
        "total_evaluation_time_seconds": str(machine.get("seconds_score", "")),
    }
    name = f"{row.id}/results_{date.removesuffix('Z').replace(':', '-')}.json"
    return name, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
