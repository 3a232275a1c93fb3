"""Claims rerun on the mini prior: real text, the shipped banks, intervals over prompts and draws in place of sums.

C06    the bank alone: P(right) under p0 and under weights exp(r/beta), a prompt at a time
C10    draws of the prior at temperature 0.7 as the policy, per-prompt variances of log q/p0 and of the sum of token KLs
C18    best-of-n's density over the prior's from the bank's law of the reward
C20    best-of-4's wasted nats: the KL beyond the least that buys its reward
C33    mean rewards of rejection, snis:32 and smc:16 beside the posterior's own from the bank
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from klbench import bank as banks
from klbench import models, task
from klbench.bank import Bank
from klbench.claims.contract import Check, at_most, claim, mean_of, near
from klbench.method import RewardLaw
from klbench.policies.causal_lm import CausalLM
from klbench.pool import nearest_lambda
from klbench.rows import Rows
from klbench.sheet import Sheet
from klbench.target import TiltedPrior

KORBAK, PROMPTS = "arXiv:2205.11275", 24
FEW = 10  # prompts on which samplers draw


@lru_cache(maxsize=4)
def opened(name: str) -> tuple[CausalLM, TiltedPrior, list[str], Bank, int]:
    """The mini prior on a task: target, score prompts, their shipped bank, length."""
    prior, found = models.open_prior("mini"), task.load(name)
    assert isinstance(prior, CausalLM)
    target, prompts = found.target(prior, found.beta), found.prompts("score")[:PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        bank = banks.open_bank(found, prior, target, Path(folder), 512)
    return prior, target, prompts, bank.first(len(prompts)), found.max_new_tokens


def drawn(name: str, spec: str, draws: int) -> Rows:
    """Draws of a policy with a density, scored under the prior."""
    prior, target, prompts, bank, length = opened(name)
    sheet = Sheet(prior, target, prompts, bank, 16, length)
    sheet.add("q", models.open_policy("q", spec, prior), draws, 7)
    return sheet.rows("q", "q")


@claim("C06", "With a binary reward the log-odds of success move by exactly 1/beta.", source=KORBAK, wrong="beta halved", tier="quick")
def binary(wrong: bool) -> Sequence[Check]:
    _, target, _, bank, _ = opened("factuality")
    right = bank.reward >= target.ceiling(opened("factuality")[2])[:, None] - 1e-6
    some = right.any(1) & ~right.all(1)
    weight = np.exp(bank.reward[some] / (target.beta / 2 if wrong else target.beta))
    share = (weight * right[some]).sum(1) / weight.sum(1)
    before = right[some].mean(1)
    shift = np.log(share / (1 - share)) - np.log(before / (1 - before))
    spread = float(bank.reward.max() - bank.reward.min())
    return [near("largest gap of the shift to 1/beta", float(np.abs(shift - spread / target.beta).max()), 0.0, 1e-6)]


@claim(
    "C10", "The Rao-Blackwellised KL is unbiased and usually varies less than log q/p0.", source="arXiv:2504.10637",
    wrong="the token KLs of the other direction", tier="quick",
)  # fmt: skip
def rao_blackwell(wrong: bool) -> Sequence[Check]:
    rows = drawn("toxicity", "temperature:0.7", 128)
    plain = rows.log_q - rows.log_p0
    inner = rows.lost if wrong else rows.kl
    return [
        mean_of("mean difference, nats", (plain - inner).mean(1), -0.25, 0.25, 0.0),
        mean_of("share of prompts on which it varies less", (inner.var(1) < plain.var(1)).astype(float), least=0.5),
    ]


@claim("C18", "KL(best-of-n||prior) is at most log n - (n-1)/n.", source="arXiv:2401.01879", wrong="log n - 1 as the bound", tier="quick")
def best_of_n(wrong: bool) -> Sequence[Check]:
    _, _, _, bank, _ = opened("toxicity")
    checks = []
    for n in (2, 4, 16):
        bound = math.log(n) - (1.0 if wrong else (n - 1) / n)
        worst = max(_kl(RewardLaw.of(row), n) - bound for row in bank.reward)
        checks.append(at_most(f"n = {n}: KL less the bound, most over prompts", worst, 1e-9))
    return checks


def _kl(law: RewardLaw, n: int) -> float:
    ratio = law.log_best_of(law.levels, n)
    return float((law.mass * np.exp(ratio) * ratio).sum())


@claim(
    "C20", "At equal expected reward no policy is closer to the prior than the posterior, best-of-n included.", source=KORBAK,
    wrong="the posterior of twice the reward's gain", tier="quick",
)  # fmt: skip
def least_kl(wrong: bool) -> Sequence[Check]:
    _, _, _, bank, _ = opened("toxicity")
    laws = [RewardLaw.of(row) for row in bank.reward]
    reward = float(np.mean([(law.mass * np.exp(law.log_best_of(law.levels, 4)) * law.levels).sum() for law in laws]))
    gain = reward - float(bank.reward.mean())
    lam = nearest_lambda(bank.reward, float(bank.reward.mean()) + (1.4 if wrong else 1.0) * gain)
    tilt = lam * bank.reward
    share = np.exp(tilt - tilt.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    least = float((share * np.log(np.maximum(share * bank.reward.shape[1], 1e-300))).sum(1).mean())
    return [at_most("KL of the posterior less that of best of 4", least - float(np.mean([_kl(law, 4) for law in laws])), 0.0)]


@claim(
    "C33", "Rejection, importance resampling and SMC give one and the same posterior.", source="arXiv:2404.17546",
    wrong="beta doubled in the samplers", tier="quick",
)  # fmt: skip
def samplers(wrong: bool) -> Sequence[Check]:
    prior, target, prompts, bank, length = opened("factuality")
    tilt = target.tilt(bank.reward)
    share = np.exp(tilt - tilt.max(1, keepdims=True))
    own = (share * bank.reward).sum(1) / share.sum(1)
    checks = []
    used = TiltedPrior(prior, target.reward, 2 * target.beta, target.reward_max, target.ceilings) if wrong else target
    for spec in ("rejection", "snis:32", "smc:16"):
        sheet = Sheet(prior, used, prompts[:FEW], bank.first(FEW), 16, length)
        sheet.add("q", models.open_policy("q", spec, prior), 48, 3)
        gap = sheet.laws["q"].reward.mean(1) - own[:FEW]
        checks.append(mean_of(f"{spec}: mean reward less the posterior's", gap, -0.12, 0.12, 0.0))
    return checks
