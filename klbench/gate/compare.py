"""From two sides to a verdict: is the candidate worse, by an amount that matters, beyond noise?

w_p = worsening at prompt p, mean over paired seeds: candidate - baseline for a metric to be small, baseline - candidate for one to be large
W   = mean_p w_p;     H0: W <= 0 (a band: W = 0)
p   = mean over sign vectors s in {-1, 1}^P of Pr(mean_p s_p w_p + sigma T_nu >= W)        paired permutation test, prompts as clusters
sigma^2 = (v_a + v_b) / S, v the variance of a training seed's mean: of the sides' own seeds, or as the gate's calibration measured it
se^2    = var_p(w_p) / P + sigma^2                                  upper = W + t_.95 se, the most worsening that is not refused at 5 %
seen    = max[(t_{1-a} + t_.8) se, margin - (t_.95 - t_.8) se]      the least worsening that is a regression four times in five,
                                                                    a = rate · weight / sum of weights

With fewer than FEW prompts no sign vector is rare enough to survive a correction for many metrics; there p is that of W / se under
Student's t. With Holm's correction, weighted, over all metrics of all policies:
    regression      p <= rate and upper >= margin: worse, and not shown to stay within the margin
    within margin   p <= rate and upper <  margin
    no regression   else, where upper < margin or seen <= margin: one of the margin's size would have been found
    inconclusive    else: could not have seen one

reverse_kl is compared through free = KL(q‖p0) − E_q[r]/β, in which log Z cancels, whatever the status. Other columns with Z or p* in them
are compared where both sides may be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from typing import Final, final

import numpy as np
from scipy.special import ndtr, stdtr, stdtrit

from klbench.estimate import Array, Estimate
from klbench.gate.settings import ESTIMATOR, Gate, Metric, base
from klbench.gate.sides import Cell, Difference, Pair, pairs
from klbench.measure import COLUMNS
from klbench.ranks import holm
from klbench.record import Record

CODES: Final = {"pass": 0, "regression": 1, "inconclusive": 3, "not comparable": 4, "nothing measured": 5}
WHOLE: Final = Cell("every task", "every policy", 0.0)  # where a metric is one of the estimators, over all policies
FLIPS: Final = 20_000  # sign vectors; a tenth of them where p is above CLEAR
CLEAR: Final = 0.02
FEW: Final = 15  # prompts, of which there are 2^15 sign vectors
POWER: Final = 0.8
UNPAIRED_DOF: Final = 30.0
PER_PROMPT: Final = {"reverse_kl": "free"}  # columns whose paired array has another name
TRUSTED: Final = ("exact", "certified", "wide", "lower", "upper")
ORDER: Final = ("regression", "inconclusive", "within margin", "no regression", "not compared", "info")


@final
@dataclass(frozen=True)
class Shift:
    """Evidence on one metric of one cell. values [P]: worsening at each cluster (a prompt, or a policy).

    sigma, dof: standard error that the clusters do not show, of training seeds or of figures that are not paired.
    """

    values: Array
    sigma: float = 0.0
    dof: float = math.inf

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def spread(self) -> float:
        """Standard error of the mean over clusters; one cluster says nothing of it."""
        return float(self.values.std(ddof=1) / math.sqrt(len(self.values))) if len(self.values) > 1 else 0.0

    @property
    def stderr(self) -> float:
        return math.hypot(self.spread, self.sigma)

    @property
    def freedom(self) -> float:
        """Satterthwaite's degrees of freedom of `stderr`."""
        if not self.stderr:
            return math.inf
        parts = self.spread**4 / max(len(self.values) - 1, 1) + (self.sigma**4 / self.dof if self.dof else 0.0)
        return min(self.stderr**4 / parts if parts else math.inf, 1e6)

    def p(self, two_sided: bool) -> float:
        """Of H0, see the module. 1 where nothing differs, 0 where two exact figures do."""
        size = float(np.abs(self.values).max())
        if size < 1e-12:
            return 1.0
        w = abs(self.mean) if two_sided else self.mean
        sides = 2.0 if two_sided else 1.0
        if len(self.values) < FEW:
            if not self.stderr:
                return float(w <= 0)
            return min(1.0, sides * float(stdtr(self.freedom, -w / self.stderr)))
        for flips in (FLIPS // 10, FLIPS):
            means = _signs(len(self.values))[:flips] @ self.values / len(self.values)
            if not self.sigma:
                found = float((means >= w - 1e-9 * size).mean())
            else:
                found = float((ndtr if self.dof > 200 else partial(stdtr, self.dof))((means - w) / self.sigma).mean())
            if found > CLEAR:  # not worth more digits
                break
        return min(1.0, sides * found)

    def upper(self, two_sided: bool) -> float:
        """The largest worsening that is not refused at 5 %, one-sided."""
        return (abs(self.mean) if two_sided else self.mean) + _quantile(0.95, self.freedom) * self.stderr

    def seen(self, level: float, margin: float, two_sided: bool) -> float:
        """The least worsening that is a regression with probability POWER: beyond noise for a test at `level`, and not shown to be within
        the margin. Infinite where the test could find none at all."""
        each = level / 2 if two_sided else level
        if not self.sigma and self.spread and FEW <= len(self.values) < -math.log2(each):
            return math.inf  # even if every prompt were worse
        beyond, power, refused = (_quantile(x, self.freedom) * self.stderr for x in (1 - each, POWER, 0.95))
        least = beyond + power
        if self.sigma and len(self.values) >= FEW:  # flipped signs spread a shift d too: d = power + beyond sqrt(1 + d^2 / P se^2)
            rest = 1 - _quantile(1 - each, self.freedom) ** 2 / len(self.values)
            if rest <= 0:
                return math.inf
            least = (power + math.sqrt(power**2 - rest * (power**2 - beyond**2))) / rest
        return max(least, margin - (refused - power))


def _quantile(level: float, dof: float) -> float:
    return float(stdtrit(min(dof, 1e6), level))


@cache
def _signs(clusters: int) -> Array:
    """[FLIPS, P] sign vectors, drawn once for all hypotheses: each with its opposite, the given signs among them."""
    drawn = np.random.default_rng(0).integers(0, 2, (FLIPS // 2, clusters), dtype=np.int8) * 2.0 - 1.0
    drawn[0] = 1.0
    return np.stack([drawn, -drawn], 1).reshape(-1, clusters)


@final
@dataclass(frozen=True)
class Comparison:
    """One metric of one cell. worse: W in the metric's unit, None where it was not compared; p: after Holm; the rest as in the module."""

    cell: Cell
    metric: str
    asked: Metric
    seeds: str
    verdict: str
    baseline: float | None
    candidate: float | None
    note: str = ""
    worse: float | None = None
    upper: float | None = None
    seen: float | None = None
    p: float | None = None
    shift: Shift | None = field(default=None, repr=False, compare=False)

    @property
    def decides(self) -> bool:
        return self.shift is not None and self.asked.direction != "info"

    @property
    def unit(self) -> str:
        if self.metric.startswith("stderr."):
            return "in log"
        column = COLUMNS.get(base(self.metric))
        return column.unit if column else ""

    @property
    def why(self) -> str:
        """One sentence for people."""
        name = f"{self.metric} of {self.cell.method} on {self.cell.task}"
        if self.worse is None or self.asked.direction == "info":
            return f"{name}: {self.note or 'shown, decides nothing'}"
        unit = f" {self.unit}" if self.unit else ""
        way = {"min": "rose", "max": "fell", "band": "moved"}[self.asked.direction]
        other = {"min": "fell", "max": "rose", "band": "moved"}[self.asked.direction]
        size = abs(self.worse)
        moved = f"{way if self.worse >= 0 else other} by {size:.3g}{unit}" if size else "did not move"
        said = f"{name} {moved}{self._between}"
        p = "p < 0.0001" if (self.p or 0.0) < 1e-4 else f"p = {self.p:.2g}"
        if self.verdict == "regression":
            said += f", beyond noise ({p} after Holm) and not shown to stay within the margin {self.asked.margin:g}"
        elif self.verdict == "within margin":
            said += f", beyond noise ({p} after Holm) but within the margin {self.asked.margin:g} (at most {self.upper:.3g})"
        elif self.verdict == "inconclusive" and self.seen is not None and self.seen > (self.asked.margin or 0.0):
            least = "none could" if math.isinf(self.seen or 0.0) else f"only one of {self.seen:.3g} or more would"
            said += f"; too little data: the margin is {self.asked.margin:g}, and {least} have been found"
        elif self.verdict == "no regression":
            said += f"; at most {max(self.upper or 0.0, 0.0):.3g} worse (95 %), and a worsening of {self.seen:.3g} would have been found"
        return f"{said}; {self.note}" if self.note else said

    @property
    def _between(self) -> str:
        return "" if self.baseline is None or self.candidate is None else f" ({self.baseline:.4g} to {self.candidate:.4g})"


@final
@dataclass(frozen=True)
class Verdict:
    """The whole of it. new: cells that only the candidate has."""

    outcome: str
    comparisons: tuple[Comparison, ...]
    differences: tuple[Difference, ...]
    new: tuple[Cell, ...]
    gate: Gate

    @property
    def code(self) -> int:
        return CODES[self.outcome]

    def of(self, verdict: str) -> list[Comparison]:
        return [c for c in self.comparisons if c.verdict == verdict]

    @property
    def sentence(self) -> str:
        """What it comes to, in one."""
        decided = [c for c in self.comparisons if c.decides]
        cells = len({c.cell for c in decided} - {WHOLE})
        if self.outcome == "not comparable":
            more = f", and {len(self.differences) - 1} more" if len(self.differences) > 1 else ""
            return f"{self.differences[0]}{more}"
        if self.outcome == "nothing measured":
            return "no metric of the gate could be compared for any policy"
        if self.outcome == "regression":
            found = self.of("regression")
            worst = max(found, key=lambda c: (c.worse or 0.0) / (c.asked.margin or 1.0))
            return worst.why + (f"; {len(found) - 1} more" if len(found) > 1 else "")
        if self.outcome == "inconclusive":
            found = self.of("inconclusive")
            return f"{len(found)} of {len(decided)} comparisons could not have seen a regression of the margin's size: {found[0].why}"
        return f"no regression found in {len(decided)} comparisons of {cells} policies; each could have seen one of its margin's size"


SeedNoise = Mapping[str, tuple[float, float]]  # by `key`: standard deviation over training seeds, and its degrees of freedom


def key(cell: Cell, metric: str) -> str:
    return f"{cell.task}|{cell.method}|{cell.beta:g}|{metric}"


def check(baseline: Sequence[Record], candidate: Sequence[Record], gate: Gate, seeds: SeedNoise | None = None) -> Verdict:
    """The verdict. seeds: the noise of training seeds that a calibration measured. Raises UserError for two records of one policy."""
    found, differences, new = pairs(baseline, candidate, gate)
    shifts = [c for pair in found for c in _of_pair(pair, gate, seeds or {})]
    return decide([*shifts, *_of_estimators(found, gate)], differences, new, gate)


def decide(given: Sequence[Comparison], differences: Sequence[Difference], new: Sequence[Cell], gate: Gate) -> Verdict:
    """Verdicts from evidence: Holm over everything that decides, then the outcome by precedence."""
    deciding = [c for c in given if c.decides]
    weights = np.array([c.asked.weight for c in deciding])
    adjusted = holm([_p(c) for c in deciding], weights)
    judged = iter(
        _judged(c, float(p), gate.rate * c.asked.weight / weights.sum(), gate.rate) for c, p in zip(deciding, adjusted, strict=True)
    )
    comparisons = tuple(next(judged) if c.decides else c for c in given)
    verdicts = {c.verdict for c in comparisons}
    outcome = "pass"
    if differences:
        outcome = "not comparable"
    elif not verdicts - {"not compared", "info"}:
        outcome = "nothing measured"
    elif "regression" in verdicts:
        outcome = "regression"
    elif "inconclusive" in verdicts:
        outcome = "inconclusive"
    ordered = sorted(comparisons, key=lambda c: ORDER.index(c.verdict))
    return Verdict(outcome, tuple(ordered), tuple(differences), tuple(new), gate)


def _p(comparison: Comparison) -> float:
    assert comparison.shift is not None
    if math.isinf(comparison.shift.mean):
        return 0.0 if comparison.shift.mean > 0 or comparison.asked.direction == "band" else 1.0
    return comparison.shift.p(comparison.asked.direction == "band")


def _judged(given: Comparison, p: float, level: float, rate: float) -> Comparison:
    assert given.shift is not None and given.asked.margin is not None
    shift, two_sided, margin = given.shift, given.asked.direction == "band", given.asked.margin
    if math.isinf(shift.mean):
        known = replace(given, worse=shift.mean, upper=shift.mean, seen=0.0, p=p)
        return replace(known, verdict="regression" if p <= rate else "no regression")
    known = replace(given, worse=shift.mean, upper=shift.upper(two_sided), seen=shift.seen(level, margin, two_sided), p=p)
    assert known.upper is not None and known.seen is not None
    if p <= rate:
        return replace(known, verdict="regression" if known.upper >= margin else "within margin")
    if given.verdict == "inconclusive" or (known.upper >= margin and known.seen > margin):
        return replace(known, verdict="inconclusive")
    return replace(known, verdict="no regression")


# --- evidence ---


def _of_pair(pair: Pair, gate: Gate, seeds: SeedNoise) -> Iterator[Comparison]:
    for metric in gate.metrics:
        if not metric.startswith(ESTIMATOR):
            found = _of_column(pair, metric, gate.metric(metric, pair.cell.task, pair.cell.method), gate, seeds)
            if found is not None:
                yield found


def _of_column(pair: Pair, metric: str, asked: Metric, gate: Gate, seeds: SeedNoise) -> Comparison | None:
    """Evidence on one column of one cell, None where neither side has it."""
    a, b = ([record.columns.get(metric) for record in side] for side in (pair.baseline, pair.candidate))
    given = Comparison(pair.cell, metric, asked, pair.seeds, "not compared", _mean(a), _mean(b))
    if not any(a) and not any(b):
        return None
    if asked.direction == "info":
        return replace(given, verdict="info")
    about = COLUMNS.get(metric)
    if gate.rewards_differ and (metric == "reward" or (about is not None and about.posterior)):
        return replace(given, note="rewards differ, so this figure is of two different things")
    if given.baseline is None and metric not in PER_PROMPT:
        return replace(given, note="the baseline has no figure")
    array = PER_PROMPT.get(metric, metric)
    paired = all(array in record.prompts for record in (*pair.baseline, *pair.candidate))
    if given.candidate is None and not paired:
        return replace(given, verdict="inconclusive", note="the candidate has no figure, the baseline has one")
    sign = -1.0 if asked.direction == "max" else 1.0
    noise, dof, note = _seed_noise(pair, metric, a, b, array if paired else "", seeds)
    if about is not None and about.posterior:
        trust_a, trust_b = (all(x is not None and x.status in TRUSTED for x in side) for side in (a, b))
        if trust_a and not trust_b:
            given = replace(given, verdict="inconclusive", note="certified before and uncertified now")
        elif not trust_a and not paired:
            return replace(given, note="uncertified on both sides" if not trust_b else "the baseline's figure is uncertified")
        elif not trust_a:
            note = "; ".join(filter(None, ("the figures are uncertified, their paired difference needs no log Z", note)))
    if all(x is not None and x.status == "exact" for x in (*a, *b)):
        paired, noise = False, 0.0
    if paired:
        was, now = (np.mean([record.prompts[array] for record in side], axis=0) for side in (pair.baseline, pair.candidate))
        shift = Shift(sign * (now - was), noise, dof)
    elif given.candidate is None:
        return given
    else:
        assert given.baseline is not None
        worse = sign * (given.candidate - given.baseline)
        if math.isnan(worse):
            return replace(given, note="infinite on both sides")
        drawn = [x.stderr or 0.0 for x in (*a, *b) if x is not None]
        error = math.sqrt(sum(e**2 for e in drawn)) / len(a)
        shift = Shift(np.array([worse]), math.hypot(error, noise), min(dof, UNPAIRED_DOF))
    return replace(given, shift=shift, note=given.note or note)


def _mean(figures: Sequence[Estimate | None]) -> float | None:
    values = [f.value for f in figures if f is not None and f.value is not None]
    return float(np.mean(values)) if len(values) == len(figures) else None


def _seed_noise(
    pair: Pair, metric: str, a: Sequence[Estimate | None], b: Sequence[Estimate | None], array: str, seeds: SeedNoise
) -> tuple[float, float, str]:
    """Standard error of W from training seeds, its degrees of freedom, and what to say where nothing is known of it."""
    if pair.baseline[0].run.kind != "objective":
        return 0.0, math.inf, ""
    count = len(pair.baseline)
    if (known := seeds.get(key(pair.cell, metric))) is not None:
        return known[0] * math.sqrt(2 / count), known[1], ""
    if count == 1:
        return 0.0, math.inf, "one training seed: this is about these two checkpoints"
    sides = (
        ([float(np.mean(r.prompts[array])) for r in side] for side in (pair.baseline, pair.candidate))
        if array
        else ([f.value for f in side if f is not None and f.value is not None] for side in (a, b))
    )
    variances = [float(np.var(side, ddof=1)) for side in sides]
    return math.sqrt(sum(variances) / count), 2.0 * (count - 1), ""


def _of_estimators(found: Sequence[Pair], gate: Gate) -> Iterator[Comparison]:
    """How good the figures themselves are, with policies as clusters: log of the standard error, and distance to the truth."""
    for metric, asked in gate.metrics.items():
        if not metric.startswith(ESTIMATOR):
            continue
        column, of_truth = base(metric), metric.startswith("error.")
        rows = [[_quality(r, column, of_truth) for r in side] for pair in found for side in (pair.baseline, pair.candidate)]
        both = [(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True) if None not in (*a, *b)]
        if not both:
            continue
        was, now = (np.array([np.mean(x) for x in side], dtype=np.float64) for side in zip(*both, strict=True))
        sign = -1.0 if asked.direction == "max" else 1.0
        given = Comparison(WHOLE, metric, asked, "", "info", float(was.mean()), float(now.mean()))
        yield given if asked.direction == "info" else replace(given, verdict="not compared", shift=Shift(sign * (now - was)))


def _quality(record: Record, column: str, of_truth: bool) -> float | None:
    figure = record.columns.get(column)
    if figure is None or figure.value is None or not math.isfinite(figure.value):
        return None
    if of_truth:
        truth = record.truths.get(column)
        return None if truth is None or not math.isfinite(truth) else abs(figure.value - truth)
    return math.log(figure.stderr) if figure.stderr else None


def by_cell(comparisons: Sequence[Comparison]) -> list[tuple[Cell, list[Comparison]]]:
    """Grouped for showing."""
    ordered = sorted(comparisons, key=lambda c: (c.cell == WHOLE, c.cell.task, c.cell.method, c.cell.beta))
    return [(cell, list(group)) for cell, group in groupby(ordered, key=lambda c: c.cell)]
