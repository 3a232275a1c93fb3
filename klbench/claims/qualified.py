"""Statements of the literature that need a qualifier, each with the counterexample that shows it: F01 to F12 but F06 and F08.

Every experiment here is a refutation: its checks are those of the counterexample, and the statement fails when all of them hold.
F06 stands beside C42 in best_of_n.py, F08 beside C40 in online.py, on the toys of those claims.

    F02   Var[(w - 1) s] - Var[w s] = E_q[|s|^2] - 2 E_p*[|s|^2],   w = p*/q,   s = grad log q:   may have either sign
    F07   posterior odds e^-x before a bonus of 2 x beta, e^x after it:   TV = tanh(x/2);   from a tie by the same bonus   tanh(x)/2
    F10   normalised by the spread, with a true KL beside it:   logit p - logit p_0 = E[s_K] / (beta p (1-p)),   not 1/beta
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from scipy.special import comb, expit, log_softmax, logit
from torch import Tensor

from klbench.batch import Batch
from klbench.claims import toys
from klbench.claims.contract import Check, at_least, at_most, claim, near
from klbench.estimate import Array
from klbench.laws import World, expected_gradient, settled_state
from klbench.method import RewardLaw, State
from klbench.objectives.dpg import DPG
from klbench.objectives.dr_grpo import DrGRPO
from klbench.objectives.exo import EXO
from klbench.objectives.fdpg import FDPG
from klbench.objectives.grpo import GRPO
from klbench.objectives.ipo import IPO
from klbench.objectives.kl_in_loss import KLInLoss
from klbench.objectives.reinforce import Reinforce
from klbench.policies.tabular import Tabular

SEEDS = range(3)


def row(x: Array) -> Tensor:
    """[1, S]"""
    return torch.from_numpy(np.array(x))[None]


@claim(
    "F01", "The Rao-Blackwellised KL has no more variance than the plain log-ratio.",
    source="arXiv:2504.10637", wrong="log q/p0 of the sampled tokens in place of the sums over the vocabulary",
    expected="fails", refutes=True,
    note="Each token's term has no more variance, their sum may. Here q is p0 given six of its eight answers: near a hard posterior the "
    "plain log-ratio is the calmer one. The regression of both is safe, and klbench's default.",
)  # fmt: skip
def rao_blackwell(wrong: bool) -> Sequence[Check]:
    never = -60.0
    half, dead = [math.log(1 / 8)] * 4, [never] * 4
    prior = Tabular(torch.tensor([half + half + dead + dead], dtype=torch.float64), ("",), 4, 2)
    after_b = [math.log(1 / 6)] * 2 + [never] * 2
    policy = Tabular(torch.tensor([[math.log(1 / 6)] * 4 + after_b + dead + dead], dtype=torch.float64), ("",), 4, 2)
    q = policy.logits.softmax(1)[0].numpy()
    plain = (policy.enumerate().log_prob - prior.enumerate().log_prob)[0].sum(1).numpy()
    summed = plain if wrong else policy.kl_token(prior)[0].sum(1).numpy()

    def variance(x: Array) -> float:
        return float(q @ x**2 - (q @ x) ** 2)

    return [
        at_most("|difference of the two means|", abs(float(q @ (plain - summed))), 1e-10, 0.0),
        near("variance of log q/p0", variance(plain), 0.0, 1e-12),
        near("variance of the Rao-Blackwellised sum", variance(summed), 0.1068, 1e-4),
    ]


@claim(
    "F02", "The baseline of DPG lowers the variance of its gradient.",
    source="arXiv:2206.00761", wrong="the variance of the weights taken for that of the gradient",
    expected="fails", refutes=True,
    note="Lower on all but a few of 300 random toys, and exactly 0 at q = p*; not always lower far from it. How many are worse depends "
    "on beta: 4 at .3, none from 1 on.",
)  # fmt: skip
def baseline(wrong: bool) -> Sequence[Check]:
    beta, rises = 0.3, []
    for seed in range(300):
        toy = toys.random(7, seed)
        q, p = toy.p0, np.exp(toy.log_target(beta))
        square = np.ones(7) if wrong else 1 - 2 * q + (q**2).sum()  # |s|^2 of each answer
        rises.append(float(q @ square - 2 * p @ square))
    there = toys.random(7, int(np.argmax(rises)))
    ours, without = (gradient_variance(toys.world(there, 2), beta, dropped) for dropped in (0.0, 1.0))
    return [
        at_least("random toys of 300 on which the variance rises", sum(x > 0 for x in rises), 1, 6.0),
        at_least("variance of klbench's dpg over that without a baseline, worst toy", ours / without, 1.05),
    ]


def gradient_variance(at: World, beta: float, dropped: float) -> float:
    """Of DPG's gradient at q = p0, summed over parameters, all groups of two draws. dropped: part of the baseline that is taken away."""
    state, size = settled_state(DPG(), at, beta), at.rewards.shape[1]
    assert state is not None
    first, second = torch.zeros(size, dtype=torch.float64), 0.0
    for i in range(size):
        for j in range(size):
            logits = at.log_p0.clone().requires_grad_()
            log_q, pair = logits.log_softmax(1), torch.tensor([i, j])
            batch = Batch(
                pair[None, :, None], torch.ones(1, 2, 1, dtype=torch.bool), log_q[:, pair, None], at.log_p0[:, pair, None],
                at.rewards[:, pair], torch.zeros(1, 2), prompt=torch.tensor([0]),
            )  # fmt: skip
            loss, _ = DPG().loss(batch, beta, state)
            (slope,) = torch.autograd.grad(loss - dropped * log_q[0, pair].mean(), logits)
            mass = float(at.log_p0[0, pair].sum().exp())
            first, second = first + mass * slope[0], second + mass * float((slope**2).sum())
    return second - float((first**2).sum())


