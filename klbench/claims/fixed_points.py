"""Claims about where training ends.

    C12  advantage r/sd and a true KL:  logit p = logit p_0 + 1/(beta sqrt(p (1-p))),  solvable iff beta >= beta_c,
         2 asinh(beta_c) - 2 sqrt(1 + beta_c^2)/beta_c = logit p_0
    C13  the same with k3:  beta (p - p_0) = sqrt(p (1-p));   advantage r - mean:  beta (p - p_0) = p (1-p)
    C14  E_{p ~ Beta(a,b)}[p (1-p) / f(p)^2], f a Beta density, is least at f = Beta(1 + a/3, 1 + b/3)
    C15  NFT: q_old(x) P(right|x) / p
    C16  TOPR: mu(.|right);   REINFORCE on draws of mu: log q of the wrong falls by mu a unit of time
    C44  E_q[r] - beta D(q||p0):  q/p0 = max(a, 0)/2 for chi2,  -1/a for KL(p0||q),  e^a/(2 - e^a) for twice Jensen-Shannon,
         a = (r - m)/beta, m such that q sums to 1

p: success rate of the policy, p_0 of the prior. Objectives are followed in the limit of large groups: the shares of the answers in a
group are those of the law that draws it, so that a mean over the group is an expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.optimize import brentq, minimize
from scipy.special import betaln, log_softmax, softmax
from scipy.stats import beta as beta_law

from klbench.batch import Batch
from klbench.claims.contract import Check, at_least, at_most, claim, near
from klbench.claims.toys import Toy, random
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw
from klbench.objectives.bnpo import BNPO
from klbench.objectives.chi2_rl import Chi2RL
from klbench.objectives.dr_grpo import DrGRPO
from klbench.objectives.grpo import GRPO
from klbench.objectives.kl_in_loss import KLInLoss
from klbench.objectives.nft import NFT
from klbench.objectives.reinforce import Reinforce
from klbench.objectives.rloo import RLOO
from klbench.objectives.topr import TOPR

DRAWS = 800
SEEDS = range(4)


def groups(right: torch.Tensor, log_q: torch.Tensor, log_p0: torch.Tensor) -> Batch:
    """One-token draws [P, K], right or wrong, fresh."""
    return Batch(
        tokens=torch.zeros_like(right, dtype=torch.int64)[:, :, None],
        mask=torch.ones_like(right, dtype=torch.bool)[:, :, None],
        log_q=log_q[:, :, None],
        log_p0=log_p0[:, :, None],
        reward=right,
        log_weight=torch.zeros_like(right),
        prompt=torch.arange(len(right)),
        top=torch.ones(len(right), dtype=torch.float64),
    )


def drift(objective: AbstractObjective, p_0: float, beta: float, rewarded: bool = True) -> Array:
    """[K-1] how fast gradient descent moves logit p at p = 1/K .. (K-1)/K, two answers, groups whose shares are the policy's."""
    p = torch.arange(1, DRAWS, dtype=torch.float64) / DRAWS
    z = p.logit().requires_grad_()
    good = torch.arange(DRAWS)[None, :] < torch.arange(1, DRAWS)[:, None]
    log_q = torch.nn.functional.logsigmoid(torch.where(good, z[:, None], -z[:, None]))
    log_p0 = torch.where(good, np.log(p_0), np.log1p(-p_0)).double()
    batch = groups(good.double() if rewarded else torch.zeros_like(log_p0), log_q, log_p0)
    (slope,) = torch.autograd.grad(objective.loss(batch, beta), z)
    return np.asarray(-slope.numpy() * len(p))


def roots(speed: Array) -> Array:
    """Stable rates: where the drift turns from up to down, between grid points by a straight line."""
    at = np.flatnonzero((speed[:-1] > 0) & (speed[1:] <= 0))
    return np.asarray((at + 1 + speed[at] / (speed[at] - speed[at + 1])) / DRAWS)


