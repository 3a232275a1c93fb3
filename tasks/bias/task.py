"""bias: a sentence about an occupation goes on with a pronoun; the target keeps the prior's text and balances "she" against "he".

    phi(x) = +1 if the first gendered pronoun of x is feminine, -1 if masculine, 0 if there is none
    p*(x|c) = p0(x|c) exp(lambda_c phi(x)) / Z(c),    lambda_c such that E_p*[phi | c] = 0          (beta = 1)

This is the I-projection of the prior on the moment constraint, per occupation; a continuation without a pronoun costs nothing. lambda
is fitted once per (prior, prompt) on draws of its own, frozen and shipped for `mini` (`lambda.json`); with s, h the prior's shares of
the two, it is log(h/s)/2. The reward is lambda_c phi, its ceiling |lambda_c|. The variants have a file each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

from klbench.target import Policy, Reward, TiltedPrior
from klbench.task import SPLITS, AbstractTask
from klbench_tasks.bias.agreement import Agreement
from klbench_tasks.bias.association import Association
from klbench_tasks.bias.bbq import BBQ
from klbench_tasks.bias.counterfactual import Counterfactual
from klbench_tasks.bias.discrimination import Discrimination
from klbench_tasks.bias.labour import Labour
from klbench_tasks.bias.pronouns import gender
from klbench_tasks.bias.single import Single
from klbench_tasks.bias.variant import FIT_DRAWS, Balance, Fit, Towards, moment_target, per_prompt, rows
from klbench_tasks.bias.winogender import Winogender
from klbench_tasks.bias.yes_no import YesNo

__all__ = [
    "BBQ", "Agreement", "Association", "Balance", "Bias", "Counterfactual", "Discrimination", "Labour", "Single", "Winogender", "YesNo",
    "fit_lambda", "gender",
]  # fmt: skip

SHE_AND_HE: Final = Towards(gender, ("she", "he"))


def fit_lambda(prior: Policy, prompts: Sequence[str], max_new_tokens: int, draws: int = FIT_DRAWS) -> Fit:
    """lambda_c = log(h/s)/2 with its standard error sqrt((1/s + 1/h)/N)/2, from N = `draws` draws a prompt.

    Raises UserError for a prompt where one of the pronouns never came: its constraint has no finite solution that the draws can see.
    """
    return per_prompt("bias", prior, prompts, max_new_tokens, draws, SHE_AND_HE)


@final
@dataclass(frozen=True)
class Bias(AbstractTask):
    """Occupations of Winogender; the posterior says she and he equally often after each."""

    name: ClassVar[str] = "bias"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "occupations and pronouns, moment target: she as often as he, per occupation"
    max_new_tokens: ClassVar[int] = 5
    beta: ClassVar[float] = 1.0

    def prompts(self, split: str) -> list[str]:
        return [row["prompt"] for row in rows(split)]

    def fit(self, prior: Policy, draws: int) -> Fit:
        """lambda of every prompt for this prior."""
        return fit_lambda(prior, [p for split in SPLITS for p in self.prompts(split)], self.max_new_tokens, draws)

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        """The moment target at beta = 1; another beta tilts by lambda phi / beta, which no longer balances."""
        return moment_target(self, prior, beta, SHE_AND_HE, self.fit)

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return gender, 0.0
