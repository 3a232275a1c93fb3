"""Best-of-n beside the posterior, families too small for it, and proxies that are followed too far: C17 to C21, C42, F06.

    b_n(x)  = p0(x) [F(r)^n - F(r-)^n] / P0(r)                 KL(b_n||p0) <= log n - (n-1)/n
    binary reward, p = P0(r = 1):   b_n = p*_beta   at   e^(1/beta) = ((1-p)^-n - 1) (1-p)/p
    KL(q||p0) = KL(p*||p0) + KL(q||p*)   for every q with E_q[r] = E_p*[r]
    fit of a family:   min_q D_f,   D_f = E_p*[ f(q/p*) ]
    over-optimisation:   gold E_q[g] against d = sqrt(KL(q||p0)),   q: best-of-n, or the tilt, by a proxy of the gold g

b_n is klbench's own (`RewardLaw.log_best_of`), D_f and its gradient those of `fdpg`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import brentq, minimize
from scipy.special import gammaln, log_softmax
from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor

from klbench.claims import toys
from klbench.claims.contract import Check, at_least, at_most, claim, near
from klbench.estimate import Array
from klbench.laws import expected_gradient, settled_state
from klbench.method import RewardLaw
from klbench.objectives.fdpg import FDPG
from klbench.objectives.sft import SFT

SEEDS = range(5)


def with_mean(toy: toys.Toy, reward: float) -> Array:
    """[S] log p* at the beta where E_p*[r] is this."""
    return toy.log_target(1 / brentq(lambda tilt: np.exp(toy.log_target(1 / tilt)) @ toy.reward - reward, 1e-6, 1e3))


def beta_of(p: float, n: int) -> float:
    """C17: the beta of best-of-n with success rate p."""
    return 1 / math.log(((1 - p) ** -n - 1) * (1 - p) / p)


@claim(
    "C17", "Best-of-n with a right-or-wrong reward is the KL posterior at a beta that n sets; its successes alone are p0 given success.",
    source="arXiv:2502.06781", wrong="the factor (1-p)/p left out of e^(1/beta)",
)  # fmt: skip
def binary(wrong: bool) -> Sequence[Check]:
    apart, cloned, slope = 0.0, 0.0, 0.0
    for seed in SEEDS:
        toy = toys.random(6, seed, binary=True)
        right = toy.reward == 1
        p = float(toy.p0[right].sum())
        for n in (2, 4, 16):
            target = toy.log_target(1 / math.log((1 - p) ** -n - 1) if wrong else beta_of(p, n))
            b = toys.best_of(toy, n)
            apart = max(apart, float(np.abs(b - target).max()))
            cloned = max(cloned, float(np.abs(log_softmax(b[right]) - log_softmax(toy.log_p0[right])).max()))
            if n == 2:
                slope = max(slope, float(expected_gradient(SFT(), toys.world(toy, n), torch.from_numpy(target)[None], 1.0).norm()))
    return [
        at_most("|log b_n - log p*|, worst", apart, 1e-10, 0.0),
        at_most("gradient of klbench's sft at that p*, worst", slope, 1e-10, 0.0),
        at_most("|log of the cloned successes - log p0(.|r=1)|, worst", cloned, 1e-10, 0.0),
    ]


@claim(
    "C18", "KL(best-of-n||prior) is at most log n - (n-1)/n, and less where rewards tie or answers are few.",
    source="arXiv:2401.01879", wrong="the density n F^(n-1) of a continuous reward on a prior with atoms",
)  # fmt: skip
def bound(wrong: bool) -> Sequence[Check]:
    def divergence(law: RewardLaw, n: int) -> float:
        log_ratio = math.log(n) + (n - 1) * np.log(np.cumsum(law.mass)) if wrong else law.log_best_of(law.levels, n)
        return float(law.mass @ (np.exp(log_ratio) * log_ratio))

    few = [RewardLaw.of(toy.reward, toy.p0) for toy in (toys.random(6, seed) for seed in SEEDS)]
    room = min(math.log(n) - (n - 1) / n - divergence(law, n) for law in few for n in (2, 4, 16, 64))
    fine = RewardLaw(np.arange(20_000.0), np.full(20_000, 1 / 20_000))
    return [
        at_least("bound - KL over six answers, least", room, 1e-6),
        near("KL of best of 8, 2e4 equal atoms", divergence(fine, 8), math.log(8) - 7 / 8, 1e-6),
        at_most("KL - bound, 2e4 equal atoms", divergence(fine, 8) - math.log(8) + 7 / 8, 0.0),
    ]


def coins(length: int) -> tuple[Array, Array]:
    """Heads among so many Bernoulli(.3) tokens: counts and their prior mass."""
    k = np.arange(length + 1.0)
    log_mass = gammaln(length + 1) - gammaln(k + 1) - gammaln(length - k + 1) + k * math.log(0.3) + (length - k) * math.log(0.7)
    return k, np.exp(log_softmax(log_mass))


def best_of_real(mass: Array, log_n: float) -> Array:
    """[S] b_n for any real n, by powers of F read from the upper tail: n reaches e^26 here."""
    above = np.append(np.cumsum(mass[::-1])[::-1][1:], 0.0)
    power = np.exp(math.exp(log_n) * np.log1p(-np.minimum(above, 1 - 1e-300)))
    return np.asarray(np.diff(power, prepend=0.0))


def nats(q: Array, p0: Array) -> float:
    """KL(q||p0) of masses."""
    return float(np.where(q > 0, q * np.log(np.maximum(q, 1e-300) / p0), 0.0).sum())


@claim(
    "C19", "At equal KL a token, best-of-n of long sequences comes close to the tilted law.",
    source="arXiv:2404.01730", wrong="the bound log n - (n-1)/n taken for the KL of best-of-n, whose rewards tie",
    note="n is real and reaches e^26, beyond RewardLaw.log_best_of, to which the same powers of F are held at n = 3.",
)  # fmt: skip
def long(wrong: bool) -> Sequence[Check]:
    tilt = brentq(lambda p: p * math.log(p / 0.3) + (1 - p) * math.log((1 - p) / 0.7) - 0.1, 0.3, 0.99)

    def excess(log_n: float, mass: Array, length: int) -> float:
        return (log_n - 1 + math.exp(-log_n) if wrong else nats(best_of_real(mass, log_n), mass)) - 0.1 * length

    checks, gaps, log_n = [near("E[r]/T of the tilt", tilt, 0.5146, 1e-4)], [], 0.0
    for length, predicted in ((4, 0.4956), (64, 0.5026), (256, 0.5089)):
        k, mass = coins(length)
        log_n = brentq(excess, 1e-3, 60.0, args=(mass, length))
        mean = float(best_of_real(mass, log_n) @ k) / length
        gaps.append(tilt - mean)
        checks.append(near(f"E[r]/T of best-of-n, T = {length}", mean, predicted, 1e-4))
    k, mass = coins(4)
    ours = mass * np.exp(RewardLaw(k, mass).log_best_of(k, 3))
    return [
        *checks,
        near("log n / T at T = 256", log_n / 256, 0.104, 5e-4),
        at_least("fall of the gap to the tilt, least", float(-np.diff(gaps).max()), 1e-3),
        at_most("|b_3 - RewardLaw's|", float(np.abs(best_of_real(mass, math.log(3)) - ours).max()), 1e-12),
    ]


@claim(
    "C20", "At equal expected reward no policy is closer to the prior than the posterior, best-of-n included.",
    source="arXiv:2205.11275", wrong="the KL to the prior with its arguments swapped",
    note="True of the KL; of the entropy only where the prior is uniform, as it is in the toy measured here (F03).",
)  # fmt: skip
def matched(wrong: bool) -> Sequence[Check]:
    def far(log_q: Array, toy: toys.Toy) -> float:
        return toys.kl(toy.log_p0, log_q) if wrong else toys.kl(log_q, toy.log_p0)

    b = toys.best_of(toys.U8, 4)
    mean = float(np.exp(b) @ toys.U8.reward)
    p = with_mean(toys.U8, mean)
    saved, apart = [], 0.0
    for toy in (toys.random(6, seed) for seed in SEEDS):
        for n in (2, 4, 16):
            q = toys.best_of(toy, n)
            posterior = with_mean(toy, float(np.exp(q) @ toy.reward))
            saved.append(far(q, toy) - far(posterior, toy))
            apart = max(apart, abs(saved[-1] - toys.kl(q, posterior)))
    return [
        near("E[r] of best of 4", mean, 0.8369, 1e-4),
        near("beta with that E[r]", 1 / (7 * float(p[1] - p[0])), 0.2366, 1e-4),
        near("KL to the prior, posterior", far(p, toys.U8), 0.6069, 1e-4),
        near("KL to the prior, best of 4", far(b, toys.U8), 0.6246, 1e-4),
        near("entropy of the posterior", toys.entropy(p), 1.4726, 1e-4),
        near("entropy of best of 4", toys.entropy(b), 1.4548, 1e-4),
        at_least("KL saved on random toys, least", min(saved), 1e-8),
        at_most("|KL saved - KL(b_n||p*)|, worst", apart, 1e-8, 0.0),
    ]


def fitted(generator: str, log_target: Tensor, turned: bool) -> Tensor:
    """[4, 4] log of the product of two marginals with the least D_f to the target, of 6 starts. turned: f reads p*/q."""
    objective = FDPG(generator)

    def log_q(parameters: Tensor) -> Tensor:
        return parameters[:4].log_softmax(0)[:, None] + parameters[4:].log_softmax(0)[None, :]

    def loss(x: Array) -> tuple[float, Array]:
        parameters = torch.from_numpy(x).requires_grad_()
        pair = (log_q(parameters).reshape(16), log_target)
        at, to = pair[::-1] if turned else pair
        value = objective.stated(at, to, torch.zeros(16, dtype=torch.float64), 1.0, 2)
        (slope,) = torch.autograd.grad(value, parameters)
        return float(value.detach()), slope.numpy()

    starts = np.random.default_rng(0).normal(size=(6, 8)) * 2
    found = min((minimize(loss, x, jac=True, method="BFGS", options={"gtol": 1e-9}) for x in starts), key=lambda result: result.fun)
    return log_q(torch.from_numpy(found.x)).detach()


@claim(
    "C21", "In a family that cannot hold the posterior, each divergence leads to another policy, the best one in its own column.",
    source="arXiv:2302.08215", wrong="q/p* turned upside down inside the generator",
)  # fmt: skip
def columns(wrong: bool) -> Sequence[Check]:
    target = torch.from_numpy(toys.MF.log_target(toys.MF_BETA))
    names = ("forward", "reverse", "js")
    fits = {name: fitted(name, target, wrong) for name in names}
    zero = torch.zeros(16, dtype=torch.float64)
    table = {(of, by): float(FDPG(of).stated(fits[by].reshape(16), target, zero, 1.0, 2)) for of in names for by in names}
    toy = toys.world(toys.MF, 2)
    slopes = [
        expected_gradient(FDPG(name), toy, fit.reshape(1, 16), toys.MF_BETA, settled_state(FDPG(name), toy, toys.MF_BETA)).reshape(4, 4)
        for name, fit in fits.items()
    ]
    marginals = torch.cat([torch.cat([slope.sum(0), slope.sum(1)]) for slope in slopes])  # the slope in a family of products
    p = target.exp().reshape(4, 4)
    return [
        at_least("lead in its own column, least", min(table[of, by] - table[of, of] for of in names for by in names if by != of), 1e-3),
        near("forward fit: KL(p*||q)", table["forward", "forward"], 0.730, 1e-3),
        near("forward fit: KL(q||p*)", table["reverse", "forward"], 1.034, 1e-3),
        near("reverse fit: KL(p*||q)", table["forward", "reverse"], 1.965, 1e-3),
        near("reverse fit: KL(q||p*)", table["reverse", "reverse"], 0.886, 1e-3),
        near("JS fit: JS", table["js", "js"] / 2, 0.1910, 1e-3),
        at_most("forward fit - product of the marginals", float((fits["forward"].exp() - p.sum(1)[:, None] * p.sum(0)).abs().max()), 1e-6),
        at_most("gradient of klbench's fdpg along the family, worst", float(marginals.abs().max()), 1e-6),
    ]


def proxies() -> dict[str, tuple[Array, Array, Array]]:
    """Proxy levels, their prior mass, E[gold | proxy], gold N(0, 1): noise N(0, 1); noise t(2); noise N(0, 1/4) with 1 % exploits."""
    grid = np.linspace(-8, 12, 1001)
    wide = np.sinh(np.linspace(-7.6, 7.6, 1201))  # to +-1000: the noise has no variance
    gold, weight = np.polynomial.hermite_e.hermegauss(60)
    joint = student.pdf(wide[:, None] - gold, 2) * weight
    usual, exploit = 0.99 * norm.pdf(grid, 0, math.sqrt(1.25)), 0.01 * norm.pdf(grid, 3, 1)  # of these the gold is the proxy less 6
    found = {
        "normal": (grid, norm.pdf(grid, 0, math.sqrt(2)), grid / 2),
        "t(2)": (wide, joint.sum(1) * np.gradient(wide), joint @ gold / joint.sum(1)),
        "exploit": (grid, usual + exploit, (usual * grid / 1.25 + exploit * (grid - 6)) / (usual + exploit)),
    }
    return {name: (proxy, mass / mass.sum(), gold) for name, (proxy, mass, gold) in found.items()}


def curve(proxy: Array, mass: Array, gold: Array, by: str) -> tuple[Array, Array]:
    """d and E_q[gold] along best-of-n, n to 4096 (by "n"), or along the tilt, beta 20 to .3 (by "beta")."""
    if by == "n":
        law = RewardLaw(proxy, mass)
        log_ratio = np.stack([law.log_best_of(proxy, round(2 ** (k / 2))) for k in range(2, 25)])
    else:
        log_ratio = log_softmax(np.log(mass) + proxy / np.geomspace(20, 0.3, 80)[:, None], axis=1) - np.log(mass)
    q = mass * np.exp(log_ratio)
    return np.sqrt((q * log_ratio).sum(1)), q @ gold


@claim(
    "C42", "Following a proxy lowers the gold reward in the end only if its errors are heavy-tailed or it can be exploited.",
    source="arXiv:2210.10760", wrong="the pick scored by the proxy that chose it",
    note="Integrals in place of the 2e5 atoms of OBJECTIVES.md, n to 4096. The exploit's decline ends: far out in the tail the honest "
    "answers, which spread more, lead again. KL-RL on a t(2) proxy has no posterior, its Z is infinite.",
)  # fmt: skip
def overoptimised(wrong: bool) -> Sequence[Check]:
    laws = {name: (proxy, mass, proxy if wrong else gold) for name, (proxy, mass, gold) in proxies().items()}
    normal, heavy, exploit = (curve(*laws[name], "n") for name in ("normal", "t(2)", "exploit"))
    tilt = curve(*laws["exploit"], "beta")
    top = [int(gold.argmax()) for _, gold in (heavy, exploit, tilt)]
    return [
        at_least("normal noise, best-of-n: least rise of the gold", float(np.diff(normal[1]).min()), 0.0),
        near("t(2) noise, best-of-n: peak", heavy[1][top[0]], 0.69, 0.05),
        near("t(2) noise, best-of-n: d at the peak", heavy[0][top[0]], 1.28, 0.1),
        at_most("t(2) noise, best-of-n: end", heavy[1][-1], 0.15, 0.01),
        near("exploit, best-of-n: peak", exploit[1][top[1]], 1.09, 0.05),
        near("exploit, best-of-n: d at the peak", exploit[0][top[1]], 1.38, 0.1),
        at_most("exploit, best-of-n: lowest behind it", exploit[1][top[1] :].min(), 0.0, -0.83),
        near("exploit, KL-RL: peak", tilt[1][top[2]], 0.57, 0.05),
        near("exploit, KL-RL: d at the peak", tilt[0][top[2]], 0.96, 0.1),
        at_most("exploit, KL-RL: lowest behind it", tilt[1][top[2] :].min(), 0.0),
    ]


def share_explained(d: Array, gold: Array, shape: Array) -> float:
    """R^2 of a d + b shape, least squares."""
    columns = np.stack([d, shape], 1)
    error = gold - columns @ np.linalg.lstsq(columns, gold, rcond=None)[0]
    return float(1 - error @ error / ((gold - gold.mean()) ** 2).sum())


@claim(
    "F06", "The gold reward follows d (a - b d) under best-of-n and d (a - b log d) under KL-regularised RL.",
    source="arXiv:2210.10760", wrong="no answer exploits the proxy",
    expected="fails", refutes=True,
    note="Exact laws to d = 2.44 (n = 1024): d (a - b d) fits both better. Where the fit ends decides by how much, and past d = 2.7 the "
    "two fit KL-RL alike. The log form is an empirical law of learned reward models.",
)  # fmt: skip
def forms(wrong: bool) -> Sequence[Check]:
    laws = proxies()["normal" if wrong else "exploit"]
    checks = []
    for name, by, predicted in (("best-of-n", "n", 0.942), ("KL-RL", "beta", 0.944)):
        d, gold = curve(*laws, by)
        d, gold = d[d < 2.45], gold[d < 2.45]
        square, log = share_explained(d, gold, d**2), share_explained(d, gold, d * np.log(d))
        checks += [
            near(f"R2 of d (a - b d), {name}", square, predicted, 0.02),
            at_least(f"its lead over the log form, {name}", square - log, 0.02),
        ]
    return checks
