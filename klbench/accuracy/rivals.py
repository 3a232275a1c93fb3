"""What klbench and others make of the same draws. An estimator reads a `Sample` and gives figures by column; each is a mean over prompts.

    klbench        the pool of the prior's draws and the policy's; KL to the prior and entropy regressed on what has mean 0
    board          the same with the other policies' draws as strata
    prior IS       log Z = log mean_p0 e^(r/beta);  reverse KL = [mean_q f given A, B] + log Z;  forward KL, TV, JS by weights q/p0, p*/p0
    self IS        log Z = log mean_q w,  w = p0 e^(r/beta) / q;  the rest likewise
    parts          KL(q||p0) regressed - E_q r regressed / beta + log Z of the pool, as three figures and their errors as if independent
    parts, board   the same with the board's log Z
    k1, k3, RB     KL(q||p0) as mean log q/p0;  mean p0/q - 1 - log p0/q of whole outputs;  mean sum_t KL(q_t||p0_t)
    mean           entropy as mean -log q, reward as the plain mean

f = log q - log p0 - r/beta. Their intervals are those of an 8-block jackknife that refits, t with 7 degrees of freedom a prompt (30 at
most), stretched by nothing: klbench alone adds what may hide. What two packages print carries no interval:

    disco          disco 1.1.2 (naver/disco, commit 5ea6fde): `Tuner._update_moving_z` keeps z = mean w a prompt, `metrics/kl.py` gives
                   KL(p*||q) = mean (w/z) log w - log z and, of (q, p*), KL(q||p*) = log z - mean log w; `metrics/tv.py` mean |1 - w/z| / 2;
                   `metrics/js.py` mean [(w/z) log(2 t/(1 + t)) - log((1 + t)/2)] / 2, t = w/z, as `js_target_policy` reports it;
                   KL(q||p0) as k1 (`track_divergence_from_base`). Its window of 256 figures is widened to all draws here.
    TRL GRPO       trl 1.10.0.dev0 (huggingface/trl, commit f2cd577), `GRPOTrainer._compute_loss`: `kl` = mean over tokens of
                   p0/q - 1 - log p0/q, `entropy` = mean over tokens of H(q_t); here times tokens an output, which makes them nats an output
    TRL RLOO, PPO  the same commit, `rloo_trainer.py`: `kl` = mean over tokens of log q/p0, again times tokens an output, and
                   `experimental/ppo/ppo_trainer.py`: `objective/kl` = mean over outputs of sum_t log q/p0, `objective/entropy` =
                   mean -log q. Both are k1 to the last digit.

All are evaluated at the policy itself, no step between drawing and scoring: there the packages' figures mean what their documents say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

import numpy as np

from klbench import estimate, weights
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife
from klbench.estimators import control, entropy, forgetting
from klbench.estimators import kl_prior as kl
from klbench.pool import Pool, Stratum
from klbench.rows import Rows

Figures = dict[str, Estimate]  # by column


@dataclass(frozen=True)
class Sample:
    """One policy's draws and the bank, as anybody who may score them has them.

    rest [P, M], others, reward_max [P] as of `pool.Pool`.  k3 [P, N]: sum_t p0/q - 1 - log p0/q of the tokens of the policy's own draws.
    base: the same draws without the others, where they are a sample already; what needs no pool is computed there, once.
    """

    own: Rows
    bank: Rows
    rest: Array
    reward_max: Array
    inverse_beta: float
    k3: Array
    others: tuple[Stratum, ...] = ()
    base: Sample | None = None

    @cached_property
    def alone(self) -> Figures:
        """Columns of the pool of prior and policy."""
        return Pool(self.own, self.bank, self.rest, self.reward_max).columns(self.inverse_beta)[0]

    @cached_property
    def pooled(self) -> Figures:
        """Columns of the pool with the other policies; none where there are no others."""
        if not self.others:
            return {}
        return Pool(self.own, self.bank, self.rest, self.reward_max, self.others).columns(self.inverse_beta)[0]

    @cached_property
    def kl_prior(self) -> Estimate:
        if self.base:
            return self.base.kl_prior
        return control.with_few(kl.regressed(self.own).mean(n=self.own.log_q.size), self.own.kl, self._span("kl"))

    @cached_property
    def entropy(self) -> Estimate:
        if self.base:
            return self.base.entropy
        return control.with_few(entropy.regressed(self.own).mean(n=self.own.log_q.size), self.own.entropy, self._span("entropy"))

    def _span(self, name: str) -> float:
        """What klbench.score hands to the rule of three: from the least to the most of own draws and bank."""
        seen = np.concatenate([getattr(self.own, name), getattr(self.bank, name)], 1)
        return float(np.ptp(seen[np.isfinite(seen)]))

    @cached_property
    def forgetting(self) -> Estimate:
        if self.base:
            return self.base.forgetting
        return control.with_few(forgetting.regressed(self.bank).mean(n=self.bank.log_q.size), self.bank.lost, self._span("lost"))

    @cached_property
    def reward(self) -> Estimate:
        if self.base:
            return self.base.reward
        span = float(max(self.bank.reward.max(), self.own.reward.max()) - min(self.bank.reward.min(), self.own.reward.min()))
        return control.bounded_mean(self.own.reward, self.own.A, self.own.B, span=span)

    @cached_property
    def free(self) -> Jackknife:
        """E_q f, regressed on A and B."""
        own = self.own
        f = own.log_q - own.log_p0 - self.inverse_beta * own.reward
        columns = np.stack([np.ones_like(f), own.A, own.B, f], 2)  # [P, N, 4]
        block = estimate.blocks_of(f.shape[1])
        part = np.stack([columns[:, block == b].transpose(0, 2, 1) @ columns[:, block == b] for b in range(BLOCKS)])
        total = part.sum(0)
        return Jackknife(_intercept(total), np.stack([_intercept(total - x) for x in part]))


def _intercept(gram: Array) -> Array:
    """[P] fit at A = B = 0, from the sums of products [P, 4, 4] of 1, A, B and f."""
    size = np.sqrt(gram[:, (0, 1, 2), (0, 1, 2)])
    size = np.where(size > 1e-9 * size[:, :1], size, 1.0)
    scaled = gram[:, :3, :3] / size[:, :, None] / size[:, None, :]
    scaled[:, (1, 2), (1, 2)] += 1e-6
    b = np.linalg.solve(scaled, (gram[:, :3, 3] / size)[:, :, None])
    return np.asarray(b[:, 0, 0] / size[:, 0])


@lru_cache(maxsize=8)
def _blocks(draws: int) -> Array:
    """[draws, 9]: weights of a plain mean of all draws, then of all but those of each block."""
    kept = np.concatenate([np.ones((1, draws), bool), estimate.blocks_of(draws) != np.arange(BLOCKS)[:, None]])
    return (kept / kept.sum(1, keepdims=True)).T


def _means(x: Array) -> Array:
    """[9, P] means of x [P, N]: of all draws, and with each block left out."""
    return (x @ _blocks(x.shape[1])).T


def _jack(figures: Array) -> Jackknife:
    """From [9, P]: the full figures, then those with each block left out."""
    return Jackknife(figures[0], figures[1:])


def _refitted(figure: Callable[..., Array], *arrays: Array) -> Jackknife:
    """figure(*arrays) -> [P], and with each block of the draws [P, N] left out."""
    block = estimate.blocks_of(arrays[0].shape[1])
    return Jackknife(figure(*arrays), np.stack([figure(*(x[:, block != b] for x in arrays)) for b in range(BLOCKS)]))


def _sum(a: Jackknife, b: Jackknife) -> Jackknife:
    return Jackknife(a.full + b.full, a.left + b.left)


def _log_means(log_w: Array) -> Array:
    """[9, P] log mean exp."""
    top = log_w.max(1, keepdims=True)
    return np.asarray(np.log(_means(np.exp(log_w - top))) + top[:, 0])


def _log_mean(log_w: Array) -> Array:
    return np.asarray(weights.log_mean_exp(log_w))


def _forward(log_w: Array, gap: Array) -> Array:
    """[9, P] KL(p*||q): draws of a law of log-weights log p0 e^(r/beta)/law, gap = log p0 e^(r/beta)/q."""
    share = np.exp(log_w - log_w.max(1, keepdims=True))
    return _means(share * gap) / _means(share) - _log_means(log_w)


def _tv(log_w: Array, s: Array) -> Array:
    """[P] mean |q/law - p*/law| / 2."""
    return np.asarray(0.5 * np.abs(s - np.exp(log_w - _log_mean(log_w)[:, None])).mean(1))


def _js(log_w: Array, s: Array) -> Array:
    """[P] mean of s log(2s/(s+u)) + u log(2u/(s+u)), halved, u = p*/law."""
    u = np.exp(log_w - _log_mean(log_w)[:, None])
    total = np.where(s + u > 0, s + u, 1.0)
    terms = [np.where(a > 0, a * np.log(np.where(a > 0, 2 * a / total, 1.0)), 0.0) for a in (s, u)]
    return np.asarray(0.5 * (terms[0] + terms[1]).mean(1))


KLBENCH: Final = ("reverse_kl", "log_z", "forward_kl", "tv", "js", "chi2", "wasted_nats", "beta_implied", "kl_efficiency")


def klbench(sample: Sample) -> Figures:
    rest = {name: getattr(sample, name) for name in ("kl_prior", "reward", "entropy", "forgetting")}
    return {name: sample.alone[name] for name in KLBENCH if name in sample.alone} | rest


def board(sample: Sample) -> Figures:
    return {name: sample.pooled[name] for name in KLBENCH if name in sample.pooled}


def prior_is(sample: Sample) -> Figures:
    bank = sample.bank
    log_z = _jack(_log_means(sample.inverse_beta * np.concatenate([bank.reward, sample.rest], 1)))
    log_w = sample.inverse_beta * bank.reward
    s = np.exp(bank.log_q - bank.log_p0)
    found = {
        "log_z": log_z,
        "reverse_kl": _sum(sample.free, log_z),
        "forward_kl": _jack(_forward(log_w, log_w + bank.log_p0 - bank.log_q)),
        "tv": _refitted(_tv, log_w, s),
        "js": _refitted(_js, log_w, s),
    }
    return {name: jack.mean(n=bank.log_q.size) for name, jack in found.items()}


def self_is(sample: Sample) -> Figures:
    own = sample.own
    log_w = own.log_p0 + sample.inverse_beta * own.reward - own.log_q
    log_z = _log_means(log_w)
    found = {
        "log_z": _jack(log_z),
        "reverse_kl": _sum(sample.free, _jack(log_z)),
        "forward_kl": _jack(_forward(log_w, log_w)),
        "chi2": _jack(_log_means(2 * log_w) - 2 * log_z),
    }
    return {name: jack.mean(n=own.log_q.size) for name, jack in found.items()}


def _parts(sample: Sample, log_z: Estimate) -> Figures:
    parts = ((1.0, sample.kl_prior), (-sample.inverse_beta, sample.reward), (1.0, log_z))
    value = sum(c * (x.value or 0.0) for c, x in parts)
    stderr = sum((c * (x.stderr or 0.0)) ** 2 for c, x in parts) ** 0.5
    half = estimate.t_quantile(min((BLOCKS - 1) * len(sample.own.log_q), 30)) * stderr
    return {"reverse_kl": Estimate(value, value - half, value + half, stderr, log_z.n)}


def parts(sample: Sample) -> Figures:
    return _parts(sample, sample.alone["log_z"])


def parts_board(sample: Sample) -> Figures:
    return _parts(sample, sample.pooled["log_z"]) if sample.others else {}


def k1(sample: Sample) -> Figures:
    n = sample.own.log_q.size
    return {"kl_prior": kl.k1(sample.own).mean(n=n), "forgetting": forgetting.k1(sample.bank).mean(n=sample.bank.log_q.size)}


def k3(sample: Sample) -> Figures:
    return {"kl_prior": kl.k3(sample.own).mean(n=sample.own.log_q.size)}


def rao_blackwell(sample: Sample) -> Figures:
    n = sample.own.log_q.size
    return {"kl_prior": kl.rao_blackwell(sample.own).mean(n=n), "entropy": entropy.rao_blackwell(sample.own).mean(n=n)}


def plain(sample: Sample) -> Figures:
    n = sample.own.log_q.size
    return {"entropy": entropy.monte_carlo(sample.own).mean(n=n), "reward": control.plain(sample.own.reward).mean(n=n)}


def _printed(figures: dict[str, Array]) -> Figures:
    """Values without an interval, from one figure a prompt."""
    return {name: Estimate(float(x.mean())) for name, x in figures.items()}


def disco(sample: Sample) -> Figures:
    own = sample.own
    log_w = own.log_p0 + sample.inverse_beta * own.reward - own.log_q
    log_z = _log_mean(log_w)
    one = np.ones_like(log_w)
    return _printed(
        {
            "log_z": log_z,
            "reverse_kl": log_z - log_w.mean(1),
            "forward_kl": _forward(log_w, log_w)[0],
            "tv": _tv(log_w, one),
            "js": _js(log_w, one),
            "kl_prior": (own.log_q - own.log_p0).mean(1),
        }
    )


def trl_grpo(sample: Sample) -> Figures:
    return _printed({"kl_prior": sample.k3.mean(1), "entropy": sample.own.entropy.mean(1)})


def trl_rloo(sample: Sample) -> Figures:
    return _printed({"kl_prior": (sample.own.log_q - sample.own.log_p0).mean(1), "entropy": -sample.own.log_q.mean(1)})


Estimator = Callable[[Sample], Figures]
ESTIMATORS: Final[dict[str, Estimator]] = {
    "klbench": klbench,
    "board": board,
    "prior IS": prior_is,
    "self IS": self_is,
    "parts": parts,
    "parts, board": parts_board,
    "k1": k1,
    "k3": k3,
    "RB": rao_blackwell,
    "mean": plain,
    "disco": disco,
    "TRL GRPO": trl_grpo,
    "TRL RLOO, PPO": trl_rloo,
}
OURS: Final = ("klbench", "board")  # whose intervals are on trial
