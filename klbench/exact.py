"""Every outcome of a tiny language model, and every column as a sum over them: the truth that estimates are held against.

    x: each sequence that ends with a stop token or is cut at T       q(x | c) = prod_t q(x_t | c, x_<t),  float64
    log Z = log sum_x p0 exp(r / beta)      p* = p0 exp(r / beta) / Z     f over all x, no draw anywhere
    wasted = min over lambda >= 0 of KL(q||p0) - lambda E_q r + log Z(lambda)           one lambda for all prompts, a convex solve
    distinct_n = sum_g 1 - (1 - P(g in x))^16  /  16 E|grams of x|                      16 independent draws of one prompt

What a column is, is what `score` and `pool` call by its name: means over prompts of per-prompt figures. Shapes [P prompts, S outcomes].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp, xlogy
from torch import Tensor

from klbench.errors import UserError
from klbench.estimate import Array
from klbench.estimators.diversity import SET, at_cap
from klbench.method import AbstractSampler, AbstractSteering, ClosedForm, RewardLaw, TiltedForm
from klbench.policies.causal_lm import CausalLM
from klbench.policies.tabular import Tabular, sequences
from klbench.target import Policy, TiltedPrior, WithoutDensity, evaluate
from klbench.task import AbstractTask

MOST: Final = 300_000  # outcomes of a prompt
ROWS: Final = 4096  # prefixes in one forward pass
SLACK: Final = {True: 1e-9, False: 1e-4}  # how far the mass of all outcomes may be from 1, in float64 and by a policy's own log_prob


def outcomes(words: int, stops: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """Every sequence over token ids 0 .. words - 1: tokens [S, T] int64, mask [S, T], False behind a stop, where the first stop fills.

    Raises UserError when there are more than MOST of them.
    """
    going = [word for word in range(words) if word not in set(stops)]
    count = sum(len(going) ** t * len(set(stops)) for t in range(length)) + len(going) ** length
    if count > MOST:
        raise UserError(f"{words} tokens at length {length} make {count:,} outcomes; at most {MOST:,} can be summed over")
    filler = stops[0] if stops else 0
    body, parts = torch.zeros(1, 0, dtype=torch.int64), []
    for t in range(length):
        for stop in dict.fromkeys(stops):
            parts.append(torch.cat([body, torch.full((len(body), 1), stop), torch.full((len(body), length - t - 1), filler)], 1))
        body = torch.cat([body.repeat_interleave(len(going), 0), torch.tensor(going).repeat(len(body))[:, None]], 1)
    lengths = torch.cat([torch.full((len(part),), t // max(1, len(set(stops))) + 1) for t, part in enumerate(parts)] or [body[:0, 0]])
    lengths = torch.cat([lengths, torch.full((len(body),), length)])
    return torch.cat([*parts, body]), torch.arange(length) < lengths[:, None]


def log_law(policy: Policy, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Array:
    """[P, S] log q of all outcomes [S, T]. -inf is a value: what a decoding cuts away.

    Raises UserError that names the policy when its mass does not sum to 1: then these are not all of its outcomes.
    """
    if isinstance(policy, CausalLM):
        found = _causal(policy, prompts, tokens, mask)
    elif isinstance(policy, Tabular) and tokens.shape[1] == policy.length:
        found = _tabular(policy, prompts, tokens, mask)
    else:
        shape = (len(prompts), *tokens.shape)
        pieces = zip(tokens.expand(shape).split(256, 1), mask.expand(shape).split(256, 1), strict=True)
        found = torch.cat([policy.log_prob(prompts, some, kept).double().sum(2) for some, kept in pieces], 1).detach().cpu().numpy()
    mass = np.exp(logsumexp(found, axis=1))
    slack = SLACK[isinstance(policy, CausalLM | Tabular)]
    if not (np.abs(mass - 1) <= slack).all():  # a NaN is no mass either
        worst = int(np.argmax(np.where(np.isnan(mass), np.inf, np.abs(mass - 1))))
        raise UserError(f"{policy.name}: the mass of all outcomes after {prompts[worst]!r} is {mass[worst]:.9g}, not 1")
    return np.asarray(found)


@torch.no_grad()
def _causal(policy: CausalLM, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Array:
    """By plain forward passes of a float64 copy, one row for each distinct prefix of T - 1 tokens, whose shorter prefixes it contains."""
    model = copy.deepcopy(policy.model).double()
    length = tokens.shape[1]
    rows, at = torch.unique(tokens[:, :-1], dim=0, return_inverse=True) if length > 1 else (tokens[:1, :0], torch.zeros(len(tokens)).long())
    out = []
    for prompt in prompts:
        start = torch.tensor(policy.encode(prompt))
        logits = torch.cat([
            model(torch.cat([start.expand(len(some), -1), some], 1).to(policy.device), use_cache=False).logits[:, -length:].cpu()
            for some in rows.split(ROWS)
        ])  # fmt: skip
        law = logits[..., : policy.columns].log_softmax(2)
        for decoding in policy.decodings:
            law = decoding.law(law)
        law = torch.nn.functional.pad(law, (0, max(0, int(tokens.max()) + 1 - law.shape[2])), value=-torch.inf)  # ids it never says
        step = law[at].gather(2, tokens[:, :, None])[..., 0]  # [S, T]
        out.append(step.masked_fill(~mask, 0.0).sum(1))
    return torch.stack(out).numpy()


def _tabular(policy: Tabular, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Array:
    """From the table itself; outcomes that it lacks have no mass."""
    every, _ = sequences(policy.vocabulary, policy.length, policy.eos)
    place = policy.vocabulary ** torch.arange(policy.length).flip(0)
    filled = tokens if policy.eos is None else torch.where(mask, tokens, policy.eos)
    code, known = filled @ place, every @ place  # `sequences` is in lexicographic order
    at = torch.searchsorted(known, code).clamp(max=len(known) - 1)
    missing = [p for p in prompts if p not in policy.prompts]
    if missing:
        raise UserError(f"{policy.name}: this table has no prompt {missing[0]!r}")
    law = policy.logits.detach().double().log_softmax(1)[[policy.prompts.index(p) for p in prompts]].cpu()
    return law[:, at].masked_fill(known[at] != code, -torch.inf).numpy()


@final
@dataclass(frozen=True, eq=False)
class Outcomes:
    """Everything the prior can say after each prompt. tokens, mask [S, T]; texts [S]; log_p0, reward [P, S]; stops: its stop tokens."""

    prompts: tuple[str, ...]
    tokens: Tensor
    mask: Tensor
    stops: tuple[int, ...]
    texts: list[str]
    log_p0: Array
    reward: Array

    @classmethod
    def of(cls, prior: Policy, target: TiltedPrior, prompts: Sequence[str], length: int) -> Outcomes:
        """Raises UserError for a prior that is neither a CausalLM nor a Tabular, and for one with too many outcomes."""
        if isinstance(prior, CausalLM):
            words, stops = prior.columns, prior.stops
        elif isinstance(prior, Tabular):
            words, stops = prior.vocabulary, () if prior.eos is None else (prior.eos,)
        else:
            raise UserError(f"{prior.name}: the outcomes of a {type(prior).__name__} cannot be listed")
        tokens, mask = outcomes(words, stops, length)
        texts = prior.decode(tokens[None], mask[None])[0]
        reward = target.rewards(prompts, [texts] * len(prompts))
        return cls(tuple(prompts), tokens, mask, stops, texts, log_law(prior, prompts, tokens, mask), reward)

    def values(self, of: Callable[..., list[float]]) -> Array:
        """[P, S] of a gold reward or a feature."""
        return evaluate(of, self.prompts, [self.texts] * len(self.prompts))

    def law_of_reward(self, prompt: int) -> RewardLaw:
        return RewardLaw.of(self.reward[prompt], np.exp(self.log_p0[prompt]))

    def log_q(self, policy: Policy | AbstractSampler, target: TiltedPrior) -> Array:
        """[P, S] of a policy, or of a sampler whose density ratio reads the exact law of the reward."""
        if not isinstance(policy, AbstractSampler):
            return log_law(policy, self.prompts, self.tokens, self.mask)
        ratio = [
            policy.log_ratio(row, self.law_of_reward(p), target.beta, float(top))
            for p, (row, top) in enumerate(zip(self.reward, target.ceiling(self.prompts), strict=True))
        ]
        found = self.log_p0 + np.stack(ratio)
        mass = np.exp(logsumexp(found, axis=1))
        if not (np.abs(mass - 1) <= SLACK[True]).all():
            raise UserError(f"{type(policy).__name__}: p0 exp(log_ratio) sums to {mass[np.argmax(np.abs(mass - 1))]:.9g}, not 1")
        return np.asarray(found)


def kl(log_q: Array, log_p: Array) -> Array:
    """[P] KL(q||p), infinite where q has mass that p has not; rounding does not take it below 0."""
    q = np.exp(log_q)
    with np.errstate(invalid="ignore"):
        return np.maximum(np.where(q > 0, q * (log_q - log_p), 0.0).sum(1), 0.0)


def nearest_posterior(log_p0: Array, reward: Array, wanted: float) -> tuple[float, float]:
    """argmin over lambda >= 0 of mean_p log Z_p(lambda) - lambda wanted, and that minimum, -KL*(wanted). lambda may be infinite."""
    top = np.where(np.isneginf(log_p0), -np.inf, reward).max(1)  # of what the prior says at all
    gap = np.minimum(reward - top[:, None], 0.0)

    def log_z(lam: float) -> Array:  # of rewards below their top
        return np.asarray(logsumexp(log_p0 + lam * gap, axis=1))

    def slope(lam: float) -> float:
        tilted = log_p0 + lam * gap
        mean = (np.exp(tilted - logsumexp(tilted, axis=1, keepdims=True)) * reward).sum(1)
        return float(mean.mean()) - wanted

    if slope(0.0) >= -1e-13:  # no more than the prior's
        return 0.0, 0.0
    if wanted > float(top.mean()) - 1e-12 * max(1.0, abs(wanted)):
        return math.inf, float(logsumexp(np.where(gap == 0, log_p0, -np.inf), axis=1).mean())
    high = 1.0 / float(-gap.min())
    while slope(high) < 0:
        high *= 2
    lam = float(brentq(slope, 0.0, high, xtol=1e-13, rtol=1e-14))
    return lam, float((log_z(lam) + lam * (top - wanted)).mean())


def log_chi2(log_p: Array, log_q: Array) -> Array:
    """[P] log(1 + chi2(p||q)) = log sum p^2 / q."""
    with np.errstate(invalid="ignore"):
        return np.maximum(logsumexp(np.where(np.isneginf(log_p), -np.inf, 2 * log_p - log_q), axis=1), 0.0)


def differential_entropy(log_q: Array, log_p0: Array) -> Array:
    """[P] entropy (nats) of the differential law d = (q/p0) / sum_x q/p0 from log-probabilities [P, S] of all S outcomes.

    Large where the update is spread evenly over answers, log S where q = p0; of p*/p0 it is the entropy of softmax(r / beta). Outcomes that
    neither law says are left out. d counts answers and not the prior's mass: every estimate of it from draws of any law known to us weighs
    them by 1/p0 of answers that nobody draws, so this sum is all there is. Raises ValueError where q has mass that p0 has not.
    Source: Won et al. 2025, arXiv:2505.23761 (differential information distribution).
    """
    outside = np.isneginf(log_p0)
    if (outside & ~np.isneginf(log_q)).any():
        raise ValueError("q has mass where the prior has none: q/p0 is no law")
    with np.errstate(invalid="ignore"):
        log_d = np.where(outside, -np.inf, log_q - log_p0)
    log_d = log_d - logsumexp(log_d, axis=1, keepdims=True)
    d = np.exp(log_d)
    return np.asarray(-xlogy(d, d).sum(1))


def distinct(outcomes: Outcomes, q: Array, n: int) -> Array:
    """[P] E[different n-grams] / E[n-grams] in sets of 16 independent draws; 0 where no draw is n tokens long."""
    body = _bodies(outcomes)
    if body.shape[1] < n:
        return np.zeros(len(q))
    windows = np.lib.stride_tricks.sliding_window_view(body, n, axis=1)  # [S, T - n + 1, n]
    whole = (windows >= 0).all(2)
    base = int(body.max()) + 1
    code = np.sort(np.where(whole, windows @ base ** np.arange(n), -1), 1)
    first = (code >= 0) & np.concatenate([np.ones((len(code), 1), bool), code[:, 1:] != code[:, :-1]], 1)
    where = np.nonzero(first)[0]
    _, gram = np.unique(code[first], return_inverse=True)
    size = int(gram.max(initial=-1)) + 1
    inside = np.stack([np.bincount(gram, weights=row[where], minlength=size) for row in q]).astype(np.float64)  # P(g in x)
    total = SET * (q @ whole.sum(1))
    return np.divide(_seen(inside).sum(1), total, out=np.zeros(len(q)), where=total > 0)


def unique(outcomes: Outcomes, q: Array, valid: NDArray[np.bool_] | None = None) -> Array:
    """[P] E[different draws] / 16 in sets of 16 independent draws; valid [P, S]: only those are counted."""
    _, same = np.unique(_bodies(outcomes), axis=0, return_inverse=True)
    mass = np.stack([np.bincount(same.ravel(), weights=row) for row in (q if valid is None else np.where(valid, q, 0.0))])
    return np.asarray(_seen(mass.astype(np.float64)).sum(1) / SET)


def _seen(mass: Array) -> Array:
    """Chance to be among 16 draws."""
    return np.asarray(-np.expm1(SET * np.log1p(-np.minimum(mass, 1 - 1e-16))))


def _bodies(outcomes: Outcomes) -> NDArray[np.int64]:
    """[S, T] tokens without the stop that ends an outcome, -1 where there is none."""
    body = outcomes.mask & ~torch.isin(outcomes.tokens, torch.tensor(outcomes.stops, dtype=torch.int64))
    return torch.where(body, outcomes.tokens, -1).numpy()


def truths(
    policy: Policy | AbstractSampler | AbstractSteering | WithoutDensity, task: AbstractTask, prior: Policy, target: TiltedPrior,
    prompts: Sequence[str], length: int, objective: object = None, samples: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Column -> its exact value, nats where it has a unit; those of the target alone for a policy without a density.

    objective: whose optimum own_kl is taken to, where it has a closed form; samples: K of its groups. Raises UserError when the prior's
    outcomes cannot be summed over.
    """
    every = Outcomes.of(prior, target, prompts, length)
    log_p0, reward, tilt = every.log_p0, every.reward, target.tilt(every.reward)
    log_z = logsumexp(log_p0 + tilt, axis=1)
    log_p = log_p0 + tilt - log_z[:, None]
    p = np.exp(log_p)
    found: dict[str, Array | float] = {
        "log_z": log_z,
        "reward_target": (p * reward).sum(1),
        "kl_prior_target": kl(log_p, log_p0),
        "entropy_target": -xlogy(p, p).sum(1),
        "distinct_2_target": distinct(every, p, 2),
        "unique_target": unique(every, p),
    }
    feature, gold = task.features(), task.gold()
    valid = at_cap(every.reward, target.ceiling(prompts)) if feature is None else None
    if valid is not None:
        found["unique_valid_target"] = unique(every, p, valid)
    phi = None if feature is None else every.values(feature[0])
    if phi is not None:
        found["moments_target"] = (p * phi).sum(1)
    if not isinstance(policy, WithoutDensity | AbstractSteering):
        log_q = every.log_q(policy, target)
        q = np.exp(log_q)
        spent, log_m = kl(log_q, log_p0), np.logaddexp(log_q, log_p) - math.log(2)
        lam, least = nearest_posterior(log_p0, reward, float((q * reward).sum(1).mean()))
        wasted = float(spent.mean()) + least
        found |= {
            "reward": (q * reward).sum(1),
            "kl_prior": spent,
            "reverse_kl": kl(log_q, log_p),
            "forward_kl": kl(log_p, log_q),
            "tv": 0.5 * np.abs(q - p).sum(1),
            "js": 0.5 * (kl(log_q, log_m) + kl(log_p, log_m)),
            "chi2": log_chi2(log_p, log_q),
            "wasted_nats": max(wasted, 0.0),
            "beta_implied": math.inf if lam == 0 else 1.0 / lam,
            "forgetting": kl(log_p0, log_q),
            "entropy": -xlogy(q, q).sum(1),
            "unique": unique(every, q),
            **{f"distinct_{n}": distinct(every, q, n) for n in (1, 2, 3, 4)},
        }
        if 1e-12 < spent.mean() < math.inf:
            found["kl_efficiency"] = min(1.0, max(0.0, -least / float(spent.mean())))
        if valid is not None:
            found["unique_valid"] = unique(every, q, valid)
        if gold is not None:
            found["gold"] = (q * every.values(gold)).sum(1)
        if phi is not None:
            found["moments"] = (q * phi).sum(1)
        if isinstance(objective, ClosedForm):
            ratio = np.stack([objective.own(row, every.law_of_reward(i), target.beta, samples) for i, row in enumerate(reward)])
            found["own_kl"] = kl(log_q, log_p0 + ratio)
        if isinstance(objective, TiltedForm):
            own = log_p0 + np.stack([objective.own_tilt(p, r, target.beta, samples) for p, r in zip(log_p0, reward, strict=True)])
            found["own_kl"] = kl(log_q, own - logsumexp(own, axis=1, keepdims=True))
    out = {name: float(np.mean(value)) for name, value in found.items()}
    for name, value in out.items():
        if math.isnan(value):
            raise AssertionError(f"the exact {name} is NaN")
    return out
