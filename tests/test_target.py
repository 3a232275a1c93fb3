"""The one door for rewards, and the one place where a reward is divided by beta."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from klbench.errors import UserError
from klbench.target import Policy, TiltedPrior, evaluate

NOBODY = cast(Policy, None)  # the door does not look at the prior
PROMPTS, TEXTS = ["one", "two"], [["a", "bb", "ccc"], ["dddd", "e", ""]]


def target(values: Any, **change: Any) -> TiltedPrior:
    def grader(prompts: list[str], completions: list[str]) -> Any:
        return values

    return TiltedPrior(NOBODY, cast(Any, grader), **{"beta": 0.5, **change})


def by_length(prompts: list[str], completions: list[str]) -> list[float]:
    assert prompts == ["one"] * 3 + ["two"] * 3
    return [len(c) + (10.0 if p == "two" else 0.0) for p, c in zip(prompts, completions, strict=True)]


WANTED = [[1.0, 2.0, 3.0], [14.0, 11.0, 10.0]]


def test_each_completion_goes_with_its_own_prompt() -> None:
    found = TiltedPrior(NOBODY, cast(Any, by_length), 0.5).rewards(PROMPTS, TEXTS)
    assert found.dtype == np.float64 and found.tolist() == WANTED
    assert evaluate(cast(Any, by_length), PROMPTS, TEXTS).tolist() == WANTED


@pytest.mark.parametrize(
    "kind", [tuple, np.array, torch.tensor, iter, lambda x: [np.float32(v) for v in x], lambda x: [torch.tensor(v) for v in x]]
)
def test_what_may_stand_for_a_list_of_floats(kind: Callable[[list[float]], Any]) -> None:
    assert target(kind([1, 2.0, 3, 14, 11, 10])).rewards(PROMPTS, TEXTS).tolist() == WANTED


@pytest.mark.parametrize(
    "bad, says",
    [
        (math.nan, "nan, not a finite number,"),
        (None, "nan, not a finite number,"),
        (math.inf, "inf, not a finite number,"),
        (-math.inf, "-inf, not a finite number,"),
        (1.5, "1.5, above its declared maximum 1,"),
    ],
)
@pytest.mark.parametrize("at, prompt, text", [(0, "one", "a"), (2, "one", "ccc"), (4, "two", "e")])
def test_a_bad_reward_is_refused_with_its_prompt_and_completion(bad: float, says: str, at: int, prompt: str, text: str) -> None:
    values: list[Any] = [0.0] * 6
    values[at] = bad
    with pytest.raises(UserError) as error:
        target(values, reward_max=1.0).rewards(PROMPTS, TEXTS)
    assert str(error.value) == f"reward grader gave {says} for prompt {prompt!r} and completion {text!r}"
    values[at] = 1.0  # the ceiling itself is no offence, nor is rounding
    assert target(values, reward_max=1.0 - 1e-12).rewards(PROMPTS, TEXTS).sum() == 1.0


@pytest.mark.parametrize("count", [0, 5, 7])
def test_one_value_a_completion(count: int) -> None:
    with pytest.raises(UserError, match=f"reward grader returned {count} values for 6 completions"):
        target([0.0] * count).rewards(PROMPTS, TEXTS)


@pytest.mark.parametrize("values", [None, 3.0, [[0.0]] * 6, ["high"] * 6, [0.0, 0.0, object(), 0.0, 0.0, 0.0]])
def test_what_is_no_list_of_floats(values: Any) -> None:
    with pytest.raises(UserError, match="reward grader must return a list of floats"):
        target(values).rewards(PROMPTS, TEXTS)


def test_ceilings_are_those_of_each_prompt() -> None:
    held = target([0.0, 0.0, 2.0, 3.0, 0.0, 0.0], reward_max=3.0, ceilings={"one": 2.0})
    assert held.ceiling(["two", "one", "two"]).tolist() == [3.0, 2.0, 3.0]
    assert held.rewards(PROMPTS, TEXTS).max() == 3.0
    with pytest.raises(UserError, match="gave 3, above its declared maximum 2, for prompt 'one' and completion 'bb'"):
        target([0.0, 3.0, 0.0, 3.0, 0.0, 0.0], reward_max=3.0, ceilings={"one": 2.0}).rewards(PROMPTS, TEXTS)
    assert target([]).ceiling(PROMPTS).tolist() == [math.inf, math.inf]


def test_a_negative_ceiling_is_a_ceiling() -> None:
    with pytest.raises(UserError, match="gave 0, above its declared maximum -1,"):
        target([-1.0] * 5 + [0.0], reward_max=-1.0).rewards(PROMPTS, TEXTS)


def test_ragged_completions_are_not_shuffled_into_other_prompts() -> None:
    with pytest.raises(ValueError, match="as many completions of each prompt"):
        target([1.0] * 4).rewards(PROMPTS, [["a"], ["b", "c", "d"]])
    with pytest.raises(ValueError):
        target([1.0] * 2).rewards(PROMPTS, [["a", "b"]])


def test_nothing_to_grade() -> None:
    assert target([]).rewards(PROMPTS, [[], []]).shape == (2, 0)
    assert target([]).rewards([], []).shape == (0, 0)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_beta_is_finite_and_positive(beta: float) -> None:
    with pytest.raises(UserError, match="beta must be finite and above 0"):
        target([], beta=beta)


def test_the_tilt_divides_by_beta() -> None:
    reward = np.array([[1.0, -2.0]], dtype=np.float32)
    assert target([], beta=0.25).tilt(reward).tolist() == [[4.0, -8.0]]
    assert target([], beta=0.25).tilt(reward, beta=2.0).tolist() == [[0.5, -1.0]]
    assert target([], beta=0.25).tilt(reward).dtype == np.float64
