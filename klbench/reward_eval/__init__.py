"""Rewards evaluated as likelihoods: `klbench reward`. How well a reward ranks, how calibrated it is, what it goes along with, how sharp it
is for a prior, and where following it turns against the gold. docs/rewards.md says what each figure means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from klbench import __version__
from klbench import rewards as named
from klbench.errors import UserError
from klbench.reward_eval import validation
from klbench.reward_eval.board import Board
from klbench.reward_eval.cards import table


def evaluate(
    tasks: Sequence[str], rewards: Sequence[str] = (), *, pairs: Path | None = None, prior: str | None = None, samples: int | None = None,
    seed: int = 0, policies: Path | None = None, include: Sequence[Path] = (), command: str = "klbench reward",
    report: Callable[[str], None] = lambda text: None,
) -> Board:  # fmt: skip
    """The board of these rewards, and of each task's own, its gold, its family's others and the nulls.

    rewards: as klbench.rewards.load reads them.  samples: prior draws a prompt [default: the bank that ships, else 512].
    policies: the directory of a run. Raises UserError for whatever cannot be found or read.
    """
    if len(set(tasks)) != len(tasks) or not tasks:
        raise UserError("reward: one or more tasks expected, each once")
    if len(set(rewards)) != len(rewards):
        raise UserError("--reward: each reward once")
    asked = None if pairs is None else validation.pairs_of(pairs)
    given = [(spec, named.load(spec, include)) for spec in rewards]
    found = [table(name, given, asked, prior, samples, seed, policies, include, report) for name in tasks]
    return Board(klbench=__version__, command=command, seed=seed, tables=found)
