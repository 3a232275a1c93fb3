"""hf: the front matter of a Hugging Face model card whose `model-index` holds a policy's figures, to stand above the card's own text.

Metrics are the columns that have a better and a worse, and kl_prior, with interval, status and provenance as `args` beside the value; a
figure without a finite value is left out, as the hub shows numbers. Written by huggingface_hub, which also reads it back.
"""

from __future__ import annotations

import math

from klbench.board import Board, Row
from klbench.measure import COLUMNS


def document(board: Board, row: Row) -> tuple[str, str]:
    """Name and text of one policy's card."""
    from huggingface_hub import EvalResult, ModelCardData

    run = row.record.run
    results = []
    for name, figure in sorted(row.columns.items()):
        about = COLUMNS.get(name)
        if figure.value is None or not math.isfinite(figure.value) or (about and not about.better and name != "kl_prior"):
            continue
        ends = {"low": figure.low, "high": figure.high, "stderr": figure.stderr}
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=f"klbench/{run.task.replace('/', '_')}",
                dataset_name=f"klbench {run.task}",
                dataset_config=f"beta {run.beta:g}, prior {run.prior}",
                dataset_split="score",
                dataset_revision=str(run.task_version),
                metric_type=name,
                metric_name=f"{about.title} ({about.unit})" if about and about.unit else about.title if about else name,
                metric_value=figure.value,
                metric_args={
                    "status": figure.status,
                    "provenance": row.provenance,
                    **{k: v for k, v in ends.items() if v is not None and math.isfinite(v)},
                },
            )
        )
    card = ModelCardData(model_name=row.id, eval_results=results, tags=["klbench"])
    return f"{row.id}.md", f"---\n{card.to_yaml()}\n---\n"
