"""Following a reward too far: gold reward against the KL spent, for best-of-n, for the posterior over beta, and for trained policies.

    d = sqrt(KL(q || p0))      R(d) = E_q[gold] - E_p0[gold]
    bon form   R = d (a - b d)         peak at d = a/(2b)              rl form   R = d (a - b log d)         peak at d = exp(a/b - 1)

Fitted by least squares through the points of a curve, R^2 beside it; intervals of a and b from a bootstrap of prompts (curves) or the usual
t of least squares (policies, which are points of their own). Both forms are fitted to every curve: on exact posteriors with an exploit set
the bon form fits both better (OBJECTIVES.md F6), so `a - b log d` is an empirical law of learned reward models and not a theorem.
Best-of-n is the unbiased U-statistic of klbench.estimators.best_of_n. Source: Gao, Schulman, Hilton 2022, arXiv:2210.10760.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from klbench import estimate
from klbench.estimate import WIDE, Array, Estimate
from klbench.estimators import best_of_n
from klbench.record import EstimateField, Strict
from klbench.reward_eval import intervals, sharpness

FORMS: Final = ("bon", "rl")
POINTS: Final = 3  # that a form of two coefficients is fitted to
SMALL: Final = 1e-3  # nats: points nearer to the prior say nothing of the form


class Point(Strict):
    """A policy. at: n, 1/beta or the method's name."""

    at: str
    kl: EstimateField
    gold: EstimateField


class Fit(Strict):
    """a and b of a form with R^2 about the mean, and the d of its peak, None where it has none or the interval of b holds 0."""

    form: str
    a: EstimateField
    b: EstimateField
    r2: float
    peak: float | None


class Curve(Strict):
    """kind: best_of_n, posterior or policies."""

    kind: str
    points: list[Point]
    fits: list[Fit]


def columns(d: Array, form: str) -> Array:
    """[S, 2] of the least squares: R = a d - b (d^2 or d log d)."""
    return np.stack([d, -(d * d if form == "bon" else d * np.log(d))], 1)


def solved(d: Array, gain: Array, form: str) -> tuple[float, float]:
    """(a, b)."""
    a, b = np.linalg.lstsq(columns(d, form), gain, rcond=None)[0]
    return float(a), float(b)


def _fit(d: Array, gain: Array, form: str, a: Estimate, b: Estimate) -> Fit:
    error = gain - columns(d, form) @ np.array([a.value, b.value])
    total = float(((gain - gain.mean()) ** 2).sum())
    value_a, value_b = a.value or 0.0, b.value or 0.0
    peak = None
    if value_a > 0 and value_b > 0 and b.low is not None and b.low > 0:
        peak = value_a / (2 * value_b) if form == "bon" else math.exp(min(value_a / value_b - 1, 50.0))
    return Fit(form=form, a=a, b=b, r2=1 - float(error @ error) / total if total > 0 else 0.0, peak=peak)


def by_prompts(kl: Array, gain: Array, seed: int) -> list[Fit]:
    """Fits to the mean curve of per-prompt KL [S, P] and gain [S, P]; none below three points away from the prior."""
    keep = kl.mean(1) > SMALL
    kl, gain = kl[keep], gain[keep]
    if len(kl) < POINTS:
        return []
    count = kl.shape[1]
    rng = np.random.default_rng(seed)
    picks = [rng.integers(count, size=count) for _ in range(intervals.RESAMPLES)] if count > 1 else []
    found = []
    for form in FORMS:
        value = solved(np.sqrt(kl.mean(1)), gain.mean(1), form)
        again = np.array([solved(np.sqrt(np.maximum(kl[:, i].mean(1), SMALL)), gain[:, i].mean(1), form) for i in picks])
        ends = np.quantile(again, [0.025, 0.975], axis=0).T if len(again) else [(None, None)] * 2
        a, b = (
            Estimate(x, low, high, float(again[:, j].std()) if len(again) else None, count, population=(low, high) if count > 1 else None)
            for j, (x, (low, high)) in enumerate(zip(value, ends, strict=True))
        )
        found.append(_fit(np.sqrt(kl.mean(1)), gain.mean(1), form, a, b))
    return found


def by_points(kl: Array, gain: Array) -> list[Fit]:
    """Fits to policies [S], whose spread about the form is the error; none unless they are more than the coefficients."""
    keep = kl > SMALL
    d, gain = np.sqrt(kl[keep]), gain[keep]
    if len(d) < POINTS:
        return []
    found = []
    for form in FORMS:
        x = columns(d, form)
        value = solved(d, gain, form)
        error = gain - x @ np.array(value)
        spread = float(error @ error) / (len(d) - 2) * np.linalg.pinv(x.T @ x)
        a, b = (
            Estimate(v, v - half, v + half, math.sqrt(var), len(d))
            for v, var in zip(value, np.maximum(np.diag(spread), 0.0), strict=True)
            for half in [estimate.t_quantile(len(d) - 2) * math.sqrt(var)]
        )
        found.append(_fit(d, gain, form, a, b))
    return found


def best_of(proxy: Array, gold: Array, span: float, gold_span: float, seed: int) -> Curve:
    """Best-of-n by the proxy for n = 1, 2, 4, .. up to an eighth of the draws [P, N]."""
    sizes = [2**i for i in range(20) if 2**i * best_of_n.SHARE <= proxy.shape[1]]
    whole = best_of_n.curve(proxy, gold, sizes, span, gold_span)
    assert whole.gold is not None
    kl = np.array([[best_of_n.kl(row[None], n).value or 0.0 for row in proxy] for n in sizes])
    gain = np.array([best_of_n.best_of(proxy, gold, n)[0] for n in sizes]) - gold.mean(1)
    points = [Point(at=f"{n}", kl=k, gold=g) for n, k, g in zip(whole.n, whole.kl, whole.gold, strict=True)]
    return Curve(kind="best_of_n", points=points, fits=by_prompts(kl, gain, seed))


def posterior(proxy: Array, gold: Array, ceiling: Array, inverse_betas: Sequence[float], seed: int) -> Curve:
    """The proxy's own posterior at each 1/beta that the draws can speak of (reach of at least 1)."""
    known = bool(np.isfinite(ceiling).all())
    lams = [lam for lam in inverse_betas if not known or sharpness.reach_of(proxy, ceiling, lam).min() >= WIDE]
    points = []
    for lam in lams:
        spent = sharpness.at(proxy, ceiling, 1 / lam).kl
        points.append(Point(at=f"{lam:.4g}", kl=spent, gold=sharpness.tilted(proxy, ceiling, 1 / lam, gold)))
    if not lams or not known:
        return Curve(kind="posterior", points=points, fits=[])
    kl = np.array([sharpness.kl_at(proxy, 1 / lam) for lam in lams])
    gain = np.array([sharpness.mean_at(proxy, 1 / lam, gold) for lam in lams]) - gold.mean(1)
    return Curve(kind="posterior", points=points, fits=by_prompts(kl, gain, seed))


def policies(named: Sequence[tuple[str, Estimate, Estimate]], prior_gold: float) -> Curve:
    """Trained policies: (name, kl_prior, gold) of each."""
    points = sorted((Point(at=name, kl=kl, gold=gold) for name, kl, gold in named), key=lambda p: (p.kl.value or 0.0, p.at))
    kl = np.array([max(p.kl.value or 0.0, 0.0) for p in points])
    gain = np.array([(p.gold.value or 0.0) - prior_gold for p in points])
    return Curve(kind="policies", points=points, fits=by_points(kl, gain))
