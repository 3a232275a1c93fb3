"""What the accuracy table has to show, each criterion with its bound, what was measured and where it is worst.

A criterion about a median over a list of targets is judged where all of the list were measured. On a part of it (`--quick`, or targets
named) the figure is printed and not judged: it would say which targets were left out.

A cell is a row of the table: one column of one policy, of one pool, in one setting. For coverage a cell is split by status, and counted
where at least LEAST of its figures have that status. 28 misses of 300 are what an honest 95 % interval exceeds with probability TAIL; in a
cell with fewer figures the bound is the count with that tail. Chance allows as many cells beyond it as honest intervals would put there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scipy.stats import binom

from klbench.accuracy.cells import ADVERSARIES, COLLAPSED, FAR_BOARD, NEAR_BOARD, SETTINGS, Key, Row
from klbench.accuracy.rivals import OURS
from klbench.accuracy.worlds import NINE

LEVEL: Final = 0.95
LEAST: Final = 30  # figures of a status, for a cell to speak of its coverage
MISSES, OF = 28, 300
TAIL: Final = float(binom.sf(MISSES, OF, 1 - LEVEL))
EVERY: Final = dict.fromkeys(setting.target for setting in SETTINGS)
TRUTHFUL: Final = ("certified", "wide")


@dataclass(frozen=True)
class Criterion:
    """One line of the summary. holds: None where nothing was measured.  bound: as it is printed, with its sign."""

    name: str
    measured: str
    bound: str
    holds: bool | None
    where: str = ""

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "fails", None: "not measured"}[self.holds]


def place(key: Key) -> str:
    """A row in words: `rare 1000+1000, far of near+mid+far, reverse_kl`."""
    return f"{key.setting}, {key.policy}{f' of {key.lineup}' if key.lineup else ''}, {key.column}"


@dataclass(frozen=True)
class Part:
    """The intervals of one status in one cell."""

    row: Row
    status: str
    intervals: int
    misses: int

    @property
    def coverage(self) -> float:
        return 1 - self.misses / self.intervals

    @property
    def beyond(self) -> bool:
        """More misses than 28 of 300, in proportion of the tail."""
        return float(binom.sf(self.misses - 1, self.intervals, 1 - LEVEL)) < float(binom.sf(MISSES, OF, 1 - LEVEL)) * (1 + 1e-9)


def parts(rows: Iterable[Row], statuses: Sequence[str] = TRUTHFUL, least: int = LEAST) -> list[Part]:
    """Our intervals by cell and status; the adversaries, one replication each, have a criterion of their own."""
    found = []
    for row in rows:
        if row.key.estimator in OURS and not row.key.setting.startswith(ADVERSARIES):
            for status in statuses:
                tally = row.by_status.get(status)
                if tally is not None and tally.intervals >= least:
                    found.append(Part(row, status, tally.intervals, tally.misses))
    return found


def coverage(rows: Sequence[Row], status: str, column: str = "") -> Criterion:
    """Mean over cells of the coverage of one status."""
    mine = [p for p in parts(rows, (status,)) if column in ("", p.row.key.column)]
    name = f"coverage of {status} figures, {column or 'every column'}: mean over cells"
    if not mine:
        return Criterion(name, "-", f">= {LEVEL:g}", None)
    mean = float(np.mean([p.coverage for p in mine]))
    error = float(np.std([p.coverage for p in mine]) / math.sqrt(len(mine)))
    worst = min(mine, key=lambda p: p.coverage)
    where = f"{len(mine)} cells, standard error {error:.4f}; lowest {worst.coverage:.3f} of {worst.intervals}: {place(worst.row.key)}"
    return Criterion(name, f"{mean:.4f}", f">= {LEVEL:g}", mean >= LEVEL, where)


def worst_cell(rows: Sequence[Row], column: str = "") -> Criterion:
    """How many cells miss more often than 28 of 300 allows, against what chance allows (its 95 % point, over as many honest cells)."""
    mine = [p for p in parts(rows) if column in ("", p.row.key.column)]
    name = f"cells with more than {MISSES} misses of {OF} (or its like), {column or 'every column'}"
    if not mine:
        return Criterion(name, "-", "chance", None)
    beyond = [p for p in mine if p.beyond]
    allowed = int(binom.ppf(0.95, len(mine), TAIL))
    worst = min(mine, key=lambda p: float(binom.sf(p.misses - 1, p.intervals, 1 - LEVEL)))
    where = f"{len(mine)} cells; worst {worst.misses} of {worst.intervals} {worst.status}: {place(worst.row.key)}"
    return Criterion(name, str(len(beyond)), f"<= {allowed}", len(beyond) <= allowed, where)


Pairs = list[tuple[Row, Row]]  # an estimator's row and a rival's of the same policy


def pairs_of(rows: Sequence[Row], column: str, ours: str, theirs: str, keep: Callable[[Key], bool] = lambda key: True) -> Pairs:
    """Rows of two estimators for the same policy and setting, both with an RMSE. A rival that pools is met in its own line-up."""
    index = {row.key: row for row in rows}
    found = []
    for row in rows:
        key = row.key
        if (key.column, key.estimator) != (column, ours) or key.setting.startswith(ADVERSARIES) or not keep(key):
            continue
        other = index.get(key._replace(estimator=theirs, lineup=key.lineup if "board" in theirs else ""))
        if other is not None and row.rmse is not None and other.rmse:
            found.append((row, other))
    return found


def _rmse(rows: Iterable[Row]) -> float:
    """Median over cells."""
    return float(np.median([row.rmse for row in rows if row.rmse is not None]))


def _ratio(pair: tuple[Row, Row]) -> float:
    return (pair[0].rmse or 0.0) / (pair[1].rmse or math.inf)


def of_medians(name: str, pairs: Pairs, bound: float) -> Criterion:
    """The median RMSE over cells, over the rival's median: as the table of ESTIMATORS.md section 2 is read."""
    if not pairs:
        return Criterion(name, "-", f"<= {bound:.3f}", None)
    ours, theirs = _rmse(a for a, _ in pairs), _rmse(b for _, b in pairs)
    each = float(np.median([_ratio(p) for p in pairs]))
    where = f"{len(pairs)} cells: {ours:.4f} against {theirs:.4f} nats; median of the cells' ratios {each:.3f}"
    return Criterion(name, f"{ours / theirs:.3f}", f"<= {bound:.3f}", ours <= bound * theirs, where)


