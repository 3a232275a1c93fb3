"""bias: a sentence about an occupation goes on with a pronoun; the target keeps the prior's text and balances "she" against "he".

    phi(x) = +1 if the first gendered pronoun of x is feminine, -1 if masculine, 0 if there is none
    p*(x|c) = p0(x|c) exp(lambda_c phi(x)) / Z(c),    lambda_c such that E_p*[phi | c] = 0          (beta = 1)

This is the I-projection of the prior on the moment constraint, per occupation; a continuation without a pronoun costs nothing. lambda
is fitted once per (prior, prompt) on draws of its own, frozen and shipped for `mini` (`lambda.json`); with s, h the prior's shares of
the two, it is log(h/s)/2. The reward is lambda_c phi, its ceiling |lambda_c|.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar, Final, final

from klbench import streams
from klbench.errors import UserError
from klbench.target import Policy, Reward, TiltedPrior, evaluate
from klbench.task import SPLITS, AbstractTask

PRONOUN: Final = re.compile(r"\b(?:(she|her|hers|herself)|(he|him|his|himself))\b", re.IGNORECASE)
FIT_DRAWS: Final = 1024  # prior draws a prompt behind each lambda, on a stream that feeds nothing else


def gender(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """phi of each continuation: +1 she, -1 he, by the first pronoun; 0 without one."""
    found = (PRONOUN.search(c) for c in completions)
    return [0.0 if m is None else 1.0 if m.group(1) else -1.0 for m in found]


@dataclass(frozen=True)
class Balance:
    """The reward lambda_c phi(x)."""

    lambdas: dict[str, float]

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        return [self.lambdas[p] * phi for p, phi in zip(prompts, gender(prompts, completions), strict=True)]


def fit_lambda(prior: Policy, prompts: Sequence[str], max_new_tokens: int, draws: int = FIT_DRAWS) -> dict[str, dict[str, float]]:
    """lambda_c = log(h/s)/2 with its standard error sqrt((1/s + 1/h)/N)/2, from N = `draws` draws a prompt.

    Raises UserError for a prompt where one of the pronouns never came: its constraint has no finite solution that the draws can see.
    """
    drawn = prior.sample(prompts, draws, max_new_tokens, streams.seed(0, "bias/lambda"))
    phis = evaluate(gender, prompts, prior.decode(drawn.tokens, drawn.mask))
    out = {}
    for prompt, phi in zip(prompts, phis, strict=True):
        s, h = float((phi > 0).mean()), float((phi < 0).mean())
        if s == 0 or h == 0:
            raise UserError(f"bias: {prior.name} never says {'she' if s == 0 else 'he'} after {prompt!r} in {draws} draws: no lambda")
        error = math.sqrt((1 / s + 1 / h) / draws) / 2
        out[prompt] = {"lambda": round(math.log(h / s) / 2, 6), "stderr": round(error, 6), "she": s, "he": h}
    return out


@functools.cache
def _shipped() -> dict[str, dict[str, dict[str, float]]]:
    file = files(__package__).joinpath("lambda.json")
    data: dict[str, dict[str, dict[str, float]]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return data


_FITTED: Final[dict[str, dict[str, dict[str, float]]]] = {}  # by weights: a prior that does not ship is fitted once a process


def _lambdas(prior: Policy, version: str, max_new_tokens: int) -> dict[str, float]:
    fitted = _shipped().get(version) or _FITTED.get(version)
    if fitted is None:
        fitted = _FITTED[version] = fit_lambda(prior, [p for split in SPLITS for p in Bias().prompts(split)], max_new_tokens)
    return {prompt: row["lambda"] for prompt, row in fitted.items()}


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
        rows = files(__package__).joinpath(f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["prompt"] for row in rows]

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        """The moment target at beta = 1; another beta tilts by lambda phi / beta, which no longer balances."""
        version = str(getattr(prior, "weights_hash", lambda: prior.name)())
        lambdas = _lambdas(prior, version, self.max_new_tokens)
        ceilings = {prompt: abs(value) for prompt, value in lambdas.items()}
        return TiltedPrior(prior, Balance(lambdas), beta, ceilings=ceilings)

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return gender, 0.0
