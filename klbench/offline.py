"""Training data from a file: draws of an unknown behaviour policy, in place of the prior's, for objectives that train on what is given.

A row of the .jsonl is one of

    {"prompt": .., "chosen": .., "rejected": ..}            for objectives that are told which of two is better
    {"prompt": .., "completion": .., "label": true}         for those that are told which are right
    {"prompt": .., "completion": ..}                        for any; the task's reward says what it is worth

all rows of one kind. A prompt's rows are shuffled once an epoch by the run's seed; a completion longer than the task's continuations is cut
where they are. Who wrote the completions is not known: their log-probability under it is taken to be the prior's. An optimum that is
declared for prior draws presumes them: from a file it is what the file makes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from klbench import streams
from klbench.errors import UserError
from klbench.policies.causal_lm import CausalLM
from klbench.target import Draws

SURE: Final = 20.0  # half the reward gap of a given pair: its Bradley-Terry probability is 1 in single precision
KINDS: Final[dict[frozenset[str], str]] = {
    frozenset({"prompt", "chosen", "rejected"}): "pairs",
    frozenset({"prompt", "completion", "label"}): "success",
    frozenset({"prompt", "completion"}): "reward",
}


@final
@dataclass(frozen=True)
class Offline:
    """Completions by prompt, [P] lists of equal kind. values: +-SURE of a pair, 1 or 0 of a label; None where the task's reward is asked.

    width: completions of a prompt that a step takes at most, 2 for pairs: all that one row compares.
    """

    prompts: tuple[str, ...]
    groups: tuple[tuple[tuple[str, ...], ...], ...]  # [P][rows][completions of a row]
    values: tuple[tuple[tuple[float, ...], ...], ...] | None
    kind: str

    @classmethod
    def read(cls, path: Path, feedback: str, held_out: Mapping[str, str]) -> Offline:
        """feedback: what the objective is told.  held_out: prompts of other splits, by prompt the split's name.

        Raises UserError with the line of a row that is none of the kinds, that is of another kind than the first or than the objective
        can read, or whose prompt is held out.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"train.data {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        kind = ""
        found: dict[str, list[tuple[tuple[str, ...], tuple[float, ...]]]] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"train.data {path}, line {number}"
            row = _row(line, where)
            this = KINDS.get(frozenset(row))
            if this is None:
                raise UserError(f"{where}: keys prompt and completion, with label or without, or prompt, chosen, rejected expected")
            kind = kind or this
            if this != kind:
                raise UserError(f"{where}: a row of {this} among rows of {kind}")
            if kind not in ("reward", feedback):
                raise UserError(f"{where}: rows of {kind}, and the objective is told {feedback}: give prompt and completion alone")
            if row["prompt"] in held_out:
                raise UserError(
                    f"{where}: prompt {row['prompt']!r} belongs to the {held_out[row['prompt']]} split, which nothing trains on"
                )
            found.setdefault(row["prompt"], []).append(_told(row, kind))
        if not found:
            raise UserError(f"train.data {path}: no row in it")
        for prompt, rows in found.items():
            if kind != "pairs" and len(rows) < 2:
                raise UserError(f"train.data {path}: one completion of prompt {prompt!r}, and losses compare two or more")
        groups = tuple(tuple(texts for texts, _ in rows) for rows in found.values())
        values = tuple(tuple(v for _, v in rows) for rows in found.values())
        return cls(tuple(found), groups, None if kind == "reward" else values, kind)

    @property
    def top(self) -> float:
        """The value of what is right, infinite where right and wrong are not told."""
        return 1.0 if self.kind == "success" else math.inf

    def width(self, samples: int) -> int:
        """Completions of a prompt in a batch: the two of a pair, else `samples` or as many as the least prompt has."""
        return 2 if self.kind == "pairs" else min(samples, min(map(len, self.groups)))

    def drawn(self, prior: CausalLM, chosen: list[int], samples: int, length: int, seed: int, step: int) -> tuple[Draws, Tensor | None]:
        """Completions of the chosen prompts with log p0 as `log_q`, and their values [P, K] where the file tells them."""
        many = self.width(samples)
        take = many // len(self.groups[0][0])
        rows = [[self._place(i, step * take + j, seed) for j in range(take)] for i in chosen]
        texts = [[text for at in places for text in self.groups[i][at]] for i, places in zip(chosen, rows, strict=True)]
        prompts = [self.prompts[i] for i in chosen]
        tokens, mask = prior.spelled(prompts, texts, end=True)
        tokens, mask = tokens[:, :, :length], mask[:, :, :length]
        told = None
        if self.values is not None:
            told = torch.tensor([[v for at in places for v in self.values[i][at]] for i, places in zip(chosen, rows, strict=True)])
        return Draws(tokens, mask, prior.log_prob(prompts, tokens, mask)), told

    def _place(self, prompt: int, count: int, seed: int) -> int:
        """Which row of a prompt comes as its `count`-th: an endless shuffle, a function of the seed alone."""
        rows = len(self.groups[prompt])
        epoch, place = divmod(count, rows)
        generator = torch.Generator().manual_seed(streams.seed(seed, f"train/data/{prompt}/{epoch}"))
        return int(torch.randperm(rows, generator=generator)[place])


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    texts = {k: v for k, v in row.items() if k != "label"} if isinstance(row, dict) else {}
    if not texts or not all(isinstance(v, str) and v for v in texts.values()):
        raise UserError(f"{where}: an object of texts expected, none of them empty")
    if "label" in row and not isinstance(row["label"], bool):
        raise UserError(f"{where}: label {row['label']!r}: true or false expected")
    found: dict[str, Any] = row
    return found


def _told(row: dict[str, Any], kind: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if kind == "pairs":
        return (row["chosen"], row["rejected"]), (SURE, -SURE)
    return (row["completion"],), (float(row.get("label", False)),)