def median_ratio(name: str, pairs: Pairs, bound: float, strictly: bool = False) -> Criterion:
    """Median over cells of the ratio of two RMSEs."""
    sign = "<" if strictly else "<="
    if not pairs:
        return Criterion(name, "-", f"{sign} {bound:.3g}", None)
    median = float(np.median([_ratio(p) for p in pairs]))
    worst = max(pairs, key=_ratio)
    where = f"{len(pairs)} cells; worst {_ratio(worst):.3f}: {place(worst[0].key)}"
    return Criterion(name, f"{median:.3f}", f"{sign} {bound:.3g}", median < bound if strictly else median <= bound, where)


def never_worse(rows: Sequence[Row]) -> Criterion:
    """KL to the prior against k1 in every cell."""
    pairs = pairs_of(rows, "kl_prior", "klbench", "k1")
    name = "RMSE of kl_prior over k1's: largest over cells"
    if not pairs:
        return Criterion(name, "-", "<= 1", None)
    worst = max(pairs, key=_ratio)
    return Criterion(name, f"{_ratio(worst):.3f}", "<= 1", _ratio(worst) <= 1, f"{len(pairs)} cells; {place(worst[0].key)}")


def adversaries(rows: Sequence[Row]) -> list[Criterion]:
    """Of the figures certified against a hidden mode, those whose interval misses: at most one in twenty. So for wide ones."""
    found = []
    for row in rows:
        if row.key.setting.startswith(ADVERSARIES) and (row.key.estimator, row.key.column) == ("klbench", "reverse_kl"):
            for status in TRUTHFUL:
                tally = row.by_status.get(status)
                name = f"{row.replications} collapsed policies against a hidden mode: {status} figures that miss"
                if tally is None or not tally.intervals:
                    found.append(Criterion(name, "-", "<= 0.05", None))
                    continue
                share = tally.misses / tally.intervals
                where = f"{tally.misses} of {tally.intervals}: {tally.below} intervals below the truth, {tally.above} above"
                found.append(Criterion(name, f"{share:.3f}", "<= 0.05", share <= 0.05, where))
    return found


