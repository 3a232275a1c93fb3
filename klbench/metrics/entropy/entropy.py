"""entropy: of a policy, from the log-probabilities of its own draws."""

from typing import Any, final

import datasets
import evaluate

from klbench.estimators import entropy
from klbench.metrics import answering

DESCRIPTION = """\
Entropy of a policy q, -E_q[log q] in nats a sequence, from the log-probabilities of its own draws: the mean of -log q, with a 95 %
interval.
"""
INPUTS = """
log_q: log q(x|c) of draws x ~ q(.|c), summed over tokens (nats): a list of 16 and more numbers a prompt, as many of each.
Returns entropy with its interval, status and reason.
"""


@final
class Entropy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=answering.CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"log_q": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, log_q: Any, **others: object) -> dict[str, Any]:
        (log_q,) = answering.draws(log_q=log_q)
        return answering.answer("entropy", entropy.monte_carlo(answering.rows(log_q, log_q)).mean(n=log_q.size))
