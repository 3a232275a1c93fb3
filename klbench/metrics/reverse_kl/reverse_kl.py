"""reverse_kl: how far a policy is from the posterior, from log-probabilities and rewards of its draws and of the prior's."""

import math
from typing import Any, final

import datasets
import evaluate
import numpy as np

from klbench.errors import UserError
from klbench.metrics import answering
from klbench.pool import Pool

DESCRIPTION = """\
KL(q||p*) of a policy q to the posterior p*(x|c) = p0(x|c) exp(r(c, x)/beta) / Z(c) in nats a sequence, and forward_kl, tv and js to the
same p*, estimated jointly with log Z from draws of q and of the prior p0, so that log Z's error is inside the intervals (klbench.pool).
"""
INPUTS = """
log_q, log_p0, reward: log-probabilities (nats, summed over tokens) under policy and prior and the reward, of draws x ~ q(.|c).
prior_log_q, prior_log_p0, prior_reward: the same of draws x ~ p0(.|c). For each a list of 16 and more numbers a prompt, as
many of each.
beta: the KL penalty.  reward_max: what no reward exceeds; without it nothing that holds log Z has an interval.
Returns reverse_kl, forward_kl, tv, js and log_z, each with its interval, status and reason.
"""
OWN = ("log_q", "log_p0", "reward")
FIGURES = ("reverse_kl", "forward_kl", "tv", "js", "log_z")


@final
class ReverseKL(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=answering.CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {name: datasets.Sequence(datasets.Value("float64")) for name in (*OWN, *(f"prior_{x}" for x in OWN))}
            ),
        )

    def _compute(
        self, log_q: Any, log_p0: Any, reward: Any, prior_log_q: Any, prior_log_p0: Any, prior_reward: Any, beta: float | None = None,
        reward_max: float = math.inf, **others: object,
    ) -> dict[str, Any]:  # fmt: skip
        if beta is None or not (math.isfinite(beta) and beta > 0):
            raise UserError("beta must be given, finite and above 0")
        own = answering.draws(log_q=log_q, log_p0=log_p0, reward=reward)
        bank = answering.draws(prior_log_q=prior_log_q, prior_log_p0=prior_log_p0, prior_reward=prior_reward)
        if max(own[2].max(), bank[2].max()) > reward_max:
            raise UserError(f"a reward is above reward_max {reward_max:g}")
        prompts = len(own[0])
        pool = Pool(answering.rows(*own), answering.rows(*bank), np.zeros((prompts, 0)), np.full(prompts, float(reward_max)))
        found = pool.columns(1.0 / beta)[0]
        return {k: v for name in FIGURES for k, v in answering.answer(name, found[name]).items()}