def _boards(boards: dict[str, Pairs], measured: set[str], which: str, lineups: Sequence[str], bound: float) -> list[Criterion]:
    """Two lines: on the targets of ESTIMATORS.md section 2, read as its table is; and cell by cell on all targets.

    Neither is judged unless all of its targets were `measured`.

    A ratio of medians over all targets would say which targets we added: where prior importance sampling is good already (few nats between
    prior and posterior), both share the error of KL - E[r]/beta. It is printed beside the second line.
    """
    name = "RMSE of reverse_kl over prior importance sampling's, boards"
    theirs = {x: [p for p in boards[x] if _target(p[0].key) in NINE] for x in lineups}
    out = []
    for pairs, make, how, targets in (
        (theirs, of_medians, "medians over cells, the targets of ESTIMATORS.md", NINE),
        (boards, median_ratio, "median of the cells' ratios, every target", EVERY),
    ):
        found = [(x, make(f"{name} {which}: {how}", pairs[x], bound)) for x in lineups if pairs[x]]
        if not found:
            out.append(make(f"{name} {which}: {how}", [], bound))
            continue
        lineup, worst = max(found, key=lambda pair: float(pair[1].measured))
        every = f"; ratio of medians {of_medians('', boards[lineup], bound).measured}" if make is median_ratio else ""
        missing = set(targets) - measured
        part = f"{len(targets) - len(missing)} of its {len(targets)} targets, not judged; " if missing else ""
        out.append(replace(worst, holds=None if missing else worst.holds, where=f"{part}{lineup}; {worst.where}{every}"))
    return out


def _target(key: Key) -> str:
    return key.setting.rpartition(" ")[0]


def _large(key: Key) -> bool:
    """1000 draws of each law and no rest, as in ESTIMATORS.md section 2."""
    return key.setting.endswith(" 1000+1000")


def criteria(rows: Sequence[Row]) -> list[Criterion]:
    """All of issue 4's "Must reach" that this table can show."""
    out = [coverage(rows, status, column) for column in ("reverse_kl", "") for status in TRUTHFUL]
    out += [worst_cell(rows, column) for column in ("reverse_kl", "")]
    boards = {
        lineup: pairs_of(rows, "reverse_kl", "board", "prior IS", lambda key, at=lineup: key.lineup == at and _large(key))  # type: ignore[misc]
        for lineup in ("+".join(NEAR_BOARD), "+".join(FAR_BOARD))
    }
    measured = {_target(row.key) for row in rows if _large(row.key)}
    out += _boards(boards, measured, "with a near policy", ["+".join(NEAR_BOARD)], 1 / 10)
    out += _boards(boards, measured, "that cover, the worst", list(boards), 1 / 6)
    for label, theirs in (("board", "parts, board"), ("klbench", "parts")):
        pairs = pairs_of(rows, "reverse_kl", label, theirs, lambda key: key.lineup != "+".join(COLLAPSED))
        out.append(median_ratio(f"RMSE of reverse_kl over that of separate parts, {label}: median", pairs, 1.0, strictly=True))
    out.append(never_worse(rows))
    long = pairs_of(rows, "kl_prior", "klbench", "k1", lambda key: " 32 " in key.setting and _large(key))
    out.append(median_ratio("RMSE of kl_prior over k1's, 32-token models: median", long, 1 / 3))
    return out + adversaries(rows)
