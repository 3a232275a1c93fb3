"""Decoding-time ways to the posterior: which are exact, what each approximation costs, and what may not be left out. C33 to C38.

    SNIS, SMC   right as N grows;   MCMC   as steps grow;   rejection   exactly
    twists      Zhat = mean of  w = prod_t p0(x_t|x_<t) psi_t / (psi_(t-1) q(x_t|x_<t)),   q ~ p0 psi token by token:   E[Zhat] = Z
    chain       x' = x_<k and a fresh end, k uniform in 0..|x|-1:   T(x, x') = sum_k 1/|x| p0(x'|x_<k) a(x, x')
    QRS         q ~ p0 min(e^(r/beta), c'):   TV(p*, q) <= 1 - Z_c/Z
    tokens      p0 exp(V/beta) with the soft V is p*;   with the mean reward it is not;   p0^(1-lam) q^lam of tokens is not p*_(beta/lam)

Samplers, filter, acceptance and mixture are klbench's, on tables of a few answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import final

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from klbench.claims import toys
from klbench.claims.contract import Check, at_least, at_most, claim, mean_of, near
from klbench.estimate import Array
from klbench.method import AbstractSampler, AbstractSteering, RewardLaw
from klbench.policies.tabular import Tabular, sequences
from klbench.samplers.mcmc import MCMC
from klbench.samplers.quasi_rejection import QuasiRejection
from klbench.samplers.realignment import Realignment
from klbench.samplers.rejection import Rejection
from klbench.samplers.smc import SMC, filtered
from klbench.samplers.snis import SNIS
from klbench.samplers.twisted_smc import TwistedSMC
from klbench.target import Draws, TiltedPrior

BETA = 0.5


def chained(*logits: Array) -> Array:
    """[S] log-law of whole answers from next-token logits at each prefix, [V], [V, V], ..."""
    log_law = np.zeros(())
    for step in logits:
        log_law = log_law[..., None] + log_softmax(step, axis=-1)
    return np.asarray(log_law.reshape(-1))


def table(log_law: Array, words: int, length: int, eos: int | None = None) -> Tabular:
    return Tabular(torch.from_numpy(np.array(log_law))[None], ("",), words, length, eos)


@final
@dataclass(frozen=True)
class Words:
    """A reward of texts: [27] of whole answers of three tokens, 0 of what is shorter."""

    value: Array

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        read = [[int(word) for word in text.split()] for text in completions]
        return [float(self.value[9 * x[0] + 3 * x[1] + x[2]]) if len(x) == 3 else 0.0 for x in read]


def lm3(seed: int) -> toys.Toy:
    rng = np.random.default_rng(seed)
    return toys.Toy(chained(rng.normal(size=3), rng.normal(size=(3, 3)), rng.normal(size=(3, 3, 3))), rng.normal(size=27))


def share_of_answers(draws: Draws) -> Array:
    """[27]"""
    at = (draws.tokens[0] * torch.tensor([9, 3, 1])).sum(1).numpy()
    return np.bincount(at, minlength=27) / len(at)


@claim(
    "C33", "Rejection, importance resampling, SMC and Metropolis-Hastings give one and the same posterior.",
    source="arXiv:2404.17546", wrong="beta left out of the weights",
    note="1e5 draws by picking and 5000 by steering, which even of the posterior itself are .018 from it. Half-written answers earn 0, "
    "which makes SMC's twists poor.",
)  # fmt: skip
def one_posterior(wrong: bool) -> Sequence[Check]:
    toy, beta = lm3(0), 1.0 if wrong else BETA
    target = np.exp(toy.log_target(BETA))
    stream = np.random.default_rng(1).choice(27, size=3_200_000, p=toy.p0)
    most = float(toy.reward.max())

    def picked(sampler: AbstractSampler) -> float:
        index, _ = sampler.pick(toy.reward[stream], beta, most, 100_000, 2)
        return float(np.abs(np.bincount(stream[index], minlength=27) / 100_000 - target).sum() / 2)

    def steered(sampler: AbstractSteering) -> float:
        prior = table(toy.log_p0, 3, 3)
        found = sampler.steer(prior, TiltedPrior(prior, Words(toy.reward), beta, most), [""], 5000, 3, 3)
        return float(np.abs(share_of_answers(found.draws) - target).sum() / 2)

    filtered_32 = steered(SMC(32, 1))
    return [
        at_most("rejection: TV", picked(Rejection()), 0.03),
        at_most("SNIS of 32: TV", picked(SNIS(32)), 0.03),
        at_most("MCMC of 32 steps: TV", steered(MCMC(32)), 0.03),
        at_most("SMC of 32: TV", filtered_32, 0.065, 0.065),
        at_most("SMC with fitted twists, of 32: TV", steered(TwistedSMC(32, 1)), 0.065),
        at_least("SMC: fall of the TV from 4 particles to 32", steered(SMC(4, 1)) - filtered_32, 0.05),
    ]


@claim(
    "C34", "Optimal twists make SMC exact, and any twists leave its estimate of Z unbiased.",
    source="arXiv:2404.17546", wrong="log Zhat averaged in place of Zhat",
    note="klbench's particle filter, given the law that proposes and the weights p0 psi over that law. Eight particles, 8000 runs.",
)  # fmt: skip
def twists(wrong: bool) -> Sequence[Check]:
    toy, runs = lm3(0), 8000
    rng, log_z = np.random.default_rng(5), toy.log_z(BETA)
    log_P, log_p0 = (toy.log_p0 + toy.reward / BETA).reshape(3, 3, 3), toy.log_p0.reshape(3, 3, 3)
    best = [logsumexp(log_P, axis=(1, 2)), logsumexp(log_P, axis=2), log_P]  # p0 psi* of each prefix
    poor = [logsumexp(log_p0, axis=(1, 2)) + rng.normal(size=3), logsumexp(log_p0, axis=2) + rng.normal(size=(3, 3)), log_P]
    (share, exact), (_, random) = run(best, runs), run(poor, runs)
    ratio = np.exp(random - log_z)
    return [
        at_most("optimal twists: spread of log Zhat", float(np.ptp(exact)), 1e-9, 0.0),
        at_most("optimal twists: |log Zhat - log Z|", float(np.abs(exact - log_z).max()), 1e-9, 0.0),
        at_most("optimal twists: TV of the draws", float(np.abs(share - np.exp(toy.log_target(BETA))).sum() / 2), 0.03),
        at_least("random twists: spread of log Zhat", float(random.std()), 0.1),
        mean_of("random twists: mean of Zhat/Z", np.full(runs, np.exp(np.log(ratio).mean())) if wrong else ratio, 0.96, 1.04, 1.0),
        mean_of("random twists: log Zhat - log Z", np.log(ratio), most=0.0),
    ]


def run(p0_psi: list[Array], runs: int) -> tuple[Array, Array]:
    """Shares of the answers [27], one draw a run, and log Zhat [runs]. p0_psi: log p0 psi of prefixes of one, two and three tokens."""
    law = [log_softmax(step, axis=-1) for step in p0_psi]  # q(v|s) ~ p0(v|s) psi(s v)
    so_far = [law[0], law[0][:, None] + law[1], law[0][:, None, None] + law[1][:, :, None] + law[2]]

    def twist(now: Draws, start: int, before: Array) -> tuple[Array, int]:
        at = tuple(now.tokens.unbind(2)[i].numpy() for i in range(start + 1))
        return (p0_psi[start] - so_far[start])[at], 0

    found = filtered(8, 1, table(so_far[2].reshape(-1), 3, 3), [""], runs, 3, 4, twist)
    assert found.log_z is not None
    return share_of_answers(found.draws), found.log_z[0]


@claim(
    "C35", "Metropolis-Hastings by fresh suffixes keeps the posterior only with the ratio of the lengths.",
    source="arXiv:2504.03790", wrong="the ratio of the lengths dropped",
    note="The chain's whole transition matrix, with klbench's acceptance. Without the factor the chain tends to p*(x) |x| / norm; how far "
    "that is from p* is the toy's.",
)  # fmt: skip
def lengths(wrong: bool) -> Sequence[Check]:
    still, balanced, to_longer, off = 0.0, 0.0, 0.0, []
    for seed in range(3):
        toy, size = stopping(seed)
        right, without = (moves(toy, length_factor) for length_factor in (not wrong, False))
        p = np.exp(toy.log_target(BETA))
        flow = p[:, None] * right
        still, balanced = max(still, float(np.abs(p @ right - p).max())), max(balanced, float(np.abs(flow - flow.T).max()))
        settled = np.linalg.matrix_power(without, 4096)[0]
        to_longer = max(to_longer, float(np.abs(settled - p * size / (p @ size)).max()))
        off.append(float(np.abs(settled - p).sum() / 2))
    return [
        at_most("|p* T - p*|, worst", still, 1e-12, 0.0),
        at_most("|p*(x) T(x, y) - p*(y) T(y, x)|, worst", balanced, 1e-12, 0.0),
        at_most("without it: |the chain's law - p*(x) |x| / norm|, worst", to_longer, 1e-10, 0.0),
        at_least("without it: TV of the chain's law to p*, largest", max(off), 0.1, 0.218),
    ]


def stopping(seed: int) -> tuple[toys.Toy, Array]:
    """Answers of one to three tokens over an EOS and two words, normal logits at each prefix; and how many tokens each has."""
    rng = np.random.default_rng(seed)
    tokens, mask = (x.numpy() for x in sequences(3, 3, 0))
    law = {prefix: log_softmax(rng.normal(size=3)) for t in range(3) for prefix in product((1, 2), repeat=t)}
    log_p0 = [sum(law[tuple(row[:t])][row[t]] for t in range(n)) for row, n in zip(tokens.tolist(), mask.sum(1), strict=True)]
    return toys.toy(log_p0, rng.normal(size=len(tokens))), mask.sum(1).astype(np.float64)


def moves(toy: toys.Toy, length_factor: bool) -> Array:
    """[S, S] transitions of the chain."""
    tokens, mask = (x.numpy() for x in sequences(3, 3, 0))
    size = mask.sum(1)
    told = size if length_factor else np.ones_like(size)
    gain = (toy.reward - toy.reward[:, None]) / BETA
    proposed = np.zeros_like(gain)
    for k in range(3):
        fresh = (tokens[:, None, :k] == tokens[:, :k]).all(2) * toy.p0  # filled with EOS behind the end
        proposed += fresh / fresh.sum(1, keepdims=True) * (size > k)[:, None] / size[:, None]
    found = proposed * np.exp(MCMC().log_accept(gain, told[:, None], told[None, :]))
    return np.asarray(found + np.diag(1 - found.sum(1)))


@claim(
    "C36", "Quasi-rejection buys acceptance with distance to the posterior, monotonically, and bounds the distance.",
    source="arXiv:2112.05702", wrong="draws above the bound thrown away, not kept",
)  # fmt: skip
def quasi_rejection(wrong: bool) -> Sequence[Check]:
    falls, room, exact = math.inf, math.inf, 0.0
    for seed in range(3):
        toy, figures = toys.random(8, seed), []
        top, target, law = float(toy.reward.max()), toy.log_target(BETA), RewardLaw.of(toy.reward, toy.p0)
        for c in (0.01, 0.03, 0.1, 0.3, 1.0):
            sampler = QuasiRejection(c)
            log_accept = sampler.log_accept(toy.reward, BETA, top)
            log_q = toy.log_p0 + sampler.log_ratio(toy.reward, law, BETA, top)
            if wrong:
                log_accept = np.where((toy.reward - top) / BETA > math.log(c) + 1e-9, -50.0, log_accept)
                log_q = np.asarray(log_softmax(toy.log_p0 + log_accept))
            rate = float(toy.p0 @ np.exp(log_accept))
            figures.append((toys.tv(log_q, target), toys.kl(log_q, target), rate))
            share = c * math.exp(top / BETA - toy.log_z(BETA)) * rate  # Z_c / Z
            room = min(room, 1 - share - figures[-1][0])
        falls, exact = min(falls, float(-np.diff(np.array(figures), axis=0).max())), max(exact, figures[-1][0])
    return [
        at_least("fall of TV, KL and acceptance as c grows, least", falls, 0.0),
        at_least("1 - Z_c/Z - TV, least", room, -1e-12),
        at_most("TV at the true bound, worst", exact, 1e-12, 0.0),
    ]


@claim(
    "C37", "Decoding token by token by the mean reward, or by mixing two models, only comes near to the tilted law of whole answers.",
    source="arXiv:2402.02992", wrong="beta lam in place of beta/lam for the mixture of whole answers",
    note="The soft value is exact; the mean reward and the token-level mixture are not.",
)  # fmt: skip
def tokens(wrong: bool) -> Sequence[Check]:
    toy, lam = toys.AB, 0.5
    soft, mean = logsumexp(toy.reward.reshape(2, 2), axis=1) - math.log(2), toy.reward.reshape(2, 2).mean(1)
    prior, policy = table(toy.log_p0, 2, 2), table(toy.log_target(1.0), 2, 2)

    def first(log_law: Array) -> float:
        return float(np.exp(log_law[:2]).sum())

    mixed = Realignment(lam).law(*(next_tokens(which)[0] for which in (policy, prior)))
    whole = log_softmax((1 - lam) * toy.log_p0 + lam * toy.log_target(1.0))
    return [
        near("P(A) of the posterior", first(toy.log_target(1.0)), 0.6953, 1e-3),
        near("tokens by p0 exp(soft value): P(A)", float(np.exp(log_softmax(soft))[0]), 0.6953, 1e-3),
        near("tokens by p0 exp(mean reward): P(A)", float(np.exp(log_softmax(mean))[0]), 0.3775, 1e-3),
        near("whole answers mixed half and half: P(A)", first(whole), 0.5458, 1e-3),
        at_most("their TV to the posterior of beta/lam", toys.tv(whole, toy.log_target(lam if wrong else 1 / lam)), 1e-12, 0.0),
        near("klbench's realignment:0.5, token by token: P(A)", float(mixed.exp()[0]), 0.6017, 1e-3),
    ]


def next_tokens(policy: Tabular) -> tuple[Tensor, Tensor]:
    """Of a table of two tokens over two words: the first token's law [2] and the second's after each [2, 2]."""
    every = policy.enumerate().log_prob[0]
    return every[::2, 0], every[:, 1].reshape(2, 2)


@claim(
    "C38", "Masking each forbidden next token is not conditioning on the constraint.",
    source="arXiv:2306.03081", wrong="a constraint that each token meets or breaks by itself",
    note="Local masks never ask how much of what follows is allowed.",
)  # fmt: skip
def masks(wrong: bool) -> Sequence[Check]:
    toy = toys.AB  # a uniform prior over AA, AB, BA, BB
    allowed = np.array([True, False, True, False] if wrong else [True, False, True, True])
    reward = np.where(allowed, 0.0, -500.0)
    conditioned = toy.log_p0 + Rejection().log_ratio(reward, RewardLaw.of(reward, toy.p0), 1.0, 0.0)
    first, second = (x.numpy() for x in next_tokens(table(toy.log_p0, 2, 2)))
    masked = chained(first, np.where(allowed.reshape(2, 2), second, -500.0))
    return [
        near("masked: P(A)", float(np.exp(masked[:2]).sum()), 0.5, 1e-3),
        near("conditioned: P(A)", float(np.exp(conditioned[:2]).sum()), 1 / 3, 1e-3),
        near("TV between the two", toys.tv(masked, conditioned), 1 / 6, 1e-3),
    ]
