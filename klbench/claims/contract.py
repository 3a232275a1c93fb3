"""A claim of the literature, the experiment that reruns it, and its verdict.

An experiment measures; a check says in which range each measured number has to lie. With a 95 % interval inside the range a check holds,
apart from it it fails, across its edge it is inconclusive; what is summed exactly has no interval. A claim holds when all its checks hold,
fails when one fails. A *refutation* is a claim that is expected to fail: its checks are those of the counterexample, and when all of them
hold the statement fails; when they do not, nothing was refuted and the verdict is inconclusive.

Every experiment takes `wrong`: it then runs with the one named wrong ingredient, and must not say `holds` (nor, refuting, `fails`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from klbench.estimate import t_quantile

VERDICTS: Final = ("holds", "fails", "inconclusive")


@final
@dataclass(frozen=True)
class Check:
    """One measured number. least, most: the range in which the claim puts it.  low, high: the 95 % interval of the measurement, both equal
    to `measured` where it is exact.  predicted: the number that the paper or OBJECTIVES.md gives, where it gives one.
    """

    name: str
    measured: float
    least: float = -math.inf
    most: float = math.inf
    low: float | None = None
    high: float | None = None
    predicted: float | None = None

    @property
    def verdict(self) -> str:
        low, high = (self.measured if x is None else x for x in (self.low, self.high))
        if math.isnan(self.measured) or high < self.least or low > self.most:
            return "fails"
        return "holds" if self.least <= low and high <= self.most else "inconclusive"


def near(name: str, measured: float, predicted: float, tolerance: float) -> Check:
    """An exact number that has to be within `tolerance` of the predicted one."""
    return Check(name, float(measured), predicted - tolerance, predicted + tolerance, predicted=predicted)


def at_most(name: str, measured: float, bound: float, predicted: float | None = None) -> Check:
    """An exact number that may not exceed a bound."""
    return Check(name, float(measured), most=bound, predicted=predicted)


def at_least(name: str, measured: float, bound: float, predicted: float | None = None) -> Check:
    """An exact number that has to reach a bound."""
    return Check(name, float(measured), least=bound, predicted=predicted)


def mean_of(
    name: str, samples: Sequence[float] | np.ndarray, least: float = -math.inf, most: float = math.inf, predicted: float | None = None
) -> Check:
    """The mean of independent repetitions, with its t interval."""
    x = np.asarray(samples, dtype=np.float64)
    half = t_quantile(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    mean = float(x.mean())
    return Check(name, mean, least, most, mean - half, mean + half, predicted)


def share_of(name: str, hits: int, of: int, least: float = 0.0, most: float = 1.0, predicted: float | None = None) -> Check:
    """A share, with Wilson's interval."""
    z, p = 1.959964, hits / of
    centre, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return Check(name, p, least, most, (centre - half) / scale, (centre + half) / scale, predicted)


Experiment = Callable[[bool], Sequence[Check]]


@final
@dataclass(frozen=True)
class Claim:
    """id: `C06`, or `F03` for a statement that is expected to fail.  wrong: the wrong ingredient, in words.  note: what qualifies it, or
    what was tried where it does not reproduce.
    """

    id: str
    statement: str
    source: str
    wrong: str
    experiment: Experiment
    expected: str = "holds"
    refutes: bool = False
    tier: str = "exact"
    note: str = ""

    def run(self, wrong: bool = False) -> Verdict:
        """The verdict of the experiment, or of the same with the wrong ingredient."""
        checks = tuple(self.experiment(wrong))
        found = {check.verdict for check in checks}
        if self.refutes:
            verdict = "fails" if found == {"holds"} else "inconclusive"
        else:
            verdict = "fails" if "fails" in found else "inconclusive" if "inconclusive" in found else "holds"
        return Verdict(self, checks, verdict)


@final
@dataclass(frozen=True)
class Verdict:
    """A claim with what was measured. as_expected: whether the verdict is the one that the catalogue expects."""

    claim: Claim
    checks: tuple[Check, ...]
    verdict: str

    @property
    def as_expected(self) -> bool:
        return self.verdict == self.claim.expected


CLAIMS: Final[dict[tuple[str, str], Claim]] = {}  # by tier and id


def claim(
    id: str, statement: str, *, source: str, wrong: str, expected: str = "holds", refutes: bool = False, tier: str = "exact", note: str = ""
) -> Callable[[Experiment], Experiment]:
    """Registers an experiment under its id."""

    def register(experiment: Experiment) -> Experiment:
        if (tier, id) in CLAIMS or expected not in VERDICTS:
            raise ValueError(f"claim {id}: twice, or expected {expected!r}")
        CLAIMS[tier, id] = Claim(id, statement, source, wrong, experiment, expected, refutes, tier, note)
        return experiment

    return register
