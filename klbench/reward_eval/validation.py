"""Texts with a known answer: labelled texts, pairs and functional tests that ship beside a task, or a user's file of pairs.

    <family>/validation/pairs*.jsonl       {"prompt", "chosen", "rejected"}                       RewardBench's columns
    <family>/validation/functional.jsonl   {"functionality", "text", "good", "pair"?, "group"?}
    <family>/validation/*.jsonl            {"text", "label", "prompt"?}    label: 1 what the reward should score high, or between

Every file is optional; a family without them is told so. A row that is none of these is an error that names file and line.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np

from klbench.errors import UserError
from klbench.estimate import Array
from klbench.reward_eval import intervals
from klbench.reward_eval.functional import Case
from klbench.reward_eval.intervals import Index
from klbench.task import AbstractTask

Row = TypeVar("Row")


@final
@dataclass(frozen=True)
class Labelled:
    """Texts [n] with labels in [0, 1]; texts of one prompt are a cluster."""

    name: str
    prompts: list[str]
    texts: list[str]
    label: Array
    cluster: Index


@final
@dataclass(frozen=True)
class Pairs:
    """Preferences [n]; pairs of one prompt are a cluster."""

    name: str
    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    cluster: Index


@final
@dataclass(frozen=True)
class Validation:
    """All that ships for a family, and the SHA-256 of each file."""

    labelled: tuple[Labelled, ...] = ()
    pairs: tuple[Pairs, ...] = ()
    cases: tuple[Case, ...] = ()
    hashes: tuple[tuple[str, str], ...] = ()

    @property
    def missing(self) -> list[str]:
        """What a family lacks, in words."""
        there = (("labelled texts", self.labelled), ("pairs", self.pairs), ("functional tests", self.cases))
        return [name for name, found in there if not found]


def of(task: AbstractTask) -> Validation:
    """What ships beside the task's module."""
    folder = Path(str(sys.modules[type(task).__module__].__file__)).parent / "validation"
    paths = sorted(folder.glob("*.jsonl"))
    labelled = [path for path in paths if not path.stem.startswith("pairs") and path.stem != "functional"]
    return Validation(
        tuple(map(labels_of, labelled)),
        tuple(pairs_of(path) for path in paths if path.stem.startswith("pairs")),
        tuple(case for path in paths if path.stem == "functional" for case in rows_of(path, _case)),
        tuple((path.name, sha256(path.read_bytes()).hexdigest()) for path in paths),
    )


def pairs_of(path: Path) -> Pairs:
    """Raises UserError that names the file and the line."""
    rows = rows_of(path, _pair)
    prompts, chosen, rejected = (list(column) for column in zip(*rows, strict=True))
    name = path.stem.removeprefix("pairs").strip("-_.") or "shipped"
    return Pairs(name, prompts, chosen, rejected, _clusters(prompts))


def labels_of(path: Path) -> Labelled:
    """Raises UserError that names the file and the line."""
    rows = rows_of(path, _label)
    prompts, texts, label = (list(column) for column in zip(*rows, strict=True))
    return Labelled(path.stem, prompts, texts, np.array(label, dtype=np.float64), _clusters(prompts))


def rows_of(path: Path, read: Callable[[dict[str, Any]], Row]) -> list[Row]:
    """The rows of a .jsonl, blank lines left out. Raises UserError for a file without a row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"no file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("an object expected")
            found.append(read(row))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not found:
        raise UserError(f"{path}: no row in it")
    return found


def _clusters(prompts: list[str]) -> Index:
    return intervals.clusters([f"prompt {prompt}" if prompt else f"row {i}" for i, prompt in enumerate(prompts)])


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    found = row.get(key, default)
    if not isinstance(found, str):
        raise ValueError(f'"{key}": a string expected')
    return found


def _pair(row: dict[str, Any]) -> tuple[str, str, str]:
    return _text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected")


def _label(row: dict[str, Any]) -> tuple[str, str, float]:
    label = row.get("label")
    if not isinstance(label, int | float) or not math.isfinite(label) or not 0 <= label <= 1:
        raise ValueError('"label": 0, 1 or a number between expected')
    return _text(row, "prompt", ""), _text(row, "text"), float(label)


def _case(row: dict[str, Any]) -> Case:
    if not isinstance(row.get("good"), bool):
        raise ValueError('"good": true or false expected')
    pair, group = (row.get(key) or "" for key in ("pair", "group"))
    return Case(_text(row, "functionality"), _text(row, "text"), row["good"], str(pair), str(group))
