"""What objectives fed by comparisons, or by answers to be forgotten, come to: C25 to C32, C46.

    E(theta)  = sum over groups of their probability times klbench's own loss on that group alone
    labels    any P(i beats j): the pair is given the rewards (logit P, 0), of which Bradley-Terry makes P again
    DPO       winners ~ A, losers ~ B:  p0 (A/B)^(1/beta);   uniform pairs, any P:  sum_j P(i beats j) = sum_j sigma(beta (u_i - u_j))
    IPO       p0 exp(P(x beats a draw)/tau);   INPO  the same with itself as the opponent, the Nash policy
    Nash      of P(q beats pi) - tau KL(q||p0) + tau KL(pi||p0);   the best response to pi is p0 exp(P(x beats pi)/tau) / Z
    tokens    beta log p*(x_t|x_<t)/p0(x_t|x_<t) = V(x_<=t) - V(x_<t),   V(s) = beta log E_p0[exp(r/beta) | s]

Nothing here is drawn: every expectation is a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logit, logsumexp, ndtr
from torch import Tensor

from klbench.batch import Batch
from klbench.claims import toys
from klbench.claims.contract import Check, at_least, at_most, claim, near
from klbench.estimate import Array
from klbench.method import AbstractObjective, RewardLaw
from klbench.objectives.did import DID
from klbench.objectives.dpo import DPO
from klbench.objectives.exo import EXO
from klbench.objectives.implicit_prm import ImplicitPRM
from klbench.objectives.inpo import INPO
from klbench.objectives.ipo import IPO
from klbench.objectives.kto import KTO
from klbench.objectives.npo import NPO
from klbench.objectives.rpo import RPO
from klbench.objectives.token_dpo import TokenDPO
from klbench.objectives.unlikelihood import Unlikelihood
from klbench.policies.tabular import Tabular

SEEDS = range(3)
CERTAIN = 1e6  # a gap of rewards that leaves no doubt about the label

Loss = Callable[[Tensor], Tensor]  # of log_q [S]


def groups(answers: int, draws: int = 2) -> Tensor:
    """[S^K, K] every way to draw them."""
    return torch.cartesian_prod(*[torch.arange(answers)] * draws)


def expected(
    objective: AbstractObjective, group: Tensor, reward: Tensor, weight: Tensor, log_p0: Array, beta: float, drew: Array | None = None
) -> Loss:
    """The loss of groups [G, K] of draws, each by itself, with their rewards [G, K], by probability [G]. drew: log of the law that drew."""
    shape = (1, group.shape[1], 1)
    prior = torch.from_numpy(np.array(log_p0))[group]
    old = prior if drew is None else torch.from_numpy(np.array(drew))[group]

    def one(log_q: Tensor, before: Tensor, earned: Tensor, held: Tensor) -> Tensor:
        tokens, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
        log_q, before, held = (x.reshape(shape) for x in (log_q, before, held))
        return objective.loss(Batch(tokens, mask, log_q, before, earned[None], torch.zeros(shape[:2]), old_log_q=held), beta)

    return lambda log_q: weight @ torch.func.vmap(one)(log_q[group], prior, reward, old)


def compared(objective: AbstractObjective, wins: Array, pair: Array, log_p0: Array, beta: float, drew: Array | None = None) -> Loss:
    """Pairs (i, j) by probability [S, S], judged by P(i beats j) [S, S]."""
    label = torch.from_numpy(np.clip(logit(wins), -CERTAIN, CERTAIN).reshape(-1))
    reward = torch.stack([label, torch.zeros_like(label)], 1)
    return expected(objective, groups(len(wins)), reward, torch.from_numpy(pair.reshape(-1)), log_p0, beta, drew)


def slope(loss: Loss, logits: Array) -> tuple[float, Array]:
    """Value and gradient."""
    at = torch.from_numpy(np.array(logits)).requires_grad_()
    value = loss(at.log_softmax(0))
    (gradient,) = torch.autograd.grad(value, at)
    return float(value.detach()), gradient.numpy()


def minimised(loss: Loss, start: Array) -> Array:
    """[S] log of the policy at which BFGS ends."""
    found = minimize(lambda x: slope(loss, x), start, jac=True, method="BFGS", options={"gtol": 1e-10})
    return np.asarray(log_softmax(found.x))


def flowed(loss: Loss, start: Array, times: Sequence[float]) -> list[Array]:
    """[S] log-policies of the gradient flow: time t stands for t/rate small steps."""
    path = solve_ivp(lambda _, x: -slope(loss, x)[1], (0, max(times)), start, method="LSODA", t_eval=times, rtol=1e-4, atol=1e-6)
    return [np.asarray(log_softmax(x)) for x in path.y.T]


def bradley_terry(reward: Array) -> Array:
    """[S, S] P(i beats j)."""
    return np.asarray(expit(reward[:, None] - reward))


def uniform(answers: int) -> Array:
    return np.full((answers, answers), 1 / answers**2)


@claim(
    "C25", "DPO reaches the posterior under Bradley-Terry labels and has no optimum under certain ones, where IPO has one.",
    source="arXiv:2310.12036", wrong="the prior left out of the log-ratio",
    note="Flow in place of steps: times 1e2, 1e3, 1e4 are 1e3, 1e4, 1e5 steps of .1. The predicted margins are of one other seed.",
)  # fmt: skip
def labels(wrong: bool) -> Sequence[Check]:
    beta, tau, right, other, ipo, growth = 0.6, 0.3, 0.0, math.inf, 0.0, math.inf
    for seed in SEEDS:
        toy, everywhere = toys.random(6, seed), uniform(6)
        reference = np.zeros(6) if wrong else toy.log_p0
        certain = bradley_terry(CERTAIN * toy.reward)
        target = toy.log_target(beta)
        right = max(right, toys.tv(minimised(compared(DPO(), bradley_terry(toy.reward), everywhere, reference, beta), toy.log_p0), target))
        probit = ndtr(toy.reward[:, None] - toy.reward)
        other = min(other, toys.tv(minimised(compared(DPO(), probit, everywhere, reference, beta), toy.log_p0), target))
        won = IPO().own(CERTAIN * toy.reward, RewardLaw.of(CERTAIN * toy.reward), tau, 2)
        found = minimised(compared(IPO(), certain, everywhere, reference, tau), toy.log_p0)
        ipo = max(ipo, toys.tv(found, np.asarray(log_softmax(toy.log_p0 + won))))
        ends = flowed(compared(DPO(), certain, everywhere, reference, beta), toy.log_p0, (1e2, 1e3, 1e4))
        margins = np.array([float(np.ptp(x - toy.log_p0)) for x in ends])
        growth = min(growth, float((margins[1:] / margins[:-1]).min()))
    return [
        at_most("Bradley-Terry labels, DPO: TV to p*, worst", right, 1e-5, 0.0),
        at_least("probit labels, DPO: TV to p*, least", other, 0.01),
        at_most("certain labels, IPO: TV to p0 exp(P/tau), worst", ipo, 1e-5, 0.0),
        at_least("certain labels, DPO: growth of the margin a decade of steps, least", growth, 1.5, 28.5 / 17.6),
    ]


@claim(
    "C26", "With winners from A and losers from B, DPO's optimum is p0 (A/B)^(1/beta).",
    source="arXiv:2505.23761", wrong="beta in the exponent in place of 1/beta",
)  # fmt: skip
def density_ratio(wrong: bool) -> Sequence[Check]:
    beta, apart, target, did = 0.6, 0.0, 0.0, 0.0
    for seed in SEEDS:
        toy, (log_a, log_b) = toys.random(6, seed), (toys.random_policy(6, 10 * seed + i) for i in (1, 2))
        law = np.asarray(log_softmax(toy.log_p0 + (log_a - log_b) * (beta if wrong else 1 / beta)))
        apart = max(apart, toys.tv(fitted_to_laws(toy, log_a, log_b, beta), law))
        away = np.asarray(log_softmax(toy.log_p0 - toy.reward))  # p0 (p0/p*)^beta
        target = max(target, toys.tv(fitted_to_laws(toy, toy.log_p0, away, beta), toy.log_target(beta)))
        group, reward = groups(6, 3), torch.from_numpy(toy.reward)
        drawn = torch.from_numpy(toy.log_p0)[group].sum(1).exp()
        loss = expected(DID(), group, reward[group], drawn, toy.log_p0, beta)
        did = max(did, toys.tv(minimised(loss, toy.log_p0), toy.log_target(beta)))
    return [
        at_most("random A and B: TV to p0 (A/B)^(1/beta), worst", apart, 1e-5, 0.0),
        at_most("A = p0, B ~ p0 (p0/p*)^beta: TV to p*, worst", target, 1e-5, 0.0),
        at_most("klbench's did, groups of three: TV to p*, worst", did, 1e-5, 0.0),
    ]


def fitted_to_laws(toy: toys.Toy, log_a: Array, log_b: Array, beta: float) -> Array:
    """[S] log of DPO's optimum where the first of a pair is drawn from A, the second from B, and the first always wins."""
    pair = np.exp(log_a[:, None] + log_b)
    return minimised(compared(DPO(), np.ones((6, 6)), pair, toy.log_p0, beta), toy.log_p0)


