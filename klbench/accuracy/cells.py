"""Replications of a setting, and what they come to: RMSE, bias and coverage of every estimator of every column, a row each.

A setting is a target with numbers of draws. In a replication each law draws afresh, and every estimator reads the same draws. Replication
i of a setting has its own stream: a table is the same on any number of workers, and a longer one begins with a shorter one's replications.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np

from klbench import streams
from klbench.accuracy import worlds
from klbench.accuracy.rivals import ESTIMATORS, Estimator, Sample
from klbench.accuracy.worlds import Drawn, World
from klbench.estimate import STATUSES, Array, Estimate
from klbench.pool import Stratum

NEAR_BOARD: Final = ("near", "mid", "far")  # line-ups of ESTIMATORS.md section 2
FAR_BOARD: Final = ("mid", "far", "under")
COLLAPSED: Final = ("far", "far2", "far3")
ADVERSARIES: Final = "adversaries"


@dataclass(frozen=True)
class Setting:
    """A target, the line-ups whose members are pooled, the policies that are scored alone, and draws a prompt: of each policy, of the
    prior scored under them, and of the prior for log Z alone.
    """

    target: str
    lineups: tuple[tuple[str, ...], ...] = (NEAR_BOARD,)
    alone: tuple[str, ...] = ("near", "mid", "far")
    draws: int = 1000
    bank: int = 1000
    rest: int = 0
    replications: int = 0  # 0: as many as the run has

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.alone, *(name for lineup in self.lineups for name in lineup)]))

    @property
    def name(self) -> str:
        return f"{self.target} {self.draws}+{self.bank}" + (f"+{self.rest}" if self.rest else "")


# Who gets a pooled figure, where not all do.
POOLED: Final[dict[tuple[str, ...], tuple[str, ...]]] = {COLLAPSED: COLLAPSED[:1]}
FOUR: Final = ("near", "mid", "far", "under")
SETTINGS: Final = (
    *(Setting(name, (NEAR_BOARD, FAR_BOARD, COLLAPSED), FOUR) for name in worlds.NINE),
    *(Setting(name, (NEAR_BOARD, FAR_BOARD), FOUR) for name in (*worlds.OWN, *worlds.CHAINS)),
    *(Setting(name, draws=64, bank=64) for name in ("dense 0.3", "common", "penalty", "lengths", "count 32")),
    *(Setting(name, draws=128, bank=1000) for name in ("dense 0.1", "uneven", "ends 32")),
    *(Setting(name, draws=128, bank=128, rest=3968) for name in ("dense 0.3", "scarce 0.1", "common", "uneven", "word 32")),
    *(Setting(name, (), rest=7000) for name in ("hidden", "rare 32")),
    Setting("rare", (), ("near", "far"), rest=31000),
)
QUICK: Final = (
    *(Setting(name, (NEAR_BOARD, FAR_BOARD), FOUR) for name in ("dense 0.1", "rare")),
    *(Setting(name) for name in ("dense 0.3", "lengths", "count 32", "avoid 32")),
    Setting("common", draws=64, bank=64),
    Setting("dense 0.3", draws=128, bank=128, rest=1920),
)


class Key(NamedTuple):
    """Where a figure stands. lineup: policies pooled, joined by +, or "" for a figure of prior and policy alone."""

    setting: str
    policy: str
    lineup: str
    estimator: str
    column: str


FIELDS: Final = 5  # of a figure: value, low, high, number of its status, truth; NaN where there is none

Figures = dict[Key, Array]  # [R, FIELDS]


def numbers(figure: Estimate, truth: float) -> list[float]:
    ends = (figure.value, figure.low, figure.high)
    return [*(math.nan if x is None else x for x in ends), float(STATUSES.index(figure.status)), truth]


@lru_cache(maxsize=1)
def _opened(target: str, policies: tuple[str, ...], seed: int) -> tuple[World, dict[str, dict[str, float]]]:
    world = worlds.world(target, seed).only(policies)
    return world, {name: world.truth(name) for name in policies}


def sample(world: World, drawn: Drawn, rest: Array, policy: int) -> Sample:
    """What one policy (1, 2, ..) is scored on: its own draws and the bank."""
    return Sample(drawn.rows(policy, policy), drawn.rows(policy, 0), rest, world.reward_max, 1 / world.beta, drawn.k3(policy))


def replication(
    world: World, setting: Setting, rng: np.random.Generator, estimators: Mapping[str, Estimator] = ESTIMATORS
) -> Iterator[tuple[str, str, str, str, Estimate]]:
    """(policy, lineup, estimator, column, figure) of one set of draws. Boards are read by estimators that pool, and by them alone."""
    drawn = world.draw(rng, [setting.bank, *[setting.draws] * len(world.policies)])
    rest = world.rewards(rng, setting.rest)
    number = {name: i + 1 for i, name in enumerate(world.policies)}
    alone = {name: sample(world, drawn, rest, number[name]) for name in world.policies}
    given = [(name, "", alone[name]) for name in setting.alone]
    for members in setting.lineups:
        for name in POOLED.get(members, members):
            others = [number[other] for other in members if other != name]
            of = (0, number[name], *others)
            strata = tuple(Stratum(drawn.rows(number[name], j), drawn.density(j, of)) for j in others)
            given.append((name, "+".join(members), replace(alone[name], others=strata, base=alone[name])))
    for name, lineup, read in given:
        for label, estimator in estimators.items():
            if bool(lineup) == ("board" in label):
                for column, figure in estimator(read).items():
                    yield name, lineup, label, column, figure


def _stream(setting: Setting, seed: int, replication: int) -> np.random.Generator:
    return np.random.default_rng(streams.seed(seed, f"accuracy/draws/{setting.name}/{replication}"))


def reach(setting: Setting, seed: int) -> float | None:
    """The true A of the whole bank, at the prompt where it is least; None for the adversaries, who have one each."""
    if setting.target == ADVERSARIES:
        return None
    return significant(float(_opened(setting.target, setting.policies, seed)[0].reach(setting.bank + setting.rest).min()))


def replications(setting: Setting, seed: int, first: int, count: int, estimators: Mapping[str, Estimator] = ESTIMATORS) -> Figures:
    """Replications first .. first + count - 1 of a setting."""
    found: dict[Key, list[list[float]]] = {}
    if setting.target == ADVERSARIES:
        return _adversaries(setting, seed, first, count, estimators)
    world, truths = _opened(setting.target, setting.policies, seed)
    for i in range(first, first + count):
        for policy, lineup, label, column, figure in replication(world, setting, _stream(setting, seed, i), estimators):
            if column in truths[policy]:
                row = found.setdefault(Key(setting.name, policy, lineup, label, column), [[math.nan] * FIELDS for _ in range(i - first)])
                row.append(numbers(figure, truths[policy][column]))
        for row in found.values():  # a column that is not there in one replication has no value there
            row.extend([[math.nan] * FIELDS] * (i + 1 - first - len(row)))
    return {key: np.array(row) for key, row in found.items()}


def _adversaries(setting: Setting, seed: int, first: int, count: int, estimators: Mapping[str, Estimator]) -> Figures:
    """A fresh prompt, hidden mode and collapsed policy each time."""
    found: dict[Key, list[list[float]]] = {}
    columns = ("reverse_kl", "log_z", "forward_kl", "tv", "js", "wasted_nats")
    for i in range(first, first + count):
        world = worlds.adversary(seed, i)
        truth = world.truth("far")
        for policy, lineup, label, column, figure in replication(world, setting, _stream(setting, seed, i), estimators):
            if column in columns:
                found.setdefault(Key(setting.name, policy, lineup, label, column), []).append(numbers(figure, truth[column]))
    return {key: np.array(row) for key, row in found.items()}


def joined(parts: Iterable[Figures]) -> Figures:
    """Replications of chunks one after another; a figure that one chunk never had is none there."""
    chunks = list(parts)
    keys = dict.fromkeys(key for chunk in chunks for key in chunk)
    out = {}
    for key in keys:
        mine = [chunk for chunk in chunks if any(k.setting == key.setting for k in chunk)]
        rows = []
        for chunk in mine:
            size = len(next(row for k, row in chunk.items() if k.setting == key.setting))
            rows.append(chunk.get(key, np.full((size, FIELDS), np.nan)))
        out[key] = np.concatenate(rows)
    return out


@dataclass(frozen=True)
class Tally:
    """Of the figures of one status: how many, how many with an interval, how many of those miss the truth below and above.

    below: the whole interval is below the truth.
    """

    figures: int
    intervals: int
    below: int
    above: int

    @property
    def misses(self) -> int:
        return self.below + self.above


@dataclass(frozen=True)
class Row:
    """One estimator of one column of one policy, over all replications. width: mean, of two-sided intervals; None where there is none.

    defined: replications with a finite value; rmse and bias are over those, None where there is none.
    """

    key: Key
    truth: float
    replications: int
    defined: int
    bias: float | None
    rmse: float | None
    width: float | None
    by_status: dict[str, Tally]

    @property
    def intervals(self) -> int:
        return sum(t.intervals for t in self.by_status.values())

    @property
    def misses(self) -> int:
        return sum(t.misses for t in self.by_status.values())

    @property
    def coverage(self) -> float | None:
        return None if not self.intervals else 1 - self.misses / self.intervals

    def share(self, status: str) -> float:
        """Of the replications, those whose figure has this status."""
        return self.by_status[status].figures / self.replications if status in self.by_status else 0.0


def significant(x: float) -> float:
    """Eight digits: what files keep, so that a table read from one is the table that wrote it."""
    return float(f"{x:.8g}")


ROUNDING: Final = 1e-9  # an exact figure may miss the truth by this much of it


def row_of(key: Key, figures: Array) -> Row:
    """What the replications [R, FIELDS] of one figure come to."""
    value, low, high, status, truth = figures.T
    there = np.isfinite(value)
    error = value[there] - truth[there]
    slack = ROUNDING * np.maximum(1.0, np.abs(truth))
    ends = ~np.isnan(low) | ~np.isnan(high)
    below, above = high < truth - slack, low > truth + slack  # False where an end is NaN
    tallies = {}
    for number, name in enumerate(STATUSES):
        mine = status == number
        if mine.any():
            tallies[name] = Tally(*(int((mine & x).sum()) for x in (np.ones_like(mine), ends, below, above)))
    both = np.isfinite(low) & np.isfinite(high)

    def mean(x: Array) -> float | None:
        return significant(float(x.mean())) if len(x) else None

    rmse = significant(math.sqrt(float((error**2).mean()))) if len(error) else None
    known = mean(truth[~np.isnan(truth)])
    assert known is not None, f"{key}: no replication knows the truth"
    return Row(key, known, len(figures), int(there.sum()), mean(error), rmse, mean(high[both] - low[both]), tallies)
