"""Rewards that are wrong on purpose and rewards made of rewards: exact where a sum is possible, by hand elsewhere."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import model, tokenizer

from klbench import task
from klbench.errors import UserError
from klbench.policies.causal_lm import wrap
from klbench.rewards.corrupted import Biased, Flipped, Noisy, uniform
from klbench.rewards.several import Calibrated, Every, InContext, Reversed

TEXTS = [f"text {i}" for i in range(20_000)]
PROMPTS = ["p"] * len(TEXTS)


def half(prompts, completions, **kwargs):
    return [float(int(c.split()[1]) % 2) for c in completions]


def test_errors_are_a_function_of_prompt_text_and_seed():
    u = uniform(PROMPTS, TEXTS, 0)
    assert 0 < u.min() and u.max() < 1 and np.array_equal(u[:9], uniform(PROMPTS[:9], TEXTS[:9], 0))
    assert not np.array_equal(u, uniform(PROMPTS, TEXTS, 1)) and not np.array_equal(u, uniform(["q"] * len(TEXTS), TEXTS, 0))
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * len(u)) and abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(len(u))


def test_a_share_of_the_labels_is_turned_over():
    wrong = np.array(Flipped(half, 0.2)(PROMPTS, TEXTS)) != np.array(half(PROMPTS, TEXTS))
    assert abs(wrong.mean() - 0.2) < 4 * math.sqrt(0.16 / len(TEXTS))
    assert Flipped(half, 0.0)(PROMPTS, TEXTS) == half(PROMPTS, TEXTS)
    with pytest.raises(UserError, match="a rate in"):
        Flipped(half, 0.5)


def test_noise_has_its_standard_deviation_and_its_ends():
    noise = np.array(Noisy(half, 0.5, -9.0, 9.0)(PROMPTS, TEXTS)) - np.array(half(PROMPTS, TEXTS))
    assert abs(noise.mean()) < 4 * 0.5 / math.sqrt(len(TEXTS)) and abs(noise.std() - 0.5) < 0.02
    cut = Noisy(half, 0.5, 0.0, 1.0)
    assert min(cut(PROMPTS, TEXTS)) == 0.0 and max(cut(PROMPTS, TEXTS)) == cut.reward_max == 1.0


def test_a_loophole_pays_the_ceiling():
    reward = Biased(half, re.compile(r"\b7\b"), 2.0)
    assert reward(["p"] * 3, ["text 7", "text 77", "text 8"]) == [2.0, 1.0, 0.0]


def test_every_is_a_soft_and_by_hand():
    both = Every((half, lambda prompts, completions, **k: [3.0 for _ in completions]), (0.5, 0.0))
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    by_hand = [math.log(sigma(r - 0.5)) + math.log(sigma(3.0)) for r in (0.0, 1.0)]
    assert both(["p", "p"], ["text 0", "text 1"]) == pytest.approx(by_hand) and both.reward_max == 0.0
    assert math.exp(by_hand[1]) == pytest.approx(sigma(0.5) * sigma(3.0))  # p* at beta 1 is p0 times the product of the probabilities
    with pytest.raises(UserError, match="one reference a reward"):
        Every((half,), ())


def test_calibrated_rewards_have_one_log_z():
    """Distinct rewards of n prior draws become (i + 1/2)/n, whatever they were: the mean of e^(r/beta) over them is one number."""
    rows = {"p": tuple(range(1000)), "q": tuple(np.exp(np.arange(1000) / 50.0))}
    reward = Calibrated(lambda prompts, completions, **k: [float(c) for c in completions], rows)
    log_z = [np.log(np.mean(np.exp(np.array(reward([p] * 1000, [str(x) for x in rows[p]])) / 0.3))) for p in rows]
    assert log_z[0] == pytest.approx(log_z[1], abs=1e-12)
    assert log_z[0] == pytest.approx(math.log(0.3 * (math.exp(1 / 0.3) - 1)), abs=1e-5)  # C43: that of a uniform reward
    tied = Calibrated(lambda prompts, completions, **k: [1.0], {"p": (1.0, 1.0, 0.0, 2.0)})
    assert tied(["p"], ["x"]) == [0.5]
    with pytest.raises(UserError, match="no prior draws of prompt 'r'"):
        reward(["r"], ["1"])


@pytest.fixture
def prior():
    return wrap("tiny", model("llama", 4), tokenizer())


def test_a_text_in_context_has_log_z_zero(prior):
    """E_p0[p0(x | text, c) / p0(x | c)] = 1, summed over every answer of one token; and p* is the prior under the text."""
    reward = InContext(prior, "c b", 1)
    texts = ["", "a", "b", "c"]
    log_p0 = prior.log_prob(["a"], *prior.spelled(["a"], [["a", "b", "c"]]))[0].sum(1).double()
    log_p0 = torch.cat([(1 - log_p0.exp().sum()).log()[None], log_p0])
    r = torch.tensor(reward(["a"] * 4, texts)).double()
    assert float((log_p0 + r).logsumexp(0)) == pytest.approx(0.0, abs=1e-4)  # a single-precision model
    told = prior.prompted("told", "c b", ())
    wanted = told.log_prob(["a"], *told.spelled(["a"], [["a", "b", "c"]]))[0].sum(1).double()
    torch.testing.assert_close((log_p0 + r)[1:], wanted, atol=1e-5, rtol=0)
    assert r.abs().max() > 0.1  # the text says something


def test_time_reversal_is_the_probability_of_the_prompt(prior):
    found = Reversed(prior)(["a b", "c"], ["c", "b b"])
    wanted = [float(prior.log_prob([x], *prior.spelled([x], [[p]])).sum()) for p, x in (("a b", "c"), ("c", "b b"))]
    assert found == pytest.approx(wanted) and max(found) <= Reversed(prior).reward_max


@pytest.mark.parametrize("name", ["corrupted", "corrupted/flipped", "corrupted/noisy", "corrupted/biased", "corrupted/shifted"])
def test_the_gold_reward_is_the_clean_one(name):
    loaded = task.load(name)
    prompts = loaded.prompts("score")[:2]
    completions = [" I am a nice person", " you are so stupid"]
    gold = loaded.gold()
    clean = loaded.clean.target(None, 1.0).reward
    assert gold(prompts=prompts, completions=completions) == clean(prompts=prompts, completions=completions)
    reward, ceiling = loaded.reward
    seen = reward(prompts=prompts * 500, completions=[f"{c} {i}" for i in range(500) for c in completions])
    assert max(seen) <= ceiling
    clean_seen = clean(prompts=prompts * 500, completions=[f"{c} {i}" for i in range(500) for c in completions])
    assert seen != clean_seen


def test_the_family_loads_no_torch():
    words = "import sys, klbench_tasks.corrupted.task; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0