@claim(
    "C27", "INPO finds the Nash policy of a game of preferences that no reward explains.",
    source="arXiv:2407.00617", wrong="eta = tau, which drops the mirror term",
    note="klbench's loss is fitted for one step and differentiated at the Nash policy; the steps between are its closed form.",
)  # fmt: skip
def nash(wrong: bool) -> Sequence[Check]:
    toy, tau, ratio = toys.random(5, 0), 0.1, 1.0 if wrong else 0.1 / 0.5
    ahead = (np.arange(5) - np.arange(5)[:, None]) % 5
    wins = np.select([ahead == 0, ahead <= 2], [0.5, 0.9], 0.1)

    def step(log_q: Array, ratio: float) -> Array:
        return np.asarray(log_softmax(ratio * toy.log_p0 + (1 - ratio) * log_q + wins @ np.exp(log_q) * ratio / tau))

    def rounds(ratio: float) -> Array:
        log_q = toy.log_p0
        for _ in range(2000):
            log_q = step(log_q, ratio)
        return log_q

    def played(log_q: Array) -> Loss:
        return compared(INPO(ratio), wins, np.exp(log_q[:, None] + log_q), toy.log_p0, tau, log_q)

    first, end = toys.random_policy(5, 7), rounds(ratio)
    fitted = toys.tv(minimised(played(first), first), step(first, ratio))
    gap = tau * float(logsumexp(toy.log_p0 + wins @ np.exp(end) / tau)) + tau * toys.kl(end, toy.log_p0) - 0.5
    still = float(np.linalg.norm(slope(played(end), end)[1]))
    return [
        at_most("one step of klbench's inpo, fitted to its end: TV to its closed form", fitted, 1e-6, 0.0),
        at_most("|gap| to the best response after 2000 rounds", abs(gap), 1e-8, 0.0),
        at_most("gradient of klbench's inpo there", still, 1e-8, 0.0),
        at_least("eta = tau: TV to it after as many rounds", toys.tv(rounds(1.0), end), 0.1, 0.53),
    ]


