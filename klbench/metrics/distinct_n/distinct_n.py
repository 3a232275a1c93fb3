"""distinct-n: different n-grams over all n-grams of a set of 16 draws of one prompt."""

from collections.abc import Callable, Sequence
from typing import Any, final

import datasets
import evaluate

from klbench.estimators import diversity
from klbench.metrics import answering

DESCRIPTION = """\
distinct-n of a policy's draws: E[different n-grams] / E[n-grams] in sets of 16 draws of one prompt, then the mean over prompts, with a 95 %
interval from a jackknife over sets. No n-gram crosses draws. In sets of one size, as the figure falls with the number of draws.
"""
INPUTS = """
predictions: draws as texts, a list of lists (a prompt each, as many of each) or one list (one prompt). Draws beyond a
multiple of 16 are left out.
n: length of the n-grams, 2 unless given.
tokenize: a function from a text to its tokens; words and punctuation in lower case unless given. klbench's own columns count model tokens:
tokenize=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"].
Returns distinct_N with its interval, status and reason; None where there are too few draws: 16 for the figure, more for an interval.
"""
CITATION = "@inproceedings{li2016diversity, title={A Diversity-Promoting Objective Function for Neural Conversation Models}, author={Li, \
Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill}, booktitle={NAACL}, year={2016}}"


@final
class DistinctN(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("string"))}),
                datasets.Features({"predictions": datasets.Value("string")}),
            ],
        )

    def _compute(
        self, predictions: Any, n: int = 2, tokenize: Callable[[str], Sequence[Any]] = answering.words, **others: object
    ) -> dict[str, Any]:
        ids: dict[Any, int] = {}
        texts = answering.by_prompt(predictions)
        tokens = [[[ids.setdefault(token, len(ids)) for token in tokenize(text)] for text in row] for row in texts]
        return answering.answer(f"distinct_{n}", diversity.distinct(tokens, n))