@claim(
    "F03", "Among policies of equal expected reward the posterior is the most diverse.",
    source="arXiv:2205.11275", wrong="a uniform prior",
    expected="fails", refutes=True,
    note="It is the closest to the prior (C20). It has the highest entropy only where the prior is uniform.",
)  # fmt: skip
def diverse(wrong: bool) -> Sequence[Check]:
    toy = toys.toy([0.0] * 3 if wrong else list(np.log([0.87, 0.05, 0.08])), [0.0, 0.5, 1.0])
    b = toys.best_of(toy, 4)
    mean = float(np.exp(b) @ toy.reward)
    p = toy.log_target(1 / brentq(lambda tilt: np.exp(toy.log_target(1 / tilt)) @ toy.reward - mean, 1e-6, 1e3))
    return [
        near("E[r] of both", mean, 0.355, 5e-4),
        near("entropy of best of 4", toys.entropy(b), 0.955, 1e-3),
        near("entropy of the posterior", toys.entropy(p), 0.874, 1e-3),
        near("KL to the prior of best of 4", toys.kl(b, toy.log_p0), 0.271, 1e-3),
        near("KL to the prior of the posterior", toys.kl(p, toy.log_p0), 0.250, 1e-3),
    ]


@claim(
    "F04", "Reinforcement learning without a KL term shares its mass among the best answers as the prior does.",
    source="arXiv:2205.11275", wrong="the natural gradient, which keeps the prior's ratios",
    expected="fails", refutes=True,
    note="Which best answers survive is the geometry: the objective is indifferent, the softmax gradient gives nearly all to the one that "
    "leads, the natural gradient copies the prior. The flow to time 4000 stands for 4e5 steps of .01.",
)  # fmt: skip
def ties(wrong: bool) -> Sequence[Check]:
    toy = toys.T5
    one, best = toys.world(toy, 1), toy.reward == 1

    def flow(time: float, logits: Array) -> Array:
        slope = -expected_gradient(Reinforce(), one, row(logits), 1.0)[0].numpy()
        return np.asarray(slope / np.exp(log_softmax(logits)) if wrong else slope)

    end = np.exp(log_softmax(solve_ivp(flow, (0, 40 if wrong else 4000), toy.log_p0, method="LSODA", rtol=1e-6, atol=1e-8).y[:, -1]))
    split, prior = end[best] / end[best].sum(), toy.p0[best] / toy.p0[best].sum()
    return [
        *(near(f"share of tied answer {i + 1}", split[i], share, 2e-3) for i, share in enumerate((0.006, 0.991, 0.003))),
        near("TV to the prior's split", float(np.abs(split - prior).sum() / 2), 0.41, 5e-3),
    ]


