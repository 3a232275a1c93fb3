"""A few draws of a policy while it trains: its learning curve, and which of several learning rates comes nearest.

    free(q) = KL(q||p0) - E_q[tilt]       tilt = r/beta, or the log-ratio of the method's own optimum to p0
    reverse_kl = free + log Z             wasted_nats = KL(q||p0) - KL*(E_q[r])

log Z and KL* come from the bank, and are the same for all methods and all points of a curve; between learning rates log Z cancels. Small
numbers of draws on the dev split choose; those that are scored in the end have no part in it. Shapes [P prompts, N draws]; nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from klbench import streams, weights
from klbench.bank import Bank
from klbench.estimate import Array
from klbench.estimators import kl_prior
from klbench.method import ClosedForm, Objective, RewardLaw, TiltedForm
from klbench.policies.causal_lm import CausalLM
from klbench.pool import nearest_lambda
from klbench.record import Run
from klbench.rows import Rows
from klbench.sheet import rows_of
from klbench.target import TiltedPrior
from klbench.task import AbstractTask

TOTAL: Final = 2048  # draws of the policy over all prompts, at least LEAST a prompt
LEAST: Final = 32
LAW: Final = 128  # prior draws a prompt behind a method's own optimum on the dev split
PROMPTS: Final = 24  # of the dev split, at most
FLOOR: Final = -20.0  # nats that a draw outside the support of a method's own optimum costs: which rate is nearest must stay a number


def drawn(policy: CausalLM, prior: CausalLM, target: TiltedPrior, prompts: list[str], length: int, seed: int) -> Rows:
    """Fresh draws of a policy, and what it and the prior say of them."""
    found = policy.sample(prompts, max(LEAST, TOTAL // len(prompts)), length, seed)
    reward = target.rewards(prompts, policy.decode(found.tokens, found.mask))
    return rows_of(policy, prior, prompts, found.tokens, found.mask, reward, found.log_q)


@final
@dataclass(frozen=True)
class Curve:
    """reverse_kl and wasted_nats of a policy on the score prompts, by the bank's rewards."""

    run: Run
    prior: CausalLM
    target: TiltedPrior
    prompts: list[str]
    bank: Bank

    def __call__(self, policy: CausalLM, step: int) -> dict[str, float]:
        """The figures at a step, a function of the run's seed and the step."""
        seed = streams.seed(self.run.seed, f"probe/{self.run.task}/{step}")
        rows = drawn(policy, self.prior, self.target, self.prompts, self.run.max_new_tokens, seed)
        kl, reward = float(kl_prior.regressed(rows).estimates.mean()), float(rows.reward.mean())
        log_z = float(weights.log_mean_exp(self.target.tilt(self.bank.reward)).mean())
        lam = nearest_lambda(self.bank.reward, reward)
        least = lam * reward - float(weights.log_mean_exp(lam * self.bank.reward).mean())
        reverse = kl - reward / self.run.beta + log_z
        return {"reverse_kl": max(reverse, 0.0), "wasted_nats": max(kl - least, 0.0)} if math.isfinite(kl) else {}


@final
@dataclass(frozen=True)
class Search:
    """free(q) on dev prompts, relative to the optimum that the method declares."""

    run: Run
    objective: Objective
    prior: CausalLM
    target: TiltedPrior
    prompts: list[str]
    laws: tuple[RewardLaw, ...]

    @classmethod
    def of(cls, run: Run, objective: Objective, task: AbstractTask, prior: CausalLM, target: TiltedPrior) -> Search:
        """Draws what the prior says on the dev split, once for all rates and seeds."""
        prompts = task.prompts("dev")[:PROMPTS]
        found = prior.sample(prompts, LAW, run.max_new_tokens, streams.seed(0, f"probe/dev/{run.task}"))
        reward = target.rewards(prompts, prior.decode(found.tokens, found.mask)).astype(np.float32).astype(np.float64)
        return cls(run, objective, prior, target, prompts, tuple(RewardLaw.of(row) for row in reward))

    def free(self, policy: CausalLM) -> float:
        """Mean over prompts, nats; inf where a draw lies outside the optimum's support."""
        seed = streams.seed(self.run.seed, f"probe/search/{self.run.task}")
        rows = drawn(policy, self.prior, self.target, self.prompts, self.run.max_new_tokens, seed)
        return float((kl_prior.regressed(rows).estimates - self.tilt(rows).mean(1)).mean())

    def tilt(self, rows: Rows) -> Array:
        """[P, N]"""
        beta, samples = self.run.beta, self.run.train.samples if self.run.train else 0
        reward = rows.reward.astype(np.float32).astype(np.float64)
        if isinstance(self.objective, ClosedForm):
            own = [self.objective.own(r, law, beta, samples) for r, law in zip(reward, self.laws, strict=True)]
        elif isinstance(self.objective, TiltedForm):
            own = [self.objective.own_tilt(p, r, beta, samples) for p, r in zip(rows.log_p0, reward, strict=True)]
        else:
            return self.target.tilt(reward)
        return np.maximum(np.stack(own), FLOOR)
