"""eee: evaluation results in the schema of Every Eval Ever (evaleval, 0.3.0), the shared format that Inspect AI, HELM and lm-eval logs are
converted to as well, and the one of them that holds errors and intervals.

A metric there is better when lower or better when higher, so only columns with a direction are written; one without a finite value
is left out. The time stamp is that of the scoring, so that equal records give equal files.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

from klbench import __version__
from klbench.board import Board, Row
from klbench.estimate import Estimate
from klbench.measure import COLUMNS

SCHEMA = "0.3.0"


def document(board: Board, row: Row) -> tuple[str, str]:
    """Name and text of one policy's log."""
    run, record = row.record.run, row.record
    date = str(record.cost.get("machine", {}).get("date", "")) or "1970-01-01T00:00:00Z"
    stamp = str(int(datetime.strptime(date, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()))
    told = {"prior": run.prior, "beta": f"{run.beta:g}", "method": run.method, "kind": run.kind, "seed": str(run.seed)}
    versions = board.manifest.get("versions", {})
    data = {
        "schema_version": SCHEMA,
        "evaluation_id": f"klbench/{row.id}/{stamp}",
        "evaluation_timestamp": stamp,
        "retrieved_timestamp": stamp,
        "source_metadata": {
            "source_name": "klbench",
            "source_type": "evaluation_run",
            "source_organization_name": "klbench",
            "evaluator_relationship": "other",
            "additional_details": {"provenance": row.provenance, "git": str(board.manifest.get("git", ""))},
        },
        "eval_library": {"name": "klbench", "version": str(versions.get("klbench") or __version__)},
        "model_info": {
            "name": f"{run.method} on {run.task}",
            "id": f"klbench/{row.id}",
            "additional_details": {"deployment_type": "self_deployed", "model_availability": "unknown", **told},
        },
        "evaluation_results": [
            _result(name, figure, row)
            for name, figure in sorted(row.columns.items())
            if name in COLUMNS and COLUMNS[name].better and figure.value is not None and math.isfinite(figure.value)
        ],
    }
    return f"{row.id}.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _result(name: str, figure: Estimate, row: Row) -> dict[str, Any]:
    run, about = row.record.run, COLUMNS[name]
    uncertainty: dict[str, Any] = {"num_samples": figure.n}
    if figure.stderr is not None and math.isfinite(figure.stderr):
        uncertainty["standard_error"] = {"value": figure.stderr, "method": "jackknife"}
    if figure.low is not None and figure.high is not None and math.isfinite(figure.low) and math.isfinite(figure.high):
        ends = {"lower": figure.low, "upper": figure.high}
        uncertainty["confidence_interval"] = {**ends, "confidence_level": 0.95, "method": "delete-a-block jackknife, widened by reach"}
    return {
        "evaluation_result_id": f"{row.id}/{name}",
        "evaluation_name": f"klbench {run.task}",
        "source_data": {
            "dataset_name": f"klbench {run.task}",
            "source_type": "other",
            "additional_details": {"split": "score", "version": str(run.task_version), "prompts": str(len(row.record.prompt_ids))},
        },
        "metric_config": {
            "evaluation_description": about.formula,
            "metric_id": f"klbench.{name}",
            "metric_name": about.title,
            "metric_unit": about.unit or "none",
            "lower_is_better": about.better == "low",
            "score_type": "continuous",
            "min_score": None,
            "max_score": None,
        },
        "score_details": {"score": figure.value, "details": {"status": figure.status, "reason": figure.reason}, "uncertainty": uncertainty},
        "generation_config": {"generation_args": {"temperature": 1.0, "top_p": 1.0, "max_tokens": run.max_new_tokens}},
    }
