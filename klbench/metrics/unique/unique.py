"""unique: share of different texts in a set of 16 draws of one prompt."""

from typing import Any, final

import datasets
import evaluate

from klbench.estimators import diversity
from klbench.metrics import answering

DESCRIPTION = """\
Share of different texts in sets of 16 draws of one prompt, mean over prompts, with a 95 % interval from a jackknife over sets.
"""
INPUTS = """
predictions: draws as texts, a list of lists (a prompt each, as many of each) or one list (one prompt). Draws beyond a
multiple of 16 are left out.
Returns unique with its interval, status and reason; None where there are too few draws: 16 for the figure, more for an interval.
"""


@final
class Unique(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=answering.CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("string"))}),
                datasets.Features({"predictions": datasets.Value("string")}),
            ],
        )

    def _compute(self, predictions: Any, **others: object) -> dict[str, Any]:
        numbers: dict[str, int] = {}
        texts = answering.by_prompt(predictions)
        return answering.answer("unique", diversity.unique([[[numbers.setdefault(t, len(numbers))] for t in row] for row in texts]))