@claim(
    "C28", "EXO's temperature is beta_pi beta_r, and where no policy fits it seeks a mode, as its forward twin and DPO do not.",
    source="arXiv:2402.00856", wrong="the policy's own beta left out of the product",
    note="A group that holds each of 16 answers once is the prior itself, so that its loss at beta_pi = 1 is KL(q||p*) to the last digit: "
    "the limit of many completions.",
)  # fmt: skip
def exo(wrong: bool) -> Sequence[Check]:
    beta_pi, beta_r = 0.5, 0.8
    split, apart = math.log(beta_pi) / math.log(beta_pi * beta_r), 0.0
    for seed in SEEDS:
        toy, group = toys.random(6, seed), groups(6)
        drawn, reward = torch.from_numpy(toy.log_p0)[group].sum(1).exp(), torch.from_numpy(toy.reward)[group]
        target = toy.log_target(beta_r if wrong else beta_pi * beta_r)
        for forward in (False, True):
            loss = expected(EXO(split, forward), group, reward, drawn, toy.log_p0, beta_pi * beta_r)
            apart = max(apart, toys.tv(minimised(loss, toy.log_p0), target))
    return [at_most("(.5, .8), both directions: TV to p* of .4, worst", apart, 1e-5, 0.0), *modes(0.8 if wrong else 1.0)]


