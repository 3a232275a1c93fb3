"""kl_prior: KL(q||p0) from the log-probabilities of a policy's own draws."""

from typing import Any, final

import datasets
import evaluate

from klbench.estimators import kl_prior
from klbench.metrics import answering

DESCRIPTION = """\
KL(q||p0) of a policy q to its prior p0 in nats a sequence, from draws of q: the mean of log q - log p0 (k1), with a 95 % interval.
"""
INPUTS = """
log_q, log_p0: log-probabilities of draws x ~ q(.|c) under policy and prior, summed over tokens (nats): for each a list of 16 and more
numbers a prompt, as many of each.
Returns kl_prior with its interval, status and reason.
"""


@final
class KLPrior(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=answering.CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({name: datasets.Sequence(datasets.Value("float64")) for name in ("log_q", "log_p0")}),
        )

    def _compute(self, log_q: Any, log_p0: Any, **others: object) -> dict[str, Any]:
        log_q, log_p0 = answering.draws(log_q=log_q, log_p0=log_p0)
        return answering.answer("kl_prior", kl_prior.k1(answering.rows(log_q, log_p0)).mean(n=log_q.size))
