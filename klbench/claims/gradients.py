"""Claims about expected gradients, each a sum over every group of draws, and about where following them leads.

    C02  softmax gradient of E_q[r]: e^-theta_a - e^-theta_b stays where r(a) = r(b), so the leader of a tie takes nearly all
    C04  its natural gradient adds r to the logits: q(a)/q(b) = p0(a)/p0(b) stays
    C07  in the loss, draws held fixed, u = log q/p0:  k1 = u: 0,  k2 = u^2/2: grad KL(q||p0),  k3 = e^-u - 1 + u: grad KL(p0||q)
    C08  grad E_q[r] = beta grad KL(p0||q)  at q = beta p0 / (m - r)
    C09  E_q[ sum_t grad KL_t ] = grad KL(q||p0) - E_q[ sum_t grad log q_t sum_{u>t} KL_u ]
    C10  RB(x) = sum_t KL(q_t||p0_t) at the prefixes of x: E_q[RB] = E_q[log q/p0] = KL(q||p0)
    C11  E[grad] of GRPO = grad p E[s_K] / (p (1-p)),   s_K = sqrt(K/G (1 - K/G)), K ~ Bin(G, p);   G -> inf: grad 2 arcsin sqrt p
    C22  E_q[(w/Z - 1)^2 |s|^2] against E_q[(w/Z)^2 |s|^2]          s = grad log q, w = p0 exp(r/beta) / q
    C23  f'(t) at t = q/p* times e^err:  forward rescaled, reverse shifted, js bent, tv zero wherever |log q/p*| < |err|
    C24  E[grad] of trajectory balance and VarGrad = 2 grad KL(q||p*)
    C48  grad of c alpha P = 0, P constant on either side of the edges of its range

in the logits of one-token answers:  grad KL(q||p) = q (log q/p - KL),   grad KL(p||q) = q - p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import brentq, minimize
from scipy.special import log_softmax, softmax
from scipy.stats import binom

from klbench.batch import Batch
from klbench.claims.contract import Check, at_least, at_most, claim, near
from klbench.claims.toys import AB, T5, Toy, entropy, kl, paired, random, random_policy, toy, tv
from klbench.estimate import Array
from klbench.laws import World, expected_gradient, settled_state
from klbench.method import Objective, State
from klbench.objectives.dpg import DPG
from klbench.objectives.epo import EPO
from klbench.objectives.fdpg import FDPG
from klbench.objectives.grpo import GRPO
from klbench.objectives.kl_in_loss import KLInLoss
from klbench.objectives.rb_kl import RBKL
from klbench.objectives.reinforce import Reinforce
from klbench.objectives.trajectory_balance import TrajectoryBalance
from klbench.objectives.vargrad import VarGrad
from klbench.policies.tabular import Everything, Tabular

TIED = T5.reward == T5.reward.max()


def slope(objective: Objective, w: World, log_q: Array, beta: float, state: State | None = None) -> Array:
    """[S] the expected gradient in the logits."""
    return expected_gradient(objective, w, torch.from_numpy(log_q)[None], beta, state)[0].numpy()


def off(w: World, objective: Objective, beta: float, error: float) -> State:
    """A settled state whose log Z is wrong by `error`."""
    state = settled_state(objective, w, beta)
    assert state is not None
    return {**state, "log_z": state["log_z"] + error}


def once(every: Everything, log_q: torch.Tensor, log_p0: torch.Tensor, reward: torch.Tensor, kl_token: torch.Tensor | None = None) -> Batch:
    """One prompt's group with each answer once: its gradient holds what a loss makes of each."""
    return Batch(
        tokens=every.tokens[None],
        mask=every.mask[None],
        log_q=log_q,
        log_p0=log_p0,
        reward=reward,
        log_weight=torch.zeros_like(reward),
        prompt=torch.zeros(1, dtype=torch.int64),
        kl_token=kl_token,
    )


def grad_kl(log_q: Array, log_p: Array) -> Array:
    """[S] gradient of KL(q||p) in the logits of q."""
    return np.asarray(np.exp(log_q) * (log_q - log_p - kl(log_q, log_p)))


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def plain_rl(t: Toy, until: float, natural: bool) -> Array:
    """[S] logits where the gradient flow of E_q[r] from the prior stands at that time: step length times steps."""
    w, t = paired(t, 1)

    def ascend(_: float, logits: Array) -> Array:
        g = -slope(Reinforce(), w, logits, 1.0)
        return g / softmax(logits) if natural else g

    return np.asarray(solve_ivp(ascend, (0, until), t.log_p0, method="LSODA", rtol=1e-7, atol=1e-9).y[:, -1])


