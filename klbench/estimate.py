"""An estimate with its error, and the block jackknife that every interval of klbench comes from.

Conventions: nats, float64, arrays [P] a prompt or [B, P] a left-out block and a prompt. `low`/`high` answer for these prompts,
`population` for prompts like these (ESTIMATORS.md section 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]

BLOCKS: Final = 8  # of the delete-a-block jackknife
LEAST_DRAWS: Final = 16  # below this many draws a prompt no interval covers (ESTIMATORS.md section 1)
CERTIFIED: Final = 30.0  # reach at which an interval is certified
WIDE: Final = 1.0  # reach at which a stretched interval is still truthful

STATUSES: Final = ("exact", "certified", "wide", "uncertified", "lower", "upper", "infeasible")


@dataclass(frozen=True)
class Estimate:
    """One figure. `status` is one of STATUSES; `low`, `high` and `population` are None where no interval can be trusted.

    value: nats unless the column says otherwise; None where there is none; inf is a value.  stderr: of the value, these prompts.
    n: draws that enter.  ess: effective sample size of the weights behind it, shown and never used to certify.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    n: int = 0
    ess: float | None = None
    status: str = "certified"
    reason: str = ""
    population: tuple[float, float] | None = None

    NUMBERS: ClassVar = ("value", "low", "high", "stderr", "ess")

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")
        numbers = (self.value, self.low, self.high, self.stderr, self.ess)
        if any([x != x for x in numbers]):  # only NaN differs from itself, and a large board has a million of these
            name = next(name for name in self.NUMBERS if (x := getattr(self, name)) != x)
            raise ValueError(f"{name} of an estimate is NaN; an undefined figure is None with a status")
        if any(map(math.isnan, self.population or ())):
            raise ValueError("population of an estimate holds NaN")

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON; infinite numbers become the strings "inf" and "-inf"."""
        out: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}  # asdict would copy each number deeply
        for name in self.NUMBERS:
            out[name] = finite_or_word(out[name])
        out["population"] = None if self.population is None else [finite_or_word(x) for x in self.population]
        return out

    @classmethod
    def from_json(cls, data: Any) -> Estimate:
        """The inverse of `to_json`; raises ValueError on anything else."""
        if isinstance(data, Estimate):
            return data
        try:
            given = dict(data)
            for name in cls.NUMBERS:
                if given.get(name) is not None:
                    given[name] = float(given[name])
            if given.get("population") is not None:
                low, high = given["population"]
                given["population"] = (float(low), float(high))
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"no estimate: {error}") from None


def finite_or_word(x: float | None) -> float | str | None:
    """JSON has no infinity: "inf" and "-inf"."""
    return x if x is None or math.isfinite(x) else ("inf" if x > 0 else "-inf")


def exactly(value: float, n: int = 0, reason: str = "") -> Estimate:
    """A figure known without error."""
    return Estimate(value, value, value, 0.0, n, None, "exact", reason, (value, value))


def undefined(reason: str, status: str = "uncertified", n: int = 0) -> Estimate:
    """A figure that does not exist here, with the reason."""
    return Estimate(None, n=n, status=status, reason=reason)


def signed(figure: Estimate, sign: float) -> Estimate:
    """The figure, or with sign -1 its negative, ends changed places."""
    if sign > 0 or figure.value is None:
        return figure
    ends = figure.population
    return replace(
        figure,
        value=-figure.value,
        low=None if figure.high is None else -figure.high,
        high=None if figure.low is None else -figure.low,
        population=None if ends is None else (-ends[1], -ends[0]),
    )


def t_quantile(dof: float, level: float = 0.95) -> float:
    """Two-sided quantile of Student's t."""
    return float(stdtrit(dof, 0.5 + level / 2))


def blocks_of(draws: int, blocks: int = BLOCKS) -> NDArray[np.int64]:
    """[draws] block of each draw: 0, 1, ..., 7, 0, 1, ... so that each block takes 1/8 of a stratum."""
    return np.arange(draws) % blocks


