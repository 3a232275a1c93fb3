"""log Z and reverse KL together: the prior's bank and a policy's draws as strata of one mixture, a prompt at a time.

    rows i: n0 prior draws (the scored part of the bank) and n of the policy;  m = (n0 p0 + n q) / (n0 + n)      balance heuristic
    w = p0 exp(tilt) / m    mean w = Z          s = q / m    mean s = 1          tilt = r / beta
    f = log q - log p0 - tilt                   E_q f = KL(q||p0) - E_q r / beta
    X = [s - 1, s A, s B]                       mean 0 over the mixture, exactly; A, B of `Rows`
    Z~ = mean(w - X b_w)    F = m0 + mean(s (f - m0) - X b_f)    m0 = sum(s f) / sum(s)       b by least squares with intercept
    reverse_kl = F + log Z

The rest of the bank (N0 - n0 draws that nobody scores under q) speaks for log Z alone: Z = (1 - k) Z~ + k mean_rest exp(tilt), which is
unbiased for every fixed k. What can hide: a region that n0 (N0) prior draws missed has prior mass below 3/n0 (3/N0) at 95 %, so Z~ lacks
at most 3 W / n0 and the rest 3 W / N0, W = exp(r_max/beta); together that is the reach of N_k = 1 / ((1-k)/n0 + k/N0) draws:

    A = N_k Z exp(-r_max/beta)       interval = [est - t se, est + t se + log(1 + 3/A)]

and k is chosen, once, where se/sqrt(P) and that widening add to the least. With nothing left over k is 0 and this is ESTIMATORS.md
section 1. Errors: delete-a-block jackknife over all three strata, b and m0 refitted, k kept. Shapes [P prompts, draws]; nats; float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from klbench import estimate, weights
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife

RIDGE: Final = 1e-6
DROP: Final = 0.3  # control variates that push Z below this share of the plain mean are dropped for that prompt


@dataclass(frozen=True)
class Rows:
    """Draws of one law with what both models say of them, each [P, N].

    log_q, log_p0: of whole outputs.  reward.  A = sum_t [-log q(x_t) - H(q_t)] and B = sum_t [-log p0(x_t) - H(q_t, p0_t)]: mean 0 under q.
    kl: sum_t KL(q_t || p0_t).  entropy: sum_t H(q_t).  Where a policy has no token laws A = B = 0, kl = log_q - log_p0, entropy = -log_q.
    """

    log_q: Array
    log_p0: Array
    reward: Array
    A: Array
    B: Array
    kl: Array
    entropy: Array

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value.shape != self.log_q.shape or value.ndim != 2:
                raise ValueError(f"{name}: [P, N] expected like log_q {self.log_q.shape}, got {value.shape}")


@dataclass(frozen=True)
class Fit:
    """Per-prompt results [P] of one fit. `free` = KL(q||p0) - E_q r/beta (times that beta's inverse), log Z of its own."""

    free: Array
    log_z: Array
    forward_kl: Array
    tv: Array
    js: Array


def _kept(x: Array, leave: int | None) -> Array:
    """Columns of all blocks but one."""
    return x if leave is None else x[:, estimate.blocks_of(x.shape[1]) != leave]


def _stable_exp(x: Array) -> Array:
    return np.exp(np.minimum(x, 300.0))  # its square is finite too


@final
class Pool:
    """The strata of one policy on one task. `rest` [P, M] holds the rewards of the bank's unscored draws (M may be 0)."""

    def __init__(self, own: Rows, bank: Rows, rest: Array, reward_max: Array):
        prompts = own.log_q.shape[0]
        for name, shape in (("bank", bank.log_q.shape), ("rest", rest.shape), ("reward_max", reward_max.shape)):
            if shape[0] != prompts:
                raise ValueError(f"{name}: {prompts} prompts expected, got {shape[0]}")
        least = min(own.log_q.shape[1], bank.log_q.shape[1])
        if least < estimate.LEAST_DRAWS:
            raise ValueError(f"at least {estimate.LEAST_DRAWS} draws a prompt are needed from policy and prior, got {least}")
        self.own, self.bank, self.rest, self.reward_max = own, bank, rest, reward_max
        self.prompts = prompts
        self.draws = own.log_q.shape[1]
        self.bank_draws = bank.log_q.shape[1] + rest.shape[1]

    def reach(self, inverse_beta: float, log_z: Array, k: Array | float = 0.0) -> Array:
        """[P] A = N_k Z exp(-r_max/beta); 0 where no ceiling was declared."""
        n0 = self.bank.log_q.shape[1]
        draws = 1.0 / ((1.0 - k) / n0 + np.asarray(k) / self.bank_draws)
        ceiling = np.full(self.prompts, math.inf)  # stays infinite at inverse_beta = 0, where the product would be NaN
        np.multiply(inverse_beta, self.reward_max, out=ceiling, where=np.isfinite(self.reward_max))
        return np.asarray(draws * np.exp(np.minimum(log_z - ceiling, 0.0)))

    def fit(self, inverse_beta: float, k: Array | float, leave: int | None = None) -> tuple[Fit, Any]:
        """One fit at tilt = inverse_beta * reward, with block `leave` of every stratum left out; also the variances that choose k."""

        def both(name: str) -> Array:
            return np.concatenate([_kept(getattr(self.bank, name), leave), _kept(getattr(self.own, name), leave)], 1)

        lq, l0, reward, A, B = (both(name) for name in ("log_q", "log_p0", "reward", "A", "B"))
        n0, n = _kept(self.bank.log_q, leave).shape[1], lq.shape[1]
        tilt = inverse_beta * reward
        log_m = np.logaddexp(math.log(n0 / n) + l0, math.log(1 - n0 / n) + lq)
        top = np.max(l0 + tilt - log_m, axis=1, keepdims=True)  # of the rows that are there: Z cannot vanish
        w = np.exp(l0 + tilt - top - log_m)
        s = np.exp(lq - log_m)
        with np.errstate(invalid="ignore"):
            f = np.where(s > 0, lq - l0 - tilt, 0.0)  # a row that q cannot draw carries no weight
        sA, sB = (s * np.where(s > 0, x, 0.0) for x in (A, B))
        X = np.stack([s - 1.0, sA, sB], 2)  # [P, n, 3]
        norm = np.sqrt((X**2).sum(1, keepdims=True))
        X = X / np.where(norm > 0, norm, 1.0)
        m0 = (s * f).sum(1) / s.sum(1)
        y = s * (f - m0[:, None])
        centred = X - X.mean(1, keepdims=True)
        gram = np.einsum("pni,pnj->pij", centred, centred) + RIDGE * np.eye(3)
        targets = np.stack([w - w.mean(1, keepdims=True), y - y.mean(1, keepdims=True)], 2)
        b = np.linalg.solve(gram, np.einsum("pni,pnj->pij", centred, targets))  # [P, 3, 2]
        left = np.stack([w, y], 2) - np.einsum("pni,pij->pnj", X, b)
        dropped = left[:, :, 0].mean(1) < DROP * w.mean(1)
        left = np.where(dropped[:, None, None], np.stack([w, y], 2), left)
        u_rows, f_rows = left[:, :, 0], left[:, :, 1]
        z_joint = u_rows.mean(1)
        rest = _kept(self.rest, leave)
        z_rest = _stable_exp(inverse_beta * rest - top).mean(1) if rest.shape[1] else z_joint
        z_rest = np.where(z_rest > 1e-100, z_rest, z_joint)  # hundreds of nats below the scored rows: it says nothing
        z = (1 - k) * z_joint + k * z_rest
        log_z = np.log(z) + top[:, 0]
        free = m0 + f_rows.mean(1)
        u = w / z[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = np.where(u > 0, l0 + tilt - lq, 0.0)  # log p*/q up to log Z
            forward = (u * gap).sum(1) / u.sum(1) - log_z
            js = 0.5 * (_xlog2(s, u) + _xlog2(u, s)).mean(1)
        fit = Fit(free, log_z, forward, 0.5 * np.abs(s - u).mean(1), js)
        return fit, (u_rows / z_joint[:, None], f_rows, n0, rest, z_joint, top)

    def choose_k(self, inverse_beta: float) -> Array:
        """[P] share of the unscored bank in Z: least sum of se/sqrt(P) and widening among those that certify. 0 when there is no rest."""
        if not self.rest.shape[1]:
            return np.zeros(self.prompts)
        fit, (u, f, n0, rest, z_joint, top) = self.fit(inverse_beta, 0.0)
        n = u.shape[1]

        def stratified(a: Array, b: Array) -> Array:  # covariance of the means of a and b, fixed allocation
            total = np.zeros(self.prompts)
            for part in (slice(0, n0), slice(n0, n)):
                x, y = a[:, part], b[:, part]
                total += ((x - x.mean(1, keepdims=True)) * (y - y.mean(1, keepdims=True))).sum(1)
            return total / n**2

        v_u, v_f, c = stratified(u, u), stratified(f, f), stratified(u, f)
        w_rest = _stable_exp(inverse_beta * rest - top) / z_joint[:, None]
        v_r = w_rest.var(1) / rest.shape[1]
        grid = np.linspace(0, 1, 41)[:, None]
        var = v_f + (1 - grid) ** 2 * v_u + 2 * (1 - grid) * c + grid**2 * v_r
        reach = self.reach(inverse_beta, fit.log_z, grid)
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
        full, _ = self.fit(inverse_beta, k)
        left = [self.fit(inverse_beta, k, b)[0] for b in range(BLOCKS)]

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
        out["wasted_nats"], out["beta_implied"], efficiency = self._waste(n, known)
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
        if efficiency is not None:
            out["kl_efficiency"] = efficiency
        per_prompt = {"free": free.estimates, "log_z": log_z.estimates, "reverse_kl": reverse.estimates, "reach": reach}
        per_prompt["free_stderr"] = np.sqrt(free.variances)
        return out, per_prompt, reach

    def _guard(self, figure: Estimate, reach: Array, known: bool) -> Estimate:
        if figure.status == "exact":
            return figure
        if known:
            return estimate.by_reach(figure, reach)
        blind = replace(figure, low=None, high=None, population=None, status="uncertified")
        return replace(blind, reason="no reward_max was declared: nothing bounds what the prior draws missed")

    def _waste(self, n: int, known: bool) -> tuple[Estimate, Estimate, Estimate | None]:
        """wasted_nats at lambda-hat, refitted in each block; 1/lambda-hat; and KL*(E_q r) / KL(q||p0)."""
        lam = self.lambda_hat()
        k = self.choose_k(lam)
        full, _ = self.fit(lam, k)
        lams = [self.lambda_hat(b, lam) for b in range(BLOCKS)]
        left = np.stack([(lambda x: x.free + x.log_z)(self.fit(each, k, b)[0]) for b, each in enumerate(lams)])
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
        if kl.mean(n=n).low is None or (kl.mean(n=n).low or 0.0) <= 0:
            return waste, implied, None
        ratio = Jackknife(np.array([1 - jack.full.mean() / kl.full.mean()]), (1 - left.mean(1) / kl.left.mean(1))[:, None])
        share = ratio.mean(n=n)
        clip = lambda x: None if x is None else min(1.0, max(0.0, x))  # noqa: E731
        share = replace(share, value=clip(share.value), low=clip(share.low), high=clip(share.high), population=None)
        return waste, implied, self._guard(share, reach, known)


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