@claim(
    "C12",
    "Under a true KL, GRPO's division by the spread leaves an interior optimum only above a critical beta.",
    source="arXiv:2402.03300",
    wrong="the gradient of k3 in place of the true KL's",
)
def critical_beta(wrong: bool) -> Sequence[Check]:
    checks = []
    for p_0, critical, rate in ((0.5, 1.5089, 0.883), (0.1, 0.6970, 0.714)):
        push = drift(GRPO(delta=1e-12), p_0, 0.0)
        pull = drift(KLInLoss("k3" if wrong else "k2"), p_0, 1.0, rewarded=False)
        above = np.arange(1, DRAWS) / DRAWS > p_0 + 1e-9
        found = float((push[above] / -pull[above]).min())
        end = roots(push + 1.02 * found * pull)
        checks += [
            near(f"critical beta at p_0 = {p_0}", found, critical, 1e-3),
            near(f"stable rate at 1.02 of it, p_0 = {p_0}", end[0] if len(end) else 1.0, rate, 1e-3),
            at_least(f"least drift above the prior at .98 of it, p_0 = {p_0}", (push + 0.98 * found * pull)[above].min(), 1e-4),
        ]
    return checks


@claim(
    "C13",
    "With k3 in the loss GRPO and Dr. GRPO have one interior fixed point at every beta.",
    source="arXiv:2503.20783",
    wrong="the true KL in place of k3",
)
def interior(wrong: bool) -> Sequence[Check]:
    p_0, checks = 0.312, []
    penalty = drift(KLInLoss("k2" if wrong else "k3"), p_0, 1.0, rewarded=False)
    for beta, grpo, dr in ((0.3, 0.9606, 0.8149), (1.0, 0.7468, 0.5585), (3.0, 0.4785, 0.3913)):
        speeds = {"GRPO": drift(GRPO(), p_0, 0.0) + beta * penalty if wrong else drift(GRPO(), p_0, beta)}
        speeds["Dr. GRPO"] = drift(DrGRPO(), p_0, 0.0) + beta * penalty
        for (name, speed), predicted in zip(speeds.items(), (grpo, dr), strict=True):
            end = roots(speed)
            checks.append(near(f"{name}, beta {beta}", end[0] if len(end) == 1 else float("nan"), predicted, 1e-3))
    return checks


@claim(
    "C14",
    "Of all Beta densities BNPO divides by the one that makes the gradient quietest.",
    source="arXiv:2506.02864",
    wrong="the density of the success rates themselves",
)
def quietest(wrong: bool) -> Sequence[Check]:
    a, b = 2.0, 5.0
    k = np.arange(1, DRAWS)
    right = torch.from_numpy((np.arange(DRAWS)[None, :] < k[:, None]).astype(np.float64))
    leaf = torch.zeros_like(right, requires_grad=True)
    batch = groups(right, leaf, torch.zeros_like(right))
    prompts = beta_law.pdf(k / DRAWS, a, b) / DRAWS
    # at 3 (a - 1), 3 (b - 1) the rule 1 + a/3, 1 + b/3 gives back a, b
    like = (3 * (a - 1), 3 * (b - 1)) if wrong else (a, b)
    seen = torch.from_numpy(beta_law.ppf((np.arange(20_000) + 0.5) / 20_000, *like))
    losses = {
        "BNPO": BNPO().loss(batch, 0.0, {"rate": seen, "visits": torch.ones_like(seen)})[0],
        "GRPO": GRPO().loss(batch, 0.0) * np.pi / 8,  # its normaliser as a density, that of Beta(3/2, 3/2)
        "REINFORCE": DrGRPO().loss(batch, 0.0),
    }
    advantage = {name: torch.autograd.grad(loss, leaf)[0].numpy() * leaf.numel() for name, loss in losses.items()}
    found = {name: float(prompts @ (x**2).mean(1)) for name, x in advantage.items()}  # in units of |grad log-odds|^2

    def of(x: Array) -> float:
        """log of the mean over Beta(a, b) for the normaliser Beta(x): finite while both of its arguments are positive."""
        left = np.array([a, b]) + 1 - 2 * (x - 1)
        return float(2 * betaln(*x) + betaln(*left) - betaln(a, b)) if (left > 0).all() and (x > 0).all() else np.inf

    best = minimize(of, [1.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-14})
    return [
        near("BNPO", found["BNPO"], 0.0947, 1e-3),
        near("GRPO", found["GRPO"], 0.1542, 1e-3),
        near("REINFORCE", found["REINFORCE"], 0.1786, 1e-3),
        near("BNPO over the least of all Beta densities", found["BNPO"] / np.exp(best.fun), 1.0, 0.01),
        near("first argument of that one", best.x[0], 1 + a / 3, 1e-4),
        near("second argument", best.x[1], 1 + b / 3, 1e-4),
    ]