@dataclass(frozen=True)
class Jackknife:
    """A delete-a-block jackknife of P per-prompt figures, from the full fit [P] and the fits with one block left out [B, P].

    est_p = B full_p - (B-1) mean_b left_bp,      var_p = (B-1)/B sum_b (left_bp - mean_b left_bp)^2
    """

    full: Array
    left: Array

    @property
    def estimates(self) -> Array:
        """[P] bias-corrected figures."""
        b = len(self.left)
        return b * self.full - (b - 1) * self.left.mean(0)

    @property
    def variances(self) -> Array:
        """[P] squared standard errors."""
        b = len(self.left)
        return (b - 1) / b * ((self.left - self.left.mean(0)) ** 2).sum(0)

    def mean(self, *, n: int, widen: Array | None = None, ess: float | None = None, level: float = 0.95) -> Estimate:
        """Mean over prompts. `widen` [P] is added (averaged) to the upper end: log(1 + 3/reach) for what holds log Z.

        Degrees of freedom: 7 a prompt, 30 at most. `population` is the t interval with P - 1 of the per-prompt spread.
        """
        if np.isposinf(self.full).any():
            return exactly(math.inf, n, "a draw of positive weight has an infinite term")
        est, var = self.estimates, self.variances
        prompts = len(est)
        value = float(est.mean())
        stderr = float(math.sqrt(var.sum()) / prompts)
        half = t_quantile(min((len(self.left) - 1) * prompts, 30), level) * stderr
        up = 0.0 if widen is None else float(np.mean(widen))
        population = None
        if prompts > 1:
            spread = t_quantile(prompts - 1, level) * float(est.std(ddof=1)) / math.sqrt(prompts)
            population = (value - spread, value + spread + up)
        return Estimate(value, value - half, value + half + up, stderr, n, ess, population=population)


def jackknife(values: Array, blocks: int = BLOCKS) -> Jackknife:
    """Of plain means of draws [P, N]. Raises ValueError when N < 16."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < LEAST_DRAWS:
        raise ValueError(f"[P, N >= {LEAST_DRAWS}] expected: {values.shape}")
    block = blocks_of(values.shape[1], blocks)
    left = np.stack([values[:, block != b].mean(1) for b in range(blocks)])
    return Jackknife(values.mean(1), left)


def widening(reach: Array) -> Array:
    """log(1 + 3/A) nats a prompt: by the rule of three, the most that an unseen region can add to log Z (95 %)."""
    with np.errstate(divide="ignore"):
        return np.log1p(3.0 / np.asarray(reach, dtype=np.float64))


def by_reach(estimate: Estimate, reach: Array, draws: int = 0) -> Estimate:
    """The status that the smallest reach over prompts allows; an uncertified figure keeps its value and loses its interval.

    draws: how many prior draws a prompt stand behind the reach, for the reason that people read.
    """
    least = float(np.min(reach))
    if least >= CERTIFIED:
        return replace(estimate, status="certified", reason=f"reach {least:.3g} prior draws at every prompt")
    if least >= WIDE:
        return replace(estimate, status="wide", reason=f"reach {least:.2g}: stretched by what {least:.2g} accepted prior draws could miss")
    more = "no number of draws" if least <= 0 else f"{CERTIFIED / least:.3g} times the draws"
    reason = (
        f"an outcome with most of the posterior's mass could hide from {f'{draws:,}' if draws else 'the'} prior draws: "
        f"reach {least:.2g}; {more} would certify it"
    )
    return replace(estimate, low=None, high=None, population=None, status="uncertified", reason=reason)


def by_betting(estimate: Estimate, low: float, high: float, reach: Array) -> Estimate:
    """The figure with a betting interval in place of its own: exact at any number of draws, so no reach is needed for the truth of it.

    Certified where the reach says so, else wide; without a ceiling on the reward there is no upper end and it is a lower bound.
    """
    least = float(np.min(reach))
    if math.isinf(high):
        reason = "betting interval; no upper end without a declared reward_max"
        return replace(estimate, low=low, high=None, population=None, status="lower", reason=reason)
    status = "certified" if least >= CERTIFIED else "wide"
    value = None if estimate.value is None else min(max(estimate.value, low), high)  # the two come from different draws
    return replace(
        estimate, value=value, low=low, high=high, population=None, status=status, reason="betting interval, exact at any number of draws"
    )
