"""What the metric modules share: their inputs as arrays, an estimate as their answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from klbench.errors import UserError
from klbench.estimate import LEAST_DRAWS, Array, Estimate
from klbench.rows import Rows

WORD: Final = re.compile(r"\w+|[^\w\s]")
CITATION: Final = "@software{klbench, title = {klbench: how far is a fine-tuned language model from its posterior?}}"


def answer(name: str, figure: Estimate) -> dict[str, Any]:
    """An estimate as evaluate's modules answer."""
    return {name: figure.value} | {f"{name}_{key}": getattr(figure, key) for key in ("low", "high", "status", "reason")}


def by_prompt(predictions: Sequence[Any]) -> list[list[str]]:
    """Texts [P][N]; texts that are not sorted by prompt are draws of one."""
    return [list(predictions)] if predictions and isinstance(predictions[0], str) else [list(row) for row in predictions]


def words(text: str) -> list[str]:
    """Words and punctuation marks, lower-cased: what n-grams are made of where no tokenizer is given."""
    return WORD.findall(text.lower())


def draws(**columns: Any) -> list[Array]:
    """Each column [P, N] float64, in the order given. Raises UserError for unlike shapes, for fewer than 16 draws, and for NaN."""
    try:
        made = {name: np.asarray(value, dtype=np.float64) for name, value in columns.items()}
    except ValueError:
        raise UserError("as many draws of each prompt expected") from None
    shape = next(iter(made.values())).shape
    for name, value in made.items():
        if value.ndim != 2 or value.shape != shape or shape[1] < LEAST_DRAWS:
            raise UserError(f"{name}: a list of {LEAST_DRAWS} and more numbers a prompt expected, as many in each column")
        if np.isnan(value).any():
            raise UserError(f"{name}: there is NaN in it")
    return list(made.values())


def rows(log_q: Array, log_p0: Array, reward: Array | None = None) -> Rows:
    """What the estimators read, of a policy that tells whole log-probabilities alone."""
    return Rows.of_ratio(log_p0, np.zeros_like(log_p0) if reward is None else reward, log_q - log_p0)