def modes(shrunk: float) -> list[Check]:
    """EXO and its forward twin on products of two marginals, the whole of MF as one group. shrunk: factor on beta that is forgotten."""
    everything, reward = torch.arange(16)[None], torch.from_numpy(toys.MF.reward)[None]
    target = toys.MF.log_target(toys.MF_BETA)
    checks, starts = [], np.random.default_rng(0).normal(size=(6, 8)) * 2
    for name, forward, wanted in (("EXO", False, (1.965, 0.886)), ("its forward twin", True, (0.730, 1.034))):
        loss = expected(EXO(0.0, forward), everything, reward, torch.ones(1, dtype=torch.float64), toys.MF.log_p0, toys.MF_BETA / shrunk)

        def at(x: Array, loss: Loss = loss) -> tuple[float, Array]:
            parameters = torch.from_numpy(x).requires_grad_()
            value = loss(product(parameters))
            return float(value.detach()), torch.autograd.grad(value, parameters)[0].numpy()

        found = min((minimize(at, x, jac=True, method="BFGS", options={"gtol": 1e-8}) for x in starts), key=lambda result: result.fun)
        log_q = product(torch.from_numpy(found.x)).numpy()
        checks += [
            near(f"{name} in a family of products: KL(p*||q)", toys.kl(target, log_q), wanted[0], 1e-3),
            near(f"{name} in a family of products: KL(q||p*)", toys.kl(log_q, target), wanted[1], 1e-3),
        ]
    return checks


def product(parameters: Tensor) -> Tensor:
    """[16] log-law of two independent marginals [4 + 4]."""
    return (parameters[:4].log_softmax(0)[:, None] + parameters[4:].log_softmax(0)).reshape(16)


@claim(
    "C29", "A likelihood term on the chosen answer keeps DPO's chosen likelihood from falling.",
    source="arXiv:2405.16436", wrong="the paper's eta of .005 carried to a beta 60 times the paper's",
    note="Certain labels, flow to time 300 for 3000 steps of .1. The predicted values are of one other seed, and of an unnamed beta.",
)  # fmt: skip
def chosen(wrong: bool) -> Sequence[Check]:
    beta, gains, falls = 0.6, [], []
    for seed in SEEDS:
        toy = toys.random(6, seed)
        drawn, certain = np.exp(toy.log_p0[:, None] + toy.log_p0), bradley_terry(CERTAIN * toy.reward)
        winners = 2 * (drawn * certain).sum(1)
        ends = [
            float(winners @ flowed(compared(objective, certain, drawn, toy.log_p0, beta), toy.log_p0, (300.0,))[0])
            for objective in (DPO(), RPO(eta=0.005 if wrong else 0.05))
        ]
        gains.append(ends[1] - ends[0])
        falls.append(float(winners @ toy.log_p0) - ends[0])
    return [
        at_least("chosen log-probability, RPO - DPO, least", min(gains), 0.15, -1.84 + 2.20),
        at_least("its fall from the prior under DPO, least", min(falls), 0.1, -1.74 + 2.20),
    ]


@claim(
    "C30", "NPO loses what it is to forget exponentially slower than gradient ascent.",
    source="arXiv:2404.05868", wrong="the sign inside NPO's sigmoid",
    note="Flow to time 1000 for 1e4 steps of .1. The predicted log q started from another prior, .75 above the uniform one here.",
)  # fmt: skip
def forgetting(wrong: bool) -> Sequence[Check]:
    log_p0 = np.full(6, -math.log(6))

    def forgotten(objective: AbstractObjective, beta: float) -> list[float]:
        """log q of the one wrong answer at times 100 and 1000."""

        def loss(log_q: Tensor) -> Tensor:
            one = torch.ones(1, 1, 1)
            before = torch.full((1, 1, 1), float(log_p0[0]), dtype=torch.float64)
            return objective.loss(Batch(one.long(), one.bool(), log_q[:1].reshape(1, 1, 1), before, -one[0], one[0], top=one[0, 0]), beta)

        return [float(x[0]) for x in flowed(loss, log_p0, (100.0, 1000.0))]

    checks = [near("gradient ascent: log q", forgotten(Unlikelihood("ascent", keep=0.0), 1.0)[1], -1200, 10)]
    for beta, predicted in ((0.1, -55.7), (1.0, -8.8), (5.0, -2.9)):
        early, late = forgotten(NPO(retain=0.0), -beta if wrong else beta)
        checks.append(near(f"NPO, beta = {beta:g}: log q", late, predicted, 1.0))
        checks.append(near("its slope in log steps, times -beta", -beta * (late - early) / math.log(10), 1.0, 0.05))
    return checks