@claim(
    "F05", "The k3 penalty of GRPO is the reverse KL to the prior.",
    source="arXiv:2402.03300", wrong="the ratio q/sg(q) in front of k3",
    expected="fails", refutes=True,
    note="Its value is; on fixed draws its gradient is that of KL(p0||q), and per token it is that of neither. With the ratio in front it "
    "is the reverse KL's.",
)  # fmt: skip
def penalty(wrong: bool) -> Sequence[Check]:
    objective = KLInLoss("k3_ratio") if wrong else GRPO()
    value, apart, reverse = 0.0, 0.0, math.inf
    for seed in SEEDS:
        toy, log_q = toys.random(6, seed), toys.random_policy(6, 100 + seed)
        value = max(value, abs(float(np.exp(log_q) @ (np.exp(toy.log_p0 - log_q) - 1 + log_q - toy.log_p0)) - toys.kl(log_q, toy.log_p0)))
        found = expected_gradient(objective, silent(toys.world(toy, 2)), row(log_q), 1.0)[0].numpy()
        away, back = slopes(log_q, toy.log_p0)
        apart = max(apart, float(np.abs(found - back).max()))
        reverse = min(reverse, 1 - cosine(found, away))
    two, log_q = World(((1, 2, 3, 4),), ((0.0,) * 4,), 2, 3), toys.random_policy(4, 1)  # answers of one to three tokens
    found = expected_gradient(objective, two, row(log_q), 1.0)[0].numpy()
    token = min(1 - cosine(found, slope) for slope in slopes(log_q, two.log_p0[0].numpy()))
    return [
        at_most("|E[k3] - KL(q||p0)|, worst", value, 1e-10, 0.0),
        at_most("klbench's grpo without reward - grad KL(p0||q), worst", apart, 1e-10, 0.0),
        at_least("its 1 - cosine with grad KL(q||p0), least", reverse, 0.01),
        at_least("answers of several tokens: 1 - cosine with either", token, 0.01),
    ]


def slopes(log_q: Array, log_p0: Array) -> tuple[Array, Array]:
    """grad KL(q||p0) and grad KL(p0||q) along the logits of q."""
    q, u = np.exp(log_q), log_q - log_p0
    return q * (u - q @ u), q - np.exp(log_p0)


def cosine(x: Array, y: Array) -> float:
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def silent(at: World) -> World:
    """Without rewards only the penalty is left."""
    return replace(at, reward=tuple(tuple(0.0 for _ in row) for row in at.reward))


@claim(
    "F07", "A bonus of d on one answer moves the posterior by at most tanh(d/(2 beta))/2 in total variation.",
    source="arXiv:2507.20150", wrong="the two answers tied before the bonus",
    expected="fails", refutes=True,
    note="Exact for a tie of two. The bound for any change of reward is tanh(span/(4 beta)), reached by two groups, one leading by half "
    "the bonus before and the other after.",
)  # fmt: skip
def cliff(wrong: bool) -> Sequence[Check]:
    checks = []
    for bonus, beta in ((1.0, 0.5), (2.0, 0.3)):
        lead = 0.0 if wrong else bonus / 2
        before, after = (World(((1, 1),), ((lead, extra),), 1, 1).log_target(beta)[0].numpy() for extra in (0.0, bonus))
        moved = toys.tv(before, after)
        checks += [
            near(f"TV moved, d = {bonus:g}, beta = {beta:g}", moved, math.tanh(bonus / (4 * beta)), 1e-12),
            at_least("the same over tanh(d/(2 beta))/2", moved / (math.tanh(bonus / (2 * beta)) / 2), 1.1),
        ]
    return checks


