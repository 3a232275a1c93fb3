"""self-BLEU: how much each draw repeats the other 15 of its set."""

from typing import Any, final

import datasets
import evaluate

from klbench.estimators import diversity
from klbench.metrics import answering

DESCRIPTION = """\
self-BLEU of a policy's draws: BLEU-4 of each draw's words against the other 15 draws of its set of 16 (add-1 smoothing above unigrams),
mean over sets, then over prompts, with a 95 % interval from a jackknife over sets. High is low diversity.
"""
INPUTS = """
predictions: draws as texts, a list of lists (a prompt each, as many of each) or one list (one prompt). Draws beyond a
multiple of 16 are left out.
Returns self_bleu with its interval, status and reason; None where there are too few draws: 16 for the figure, more for an interval.
"""
CITATION = "@inproceedings{zhu2018texygen, title={Texygen: A Benchmarking Platform for Text Generation Models}, author={Zhu, Yaoming and \
Lu, Sidi and Zheng, Lei and Guo, Jiaxian and Zhang, Weinan and Wang, Jun and Yu, Yong}, booktitle={SIGIR}, year={2018}}"


@final
class SelfBleu(evaluate.Metric):
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

    def _compute(self, predictions: Any, **others: object) -> dict[str, Any]:
        return answering.answer("self_bleu", diversity.self_bleu(answering.by_prompt(predictions)))
