"""A metric over the committed versions of a baseline file, and the commits at which it changed.

y_i   = mean over policies of the metric at version i; its interval is y_i ± 1.96 · (mean of the figures' standard errors)        shown
x_i   = x_{i−1} + mean over the policies of both versions of their paired difference                                              tested
s_i²  = the larger of Σ_c stderr_c² / C² over the C figures, and v / C, v the variance over training seeds, pooled over versions

x follows the policies that both neighbours have, so that one that joins or leaves moves nothing; for reverse_kl it is the difference of
free = KL(q‖p0) − E_q[r]/β, in which log Z cancels. Policies draw for themselves, so their errors are independent in s_i; the bank that
they share is in the interval of y_i, where errors are therefore added, and is that of the neighbouring versions too.

Change points: the partition of x into stretches of constant mean that minimises

    Σ over stretches Σ_i (x_i − mean)² / s_i²  +  λ · changes            mean weighted by 1/s_i²

found exactly by dynamic programming (Jackson et al. 2005, IEEE Signal Processing Letters 12, 105-108). Where nothing changes and the errors
are normal with these s_i, m changes at given places lower the sum by a χ² with m degrees of freedom, so with λ from

    Σ_{m=1}^{n−1} C(n−1, m) · Pr(χ²_m ≥ m λ) = RATE

the chance of any mark in a series of n versions is at most RATE. With one training seed v is unknown: a mark is then about checkpoints,
and not about the method that made them.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import numpy as np
from scipy.special import gammaincc, gammaln

from klbench.errors import UserError, unknown
from klbench.estimate import Array, Estimate
from klbench.gate import sides
from klbench.gate.settings import DEFAULT
from klbench.measure import COLUMNS, OPEN
from klbench.record import Record, write_atomically

if TYPE_CHECKING:
    from klbench.page import timeline

RATE: Final = 0.01  # of a mark in a series without a change, at most
UNTRUSTED: Final = ("uncertified", "infeasible")
FORMATS: Final = ("html", "png")
HEAD: Final = ("commit", "date", "task", "policies", "value", "low", "high", "mark", "subject")


@final
@dataclass(frozen=True)
class Version:
    """A committed version of the file."""

    commit: str
    date: str
    subject: str
    records: tuple[Record, ...]


@final
@dataclass(frozen=True)
class Point:
    """A task at a version. low, high: None where a figure in the mean is not certified. linked: whether x goes on from the version before.

    level: x_i, from the first version of the stretch that can be compared.  stderr: s_i.  step: what the metric moved by here, None where
    no change is marked.
    """

    version: Version
    policies: int
    value: float
    low: float | None
    high: float | None
    level: float
    stderr: float
    linked: bool
    step: float | None = None


@final
@dataclass(frozen=True)
class History:
    """points: by task, oldest first."""

    file: str
    metric: str
    points: dict[str, tuple[Point, ...]]

    def mark(self, point: Point) -> str:
        """What to say of a version."""
        if not point.linked:
            return "cannot be compared with the version before"
        if point.step is None:
            return ""
        better = COLUMNS[self.metric].better if self.metric in COLUMNS else ""
        if not better:
            return f"moved by {point.step:+.3g}"
        return f"{'better' if (point.step < 0) == (better == 'low') else 'worse'} by {abs(point.step):.3g}"


# --- versions ---


def read(
    file: Path, metric: str, tasks: Sequence[str] = (), policies: Sequence[str] = (), passed_over: Callable[[str], None] = lambda text: None
) -> History:
    """The history of a metric in a file. Each version that cannot be read is told to `passed_over`.

    Raises UserError where the file is not under git, no version of it can be read, or none has the metric, the task or the policy.
    """
    if metric not in COLUMNS and not metric.startswith(OPEN):
        raise unknown("column", metric[:60], COLUMNS)
    unread: list[str] = []
    found = list(_versions(file, unread.append))
    if not found:
        raise UserError(f"{file}: no committed version of it can be read; the last: {unread[-1]}")
    records = [r for version in found for r in version.records]
    for kind, asked, known in (("task", tasks, {r.run.task for r in records}), ("policy", policies, {r.run.method for r in records})):
        for name in asked:
            if name not in known:
                raise unknown(kind, name[:60], known)
    wanted = sorted(set(tasks) or {r.run.task for r in records})
    series = {task: _series(found, task, metric, set(policies)) for task in wanted}
    if not any(series.values()):
        raise UserError(f"{file}: no version of it has the column {metric}")
    for text in unread:
        passed_over(f"passed over {text}")
    return History(file.name, metric, {task: points for task, points in series.items() if points})


def _versions(file: Path, passed_over: Callable[[str], None]) -> Iterator[Version]:
    """Oldest first, along the first parents: what stood on this branch, through renames."""
    if not file.absolute().parent.is_dir():
        raise UserError(f"no file {file}")
    log = ["log", "--follow", "--first-parent", "--name-only", "-z", "--format=%H%x00%cs%x00%s", "--", file.name]
    words = [os.fsdecode(word) for word in _git(file, *log).split(b"\0")]
    if len(words) < 3:
        raise UserError(f"{file}: no version of it is committed")
    commits: list[tuple[str, str, str, str]] = []
    at, name = 0, ""
    while at + 3 <= len(words):
        commit, date, subject = words[at : at + 3]
        at += 3
        while at < len(words) and words[at].startswith("\n"):  # no name where a merge took the file as it was
            name, at = words[at][1:], at + 1
        commits.append((commit, date, subject, name))
    for commit, date, subject, name in reversed(commits):
        try:
            yield Version(commit, date, subject, tuple(sides.parse(_git(file, "cat-file", "blob", f"{commit}:{name}"), Path(name))))
        except UserError as error:
            passed_over(f"{commit[:10]}: {error}")


def _git(file: Path, *words: str) -> bytes:
    """What git prints, asked in the folder of the file. Raises UserError with git's last line."""
    plain = ["-c", "log.showSignature=false", "-c", "color.ui=false", "--no-pager", "--literal-pathspecs"]
    try:
        done = subprocess.run(["git", *plain, *words], cwd=file.absolute().parent, capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError("git is not installed, and a history is read from git") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["git failed"]
        raise UserError(f"{file}: {said[-1].removeprefix('fatal: ')[:200]}")
    return done.stdout


# --- a series ---


def _series(versions: Sequence[Version], task: str, metric: str, policies: set[str]) -> tuple[Point, ...]:
    """Of one task. A version without the task or the metric has no point."""
    kept = []
    for version in versions:
        mine = [r for r in version.records if r.run.task == task and (not policies or r.run.method in policies)]
        mine = [r for r in mine if _is_number(r.columns.get(metric))]
        if mine:
            kept.append((version, mine))
    seeds = _seed_variance([mine for _, mine in kept], metric)
    points: list[Point] = []
    for i, (version, mine) in enumerate(kept):
        figures = [r.columns[metric] for r in mine]
        value = _mean_of_cells(mine, [f.value or 0.0 for f in figures])
        added = math.hypot(_mean_of_cells(mine, [f.stderr or 0.0 for f in figures]), math.sqrt(seeds / len(mine)))
        trusted = all(f.status not in UNTRUSTED for f in figures)
        drawn = math.sqrt(sum(_level(r, metric)[1] ** 2 for r in mine)) / len(mine)
        step = _step(kept[i - 1][1], mine, metric) if i else None
        points.append(
            Point(
                version,
                len({(r.run.method, r.run.beta) for r in mine}),
                value,
                value - 1.96 * added if trusted else None,
                value + 1.96 * added if trusted else None,
                points[-1].level + step if step is not None else 0.0,
                max(drawn, math.sqrt(seeds / len(mine))),
                step is not None or not i,
            )
        )
    return tuple(_marked(points))


def _marked(points: Sequence[Point]) -> Iterator[Point]:
    """The points with their steps, each stretch of comparable versions tested by itself."""
    starts = [i for i, p in enumerate(points) if not i or not p.linked]
    for start, end in pairwise([*starts, len(points)]):
        part = points[start:end]
        x, s = np.array([p.level for p in part]), np.array([p.stderr for p in part])
        changes = change_points(x, s)
        ends = [0, *changes, len(part)]
        means = [_weighted(x[a:b], s[a:b]) for a, b in pairwise(ends)]
        steps = {at: after - before for at, (before, after) in zip(changes, pairwise(means), strict=True)}
        for i, point in enumerate(part):
            yield Point(**{**vars(point), "step": steps.get(i)})


def _level(record: Record, metric: str) -> tuple[float, float]:
    """A figure whose difference between two versions is the metric's, and its standard error."""
    if metric == "reverse_kl" and "free" in record.prompts:
        errors = np.array(record.prompts.get("free_stderr", [0.0]))
        return float(np.mean(record.prompts["free"])), float(np.sqrt((errors**2).sum())) / len(record.prompts["free"])
    figure = record.columns[metric]
    return float(figure.value or 0.0), figure.stderr or 0.0


def _is_number(figure: Estimate | None) -> bool:
    return figure is not None and figure.value is not None and math.isfinite(figure.value)


def _mean_of_cells(records: Sequence[Record], values: Sequence[float]) -> float:
    """Mean over policies of the mean over their seeds."""
    cells: dict[tuple[str, float], list[float]] = {}
    for record, value in zip(records, values, strict=True):
        cells.setdefault((record.run.method, record.run.beta), []).append(value)
    return float(np.mean([np.mean(found) for found in cells.values()]))


def _seed_variance(versions: Sequence[Sequence[Record]], metric: str) -> float:
    """Of one training run, pooled over all policies and versions with several seeds; 0 where none has."""
    squares, count = 0.0, 0
    for records in versions:
        cells: dict[tuple[str, float], list[float]] = {}
        for record in records:
            cells.setdefault((record.run.method, record.run.beta), []).append(_level(record, metric)[0])
        for found in cells.values():
            squares += float(((np.array(found) - np.mean(found)) ** 2).sum())
            count += len(found) - 1
    return squares / count if count else 0.0


def _step(was: Sequence[Record], now: Sequence[Record], metric: str) -> float | None:
    """Mean paired difference over the policies of both versions, None where no policy can be compared."""
    found, _, _ = sides.pairs(was, now, DEFAULT)
    if not found:
        return None
    level = lambda side: float(np.mean([_level(r, metric)[0] for r in side]))  # noqa: E731
    return float(np.mean([level(pair.candidate) - level(pair.baseline) for pair in found]))


# --- change points ---


def change_points(x: Array, stderr: Array) -> list[int]:
    """Indices at which a new stretch begins, see the module. x, stderr [n]; a standard error of 0 is a figure without noise."""
    n = len(x)
    if n < 2:
        return []
    scale = float(np.abs(x - x[0]).max())
    if scale < 1e-12:
        return []
    weight = 1.0 / np.maximum(stderr, 1e-9 * scale) ** 2
    price = penalty(n)
    # Welford's update, for all starts at once: cost[s] is that of the stretch from s to here.
    cost, mean, total = np.zeros(n), np.zeros(n), np.zeros(n)
    best, came = np.full(n + 1, -price), np.zeros(n + 1, dtype=int)
    for end in range(n):
        here = slice(0, end + 1)
        away = x[end] - mean[here]
        cost[here] += weight[end] * away**2 * total[here] / (total[here] + weight[end])
        total[here] += weight[end]
        mean[here] += away * weight[end] / total[here]
        choices = best[here] + cost[here] + price
        came[end + 1] = int(np.argmin(choices))
        best[end + 1] = choices[came[end + 1]]
    found, at = [], n
    while (at := int(came[at])) > 0:
        found.append(at)
    return found[::-1]


@cache
def penalty(n: int) -> float:
    """λ for n versions, by bisection; see the module."""
    m = np.arange(1, n, dtype=np.float64)
    ways = gammaln(n) - gammaln(m + 1) - gammaln(n - m)  # log C(n - 1, m)

    def chance(price: float) -> float:
        tails = gammaincc(m / 2, m * price / 2)
        bound = -m / 2 * (price - 1 - math.log(price))  # Chernoff's, where the tail is below the least float
        logs = np.where(tails > 0, np.log(np.maximum(tails, 1e-320)), bound)
        return float(np.exp(np.minimum(ways + logs, 0.0)).sum())

    low, high = 1.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) > RATE else (low, middle)
    return high