@claim(
    "F09", "Cloning the successes of best-of-n gives the KL-regularised optimum.",
    source="arXiv:2502.06781", wrong="the failures that best-of-n returns kept in the clone",
    expected="fails", refutes=True,
    note="The successes alone give p0 given success at every n, the posterior of beta to 0. The finite beta of n needs the failures (C17).",
)  # fmt: skip
def successes(wrong: bool) -> Sequence[Check]:
    missed, moved, most = 0.0, 0.0, 0.0
    for seed in SEEDS:
        toy = toys.random(6, seed, binary=True)
        p = float(toy.p0[toy.reward == 1].sum())
        clones = []
        for n in (2, 4):
            b = toys.best_of(toy, n)
            clone = b if wrong else np.asarray(log_softmax(np.where(toy.reward == 1, b, -np.inf)))
            target = toy.log_target(1 / math.log(((1 - p) ** -n - 1) * (1 - p) / p))
            gap = toys.tv(clone, target)
            missed, most = max(missed, abs(gap - (1 - p) ** n)), max(most, gap)
            clones.append(clone)
        moved = max(moved, toys.tv(*clones))
    return [
        at_most("|TV to the posterior of n - (1-p)^n|, worst", missed, 1e-10, 0.0),
        at_least("that TV, largest", most, 0.1),
        at_most("TV between the clones of n = 2 and n = 4, worst", moved, 1e-10, 0.0),
    ]


@claim(
    "F10", "Dividing GRPO's advantages by the spread of the group only rescales the gradient.",
    source="arXiv:2402.03300", wrong="the group's mean taken off and no division",
    expected="fails", refutes=True,
    note="Outside the KL term it makes beta a different one at each prompt, beta p (1-p)/E[s_K], beta times the spread for large groups; "
    "only right-or-wrong rewards in groups of two or three are spared. Around a return that holds the KL it keeps p* and not the "
    "convergence: steps of a constant rate orbit it.",
)  # fmt: skip
def rescaled(wrong: bool) -> Sequence[Check]:
    objective, draws = DrGRPO() if wrong else GRPO(delta=1e-12), 6
    right = np.arange(draws + 1)
    share = right / draws

    def pull(p: float) -> float:
        """What the reward's part of the gradient is along logit p."""
        group = comb(draws, right) * p**right * (1 - p) ** (draws - right)
        return p * (1 - p) * (1 - 1 / draws) if wrong else float(group @ np.sqrt(share * (1 - share)))

    acting, left = [], 0.0
    for counts in ((9, 1), (1, 1), (1, 9)):
        start = logit(counts[1] / sum(counts))
        x = brentq(lambda x, start=start: pull(expit(x)) / expit(x) / expit(-x) - (x - start), start, 12.0)  # beta 1
        acting.append(1 / (x - start))
        found = expected_gradient(objective, World((counts,), ((0.0, 1.0),), draws, 1), row(log_softmax([0.0, x])), 0.0)
        left = max(left, abs(float(found[0, 1]) + float(expit(x) * expit(-x) * (x - start))))
    fast, slow = (orbit(rate, divided=not wrong) for rate in (0.05, 0.005))
    return [
        at_most("klbench's gradient with a true KL where beta acts as beta p (1-p)/E[s_6], three prompts, worst", left, 1e-10, 0.0),
        at_least("largest over smallest beta that acts", max(acting) / min(acting), 1.1),
        at_least("KL in the return: TV to p* while steps of .05 go on", fast, 1e-3, 0.0155),
        at_least("the same over that of steps of .005", fast / max(slow, 1e-300), 5.0),
    ]


def orbit(rate: float, divided: bool) -> float:
    """Largest TV to p* over the last 500 of 3,000 steps of a constant rate up the return with its KL, divided by its spread or not."""
    toy, beta = toys.random(5, 0), 0.5
    target, logits, last = toy.log_target(beta), toy.log_target(1.05 * beta), 0.0
    for step in range(3000):
        log_q = np.asarray(log_softmax(logits))
        q = np.exp(log_q)
        gain = toy.reward - beta * (log_q - toy.log_p0)
        gain = gain - q @ gain
        logits = logits + (rate if divided else 1.0) * q * gain / (math.sqrt(q @ gain**2) if divided else 1.0)
        last = max(last, toys.tv(log_q, target)) if step >= 2500 else 0.0
    return last


