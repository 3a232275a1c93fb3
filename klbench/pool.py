"""log Z and reverse KL together: the prior's bank, a policy's draws and those of other policies as strata of one mixture, a prompt at a time.

    rows i of strata j (0 the prior, 1 the policy q, 2.. others), n_j draws each, a_j = n_j / n;  m = sum_j a_j q_j       balance heuristic
    w = p0 exp(tilt) / m    mean w = Z          s = q / m    mean s = 1          tilt = r / beta
    f = log q - log p0 - tilt                   E_q f = KL(q||p0) - E_q r / beta
    X = [g_1 .. g_J, s A, s B]                  g_j = q_j / m - 1: mean 0 over the mixture, exactly; A, B of `Rows`
    Z~ = mean(w - X b_w)    F = m0 + mean(s (f - m0) - X b_f)    m0 = sum(s f) / sum(s)       b by least squares with intercept
    reverse_kl = F + log Z

Means over the mixture weigh a row of stratum j by a_j / n_j; with a block left out, n_j shrinks and a_j, hence m, stays: every fit reads
the same columns. `others` empty is a policy's own record; with them it is the board's pooled figure (ESTIMATORS.md section 2).

The rest of the bank (N0 - n0 draws that nobody scores under q) speaks for log Z alone: Z = (1 - k) Z~ + k mean_rest exp(tilt), which is
unbiased for every fixed k. What can hide: a region that n0 (N0) prior draws missed has prior mass below 3/n0 (3/N0) at 95 %, so Z~ lacks
at most 3 W / n0 and the rest 3 W / N0, W = exp(r_max/beta); together that is the reach of N_k = 1 / ((1-k)/n0 + k/N0) draws:

    A = N_k Z exp(-r_max/beta)       interval = [est - t se, est + t se + log(1 + 3/A)]

and k is chosen, once, where se/sqrt(P) and that widening add to the least. With nothing left over k is 0 and this is ESTIMATORS.md
section 1. Other policies' draws never add to A: nothing bounds what they and the prior all missed but the prior's own count. Errors:
delete-a-block jackknife over all strata and the rest, b refitted, k kept. Shapes [P prompts, draws]; nats; float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, logsumexp

from klbench import estimate, weights
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife
from klbench.rows import Rows

RIDGE: Final = 1e-6
DROP: Final = 0.3  # control variates that push Z below this share of the plain mean are dropped for that prompt


@dataclass(frozen=True)
class Stratum:
    """Draws of another policy j of the board, n_j a prompt.

    rows [P, n_j]: what the scored policy and the prior say of them.  density [P, n]: log q_j of the rows of all strata, in the order bank,
    own draws, others.
    """

    rows: Rows
    density: Array


@dataclass(frozen=True)
class Fit:
    """Per-prompt results [P] of one fit. `free` = KL(q||p0) - E_q r/beta (times that beta's inverse), log Z of its own."""

    free: Array
    log_z: Array
    forward_kl: Array
    tv: Array
    js: Array


@dataclass(frozen=True)
class _Tilted:
    """What depends on the tilt, of every row: w exp(-top), y = s (f - m0), the gap log p*/q up to log Z, and m0, top [P, 1]."""

    w: Array
    y: Array
    gap: Array
    m0: Array
    top: Array


@dataclass(frozen=True)
class _Regressed:
    """w and y without what X explains: Z~ exp(-top) and F - m0 [P], and their residuals [P, n, 2]."""

    z: Array
    f: Array
    left: Array


def _kept(x: Array, leave: int | None) -> Array:
    """Columns of all blocks but one."""
    return x if leave is None else x[:, estimate.blocks_of(x.shape[1]) != leave]


def _stable_exp(x: Array) -> Array:
    return np.exp(np.minimum(x, 300.0))  # its square is finite too


@final
class Pool:
    """The strata of one policy on one task. `rest` [P, M] holds the rewards of the bank's unscored draws (M may be 0).

    Raises ValueError for shapes that disagree and for fewer than 16 draws in a stratum.
    """

    def __init__(self, own: Rows, bank: Rows, rest: Array, reward_max: Array, others: Sequence[Stratum] = ()):
        prompts = own.log_q.shape[0]
        sizes = [bank.log_q.shape[1], own.log_q.shape[1], *(o.rows.log_q.shape[1] for o in others)]
        n = sum(sizes)
        for name, shape in (("bank", bank.log_q.shape), ("rest", rest.shape), ("reward_max", reward_max.shape)):
            if shape[0] != prompts:
                raise ValueError(f"{name}: {prompts} prompts expected, got {shape[0]}")
        for other in others:
            if other.density.shape != (prompts, n):
                raise ValueError(f"density of a stratum: {(prompts, n)} expected, got {other.density.shape}")
        if min(sizes) < estimate.LEAST_DRAWS:
            raise ValueError(f"at least {estimate.LEAST_DRAWS} draws a prompt are needed from policy and prior, got {min(sizes)}")
        self.own, self.bank, self.rest, self.reward_max = own, bank, rest, reward_max
        self.prompts, self.draws, self.bank_draws = prompts, sizes[1], sizes[0] + rest.shape[1]
        self.rows = Rows.joined(bank, own, *(o.rows for o in others))
        self._stratum = np.repeat(np.arange(len(sizes)), sizes)
        self._block = np.concatenate([estimate.blocks_of(size) for size in sizes])
        self._share = np.array(sizes) / n
        log_q, log_p0 = self.rows.log_q, self.rows.log_p0
        densities = np.stack([log_p0, log_q, *(o.density for o in others)])  # [J + 1, P, n]
        self._log_m = logsumexp(densities + np.log(self._share)[:, None, None], axis=0)
        self._s = np.exp(log_q - self._log_m)
        drawable = self._s > 0  # a row that q cannot draw carries no weight
        sA, sB = (np.where(drawable & np.isfinite(x), self._s * np.where(np.isfinite(x), x, 0.0), 0.0) for x in (self.rows.A, self.rows.B))
        g = np.exp(densities[1:] - self._log_m) - 1.0
        self._X = np.stack([*g, sA, sB], 2)  # [P, n, d]
        norm = np.sqrt((self._X**2).mean(1, keepdims=True))
        self._X /= np.where(norm > 0, norm, 1.0)
        with np.errstate(invalid="ignore"):
            self._ratio = np.where(drawable & np.isfinite(log_p0), log_q - log_p0, 0.0)

    @property
    def infinite(self) -> bool:
        """Whether q puts mass where the prior has none: a draw of its own shows it, or the law at a prefix of one."""
        return bool(np.isneginf(self.own.log_p0).any() or np.isposinf(self.own.kl).any())

    def reach(self, inverse_beta: float, log_z: Array, k: Array | float = 0.0) -> Array:
        """[P] A = N_k Z exp(-r_max/beta); 0 where no ceiling was declared."""
        n0 = self.bank.log_q.shape[1]
        draws = 1.0 / ((1.0 - k) / n0 + np.asarray(k) / self.bank_draws)
        ceiling = np.full(self.prompts, math.inf)  # stays infinite at inverse_beta = 0, where the product would be NaN
        np.multiply(inverse_beta, self.reward_max, out=ceiling, where=np.isfinite(self.reward_max))
        return np.asarray(draws * np.exp(np.minimum(log_z - ceiling, 0.0)))

    def _weights(self, leave: int | None) -> Array:
        """[n] weight of each row in a mean over the mixture: a_j over the draws of stratum j that are kept."""
        kept = np.ones(len(self._block), bool) if leave is None else self._block != leave
        counts = np.bincount(self._stratum[kept], minlength=len(self._share))
        return np.where(kept, (self._share / counts)[self._stratum], 0.0)

    def _tilted(self, inverse_beta: float) -> _Tilted:
        tilt = inverse_beta * self.rows.reward
        log_w = self.rows.log_p0 + tilt - self._log_m
        top = np.max(log_w, axis=1, keepdims=True)  # of the rows that are there: Z cannot vanish
        w = np.exp(log_w - top)
        f = np.where(self._s > 0, self._ratio - tilt, 0.0)
        m0 = (self._s * f).sum(1, keepdims=True) / self._s.sum(1, keepdims=True)
        with np.errstate(invalid="ignore"):
            gap = np.where(w > 0, self.rows.log_p0 + tilt - self.rows.log_q, 0.0)
        return _Tilted(w, self._s * (f - m0), gap, m0, top)

    def _regress(self, tilted: _Tilted, omega: Array) -> _Regressed:
        """Least squares of w and y on X with intercept over the mixture's rows, a prompt at a time."""
        X, targets = self._X, np.stack([tilted.w, tilted.y], 2)
        mean_x, mean_t = omega @ X, omega @ targets  # [P, d], [P, 2]
        weighted = (X * omega[:, None]).transpose(0, 2, 1)
        gram = weighted @ X - mean_x[:, :, None] * mean_x[:, None, :]
        cross = weighted @ targets - mean_x[:, :, None] * mean_t[:, None, :]
        b = np.linalg.solve(gram + RIDGE * np.eye(X.shape[2]), cross)
        found = mean_t - (mean_x[:, None, :] @ b)[:, 0]
        dropped = found[:, 0] < DROP * mean_t[:, 0]
        b = np.where(dropped[:, None, None], 0.0, b)
        found = np.where(dropped[:, None], mean_t, found)
        return _Regressed(found[:, 0], found[:, 1], targets - X @ b)

    def _finish(self, inverse_beta: float, k: Array | float, leave: int | None, tilted: _Tilted) -> Fit:
        omega = self._weights(leave)
        found = self._regress(tilted, omega)
        top = tilted.top
        rest = _kept(self.rest, leave)
        z_rest = _stable_exp(inverse_beta * rest - top).mean(1) if rest.shape[1] else found.z
        z_rest = np.where(z_rest > 1e-100, z_rest, found.z)  # hundreds of nats below the scored rows: it says nothing
        z = (1 - k) * found.z + k * z_rest
        log_z = np.log(z) + top[:, 0]
        s, u = self._s, tilted.w / z[:, None]
        with np.errstate(invalid="ignore"):
            terms = np.where(u * omega > 0, u * tilted.gap, 0.0)
        forward = (terms @ omega) / (u @ omega) - log_z
        js = 0.5 * ((_xlog2(s, u) + _xlog2(u, s)) @ omega)
        return Fit(tilted.m0[:, 0] + found.f, log_z, forward, 0.5 * (np.abs(s - u) @ omega), js)

    def fit(self, inverse_beta: float, k: Array | float = 0.0, leave: int | None = None) -> Fit:
        """One fit at tilt = inverse_beta * reward, with block `leave` of every stratum left out."""
        return self._finish(inverse_beta, k, leave, self._tilted(inverse_beta))

    def fits(self, inverse_beta: float, k: Array | float) -> tuple[Fit, list[Fit]]:
        """The full fit and those with each block left out."""
        tilted = self._tilted(inverse_beta)
        return self._finish(inverse_beta, k, None, tilted), [self._finish(inverse_beta, k, b, tilted) for b in range(BLOCKS)]

    def choose_k(self, inverse_beta: float) -> Array:
        """[P] share of the unscored bank in Z: least sum of se/sqrt(P) and widening among those that certify. 0 when there is no rest."""
        if not self.rest.shape[1]:
            return np.zeros(self.prompts)
        tilted = self._tilted(inverse_beta)
        found = self._regress(tilted, self._weights(None))
        u, f, n = found.left[:, :, 0] / found.z[:, None], found.left[:, :, 1], len(self._block)

        def stratified(a: Array, b: Array) -> Array:  # covariance of the means of a and b, fixed allocation
            total = np.zeros(self.prompts)
            for j in range(len(self._share)):
                x, y = a[:, self._stratum == j], b[:, self._stratum == j]
                total += ((x - x.mean(1, keepdims=True)) * (y - y.mean(1, keepdims=True))).sum(1)
            return total / n**2

        v_u, v_f, c = stratified(u, u), stratified(f, f), stratified(u, f)
        v_r = (_stable_exp(inverse_beta * self.rest - tilted.top) / found.z[:, None]).var(1) / self.rest.shape[1]
        grid = np.linspace(0, 1, 41)[:, None]
        var = v_f + (1 - grid) ** 2 * v_u + 2 * (1 - grid) * c + grid**2 * v_r
        reach = self.reach(inverse_beta, np.log(found.z) + tilted.top[:, 0], grid)
        width = 2 * np.sqrt(np.maximum(var, 0) / self.prompts) + estimate.widening(np.maximum(reach, 1e-300))
        certified = reach >= estimate.CERTIFIED
        width = np.where(certified | ~certified.any(0), width, np.inf)  # where some k certifies, none that does not is worth its width
        return np.asarray(grid[width.argmin(0), 0])

    def lambda_hat(self, leave: int | None = None, start: float | None = None) -> float:
        """argmin over lambda >= 0 of mean_p [log Z_p(lambda) - lambda E_q r]: where the policy is closest to a posterior."""
        bank = np.concatenate([_kept(self.bank.reward, leave), _kept(self.rest, leave)], 1)
        return nearest_lambda(bank, float(_kept(self.own.reward, leave).mean()), start)

    def columns(self, inverse_beta: float) -> tuple[dict[str, Estimate], dict[str, Array], Array]:
        """All columns that hold Z or p*, per-prompt arrays, and the reach [P] behind reverse_kl."""
        k = self.choose_k(inverse_beta)
        full, left = self.fits(inverse_beta, k)

        def jack(get: Callable[[Fit], Array]) -> Jackknife:
            return Jackknife(get(full), np.stack([get(x) for x in left]))

        n = self.prompts * (self.draws + self.bank_draws)
        reverse, log_z, free = jack(lambda x: x.free + x.log_z), jack(lambda x: x.log_z), jack(lambda x: x.free)
        reach = self.reach(inverse_beta, log_z.estimates, k)
        scored = self.reach(inverse_beta, log_z.estimates)  # what reads p* on scored rows alone
        out: dict[str, Estimate] = {}
        known = bool(np.isfinite(self.reward_max).all())
        for name, figure in (("reverse_kl", reverse), ("log_z", log_z)):
            out[name] = self._guard(figure.mean(n=n, widen=estimate.widening(reach)), reach, known)
        if self.infinite:
            nowhere = estimate.exactly(math.inf, n, "the policy puts mass where the prior has none")
            out |= {"reverse_kl": nowhere, "wasted_nats": nowhere}
        else:
            out |= self._waste(n, known)
        hidden = 3.0 / (scored + 3.0)  # the most of p* that no scored prior draw has seen (95 %)
        for name, get in (("tv", lambda x: x.tv), ("js", lambda x: x.js), ("forward_kl", lambda x: x.forward_kl)):
            out[name] = self._guard(_unseen(name, jack(get).mean(n=n), hidden), scored, known)
        if out["forward_kl"].status == "wide":
            out["forward_kl"] = replace(out["forward_kl"], status="lower", high=None, population=None)
        w = np.exp(self.own.log_p0 + inverse_beta * self.own.reward - self.own.log_q - full.log_z[:, None])
        effective = weights.ess(w)
        out["ess"] = Estimate(float(effective.mean()), n=n, status="certified", reason="certifies nothing")
        out["khat"] = Estimate(max(weights.khat(x) for x in w), n=n, reason="largest over prompts; certifies nothing")
        out["reverse_kl"] = replace(out["reverse_kl"], ess=float(effective.mean()))
        least = float(reach.min())
        out["reach"] = (
            Estimate(least, n=self.bank_draws, reason="least over prompts") if known else estimate.undefined("no reward_max declared")
        )
        per_prompt = {"free": free.estimates, "log_z": log_z.estimates, "reverse_kl": reverse.estimates, "reach": reach}
        per_prompt["free_stderr"] = np.sqrt(free.variances)
        if self.infinite:
            nowhere_at = np.isneginf(self.own.log_p0).any(1) | np.isposinf(self.own.kl).any(1)
            per_prompt |= {name: np.where(nowhere_at, math.inf, per_prompt[name]) for name in ("free", "reverse_kl")}
        return out, per_prompt, reach

    def _guard(self, figure: Estimate, reach: Array, known: bool) -> Estimate:
        if figure.status == "exact":
            return figure
        if known:
            return estimate.by_reach(figure, reach, self.bank_draws)
        blind = replace(figure, low=None, high=None, population=None, status="uncertified")
        return replace(blind, reason="no reward_max was declared: nothing bounds what the prior draws missed")

    def _waste(self, n: int, known: bool) -> dict[str, Estimate]:
        """wasted_nats at lambda-hat, refitted in each block; 1/lambda-hat; and KL*(E_q r) / KL(q||p0) where that is not 0/0."""
        lam = self.lambda_hat()
        k = self.choose_k(lam)
        full = self.fit(lam, k)
        lams = [self.lambda_hat(b, lam) for b in range(BLOCKS)]
        left = np.stack([(lambda x: x.free + x.log_z)(self.fit(each, k, b)) for b, each in enumerate(lams)])
        jack = Jackknife(full.free + full.log_z, left)
        reach = self.reach(lam, full.log_z, k)
        waste = self._guard(jack.mean(n=n, widen=estimate.widening(reach)), reach, known)
        slope = Jackknife(np.array([lam]), np.array(lams)[:, None])
        half = estimate.t_quantile(BLOCKS - 1) * float(np.sqrt(slope.variances[0]))
        invert = lambda x: math.inf if x <= 0 else 1.0 / x  # noqa: E731
        implied = Estimate(invert(lam), invert(lam + half), invert(lam - half), None, n, status=waste.status, reason=waste.reason)
        if waste.status == "uncertified":
            implied = replace(implied, low=None, high=None)
        kl = kl_prior(self.own)
        found = {"wasted_nats": waste, "beta_implied": implied}
        if (kl.mean(n=n).low or 0.0) <= 0:
            return found
        ratio = Jackknife(np.array([1 - jack.full.mean() / kl.full.mean()]), (1 - left.mean(1) / kl.left.mean(1))[:, None])
        share = ratio.mean(n=n)
        clip = lambda x: None if x is None else min(1.0, max(0.0, x))  # noqa: E731
        share = replace(share, value=clip(share.value), low=clip(share.low), high=clip(share.high), population=None)
        return {**found, "kl_efficiency": self._guard(share, reach, known)}


def _xlog2(a: Array, b: Array) -> Array:
    """a log(2 a / (a + b)), 0 where a is 0."""
    return np.where(a > 1e-300, a * np.log(np.where(a > 1e-300, 2 * a / (a + b), 1.0)), 0.0)


def _unseen(name: str, figure: Estimate, hidden: Array) -> Estimate:
    """Intervals of tv, js and forward_kl when up to `hidden` [P] of p* was seen by nobody (ESTIMATORS.md section 5)."""
    if figure.status == "exact":
        return figure
    e = float(hidden.mean())
    low, high = figure.low or 0.0, figure.high or 0.0
    if name == "tv":
        return replace(figure, low=max(0.0, low - e), high=min(1.0, high + e), population=None)
    if name == "js":
        return replace(figure, low=max(0.0, (1 - e) * low), high=min(math.log(2), (1 - e) * high + e * math.log(2)), population=None)
    entropy = float(np.mean(entr(hidden) + entr(1 - hidden)))
    return replace(figure, low=max(0.0, (1 - e) * low - entropy), high=high + e + entropy, population=None)


def kl_prior(own: Rows) -> Jackknife:
    """KL(q||p0) = E_q[kl], regressed on D = A - B, whose mean is 0: kl - c D, c by least squares, refitted in each block.

    kl - D is the plain estimate log q - log p0, so this is never worse than either (Amini, Vieira, Cotterell 2025, arXiv:2504.10637).
    """
    return regressed(own.kl, own.A - own.B)


def regressed(y: Array, x: Array) -> Jackknife:
    """Means over draws [P, N] of y - c x, x of mean 0 under the draws' law; c by least squares with intercept, a prompt at a time."""

    def mean(y: Array, x: Array) -> Array:
        dx = x - x.mean(1, keepdims=True)
        square = (dx**2).sum(1)
        slope = np.divide((dx * y).sum(1), square, out=np.zeros(len(y)), where=square > 1e-12)
        return np.asarray((y - slope[:, None] * x).mean(1))

    block = estimate.blocks_of(y.shape[1])
    return Jackknife(mean(y, x), np.stack([mean(y[:, block != b], x[:, block != b]) for b in range(BLOCKS)]))


def bounded_mean(own: Array, control: Array | None, span: float) -> Estimate:
    """E_q of a bounded figure [P, N], regressed on the mean-0 `control`; one that never varies gets 3 span / (N P), never zero width."""
    jack = estimate.jackknife(own) if control is None else regressed(own, control)
    figure = jack.mean(n=own.size)
    if span > 0 and (figure.stderr or 0.0) <= 1e-12 * max(span, abs(figure.value or 0.0)):  # constant but for rounding
        pad = 3.0 * span / own.size
        figure = replace(figure, low=(figure.low or 0.0) - pad, high=(figure.high or 0.0) + pad)
    return figure


def nearest_lambda(bank: Array, reward: float, start: float | None = None) -> float:
    """argmin over lambda >= 0 of mean_p log mean_i exp(lambda r_pi) - lambda reward: convex, by Newton steps kept inside a bracket.

    0 when the reward is at most the prior's; capped at 60 spans where the tilted prior cannot reach it.
    """
    span = float((bank.max(1) - bank.min(1)).max()) or 1.0

    def slope_and_curvature(lam: float) -> tuple[float, float]:
        tilt = lam * bank
        share = np.exp(tilt - tilt.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        mean = (share * bank).sum(1)
        return float(mean.mean()) - reward, float(((share * bank * bank).sum(1) - mean**2).mean())

    low, high = 0.0, 60.0 / span
    if slope_and_curvature(0.0)[0] >= 0:
        return 0.0
    lam = min(max(start, 0.0), high) if start else 1.0 / span
    for _ in range(100):
        slope, curvature = slope_and_curvature(lam)
        low, high = (lam, high) if slope < 0 else (low, lam)
        step = lam - slope / curvature if curvature > 0 else math.nan
        new = step if low < step < high else (low + high) / 2
        if abs(new - lam) <= 1e-10 * max(1.0, lam):
            return new
        lam = new
    return lam


@dataclass(frozen=True)
class Frontier:
    """Points [n] of KL*(R): lambda, reward, kl, its 95 % band and the least reach over prompts."""

    lam: NDArray[np.float64]
    reward: NDArray[np.float64]
    kl: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    reach: NDArray[np.float64]


def frontier(bank: Array, reward_max: Array, lams: Array) -> Frontier:
    """KL*(R(lambda)) = lambda R - E_c log Z(c; lambda) at R(lambda) = E_c E_p*[r], from all prior rewards [P, N0]; none at reach below 1.

    The band is that of KL* at fixed R: by the envelope theorem its error is log Z's, jackknifed, stretched downwards by the widening.
    """
    rows = []
    for lam in lams if np.isfinite(reward_max).all() else ():
        tilt = lam * bank
        log_z = weights.log_mean_exp(tilt)
        share = np.exp(tilt - tilt.max(1, keepdims=True))
        reward = float(((share * bank).sum(1) / share.sum(1)).mean())
        reach = bank.shape[1] * np.exp(np.minimum(log_z - lam * reward_max, 0.0))
        if not reach.min() >= estimate.WIDE:
            break
        block = estimate.blocks_of(bank.shape[1])
        left = np.stack([weights.log_mean_exp(tilt[:, block != b]) for b in range(BLOCKS)])
        figure = Jackknife(log_z, left).mean(n=bank.size, widen=estimate.widening(reach))
        kl = lam * reward - float(log_z.mean())
        assert figure.low is not None and figure.high is not None and figure.value is not None
        rows.append((lam, reward, kl, lam * reward - figure.high, lam * reward - figure.low, float(reach.min())))
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return Frontier(*table.T)