def shares(t: Toy) -> NDArray[np.int64]:
    """[S] counts of the outcomes in a group as large as DRAWS whose shares are the prior's, one of each at least."""
    return np.maximum(np.rint(DRAWS * t.p0), 1).astype(np.int64)


def offline(counts: NDArray[np.int64], right: Array) -> tuple[Callable[[torch.Tensor], Batch], Array]:
    """What a group of fixed draws, right [K] or not, looks like at logits [S]; and log of the law [S] that drew it."""
    mu = np.log(counts / counts.sum())
    drawn = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    label = torch.from_numpy(right)[None]

    def at(logits: torch.Tensor) -> Batch:
        return groups(label, logits.log_softmax(0)[drawn][None], torch.from_numpy(mu)[drawn][None])

    return at, mu


def follow(objective: AbstractObjective, at: Callable[[torch.Tensor], Batch], start: Array, times: Sequence[float]) -> Array:
    """[times, S] log-policies along gradient descent with small steps; time is step length times steps."""

    def descend(_: float, logits: Array) -> Array:
        leaf = torch.from_numpy(logits).clone().requires_grad_()
        return np.asarray(-torch.autograd.grad(objective.loss(at(leaf), 1.0), leaf)[0].numpy())

    path = solve_ivp(descend, (0, times[-1]), start, method="LSODA", t_eval=times, rtol=1e-6, atol=1e-8)
    return np.asarray(log_softmax(path.y.T, axis=1))


def pull(objective: AbstractObjective, batch: Batch, beta: float = 0.0) -> torch.Tensor:
    """[P, K, 1] the gradient in the log-probability of each draw."""
    leaf = batch.log_q.clone().requires_grad_()
    return torch.autograd.grad(objective.loss(replace(batch, log_q=leaf), beta), leaf)[0]


@claim(
    "C15",
    "NFT's optimum is the old policy given success, and on fresh draws its gradient is GRPO's or Dr. GRPO's.",
    source="arXiv:2505.18116",
    wrong="the published clamp of the wrong part at 1, with labels that are right with a probability",
)
def negative_aware(wrong: bool) -> Sequence[Check]:
    apart, gap = 0.0, 0.0
    objective = NFT(floor=1.0 if wrong else 1e-6)
    for seed in SEEDS:
        counts = shares(random(6, seed))
        wins = np.rint(counts * np.random.default_rng(900 + seed).uniform(0.1, 0.9, size=6)).astype(np.int64)
        at, mu = offline(counts, np.concatenate([np.arange(c) < n for c, n in zip(counts, wins, strict=True)]).astype(np.float64))
        end = follow(objective, at, mu, (2000.0,))[0]
        apart = max(apart, 0.5 * float(np.abs(np.exp(end) - wins / wins.sum()).sum()))
        for omega, twin in (("dr_grpo", DrGRPO()), ("grpo", GRPO(delta=1e-14))):
            pulls = [pull(o, at(torch.from_numpy(mu))) for o in (NFT(omega), twin)]
            gap = max(gap, float((pulls[0] - pulls[1]).abs().max() / pulls[1].abs().max()))
    return [
        at_most("TV to q_old P(right|x) / p, worst of 4", apart, 1e-4, 0.0),
        at_most("relative gap of a draw's gradient to Dr. GRPO's and GRPO's", gap, 1e-8, 0.0),
    ]


