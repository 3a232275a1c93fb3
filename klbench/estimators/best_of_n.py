"""The over-optimisation curve: what best-of-n would score, for every n at once, from N independent draws with a proxy and a gold reward.

    sort by proxy;  E[best of n] = sum_i C(i-1, n-1) / C(N, n) v_(i),  i = 1..N      v: proxy, or gold averaged within ties of the proxy

is the mean over all C(N, n) subsets of the value of the subset's best draw, a tie settled by lot: unbiased at every n <= N, where the
plug-in (the best of n redrawn from the N) is not. Error: leave-one-out jackknife, in closed form by sums from the left and the right,
because leaving out the draw of rank j moves those above it down by one rank.

KL axis: KL(best-of-n || p0) <= log n - (n-1)/n, equal without ties. With F the law of the proxy, a tied value with F from a to b (and the
draw among the tied by lot) adds (b^n - a^n) log((b^n - a^n)/(b - a)); a stretch without ties adds the integral of n t^{n-1} log(n t^{n-1}).

Shapes [P prompts, N draws]; rewards in their own unit, KL in nats. Source: the U-statistic of Hoeffding 1948; ESTIMATORS.md section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np
from scipy.special import gammaln

from klbench import estimate
from klbench.errors import UserError
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife

SHARE: Final = 8  # n is at most N / SHARE: beyond it a few top draws carry the curve and its interval covers as little as .81


@final
@dataclass(frozen=True)
class Curve:
    """Best-of-n at each n: mean proxy and gold (None without a gold reward), KL to the prior and its bound log n - (n-1)/n."""

    n: tuple[int, ...]
    proxy: tuple[Estimate, ...]
    gold: tuple[Estimate, ...] | None
    kl: tuple[Estimate, ...]
    kl_bound: tuple[float, ...]


def curve(proxy: Array, gold: Array | None, sizes: Sequence[int], span: float = 0.0, gold_span: float = 0.0) -> Curve:
    """The curve at the given n from independent draws [P, N], mean over prompts.

    span, gold_span: of the rewards' possible values; a curve that does not vary at all gets the rule of three times span in place of a
    zero width. Raises UserError for n below 1 or above N/8, ValueError for shapes that disagree or values that are not finite.
    """
    proxy = np.asarray(proxy, dtype=np.float64)
    gold = None if gold is None else np.asarray(gold, dtype=np.float64)
    for name, values in (("proxy", proxy), ("gold", gold)):
        if values is not None and (values.ndim != 2 or values.shape != proxy.shape or not values.size or not np.isfinite(values).all()):
            raise ValueError(f"{name}: finite values [P, N] expected, proxy and gold alike, got {values.shape}")
    draws = proxy.shape[1]
    for n in sizes:
        if n < 1 or n * SHARE > draws:
            raise UserError(
                f"best of {n}: n between 1 and an eighth of the draws expected, {max(n, 1) * SHARE} draws a prompt and not {draws}"
            )
    sizes = tuple(int(n) for n in sizes)
    both = {n: (_mean(proxy, proxy, n, span), None if gold is None else _mean(proxy, gold, n, gold_span)) for n in sizes}
    golds = tuple(x for _, x in both.values() if x is not None)
    kls = tuple(kl(proxy, n) for n in sizes)
    return Curve(sizes, tuple(x for x, _ in both.values()), golds if gold is not None else None, kls, tuple(map(kl_bound, sizes)))


def kl_bound(n: int) -> float:
    """log n - (n-1)/n nats: KL(best-of-n || p0) where the proxy has no ties, an upper bound where it has."""
    return math.log(n) - (n - 1) / n


def kl(proxy: Array, n: int) -> Estimate:
    """KL(best-of-n || p0) of the proxy's empirical law [P, N], mean over prompts: values that came twice are ties, the others are not.

    Never above `kl_bound`, and equal to it without ties. Error: 8-block jackknife.
    """
    block = estimate.blocks_of(proxy.shape[1])
    left = np.stack([_kl(proxy[:, block != b], n) for b in range(BLOCKS)])
    figure = Jackknife(_kl(proxy, n), left).mean(n=proxy.size)
    bound, low, high, value = kl_bound(n), figure.low or 0.0, figure.high or 0.0, figure.value or 0.0
    return replace(figure, value=min(max(value, 0.0), bound), low=min(max(low, 0.0), bound), high=min(high, bound), population=None)


def best_of(proxy: Array, value: Array, n: int) -> tuple[Array, Array]:
    """(E[value of the best of n] [P], the same with each draw left out [N, P]) from draws [P, N]; any n <= N - 1."""
    found = [_prompt(x, v, n) for x, v in zip(proxy, value, strict=True)]
    return np.array([full for full, _ in found]), np.stack([left for _, left in found], 1)


def weights_of(draws: int, n: int) -> Array:
    """[N] C(i-1, n-1) / C(N, n), i = 1..N: the chance that the draw of rank i is the best of a random n; 0 below rank n."""
    i = np.arange(1, draws + 1)
    out = np.zeros(draws)
    at = i >= n
    top = gammaln(i[at]) - gammaln(n) - gammaln(i[at] - n + 1)
    out[at] = np.exp(top - (gammaln(draws + 1) - gammaln(n + 1) - gammaln(draws - n + 1)))
    return out


def _prompt(proxy: Array, value: Array, n: int) -> tuple[float, Array]:
    """Full figure and leave-one-out figures [N] of one prompt, in the order of the ranks."""
    order = np.argsort(proxy, kind="stable")
    x, v, draws = proxy[order], value[order], len(proxy)
    first = np.concatenate([[True], x[1:] != x[:-1]])
    group = np.cumsum(first) - 1
    size = np.bincount(group)
    start = np.flatnonzero(first)
    end = start + size
    total = np.bincount(group, weights=v)
    mean = (total / size)[group]  # gold averaged within ties
    less = weights_of(draws - 1, n)  # of the ranks of the other N - 1
    below = np.concatenate([[0.0], np.cumsum(less * mean[:-1])])  # ranks kept: those before the group of j
    above = np.concatenate([np.cumsum((less * mean[1:])[::-1])[::-1], [0.0]])  # moved down by one: those after it
    mass = np.concatenate([[0.0], np.cumsum(less)])
    rest = np.divide(total[group] - v, size[group] - 1, out=np.zeros(draws), where=size[group] > 1)
    tied = mass[end - 1] - mass[start]  # of the group without j
    left = below[start[group]] + tied[group] * rest + above[end[group] - 1]
    return float(weights_of(draws, n) @ mean), left


def _mean(proxy: Array, value: Array, n: int, span: float) -> Estimate:
    """Mean over prompts with the leave-one-out error. Degrees of freedom: N/n - 1 blocks of n a prompt, 30 at most."""
    full, left = best_of(proxy, value, n)
    prompts, draws = proxy.shape
    jack = Jackknife(full, left)
    stderr = math.sqrt(float(jack.variances.sum())) / prompts
    figure = float(full.mean())
    half = estimate.t_quantile(min((draws // n - 1) * prompts, 30)) * stderr
    if span > 0 and stderr <= 1e-12 * max(span, abs(figure)):
        half = min(
            span, 3.0 * n * span / (draws * prompts)
        )  # a value never seen has mass below 3/(NP); best-of-n meets it n times as often
    population = None
    if prompts > 1:
        spread = estimate.t_quantile(prompts - 1) * float(full.std(ddof=1)) / math.sqrt(prompts)
        population = (figure - spread, figure + spread)
    return Estimate(figure, figure - half, figure + half, stderr, proxy.size, population=population)


def _kl(proxy: Array, n: int) -> Array:
    """[P] of the empirical law, in closed form."""
    out = np.zeros(len(proxy))
    for p, row in enumerate(proxy):
        counts = np.unique(row, return_counts=True)[1]
        b = np.cumsum(counts) / len(row)
        a = b - counts / len(row)
        mass = b**n - a**n
        with np.errstate(divide="ignore", invalid="ignore"):
            tie = np.where(mass > 0, mass * np.log(mass / (b - a)), 0.0)
        out[p] = np.where(counts > 1, tie, _untied(b, n) - _untied(a, n)).sum()
    return out


def _untied(t: Array, n: int) -> Array:
    """Integral from 0 to t of n s^{n-1} log(n s^{n-1}) ds = t^n (log n + (n-1) log t - (n-1)/n)."""
    return np.where(t > 0, t**n * (math.log(n) + (n - 1) * np.log(np.where(t > 0, t, 1.0)) - (n - 1) / n), 0.0)