@claim(
    "C02",
    "RL without KL collapses: of tied answers the one in the lead takes nearly all.",
    source="arXiv:2205.11275",
    wrong="the natural gradient in place of the softmax policy's own",
    note="4e5 steps of .01 as the flow they follow, to time 4000 (natural: 30).",
)
def ties_are_not_shared(wrong: bool) -> Sequence[Check]:
    logits = plain_rl(T5, 30.0 if wrong else 4000.0, natural=wrong)
    share, prior = softmax(logits[TIED]), softmax(T5.log_p0[TIED])
    kept = [float(np.diff(np.exp(-x[TIED][:2]))[0]) for x in (T5.log_p0, logits)]
    return [
        Check("largest share of the tied three", float(share.max()), 0.95, 1.0, predicted=0.991),
        at_most("entropy, nats", entropy(np.asarray(log_softmax(logits))), 0.1),
        near("TV to the prior's split", 0.5 * np.abs(share - prior).sum(), 0.41, 0.005),
        near("e^-a - e^-b of two tied logits", kept[1], kept[0], 1e-4),
    ]


@claim(
    "C04",
    "The natural gradient of the same return leaves ties at the prior's ratios.",
    source="Kakade 2001, A Natural Policy Gradient",
    wrong="the softmax policy's own gradient in place of the natural one",
)
def ties_are_kept(wrong: bool) -> Sequence[Check]:
    (w, t), step = paired(T5, 1), 0.3
    logits = t.log_p0
    for _ in range(120):
        g = slope(Reinforce(), w, logits, 1.0)
        logits = logits - step * (g if wrong else g / softmax(logits))
    gap = np.abs(softmax(logits[TIED]) - softmax(t.log_p0[TIED])).max()
    return [
        at_most("largest gap of a tied share to the prior's", gap, 1e-8, 0.0),
        at_least("mass on the tied three", softmax(logits)[TIED].sum(), 0.999),
    ]


@claim(
    "C07",
    "Differentiated on fixed draws, k1 has no gradient, k2 that of KL(q||p0) and k3 that of KL(p0||q).",
    source="joschu.net/blog/kl-approx.html",
    wrong="the two KLs swapped",
)
def in_the_loss(wrong: bool) -> Sequence[Check]:
    gap = dict.fromkeys(("k1", "k2", "k3", "k3_ratio"), 0.0)
    for seed in range(5):
        t, log_q = random(6, seed), random_policy(6, 200 + seed)
        w, t = paired(Toy(t.log_p0, np.zeros(6)), 2)
        reverse, forward = grad_kl(log_q, t.log_p0), np.exp(log_q) - t.p0
        reverse, forward = (forward, reverse) if wrong else (reverse, forward)
        for kind, stated in (("k1", np.zeros(6)), ("k2", reverse), ("k3", forward), ("k3_ratio", reverse)):
            gap[kind] = max(gap[kind], float(np.abs(slope(KLInLoss(kind), w, log_q, 1.0) - stated).max()))
    words = {"k1": "k1 to 0", "k2": "k2 to grad KL(q||p0)", "k3": "k3 to grad KL(p0||q)", "k3_ratio": "k3 times q/q_old to grad KL(q||p0)"}
    return [at_most(words[kind], x, 1e-10, 0.0) for kind, x in gap.items()]


def stated_loss(objective: KLInLoss, t: Toy, beta: float, logits: Array) -> float:
    """The expected loss, as the objective states it."""
    log_q = torch.from_numpy(log_softmax(logits))
    return float(objective.stated(log_q, torch.from_numpy(t.log_p0), torch.from_numpy(t.reward), beta, 2))


def slope_at(objective: Objective, w: World, beta: float, logits: Array) -> Array:
    return slope(objective, w, logits, beta)


@claim(
    "C08",
    "With k3 in the loss the optimum is beta p0/(m - r), not the posterior.",
    source="arXiv:2402.03300",
    wrong="k3 times q/q_old, whose gradient is that of KL(q||p0)",
)
def k3_optimum(wrong: bool) -> Sequence[Check]:
    beta, to_closed, to_target = 0.37, 0.0, np.inf
    objective = KLInLoss("k3_ratio" if wrong else "k3")
    for seed in range(2):
        w, t = paired(random(6, seed), 2)
        stated = partial(stated_loss, objective, t, beta)
        found = minimize(stated, t.log_p0, jac=partial(slope_at, objective, w, beta), options={"gtol": 1e-7})
        m = brentq(lambda m, t=t: float((beta * t.p0 / (m - t.reward)).sum()) - 1, t.reward.max() + 1e-9, t.reward.max() + beta)
        log_q = np.asarray(log_softmax(found.x))
        to_closed = max(to_closed, tv(log_q, np.log(beta * t.p0 / (m - t.reward))))
        to_target = min(to_target, tv(log_q, t.log_target(beta)))
    return [at_most("TV to beta p0/(m - r), worst of 2", to_closed, 1e-6, 0.0), at_least("TV to p*, least of 2", to_target, 0.01)]