@claim(
    "C16",
    "On fixed draws TOPR stays bounded and ends at the right ones alone; REINFORCE pushes the wrong ones down without end.",
    source="arXiv:2503.14286",
    wrong="the taper dropped: REINFORCE in place of TOPR",
    note="Steps of .1 as the flow they follow, to times 20, 200, 2000. Predicted log q: another toy's.",
)
def tapered(wrong: bool) -> Sequence[Check]:
    apart, gap, slopes, deep = 0.0, 0.0, [], []
    for seed in SEEDS:
        t = random(6, seed, binary=True)
        counts = shares(t)
        right = np.repeat(t.reward, counts)
        at, mu = offline(counts, right)
        signed, _ = offline(counts, 2 * right - 1)
        wanted = np.where(t.reward == 1, counts, 0) / counts[t.reward == 1].sum()
        objective, data = (Reinforce(), signed) if wrong else (TOPR(), at)
        apart = max(apart, 0.5 * float(np.abs(np.exp(follow(objective, data, mu, (3e4,))[0]) - wanted).sum()))
        pulls = [pull(o, data(torch.from_numpy(mu))) for o, data in ((TOPR(), at), (Reinforce(), signed))]
        gap = max(gap, float((pulls[0] - pulls[1]).abs().max() / pulls[1].abs().max()))
        down = follow(Reinforce(), signed, mu, (20.0, 200.0, 2000.0))[:, t.reward == 0].mean(1)
        slopes.append((down[2] - down[1]) / (down[1] - down[0]) / 10)
        deep.append(down[2])
    return [
        at_most("TV of TOPR's end to mu(.|right), worst of 4", apart, 1e-3, 0.0),
        at_most("relative gap of a draw's gradient to REINFORCE's at q = mu", gap, 1e-8, 0.0),
        at_most("mean log q of the wrong under REINFORCE at time 2000, highest of 4", max(deep), -100, -760),
        near("its slope in the last decade over that before, lowest of 4", min(slopes), 1.0, 0.05),
        near("the same, highest of 4", max(slopes), 1.0, 0.05),
    ]


CLOSED: Final[dict[str, tuple[float, Callable[[Array], Array]]]] = {  # the pole of a, and q/p0 at a = (r - m)/beta
    "chi2": (np.inf, lambda a: np.maximum(a, 0) / 2),
    "forward": (0.0, lambda a: -1 / a),
    "js": (np.log(2), lambda a: np.exp(a) / (2 - np.exp(a))),
}


def closed(name: str, t: Toy, beta: float) -> Array:
    """[S] the optimum by its formula, the constant m found by root search."""
    pole, ratio = CLOSED[name]
    top, low = t.reward.max(), t.reward.min()
    mass = lambda m: float(t.p0 @ ratio((t.reward - m) / beta)) - 1  # noqa: E731
    m = brentq(mass, low - 2 * beta if np.isinf(pole) else top - beta * pole + 1e-9, top + beta, xtol=1e-14)
    return np.asarray(t.p0 * ratio((t.reward - m) / beta))


def trained(objective: AbstractObjective, t: Toy, beta: float) -> Array:
    """[S] where the natural gradient flow from the prior stands at time 300. Its one group holds each answer once."""
    log_p0, reward = torch.from_numpy(t.log_p0)[None], torch.from_numpy(t.reward)[None]

    def descend(_: float, logits: Array) -> Array:
        log_q = torch.from_numpy(log_softmax(logits))[None]
        c = pull(objective, groups(reward, log_q, log_p0), beta)[0, :, 0].numpy()
        return np.asarray(len(c) * (softmax(logits) @ c - c))

    return np.asarray(softmax(solve_ivp(descend, (0, 300), t.log_p0, method="LSODA", rtol=1e-6, atol=1e-8).y[:, -1]))


@claim(
    "C44",
    "Chi2, KL(p0||q) and Jensen-Shannon regularisers have closed-form optima, none of them the posterior.",
    source="arXiv:2403.03185",
    wrong="KL(q||p0) in place of each",
    note="Trained by the natural gradient, whose optimum is the same; the plain one is slow where chi2 excludes an answer.",
)
def other_regularisers(wrong: bool) -> Sequence[Check]:
    stated, apart, same = 0.0, dict.fromkeys(CLOSED, 0.0), np.inf
    for seed, beta, name in product(range(3), (0.37, 3.0), CLOSED):
        t, objective = random(6, seed), Chi2RL(name)
        wanted = closed(name, t, beta)
        own = t.p0 * np.exp(objective.own(t.reward, RewardLaw.of(t.reward, t.p0), beta, 2))
        stated = max(stated, float(np.abs(own - wanted).max()))
        end = trained(RLOO() if wrong else objective, t, beta)
        apart[name] = max(apart[name], 0.5 * float(np.abs(end - wanted).sum()))
        same = min(same, 0.5 * float(np.abs(end - np.exp(t.log_target(beta))).sum()))
    return [
        *(at_most(f"TV of training's end to the formula, {name}, worst of 6", x, 1e-3, 0.0) for name, x in apart.items()),
        at_most("declared optimum less the formula, worst of 18", stated, 1e-9, 0.0),
        at_least("TV of training's end to p*, least of 18", same, 1e-3),
    ]