@claim(
    "C31", "KTO moves all mass to the answers that most raters find desirable: a set, no posterior.",
    source="arXiv:2402.01306", wrong="the undesirable half left out of the loss",
    note="Multiplicative steps, which have the same ends as small ones.",
)  # fmt: skip
def majority(wrong: bool) -> Sequence[Check]:
    beta, left, apart = 0.5, 0.0, math.inf
    for seed in SEEDS:
        toy, group = toys.random(6, seed), groups(6)
        drawn, reward = torch.from_numpy(toy.log_p0)[group].sum(1).exp(), torch.from_numpy(toy.reward)[group]
        loss = expected(KTO(undesirable=0.0 if wrong else 1.0), group, reward, drawn, toy.log_p0, beta)
        log_q = toy.log_p0
        for _ in range(200):
            step = slope(loss, log_q)[1] / np.exp(log_q)
            log_q = np.asarray(log_softmax(log_q - np.clip(3 * step, -1, 1)))
        minority = bradley_terry(toy.reward) @ toy.p0 < 0.5
        left = max(left, float(np.exp(log_q)[minority].sum()))
        apart = min(apart, toys.tv(log_q, toy.log_target(beta)))
    return [at_most("mass left where the chance to win is below 1/2, worst", left, 1e-3, 0.0), at_least("TV to p*, least", apart, 0.05)]


@claim(
    "C32", "Token by token the posterior's log-ratios are soft advantages, which sum to r - beta log Z.",
    source="arXiv:2404.12358", wrong="the mean reward in place of the soft value",
)  # fmt: skip
def advantages(wrong: bool) -> Sequence[Check]:
    token, process, total, between = 0.0, 0.0, 0.0, math.inf
    for seed in SEEDS:
        rng, beta = np.random.default_rng(seed), 0.7
        log_p0, reward = log_softmax(rng.normal(size=27)), rng.normal(size=27)
        target = log_softmax(log_p0 + reward / beta)
        prior, policy = (Tabular(torch.from_numpy(x)[None], ("",), 3, 3) for x in (log_p0, target))
        every = policy.enumerate()
        before, earned = prior.enumerate().log_prob, torch.from_numpy(reward)[None]
        batch = Batch(every.tokens[None], every.mask[None], every.log_prob, before, earned, torch.zeros(1, 27))
        value, least, most = (np.zeros((27, 4)) for _ in range(3))
        for t in range(4):
            same = (every.tokens[:, None, :t] == every.tokens[:, :t]).all(2).numpy()  # completions of each answer's prefix
            share = same * np.exp(log_p0) / (same @ np.exp(log_p0))[:, None]
            value[:, t] = share @ reward if wrong else beta * np.log(share @ np.exp(reward / beta))
            least[:, t], most[:, t] = np.where(same, reward, np.inf).min(1), np.where(same, reward, -np.inf).max(1)
        implied = TokenDPO().token_reward(batch, beta)[0].numpy()
        partial = ImplicitPRM().process_reward(batch, beta)[0].numpy()
        token = max(token, float(np.abs(implied - np.diff(value)).max()))
        process = max(process, float(np.abs(partial + value[:, :1] - value[:, 1:]).max()))
        total = max(total, float(np.abs(implied.sum(1) - reward + beta * logsumexp(log_p0 + reward / beta)).max()))
        seen = partial + beta * logsumexp(log_p0 + reward / beta)
        between = min(between, float((seen - least[:, 1:]).min()), float((most[:, 1:] - seen).min()))
    return [
        at_most("|token reward - difference of soft values|, worst", token, 1e-9, 0.0),
        at_most("|process reward - (V(prefix) - V(empty))|, worst", process, 1e-9, 0.0),
        at_most("|sum of token rewards - (r - beta log Z)|, worst", total, 1e-9, 0.0),
        at_least("process reward + beta log Z within the rewards of the prefix's completions, least room", between, -1e-9),
    ]


@claim(
    "C46", "One Bradley-Terry model cannot average raters who disagree: it matches their Borda counts, not their mean reward.",
    source="arXiv:2502.16320", wrong="the raters' rewards averaged before the label is made",
)  # fmt: skip
def raters(wrong: bool) -> Sequence[Check]:
    beta, raters = 0.5, np.array([[6.0, 0.0, -3.0, 1.5], [-1.0, 0.5, 1.0, 0.0]])
    toy = toys.toy(np.zeros(4), raters.mean(0))
    wins = bradley_terry(toy.reward) if wrong else np.mean([bradley_terry(r) for r in raters], axis=0)
    found = minimised(compared(DPO(), wins, uniform(4), toy.log_p0, beta), toy.log_p0)
    u = beta * (found - toy.log_p0)
    return [
        near("TV of DPO's optimum to the posterior of the mean reward", toys.tv(found, toy.log_target(beta)), 0.56, 5e-3),
        at_most("|Borda counts of the policy - of the raters|, worst", float(np.abs((bradley_terry(u) - wins).sum(1)).max()), 1e-5, 0.0),
    ]