@claim(
    "F11", "A wrong log Z ruins the fit of f-DPG.",
    source="arXiv:2302.08215", wrong="policies that are products of two marginals",
    expected="fails", refutes=True,
    note="Not at full capacity for a strictly convex f: forward KL is rescaled, reverse KL is untouched, JS bends on the way. It does ruin "
    "total variation, whose gradient is 0 wherever |log q/p*| is below the error, and JS in a restricted family.",
)  # fmt: skip
def wrong_z(wrong: bool) -> Sequence[Check]:
    toy, beta = toys.random(4, 1), 0.5
    checks = []
    for generator, rate in (("forward", 1.0), ("reverse", 1.0), ("js", 2.0)):
        right = descended(FDPG(generator), toy, beta, 0.0, rate, True) if wrong else toy.log_target(beta)
        found = descended(FDPG(generator), toy, beta, 0.5, rate, wrong)
        checks.append(at_most(f"{generator}: TV between the fits with log Z off by .5 and right", toys.tv(found, right), 1e-6, 0.0))
    state = settled_state(FDPG("tv"), at := toys.world(toy, 2), beta) or {}
    near_by = row(log_softmax(toy.log_target(beta) + np.array([0.2, -0.2, 0.2, -0.2])))
    slope = expected_gradient(FDPG("tv"), at, near_by, beta, {**state, "log_z": state["log_z"] + 0.5})
    return [*checks, at_most("the qualifier, tv: gradient at another policy within the error", float(slope.norm()), 1e-12, 0.0)]


def descended(objective: FDPG, toy: toys.Toy, beta: float, error: float, rate: float, product: bool) -> Array:
    """[4] log of the policy after 18 steps of its expected gradient over its own mass, from a random one; product: of two marginals."""
    at = toys.world(toy, 2)
    state: State = dict(settled_state(objective, at, beta) or {})
    state["log_z"] = state["log_z"] + error
    log_q = np.asarray(log_softmax(0.3 * np.array([1.0, -0.5, 0.2, -0.7])))
    logits = [log_q] if not product else [np.zeros(2), np.zeros(2)]
    for _ in range(18):
        log_q = logits[0] if not product else (logits[0][:, None] + logits[1]).reshape(4)
        slope = expected_gradient(objective, at, row(log_q), beta, state)[0].numpy()
        parts = [slope] if not product else [slope.reshape(2, 2).sum(1), slope.reshape(2, 2).sum(0)]
        logits = [np.asarray(log_softmax(x - rate * g / np.exp(x))) for x, g in zip(logits, parts, strict=True)]
    return logits[0] if not product else (logits[0][:, None] + logits[1]).reshape(4)


@claim(
    "F12", "A setting can be carried from one paper or library to another by its name.",
    source="arXiv:2302.08215", wrong="each setting converted first",
    expected="fails", refutes=True,
    note="disco's JS loss is twice the divergence it reports; the bandit code's IPO beta is the margin 1/(2 tau); EXO's temperature is "
    "beta_pi beta_r; also QUEST has no prior in its target, and TRL's bnpo is a mean over tokens, not BNPO.",
)  # fmt: skip
def names(wrong: bool) -> Sequence[Check]:
    toy = toys.random(6, 0)
    p, q = row(toy.log_target(0.5))[0], row(toys.random_policy(6, 9))[0]
    halfway = torch.logaddexp(p, q) - math.log(2)
    divergence = float((p.exp() * (p - halfway) + q.exp() * (q - halfway)).sum() / 2)
    generated = float(FDPG("js").stated(q, torch.from_numpy(toy.log_p0), torch.from_numpy(toy.reward), 0.5, 2))
    law = RewardLaw.of(toy.reward, toy.p0)
    margin = toy.log_p0 + IPO().own(toy.reward, law, 1 / (2 * 10.0), 2)  # (h - 10)^2
    named = toy.log_p0 + IPO().own(toy.reward, law, 1 / (2 * 10.0) if wrong else 10.0, 2)
    exo = EXO(split=math.log(0.5) / math.log(0.4))  # beta_pi .5, beta_r .8
    slope = expected_gradient(exo, toys.world(toy, 2), row(toy.log_target(0.4 if wrong else 0.5)), 0.4)
    scale = expected_gradient(exo, toys.world(toy, 2), row(toy.log_p0), 0.4)
    return [
        near("JS: the loss over the divergence", generated / divergence / (2 if wrong else 1), 2.0, 1e-9),
        at_least("IPO: TV between beta = 10 as a margin and as tau", toys.tv(margin, named), 0.1),
        at_least("EXO: gradient at the posterior of beta_pi, relative", float(slope.norm() / scale.norm()), 0.01),
    ]
