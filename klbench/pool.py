"""log Z and reverse KL together: the prior's bank, a policy's draws and other policies' as strata of one mixture, a prompt at a time.

    rows i of strata j (0 the prior, 1 the policy q, 2.. others), n_j draws each, a_j = n_j / n;  m = sum_j a_j q_j       balance heuristic
    w = p0 exp(tilt) / m    mean w = Z          s = q / m    mean s = 1          tilt = r / beta
    f = log q - log p0 - tilt                   E_q f = KL(q||p0) - E_q r / beta
    X = [g_1 .. g_J, s A, s B]                  g_j = q_j / m - 1: mean 0 over the mixture, exactly; A, B of `Rows`
    Z~ = mean(w - X b_w)    F = m0 + mean(s (f - m0) - X b_f)    m0 = sum(s f) / sum(s)       b by least squares about E X = 0
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

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, entr, logsumexp

from klbench import estimate, measure, weights
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife
from klbench.estimators import betting, chi2, kl_prior
from klbench.estimators.control import with_few
from klbench.rows import Rows

RIDGE: Final = 1e-6
INTERVALS: Final = ("jackknife", "betting")
CLEARLY: Final = 0.25  # of the variance, below which another share of the bank is worth taking for the value
FEW: Final = 10  # draws below which a spread says nothing of what was not drawn
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
    """Per-prompt results [P] of one fit. `free` = KL(q||p0) - E_q r/beta (times that beta's inverse), log Z of its own.

    chi2 is log(1 + chi2(p*||q)).
    """

    free: Array
    log_z: Array
    forward_kl: Array
    tv: Array
    js: Array
    chi2: Array

    @classmethod
    def joined(cls, full: Fit, left: Sequence[Fit]) -> Fit:
        """[9, P] from fits of which the first holds the full one and pool b that without block b."""
        names = cls.__dataclass_fields__
        return cls(**{x: np.stack([getattr(full, x)[0], *(getattr(f, x)[1 + b] for b, f in enumerate(left))]) for x in names})


def _kept(x: Array, leave: int | None) -> Array:
    """Columns of all blocks but one."""
    return x if leave is None else x[:, estimate.blocks_of(x.shape[1]) != leave]


def _stable_exp(x: Array) -> Array:
    return np.exp(np.minimum(x, 300.0))  # its square is finite too


@final
class Pool:
    """The strata of one policy on one task. `rest` [P, M] holds the rewards of the bank's unscored draws (M may be 0).

    refits: 8 pools of the same draws whose densities were estimated without block b of the bank, for a policy that takes its own from
    there (best-of-n): the error of the density is then in every interval.

    Raises ValueError for shapes that disagree and for fewer than 16 draws in a stratum.
    """

    def __init__(self, own: Rows, bank: Rows, rest: Array, reward_max: Array, others: Sequence[Stratum] = (), refits: Sequence[Pool] = ()):
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
        self.own, self.bank, self.rest, self.reward_max, self.refits = own, bank, rest, reward_max, refits
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

    def _alone(self) -> Pool:
        """The same pool with its density taken as known."""
        alone = copy.copy(self)
        alone.refits = ()
        return alone

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

    @cached_property
    def _fold(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        """Rows in order of (stratum, block), where each group starts, and [9, G] weights of the groups' sums in a mean over the mixture.

        Row 0 of the weights is the full fit, row 1 + b the one without block b: a_j over the draws of stratum j that are kept.
        """
        group = self._stratum * BLOCKS + self._block
        order = np.argsort(group, kind="stable")
        sizes = np.bincount(group).reshape(-1, BLOCKS)  # [J + 1, 8]; none is empty
        kept = np.ones((BLOCKS + 1, BLOCKS)) - np.vstack([np.zeros(BLOCKS), np.eye(BLOCKS)])
        weight = kept[:, None] * (self._share / (kept @ sizes.T))[:, :, None]  # [9, J + 1, 8]
        return order, np.concatenate([[0], np.cumsum(sizes.ravel())[:-1]]), weight.reshape(BLOCKS + 1, -1)

    def _means(self, terms: Array) -> Array:
        """[9, P, ...] means over the mixture of terms [P, n, ...]: of all rows, and without each block."""
        order, starts, weight = self._fold
        return np.tensordot(weight, np.add.reduceat(terms[:, order], starts, axis=1), (1, 1))

    @cached_property
    def _design(self) -> tuple[Array, Array]:
        """[9, P, d] means of X and [9, P, d, d] inverses of its ridged second moments: the same for every tilt and target.

        Moments about the mean that X is known to have, 0, and not about the sample's: where a policy has collapsed, s A is a multiple of s
        on all rows that were drawn, and least squares with an intercept would extrapolate along their tiny difference.
        """
        mean = self._means(self._X)
        order, starts, weight = self._fold
        X = self._X[:, order]
        sums = np.stack([part.transpose(0, 2, 1) @ part for part in np.split(X, starts[1:], axis=1)])  # [G, P, d, d]
        gram = np.tensordot(weight, sums, (1, 0))
        return mean, np.asarray(np.linalg.inv(gram + RIDGE * np.eye(X.shape[2])), dtype=np.float64)

    def _regress(self, targets: Array, guard: bool = False) -> tuple[Array, Array]:
        """[9, P, t] means over the mixture of targets [P, n, t] less what X explains, mean - mean(X) b, and b [9, P, d, t].

        guard: the first target is w; where its mean would fall below DROP of the plain one, that prompt does without X.
        """
        mean_x, inverse = self._design
        order, starts, weight = self._fold
        mean_t = self._means(targets)
        pairs = zip(np.split(self._X[:, order], starts[1:], axis=1), np.split(targets[:, order], starts[1:], axis=1), strict=True)
        sums = np.stack([x.transpose(0, 2, 1) @ y for x, y in pairs])  # [G, P, d, t]
        b = inverse @ (np.tensordot(weight, sums, (1, 0)) - mean_x[..., :, None] * mean_t[..., None, :])
        found = mean_t - (mean_x[..., None, :] @ b)[..., 0, :]
        if guard:
            dropped = (found[..., 0] < DROP * mean_t[..., 0])[..., None]
            b, found = np.where(dropped[..., None], 0.0, b), np.where(dropped, mean_t, found)
        return found, b

    def _of_rest(self, terms: Array) -> Array:
        """[9, P] means of terms [P, M] of the unscored bank, of all and without each block."""
        block = estimate.blocks_of(terms.shape[1])
        sums = np.stack([terms[:, block == b].sum(1) for b in range(BLOCKS)])
        counts = np.bincount(block, minlength=BLOCKS)
        kept = np.vstack([np.ones(BLOCKS), 1 - np.eye(BLOCKS)])
        return np.asarray(kept @ sums / (kept @ counts)[:, None])

    def _weigh(self, inverse_beta: float) -> tuple[Array, Array, Array]:
        """w exp(-top) [P, n] and y = s (f - m0), as targets [P, n, 2]; m0 and top [P, 1]."""
        tilt = inverse_beta * self.rows.reward
        log_w = self.rows.log_p0 + tilt - self._log_m
        top = np.max(log_w, axis=1, keepdims=True)  # of the rows that are there: Z cannot vanish
        f = np.where(self._s > 0, self._ratio - tilt, 0.0)
        m0 = (self._s * f).sum(1, keepdims=True) / self._s.sum(1, keepdims=True)
        return np.stack([np.exp(log_w - top), self._s * (f - m0)], 2), m0, top

    def fits(self, inverse_beta: float, k: Array | float) -> Fit:
        """All fits at tilt = inverse_beta * reward, [9, P]: the full one, and one without each block of every stratum.

        TV and JS of a left-out block are those of the full log Z, moved along their slope in it; the others are refitted.
        """
        if self.refits:
            alone = self._alone()
            return Fit.joined(alone.fits(inverse_beta, k), [pool.fits(inverse_beta, k) for pool in self.refits])
        targets, m0, top = self._weigh(inverse_beta)
        found, _ = self._regress(targets, guard=True)
        z = found[..., 0]
        if self.rest.shape[1]:
            z_rest = self._of_rest(_stable_exp(inverse_beta * self.rest - top))
            z = (1 - k) * z + k * np.where(z_rest > 1e-100, z_rest, z)  # hundreds of nats below the scored rows: it says nothing
        log_z = np.log(z) + top[:, 0]
        w, s = targets[..., 0], self._s
        u = w / z[0][:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            gap = np.where(w > 0, self.rows.log_p0 + inverse_beta * self.rows.reward - self.rows.log_q, 0.0)
            lost = np.isposinf(gap) & (w > 0)  # p* has mass where q has none
            terms = np.where(w > 0, 2 * np.log(w) - (self.rows.log_q - self._log_m), -np.inf)
        gap = np.where(lost, 0.0, gap)
        peak = np.where(lost, -np.inf, terms).max(1, keepdims=True)
        js = 0.5 * (_xlog2(s, u) + _xlog2(u, s))
        means = self._means(
            np.stack([w, w * gap, s, 0.5 * np.abs(s - u), 0.5 * np.sign(s - u) * u, js, 0.5 * _xlog2(u, s),
                      np.where(lost, 0.0, np.exp(np.minimum(terms - peak, 0.0)))], 2)
        )  # fmt: skip
        w_, w_gap, s_, tv, d_tv, js_, d_js, squares = np.moveaxis(means, -1, 0)
        moved = log_z - log_z[0]
        nowhere = lost.any(1)
        # E_m[u log(u/s) - u + s] = KL(p*||q): never negative, and an error of Z enters it at second order
        forward = np.where(nowhere, math.inf, (w_gap - w_ * log_z - w_) / z + s_)
        with np.errstate(divide="ignore"):
            chi2 = np.where(nowhere, math.inf, np.maximum(np.log(squares) + peak[:, 0] - 2 * np.log(z), 0.0))
        return Fit(m0[:, 0] + found[..., 1], log_z, forward, tv + d_tv * moved, js_ - d_js * moved, chi2)

    def fit(self, inverse_beta: float, k: Array | float = 0.0, leave: int | None = None) -> Fit:
        """One of `fits`, [P]: the full one, or that without block `leave`."""
        every = self.fits(inverse_beta, k)
        return Fit(**{name: value[0 if leave is None else 1 + leave] for name, value in vars(every).items()})

    def choose_k(self, inverse_beta: float) -> tuple[Array, Array]:
        """[P] shares of the unscored bank in Z: of least standard error, for the value; and of least sum of se/sqrt(P) and widening
        among those that certify, for the interval's upper end. 0 when there is no rest."""
        if not self.rest.shape[1]:
            return np.zeros(self.prompts), np.zeros(self.prompts)
        targets, _, top = self._weigh(inverse_beta)
        found, b = self._regress(targets, guard=True)
        left, z, n = targets - self._X @ b[0], found[0, :, 0], len(self._block)
        u, f = left[:, :, 0] / z[:, None], left[:, :, 1]

        def stratified(a: Array, b: Array) -> Array:  # covariance of the means of a and b, fixed allocation
            total = np.zeros(self.prompts)
            for j in range(len(self._share)):
                x, y = a[:, self._stratum == j], b[:, self._stratum == j]
                total += ((x - x.mean(1, keepdims=True)) * (y - y.mean(1, keepdims=True))).sum(1)
            return total / n**2

        v_u, v_f, c = stratified(u, u), stratified(f, f), stratified(u, f)
        v_r = (_stable_exp(inverse_beta * self.rest - top) / z[:, None]).var(1) / self.rest.shape[1]
        grid = np.linspace(0, 1, 41)[:, None]
        var = v_f + (1 - grid) ** 2 * v_u + 2 * (1 - grid) * c + grid**2 * v_r
        reach = self.reach(inverse_beta, np.log(z) + top[:, 0], grid)
        width = 2 * np.sqrt(np.maximum(var, 0) / self.prompts) + estimate.widening(np.maximum(reach, 1e-300))
        certified = reach >= estimate.CERTIFIED
        width = np.where(certified | ~certified.any(0), width, np.inf)  # where some k certifies, none that does not is worth its width
        high, least = width.argmin(0), np.where(reach >= estimate.WIDE, var, np.inf).argmin(0)
        at = np.arange(self.prompts)
        clearly = var[least, at] < CLEARLY * var[high, at]  # variances are estimates too: a small gain may be none
        return np.asarray(grid[np.where(clearly, least, high), 0]), np.asarray(grid[high, 0])

    @cached_property
    def kl(self) -> Jackknife:
        """KL(q||p0) from own draws alone."""
        return self.own_draws(kl_prior.regressed)

    def own_draws(self, f: Callable[[Rows], Jackknife], on_bank: bool = False) -> Jackknife:
        """f of own draws (or of the bank's scored ones); where the density is an estimate, made again without each of the bank's blocks."""
        of = lambda pool: f(pool.bank if on_bank else pool.own)  # noqa: E731
        full = of(self)
        return Jackknife(full.full, np.stack([of(p).left[b] for b, p in enumerate(self.refits)])) if self.refits else full

    def _line(self) -> tuple[Array, Array]:
        """[9, P] KL(q||p0) and E_q r by the mixture: free(lambda) is the first less lambda times the second."""
        if self.refits:
            every = [p._line() for p in (self._alone(), *self.refits)]
            kl, reward = (np.stack([every[0][i][0], *(x[i][1 + b] for b, x in enumerate(every[1:]))]) for i in range(2))
            return kl, reward
        s, targets, centres = self._s, [], []
        for x in (self._ratio, self.rows.reward):
            centre = (s * x).sum(1, keepdims=True) / s.sum(1, keepdims=True)
            targets.append(s * (x - centre))
            centres.append(centre[:, 0])
        found, _ = self._regress(np.stack(targets, 2))
        return centres[0] + found[..., 0], centres[1] + found[..., 1]

    def _log_z(self, lam: float, k: Array | float) -> tuple[Array, Array, Array, float]:
        """[9, P] log Z(lambda) and its first two derivatives in lambda (w and r w are regressed, r^2 w is not), and how many rows carry
        the second."""
        reward = self.rows.reward
        log_w = self.rows.log_p0 + lam * reward - self._log_m
        top = log_w.max(1, keepdims=True)
        w = np.exp(log_w - top)
        centre = (w * reward).sum(1, keepdims=True) / w.sum(1, keepdims=True)  # derivatives are of the centred reward: no cancellation
        r = reward - centre
        bend = w * r * r
        found, _ = self._regress(np.stack([w, w * r], 2), guard=True)
        moments = [found[..., 0], found[..., 1], self._means(bend)]
        rows = _carried(bend)
        if self.rest.shape[1]:
            e = _stable_exp(lam * self.rest - top)
            there = e.mean(1) > 1e-100  # hundreds of nats below the scored rows: it says nothing
            r = self.rest - centre
            rows = max(rows, _carried(e * r * r))
            moments = [(1 - k) * x + k * np.where(there, self._of_rest(y), x) for x, y in zip(moments, (e, e * r, e * r * r), strict=True)]
        mean = moments[1] / moments[0]
        return np.log(moments[0]) + top[:, 0], mean + centre[:, 0], np.maximum(moments[2] / moments[0] - mean**2, 0.0), rows

    @property
    def _most_lambda(self) -> float:
        """60 spans of the reward: beyond it a tilt only tells the highest rewards from one another."""
        return 60.0 / (float((self.rows.reward.max(1) - self.rows.reward.min(1)).max()) or 1.0)

    def nearest(self, start: float, reward: float | None = None) -> tuple[float, tuple[Array, Array]]:
        """argmin over lambda >= 0 of mean_p [log Z_p(lambda) - lambda E_q r], where the policy is closest to a posterior; `choose_k` there.

        The function that is minimised is the one that `wasted_nats` prints: by Newton steps kept inside a bracket, at most 60 spans.
        """
        reward = float(self._line()[1][0].mean()) if reward is None else reward
        k, lam = self.choose_k(start), start
        for _ in range(2):  # k belongs to a lambda: chosen where the search starts, and again where it ended
            lam = _minimum(self._mean_and_variance(k[0]), reward, self._most_lambda, lam)
            k = self.choose_k(lam)
        return lam, k

    def _mean_and_variance(self, k: Array) -> Callable[[float], tuple[float, float]]:
        """Of the reward under the tilted prior at a lambda, mean over prompts."""

        def found(lam: float) -> tuple[float, float]:
            _, mean, variance, _ = self._log_z(lam, k)
            return float(mean[0].mean()), float(variance[0].mean())

        return found

    def columns(self, inverse_beta: float, interval: str = "jackknife") -> tuple[dict[str, Estimate], dict[str, Array], Array]:
        """All columns that hold Z or p*, per-prompt arrays, and the reach [P] behind reverse_kl. interval: one of INTERVALS.

        "betting" gives log_z an interval that is exact at any N0, from prior draws alone, and reverse_kl the sum of that and of the
        t interval of F, each at 97.5 %; the other columns keep theirs.
        """
        k, k_high = self.choose_k(inverse_beta)
        found = self.fits(inverse_beta, k)
        other = found if (k == k_high).all() else self.fits(inverse_beta, k_high)
        n = self.prompts * (self.draws + self.bank_draws)
        jack = lambda x: Jackknife(x[0], x[1:])  # noqa: E731
        free, log_z = jack(found.free), jack(found.log_z)
        reach_value, reach = self.reach(inverse_beta, log_z.estimates, k), self.reach(inverse_beta, jack(other.log_z).estimates, k_high)
        scored = self.reach(inverse_beta, log_z.estimates)  # what reads p* on scored rows alone
        out: dict[str, Estimate] = {}
        known = bool(np.isfinite(self.reward_max).all())
        for name, value, high in (
            ("reverse_kl", found.free + found.log_z, other.free + other.log_z),
            ("log_z", found.log_z, other.log_z),
        ):
            out[name] = self._guard(_both(jack(value), reach_value, jack(high), reach, n), reach, known)
        if interval == "betting":
            tilt = inverse_beta * np.concatenate([self.bank.reward, self.rest], 1)
            ceiling = inverse_beta * self.reward_max if inverse_beta > 0 else np.zeros(self.prompts)
            (low, high_), part = betting.mean_log_z(tilt, ceiling, 0.975), free.mean(n=n, level=0.975)
            assert part.low is not None and part.high is not None
            out["log_z"] = estimate.by_betting(out["log_z"], *betting.mean_log_z(tilt, ceiling), reach)
            out["reverse_kl"] = estimate.by_betting(out["reverse_kl"], part.low + low, part.high + high_, reach)
        if self.infinite:
            nowhere = estimate.exactly(math.inf, n, "the policy puts mass where the prior has none")
            out |= {"reverse_kl": nowhere, "wasted_nats": nowhere}
        else:
            out |= self._waste(inverse_beta, n, known)
        hidden = 3.0 / (scored + 3.0)  # the most of p* that no scored prior draw has seen (95 %)
        for name, values in (("tv", found.tv), ("js", found.js), ("forward_kl", found.forward_kl)):
            out[name] = self._guard(_unseen(name, jack(values).mean(n=n), hidden), scored, known)
        if out["forward_kl"].status == "wide":
            out["forward_kl"] = replace(out["forward_kl"], status="lower", high=None, population=None)
        w = np.exp(self.own.log_p0 + inverse_beta * self.own.reward - self.own.log_q - found.log_z[0][:, None])
        ess = float(weights.ess(w).mean())
        squares = self._squares(inverse_beta, found.log_z[0])
        tail = max(weights.khat(x) for x in squares)
        out["chi2"] = self._guard(chi2.guarded(jack(found.chi2), n, tail, float(weights.ess(squares).min())), scored, known)
        out["ess"] = Estimate(ess, n=n, status="uncertified", reason="certifies nothing")
        out["khat"] = Estimate(max(weights.khat(x) for x in w), n=n, status="uncertified", reason="largest over prompts; certifies nothing")
        out["reverse_kl"] = replace(out["reverse_kl"], ess=ess)
        least = float(reach.min())
        out["reach"] = estimate.undefined("no reward_max declared")
        if known:
            out["reach"] = Estimate(least, n=self.bank_draws, status="uncertified", reason="least over prompts, of draws as they fell")
        per_prompt = {
            "free": free.estimates,
            "log_z": log_z.estimates,
            "reverse_kl": jack(found.free + found.log_z).estimates,
            "reach": reach,
        }
        shown = self._ratio[:, self._stratum == 1] - inverse_beta * self.own.reward
        unseen = 3.0 * (shown.max(1) - shown.min(1)) / self.draws / estimate.t_quantile(BLOCKS - 1)  # rule of three, as a standard error
        per_prompt["free_stderr"] = np.maximum(np.sqrt(free.variances), unseen)
        if self.infinite:
            nowhere_at = np.isneginf(self.own.log_p0).any(1) | np.isposinf(self.own.kl).any(1)
            per_prompt |= {name: np.where(nowhere_at, math.inf, per_prompt[name]) for name in ("free", "reverse_kl")}
        return {name: _tidy(name, figure) for name, figure in out.items()}, per_prompt, reach

    def _squares(self, inverse_beta: float, log_z: Array) -> Array:
        """[P, n] u^2 / s of the rows, the terms of 1 + chi2: what few of them carry, the others have not seen."""
        log_u = self.rows.log_p0 + inverse_beta * self.rows.reward - self._log_m - log_z[:, None]
        with np.errstate(invalid="ignore", over="ignore"):
            return np.nan_to_num(np.exp(np.minimum(2 * log_u - (self.rows.log_q - self._log_m), 300.0)), posinf=0.0)

    def _guard(self, figure: Estimate, reach: Array, known: bool) -> Estimate:
        if figure.status == "exact":
            return figure
        if known:
            found = estimate.by_reach(figure, reach, self.bank_draws)
            bound = figure.status == "lower" and found.status != "uncertified"
            return replace(found, status="lower", reason=figure.reason) if bound else found
        blind = replace(figure, low=None, high=None, population=None, status="uncertified")
        return replace(blind, reason="no reward_max was declared: nothing bounds what the prior draws missed")

    def _waste(self, start: float, n: int, known: bool) -> dict[str, Estimate]:
        """wasted_nats = min over lambda of g(lambda) = free(lambda) + log Z(lambda); 1/lambda-hat; and KL*(E_q r) / KL(q||p0).

        A left-out block moves lambda by one Newton step d_b = -g_b'/g'', and g_b's minimum is its value at lambda-hat less g'' d_b^2 / 2.
        """
        lam, (k, k_high) = self.nearest(start)
        (kl, reward), (log_z, first, second, rows) = self._line(), self._log_z(lam, k)
        high = log_z if (k == k_high).all() else self._log_z(lam, k_high)[0]
        g, above = kl - lam * reward + log_z, kl - lam * reward + high
        slope, bend = (first - reward)[1:].mean(1), float(second[0].mean())
        most = self._most_lambda
        step = np.clip(-slope / max(bend, 1e-12), -lam, min(lam, most - lam) if lam > 0 else most)
        gained = np.minimum(slope * step + 0.5 * bend * step**2, 0.0)  # of each block's mean, by its own lambda
        fitted = -(BLOCKS - 1) * float(gained.mean())
        reach_value, reach = self.reach(lam, log_z[0], k), self.reach(lam, high[0], k_high)
        waste = _both(Jackknife(g[0], g[1:]), reach_value, Jackknife(above[0], above[1:]), reach, n)
        waste = _moved(waste, fitted, fitted)  # the minimum of a noisy function is low by about `fitted`, give or take as much
        seen_kl = self.rows.kl[np.isfinite(self.rows.kl)]
        waste = with_few(waste, self.own.reward, float(np.ptp(seen_kl)) if seen_kl.size else 0.0)
        invert = lambda x: math.inf if x <= 0 else 1.0 / x  # noqa: E731
        free = lam - slope / max(bend, 1e-12)  # each block's lambda where 0 is no wall: a policy may earn less than the prior
        centre = lam - float((first - reward)[0].mean()) / max(bend, 1e-12) if lam == 0 else lam
        half = estimate.t_quantile(BLOCKS - 1) * float(np.sqrt(Jackknife(np.array([lam]), free[:, None]).variances[0]))
        tops = np.where(np.isfinite(self.reward_max), self.reward_max, self.rows.reward.max(1))
        unseen = float((3.0 / (reach + 3.0) * (tops - first[0])).mean()) / max(
            bend, 1e-12
        )  # what a region nobody saw would take from lambda
        implied = Estimate(invert(lam), invert(max(centre + half, 0.0)), invert(centre - half - unseen), n=n)
        doubt, more = self._few_below_the_top(), 0.0
        if (
            doubt > 0
        ):  # nearly every draw earns the most there is: lambda is known from below, KL* between what less reward and all of it cost
            least, _ = self.nearest(lam, float(reward[0].mean()) - doubt)
            bank = np.concatenate([self.bank.reward, self.rest], 1)
            full = float(np.mean(-np.log(np.maximum((bank >= bank.max(1, keepdims=True)).mean(1), 1e-300))))
            more = max(0.0, full - (lam * float(reward[0].mean()) - float(log_z[0].mean())))
            waste = replace(waste, low=(waste.low or 0.0) - more, high=(waste.high or 0.0) + lam * doubt, population=None)
            why = "nearly every draw earns the highest reward there is: any smaller beta fits as well"
            implied = Estimate(invert(least), 0.0, invert(least - half - unseen), n=n, status="upper", reason=why)
            if least - half - unseen <= 0:
                implied = estimate.undefined("no draw tells how the reward answers to beta: every beta fits", n=n)
        waste = self._guard(waste, reach, known)
        if implied.status != "upper":
            implied = replace(implied, status=waste.status, reason=waste.reason)
        seen = _carried((self.own.reward - self.own.reward.mean(1, keepdims=True)) ** 2)
        if min(rows, seen) < FEW and doubt == 0:
            implied = replace(implied, status="uncertified", reason="fewer than ten draws tell how the reward answers to beta")
        if "uncertified" in (waste.status, implied.status):
            implied = replace(implied, low=None, high=None, status="uncertified", reason=implied.reason or waste.reason)
        found = {"wasted_nats": waste, "beta_implied": implied}
        if (self.kl.mean(n=n).low or 0.0) <= 0:
            return found
        scale = float(self.kl.full.mean())
        share = Jackknife(np.array([1 - g[0].mean() / scale]), (1 - (g[1:].mean(1) + gained) / self.kl.left.mean(1))[:, None]).mean(n=n)
        down = float(np.mean(estimate.widening(reach))) + lam * doubt + fitted
        share = replace(share, low=(share.low or 0.0) - down / scale, high=(share.high or 0.0) + (more + fitted) / scale)
        clip = lambda x: None if x is None else min(1.0, max(0.0, x))  # noqa: E731
        share = replace(share, value=clip(share.value), low=clip(share.low), high=clip(share.high), population=None)
        return {**found, "kl_efficiency": self._guard(share, reach, known)}

    def _few_below_the_top(self) -> float:
        """How much less than seen E_q r may be where fewer than 10 draws in all earn less than a prompt's most: the rest of the reward's
        97.5 % Poisson limit on their number, times the span; 0 where there are more, and the jackknife can see them."""
        reward, most = self.own.reward, np.maximum(self.own.reward.max(1), self.bank.reward.max(1))[:, None]
        below, span = int((reward < most).sum()), float((most[:, 0] - self.bank.reward.min(1)).max())
        if below >= FEW:
            return 0.0
        return (float(chdtri(2 * below + 2, 0.025)) / 2 - below) * span / reward.size


def _both(value: Jackknife, reach_value: Array, high: Jackknife, reach: Array, n: int) -> Estimate:
    """The mean with the value's k, inside the intervals of both k: each at 97.5 %, the upper ends stretched by their own reach.

    One k is as good as the other in what it estimates; the value's has the least error, the other the least that could hide. Where the
    value's reach is too short for its interval to be trusted at all, or both are the same, the second alone.
    """
    up, up_value = estimate.widening(reach), estimate.widening(np.maximum(reach_value, 1e-300))
    if reach_value.min() < estimate.WIDE or value is high or (value.full == high.full).all():
        return high.mean(n=n, widen=up)
    a, b = value.mean(n=n, widen=up_value, level=0.975), high.mean(n=n, widen=up, level=0.975)
    if a.status == "exact":
        return a
    assert a.low is not None and a.high is not None and b.low is not None and b.high is not None and a.value is not None
    low, top = max(a.low, b.low), min(a.high, b.high)
    if low > top:  # they exclude each other, as happens to 1 in 20: the one that certifies is believed
        return high.mean(n=n, widen=up)
    population = value.mean(n=n, widen=np.minimum(up, up_value)).population
    return replace(a, value=min(max(a.value, low), top), low=low, high=top, population=population)


def _tidy(column: str, figure: Estimate) -> Estimate:
    """Inside the column's bounds, and 0 for the 7e-17 that a distance of nothing comes to."""
    figure = measure.bounded(column, figure)
    value, low = (0.0 if x is not None and abs(x) < 1e-12 else x for x in (figure.value, figure.low))
    return replace(figure, value=value, low=low)


def _carried(terms: Array) -> float:
    """Effective number of rows that carry a sum of non-negative terms [P, n], over all prompts."""
    square = (terms**2).sum(1)
    return float(np.divide(terms.sum(1) ** 2, square, out=np.zeros(len(terms)), where=square > 0).sum())


def _moved(figure: Estimate, by: float, more: float) -> Estimate:
    """The same interval elsewhere, wider by `more` at both ends."""
    value = None if figure.value is None else figure.value + by
    low, high = (None if x is None else x + by + side * more for x, side in ((figure.low, -1), (figure.high, 1)))
    ends = figure.population
    return replace(figure, value=value, low=low, high=high, population=None if ends is None else (ends[0] + by - more, ends[1] + by + more))


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
        return replace(figure, value=min(figure.value or 0.0, 1.0), low=max(0.0, low - e), high=min(1.0, high + e), population=None)
    if name == "js":
        most = math.log(2)
        ends = max(0.0, (1 - e) * low), min(most, (1 - e) * high + e * most)
        return replace(figure, value=min(max(figure.value or 0.0, 0.0), most), low=ends[0], high=ends[1], population=None)
    entropy = float(np.mean(entr(hidden) + entr(1 - hidden)))
    return replace(figure, low=max(0.0, (1 - e) * low - entropy), high=high + e + entropy, population=None)


def nearest_lambda(bank: Array, reward: float, start: float | None = None) -> float:
    """argmin over lambda >= 0 of mean_p log mean_i exp(lambda r_pi) - lambda reward, from prior draws [P, N] alone.

    0 when the reward is at most the prior's; capped at 60 spans where the tilted prior cannot reach it.
    """
    span = float((bank.max(1) - bank.min(1)).max()) or 1.0

    def mean_and_variance(lam: float) -> tuple[float, float]:
        tilt = lam * bank
        share = np.exp(tilt - tilt.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        mean = (share * bank).sum(1)
        return float(mean.mean()), float(((share * bank * bank).sum(1) - mean**2).mean())

    return _minimum(mean_and_variance, reward, 60.0 / span, start or 1.0 / span)


def _minimum(tilted: Callable[[float], tuple[float, float]], reward: float, most: float, start: float) -> float:
    """lambda in [0, most] at which `tilted`, the tilted mean reward and its slope, is `reward`: Newton steps kept inside a bracket."""
    low, high = 0.0, most
    if tilted(0.0)[0] >= reward:
        return 0.0
    lam = min(max(start, 0.0), high)
    for _ in range(100):
        mean, variance = tilted(lam)
        low, high = (lam, high) if mean < reward else (low, lam)
        step = lam - (mean - reward) / variance if variance > 0 else math.nan
        new = step if low < step < high else (low + high) / 2
        if abs(new - lam) <= 1e-9 * max(1.0, lam) or high - low <= 1e-6 * high:  # what is minimised is flat there to 1e-12
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