def _weighted(x: Array, stderr: Array) -> float:
    return float(np.average(x, weights=1 / stderr**2)) if (stderr > 0).all() else float(x.mean())


# --- shown ---


def rows(history: History) -> Iterator[list[str]]:
    """What HEAD names, by task, oldest first."""
    for task, points in history.points.items():
        for p in points:
            ends = ["" if end is None else f"{end:.4g}" for end in (p.low, p.high)]
            version = p.version
            yield [
                version.commit[:10], version.date, task, str(p.policies), f"{p.value:.4g}", *ends, history.mark(p), version.subject[:72],
            ]  # fmt: skip


def _spot(history: History, p: Point) -> timeline.Spot:
    from klbench.page import timeline

    commit, date, subject = p.version.commit[:10], p.version.date, _printable(p.version.subject)
    return timeline.Spot(commit, date, subject, p.policies, p.value, p.low, p.high, p.linked, history.mark(p))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def format_of(out: Path) -> str:
    """html or png, by the file's name. Raises UserError."""
    kind = out.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UserError(f"--out {out}: a name that ends in .html or .png expected")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no directory {out.parent}")
    return kind


def write(history: History, out: Path, kind: str) -> None:
    """The picture, atomically. kind: one of FORMATS."""
    from klbench.page import timeline

    unit = COLUMNS[history.metric].unit if history.metric in COLUMNS else ""
    label = f"{history.metric}, {unit}" if unit else history.metric
    drawn = {_printable(task): [_spot(history, p) for p in points] for task, points in history.points.items()}
    data = (
        timeline.png(drawn, label)
        if kind == "png"
        else timeline.page(drawn, label, _printable(history.file), RATE).encode("utf-8", "replace")
    )
    try:
        write_atomically(out, data)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