@claim(
    "C09",
    "The sum of token KLs in the loss, prefixes taken as given, is myopic: it trades reward for KL one token at a time.",
    source="arXiv:2504.10637",
    wrong="the term kept that pays for what a token leads to: rb_kl as it is",
)
def myopic(wrong: bool) -> Sequence[Check]:
    prior = Tabular(torch.from_numpy(AB.log_p0)[None], ("",), 2, 2)

    def descend(_: float, at: Array) -> Array:
        logits = torch.from_numpy(at)[None].requires_grad_()
        policy = Tabular(logits, ("",), 2, 2)
        every, cost = policy.enumerate(), policy.kl_token(prior)
        log_q, kl_token = (x.detach().requires_grad_() for x in (every.log_prob, cost))
        batch = once(every, log_q, prior.enumerate().log_prob, torch.from_numpy(AB.reward)[None], kl_token)
        charged, free = RBKL().loss(batch, 1.0), RBKL().loss(batch, 0.0)
        (c,) = torch.autograd.grad(charged if wrong else free, log_q, retain_graph=True)
        (d,) = torch.autograd.grad(charged, kl_token)
        q = logits.detach().softmax(1)[:, :, None]  # RBKL's leave-one-out holds K/(K-1), here 4/3
        return np.asarray(-torch.autograd.grad([every.log_prob, cost], logits, [3 * q * c, 4 * q * d])[0][0].numpy())

    checks = []
    for start in (np.zeros(4), np.array([-1.0, 1.0, 0.5, 0.0])):
        log_q = np.asarray(log_softmax(solve_ivp(descend, (0, 300), start, method="LSODA", rtol=1e-5, atol=1e-7).y[:, -1]))
        checks += [
            near("P(A)", np.exp(log_q[:2]).sum(), 0.8066, 1e-3),
            near("KL(q||p*)", kl(log_q, AB.log_target(1.0)), 0.0319, 1e-3),
            near("mean reward", float(np.exp(log_q) @ AB.reward), 1.652, 1e-3),
        ]
    return [*checks, near("mean reward of p*", float(np.exp(AB.log_target(1.0)) @ AB.reward), 1.493, 1e-3)]


def chains(models: int, seed: int, scale: float) -> Array:
    """[models, 27] log-laws of LM3: three tokens over three words, normal logits at each prefix times `scale`."""
    at = [log_softmax(scale * np.random.default_rng([seed, t]).normal(size=(models, *[3] * (t + 1))), axis=-1) for t in range(3)]
    return np.asarray((at[0][:, :, None, None] + at[1][:, :, :, None] + at[2]).reshape(models, 27))


def two_estimators(log_q: Array, log_p0: Array, words: int, length: int, swapped: bool) -> tuple[Array, Array, Array]:
    """[P] |mean of RB - KL(q||p0)|, variance of RB, variance of log q/p0, over every answer."""
    names = tuple(map(str, range(len(log_q))))
    policy, prior = (Tabular(torch.from_numpy(x), names, words, length) for x in (log_q, log_p0))
    rb = (prior.kl_token(policy) if swapped else policy.kl_token(prior)).sum(2).numpy()
    q, k1 = np.exp(log_q), log_q - log_p0
    mean, exact = (q * rb).sum(1), (q * k1).sum(1)
    return np.abs(mean - exact), (q * rb**2).sum(1) - mean**2, (q * k1**2).sum(1) - exact**2


def conditioned() -> tuple[Array, Array]:
    """A prior [1, 16] uniform over 2 x 4 answers of two tokens, and it conditioned on six of them: all after a, two after b."""
    p0, q = np.full((4, 4), -200.0), np.full((4, 4), -200.0)
    p0[:2], q[0], q[1, :2] = 0.0, 0.0, 0.0
    return np.asarray(log_softmax(q.reshape(1, 16), axis=1)), np.asarray(log_softmax(p0.reshape(1, 16), axis=1))


