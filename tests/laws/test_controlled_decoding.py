"""Laws of controlled decoding: blockwise best-of-K by a value, exactly where the value is known; its value is the mean reward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_smc import EVERY, TABLE, WORLD, answers, off, reward, rewritten, steering
from test_twisted_smc import exact_value, gap
from tiny import model, tokenizer

from klbench.errors import UserError
from klbench.laws import check_steering
from klbench.method import RewardLaw
from klbench.policies.causal_lm import wrap
from klbench.samplers import controlled_decoding
from klbench.samplers.controlled_decoding import ControlledDecoding, ridge
from klbench.samplers.twisted_smc import Seen, soft
from klbench.target import TiltedPrior

TARGET = TiltedPrior(TABLE, reward, 0.4)


@pytest.mark.parametrize("k, block", [(8, 4), (3, 1), (2, 2)])
def test_laws_hold(k, block, broken):
    assert broken(check_steering(ControlledDecoding(k, block))) == []


@pytest.mark.parametrize("regression, holds", [(ridge, True), (soft, False)])
def test_the_value_is_the_mean_reward_where_states_tell_prefixes_apart(regression, holds):
    """In the limit of fit draws."""
    wanted = exact_value(WORLD.rewards.numpy(), lambda r, mass: float(mass @ r))
    assert (gap(regression, WORLD.rewards.numpy(), lambda aim: aim.mean(1), wanted, np.asarray) < 0.01) == holds


def exact_law(p, k, block, value):
    """[S] by recursion over prefixes: the best of k next blocks, by value, the reward where a text is finished."""
    out = np.zeros(63)
    mass, size = WORLD.log_p0[p].exp().numpy(), EVERY.mask.sum(1).numpy()
    row = [tuple(EVERY.tokens[s, : size[s]].tolist()) for s in range(63)]

    def go(prefix, share):
        t = len(prefix)
        begins = [s for s in range(63) if row[s][:t] == prefix]
        end = min(t + block, WORLD.length)
        after = {}
        for s in begins:
            after[row[s][:end]] = after.get(row[s][:end], 0.0) + mass[s]
        words = list(after)
        law = np.array([after[w] for w in words]) / sum(after.values())
        whole = [w in row and (len(w) < end or end == WORLD.length) for w in words]
        worth = np.array([WORLD.reward[p][row.index(w)] if done else value[p, w] for w, done in zip(words, whole, strict=True)])
        best = law * np.exp(RewardLaw.of(worth, law).log_best_of(worth, k))
        for w, done, chance in zip(words, whole, best, strict=True):
            if done or w in row:
                out[row.index(w)] += share * chance
            else:
                go(w, share * chance)

    go((), 1.0)
    return out


@pytest.mark.parametrize(
    "k, block, as_if, holds", [(3, 1, (3, 1), True), (4, 2, (4, 2), True), (3, 1, (3, 2), False), (3, 1, (4, 1), False)]
)
def test_blockwise_best_of_k_by_a_known_value(k, block, as_if, holds, monkeypatch):
    """With the exact mean reward as value, against the recursion over every prefix."""
    value = exact_value(WORLD.rewards.numpy(), lambda r, mass: float(mass @ r))
    monkeypatch.setattr(Seen, "value", lambda self, *rest: lambda states: _looked_up(states, value))
    found = ControlledDecoding(k, block).steer(TABLE, TARGET, TABLE.prompts, 4000, WORLD.length, 2)
    for p, row in enumerate(answers(found.draws)):
        law = exact_law(p, *as_if, value)
        assert law.sum() == pytest.approx(1) and (off(row, law) < 4.5) == holds


def _looked_up(states, value):
    """Values of one-hot states, by a table of which state is which prefix."""
    at = TABLE.states(TABLE.prompts, EVERY.tokens.expand(2, -1, -1), EVERY.mask.expand(2, -1, -1)).argmax(3)
    known = np.zeros(states.shape[2])
    for p in range(2):
        for s in range(63):
            for t in range(1, int(EVERY.mask[s].sum()) + 1):
                known[int(at[p, s, t])] = value[p, tuple(EVERY.tokens[s, :t].tolist())]
    return known[states.argmax(2).numpy()]


@pytest.mark.parametrize("k, holds", [(5, True), (4, False)])
def test_one_block_is_best_of_k(k, holds):
    found = ControlledDecoding(5, WORLD.length).steer(TABLE, TARGET, TABLE.prompts, 4000, WORLD.length, 1)
    for p, row in enumerate(answers(found.draws)):
        law = WORLD.log_p0[p].exp().numpy() * np.exp(WORLD.law(p).log_best_of(np.array(WORLD.reward[p]), k))
        assert (off(row, law) < 4.5) == holds


def test_one_candidate_is_the_prior():
    found = ControlledDecoding(1, 2).steer(TABLE, TARGET, TABLE.prompts, 4000, WORLD.length, 1)
    assert all(off(row, WORLD.log_p0[p].exp().numpy()) < 4.5 for p, row in enumerate(answers(found.draws)))


def earned(of, draws=600):
    """[P] mean reward."""
    rows = answers(of.steer(TABLE, TARGET, TABLE.prompts, draws, WORLD.length, 4).draws)
    return np.array([np.array(WORLD.reward[p])[row].mean() for p, row in enumerate(rows)])


def test_more_candidates_earn_more(monkeypatch):
    assert (np.diff([earned(ControlledDecoding(k, 2)) for k in (1, 2, 8, 32)], axis=0) > 0).all()
    of_prior = (WORLD.log_p0.exp() * WORLD.rewards).sum(1).numpy()
    assert (earned(ControlledDecoding(8, 2)) > of_prior + 0.5).all()
    rewritten(monkeypatch, controlled_decoding, "ridge", "x.T @ aim", "-x.T @ aim")  # a value upside down
    assert (earned(ControlledDecoding(8, 2)) < of_prior + 0.5).all()


@pytest.mark.parametrize(
    "change, says", [({"seed": lambda seed: 0}, "the same seed"), ({"target": lambda t: TARGET}, "tokens and reward calls")]
)
def test_broken_ones_are_rejected(broken, change, says):
    assert any(name.startswith(says) for name in broken(check_steering(steering(ControlledDecoding(2, 2), **change))))


def test_one_choice_for_all_draws_is_rejected(monkeypatch, broken):
    taken = controlled_decoding.taken

    def same(now, index):
        return taken(now, index[:, :1] + 0 * index if index.shape[1] < now.tokens.shape[1] else index)

    monkeypatch.setattr(controlled_decoding, "taken", same)
    assert "draws of one call are independent" in broken(check_steering(ControlledDecoding(4, 2)))


def test_a_language_model():
    policy, prompts = wrap("p", model("llama", 0), tokenizer()), ["a", "b c a b"]
    target = TiltedPrior(policy, lambda prompts, completions, **kwargs: [float(c.count("b")) for c in completions], 0.3)
    means = []
    for k in (1, 6):
        found = ControlledDecoding(k, 2, 40).steer(policy, target, prompts, 40, 6, 0)
        assert torch.allclose(policy.log_prob(prompts, found.draws.tokens, found.draws.mask), found.draws.log_q, atol=5e-5)
        means.append(target.rewards(prompts, policy.decode(found.draws.tokens, found.draws.mask)).mean())
    assert means[1] > means[0] + 0.5


def test_refusals():
    for given in ((0,), (4, 0), (4, 4, 0)):
        with pytest.raises(UserError, match="at least 1 candidate, token a block and fit draw"):
            ControlledDecoding(*given)