@claim(
    "C10",
    "The Rao-Blackwellised KL is unbiased and usually, not always, varies less than log q/p0.",
    source="arXiv:2504.10637",
    wrong="KL(p0||q) at each prefix",
)
def rao_blackwell(wrong: bool) -> Sequence[Check]:
    bias, rb, k1 = two_estimators(chains(200, 0, 1.5), chains(200, 1, 1.5), 3, 3, wrong)
    _, hard_rb, hard_k1 = two_estimators(*conditioned(), 4, 2, wrong)
    return [
        at_most("|mean - KL|, worst of 200 pairs", bias.max(), 1e-10, 0.0),
        at_least("pairs of 200 in which it varies no more", int((rb <= k1).sum()), 190, 198),
        at_most("median ratio of the variances", float(np.median(rb / k1)), 1.0),
        near("q = p0 conditioned: variance of RB", hard_rb[0], 0.1068, 1e-4),
        near("q = p0 conditioned: variance of log q/p0", hard_k1[0], 0.0, 1e-10),
    ]


def finite_group(p: float, draws: int) -> float:
    """E[s_K] / (p (1-p)), K ~ Bin(draws, p)."""
    share = np.arange(draws + 1) / draws
    return float(binom.pmf(np.arange(draws + 1), draws, p) @ np.sqrt(share * (1 - share)) / (p * (1 - p)))


@claim(
    "C11",
    "GRPO on a binary reward ascends 2 arcsin sqrt p up to a factor of the group's size.",
    source="arXiv:2402.03300",
    wrong="the limit's factor 1/sqrt(p (1-p)) at a group of 4",
)
def arcsine(wrong: bool) -> Sequence[Check]:
    objective, worst = GRPO(delta=1e-14), 0.0
    for seed in range(3):
        (w, t), log_q = paired(random(4, seed, binary=True), 4), random_policy(4, 50 + seed)
        p = float(np.exp(log_q) @ t.reward)
        factor = (p * (1 - p)) ** -0.5 if wrong else finite_group(p, 4)
        worst = max(worst, float(np.abs(slope(objective, w, log_q, 0.0) + factor * np.exp(log_q) * (t.reward - p)).max()))
    checks = [at_most("|E[grad] - grad p E[s_K]/(p(1-p))|, worst of 3", worst, 1e-10, 0.0)]
    for draws, predicted in ((2, 0.50), (4, 0.81), (8, 0.93)):
        w, t = paired(toy([0.0, 0.0], [1.0, 0.0]), draws)
        checks.append(near(f"of the limit's, p = .5, G = {draws}", -slope(objective, w, t.log_p0, 0.0)[0] / 0.5, predicted, 0.005))
    return checks


def advantages(w: World, log_q: Array, beta: float) -> Array:
    """[S] what DPG multiplies the score of each outcome with, log Z known."""
    leaf = torch.from_numpy(log_q)[None, :, None].clone().requires_grad_()
    batch = once(w.policy(w.log_p0).enumerate(), leaf, w.log_p0[:, :, None], w.rewards)
    loss, _ = DPG().loss(batch, beta, off(w, DPG(), beta, 0.0))
    (gradient,) = torch.autograd.grad(loss, leaf)
    return np.asarray(-gradient[0, :, 0].numpy() * len(log_q))


def noise(log_q: Array, advantage: Array) -> float:
    """Variance of one draw's gradient, summed over the logits."""
    q = np.exp(log_q)
    mean = q * (advantage - q @ advantage)
    return float(q @ (advantage**2 * (1 - 2 * q + q @ q)) - mean @ mean)


@claim(
    "C22",
    "The baseline of DPG lowers the variance of its gradient on the way to the target, and ends it there.",
    source="arXiv:2206.00761",
    wrong="a baseline of 1 for weights that are not divided by Z",
    note="At beta .5 five of 40 such paths have a point where the baseline raises the variance: it is safe only near the target (F02).",
)
def quieter_with_baseline(wrong: bool) -> Sequence[Check]:
    beta, lower, end, ratio = 1.0, 0, 0.0, []
    for seed in range(20):
        w, t = paired(random(7, seed), 2)
        start, there = random_policy(7, 500 + seed), t.log_target(beta)
        shift = 1 - np.exp(-t.log_z(beta)) if wrong else 0.0
        path = [np.asarray(log_softmax((1 - a) * start + a * there)) for a in np.linspace(0, 1, 11)]
        with_it, without = np.array([(noise(q, a + shift), noise(q, a + 1)) for q in path for a in (advantages(w, q, beta),)]).T
        lower, end = lower + int((with_it <= without).all()), max(end, float(with_it[-1]))
        ratio.append(with_it[0] / without[0])
    return [
        at_most("variance at the target, worst of 20", end, 1e-10, 0.0),
        at_least("paths of 20 on which the baseline never raises it", lower, 20, 20),
        at_most("median share left at the start", float(np.median(ratio)), 1.0, 12.4 / 16.3),
    ]


@claim(
    "C23",
    "A wrong log Z leaves the direction of both KL gradients, bends that of JS and breaks that of TV.",
    source="arXiv:2302.08215",
    wrong="a wrong beta in place of a wrong log Z",
    note="TV turns only where log q/p* of some outcome lies between 0 and the error. Predicted cosines are those of another toy.",
)
def wrong_z(wrong: bool) -> Sequence[Check]:
    beta, error = 1.0, 0.5

    def found(w: World, name: str, log_q: Array) -> Array:
        return slope(FDPG(name), w, log_q, 1.1 * beta if wrong else beta, off(w, FDPG(name), beta, 0.0 if wrong else error))

    least, most = (dict.fromkeys(("forward", "reverse", "js", "tv"), x) for x in (1.0, -1.0))
    flat = fixed = 0.0
    for seed in range(3):
        (w, t), log_q = paired(random(7, seed), 2), random_policy(7, 600 + seed)
        for name in least:
            c = cosine(slope(FDPG(name), w, log_q, beta, off(w, FDPG(name), beta, 0.0)), found(w, name, log_q))
            least[name], most[name] = min(least[name], c), max(most[name], c)
        there = t.log_target(beta)
        near_it = np.asarray(log_softmax(there + 0.2 * np.sin(np.arange(7))))
        fixed = max(fixed, float(np.abs(found(w, "js", there)).max()))
        flat = max(flat, float(np.abs(found(w, "tv", near_it)).max()))
    return [
        at_least("cosine to the true gradient, KL(p*||q)", least["forward"], 1 - 1e-9, 1.0),
        at_least("cosine, KL(q||p*)", least["reverse"], 1 - 1e-9, 1.0),
        Check("cosine, JS, greatest of 3", most["js"], 0.95, 1 - 1e-6, predicted=0.9994),
        at_most("cosine, TV, least of 3", least["tv"], 0.99, 0.778),
        at_most("JS gradient at the target", fixed, 1e-9, 0.0),
        at_most("TV gradient away from it, |log q/p*| below the error", flat, 1e-9, 0.0),
    ]


@claim(
    "C24",
    "On fresh draws trajectory balance, whatever its log Z, and VarGrad have twice the gradient of KL(q||p*).",
    source="arXiv:2201.13259",
    wrong="KL(p*||q) in place of KL(q||p*)",
)
def balance(wrong: bool) -> Sequence[Check]:
    beta, tb, var = 0.7, 0.0, 0.0
    for seed in range(3):
        (w, t), log_q = paired(random(7, seed), 2), random_policy(7, 700 + seed)
        there = t.log_target(beta)
        twice = 2 * (np.exp(log_q) - np.exp(there) if wrong else grad_kl(log_q, there))
        for error in (-2.0, 0.0, 3.0):
            found = slope(TrajectoryBalance(), w, log_q, beta, off(w, TrajectoryBalance(), beta, error))
            tb = max(tb, float(np.abs(found - twice).max()))
        var = max(var, float(np.abs(slope(VarGrad(), replace(w, draws=3), log_q, beta) - twice).max()))
    return [
        at_most("trajectory balance, worst of 3 toys and 3 values of log Z", tb, 1e-8, 0.0),
        at_most("VarGrad on three draws", var, 1e-8, 0.0),
    ]


@claim(
    "C48",
    "EPO's penalty, a constant wherever the entropy leaves its range, does not train.",
    source="arXiv:2509.22576",
    wrong="a hinge in its place, which grows with the distance to the range",
)
def constant_penalty(wrong: bool) -> Sequence[Check]:
    beta, idle, hinge = 0.5, 0.0, np.inf
    with_it, without = (EPO(entropy=0.1, penalty=0.5, alpha=alpha, hinge=alpha * wrong > 0) for alpha in (1.0, 0.0))
    for seed in range(3):
        (w, _), log_q = paired(random(6, seed), 2), random_policy(6, 800 + seed)
        for past in (0.1, 10.0):  # the entropy above its range, and below
            state = {"past": torch.full((1,), past, dtype=torch.float64), "visits": torch.ones(1, dtype=torch.float64)}
            none = slope(without, w, log_q, beta, state)
            idle = max(idle, float(np.abs(slope(with_it, w, log_q, beta, state) - none).max()))
            hinge = min(hinge, float(np.abs(slope(replace(with_it, hinge=True), w, log_q, beta, state) - none).max()))
    return [
        at_most("gradient with the penalty less that without, worst of 6", idle, 0.0, 0.0),
        at_least("the same for a hinge, least of 6: the range is left", hinge, 1e-3),
    ]
