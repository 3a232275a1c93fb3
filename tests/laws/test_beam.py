"""Laws of beam search: the posterior's mode where the beam holds every prefix, best-of-K by log p* where there is one block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_controlled_decoding import _looked_up
from test_smc import EVERY, TABLE, WORLD, answers, off, reward, rewritten, steering
from test_twisted_smc import exact_value
from tiny import model, tokenizer

from klbench import method
from klbench.errors import UserError
from klbench.laws import check_steering
from klbench.method import RewardLaw
from klbench.policies.causal_lm import wrap
from klbench.samplers import beam
from klbench.samplers.beam import Beam, repeated
from klbench.samplers.twisted_smc import Seen
from klbench.target import Draws, TiltedPrior

BETA = 0.5
TARGET = TiltedPrior(TABLE, reward, BETA)
LOG_P = (WORLD.log_p0 + WORLD.rewards / BETA).numpy()  # of whole answers, unnormalised


@pytest.mark.parametrize("width, k, block", [(2, 2, 4), (1, 3, 1), (3, 1, 2)])
def test_laws_hold(width, k, block, broken):
    assert broken(check_steering(Beam(width, k, block))) == []


def modes(of, beta=BETA, draws=20):
    target = TiltedPrior(TABLE, reward, beta)
    return answers(of.steer(TABLE, target, TABLE.prompts, draws, WORLD.length, 5).draws)


def test_a_beam_that_holds_every_prefix_finds_the_mode(monkeypatch):
    """63 answers, 200 continuations a prefix. At the first prompt the mode is neither the answer of highest reward nor the prior's."""
    wide = Beam(63, 200, 2)
    wanted = LOG_P.argmax(1)
    assert wanted[0] not in (WORLD.rewards[0].argmax(), WORLD.log_p0[0].argmax())
    assert (modes(wide) == wanted[:, None]).all()
    assert (modes(wide) == modes(wide)).all()
    for beta in (0.2, 5.0):
        assert (modes(wide, beta) == (WORLD.log_p0 + WORLD.rewards / beta).numpy().argmax(1)[:, None]).all()
    for name, old, new in (
        ("Beam", "many.log_q.double().sum(2).numpy() + after", "after"),  # the reward alone: no log-ratio
        ("Beam", "many.log_q.double().sum(2).numpy() + after", "many.log_q.double().sum(2).numpy()"),  # the prior alone
        ("Beam", "argsort(-score", "argsort(score"),  # the worst
    ):
        with monkeypatch.context() as patched:
            rewritten(patched, beam, name, old, new)
            assert (modes(beam.Beam(63, 200, 2)) != wanted[:, None]).any(), new


def with_exact_value(monkeypatch):
    value = exact_value(WORLD.rewards.numpy() / BETA, lambda tilt, mass: float(np.log(mass @ np.exp(tilt))))
    monkeypatch.setattr(Seen, "value", lambda self, *rest: lambda states: _looked_up(states, value))


def by_posterior_mass(p, width, block):
    """The answer that a beam with every continuation ends at: prefixes by their sums of p*."""
    row = [tuple(EVERY.tokens[s][EVERY.mask[s]].tolist()) for s in range(63)]
    held, before = {()}, 0
    for end in [*range(block, WORLD.length, block), WORLD.length]:
        mass = {}
        for s, words in enumerate(row):
            if any(words[: len(h)] == h and (len(h) == before or words == h) for h in held):
                mass[words[:end]] = mass.get(words[:end], 0.0) + np.exp(LOG_P[p, s])
        held, before = set(sorted(mass, key=mass.get, reverse=True)[:width]), end
    return row.index(max(held, key=lambda words: LOG_P[p, row.index(words)]))


@pytest.mark.parametrize("width, block", [(1, 1), (2, 1), (1, 2), (3, 2), (63, 1)])
def test_prefixes_are_kept_by_their_mass_under_the_posterior(width, block, monkeypatch):
    """With the exact soft value and enough continuations, against sums over all answers that begin so."""
    with_exact_value(monkeypatch)
    wanted = [by_posterior_mass(p, width, block) for p in range(2)]
    assert (modes(Beam(width, 300, block)) == np.array(wanted)[:, None]).all()


def test_a_narrow_beam_can_miss_the_mode():
    assert any(by_posterior_mass(p, 1, 1) != LOG_P[p].argmax() for p in range(2))


@pytest.mark.parametrize("k, holds", [(5, True), (4, False)])
def test_one_prefix_and_one_block_is_best_of_k_by_log_p(k, holds):
    found = Beam(1, 5, WORLD.length).steer(TABLE, TARGET, TABLE.prompts, 4000, WORLD.length, 1)
    for p, row in enumerate(answers(found.draws)):
        mass = WORLD.log_p0[p].exp().numpy()
        law = mass * np.exp(RewardLaw.of(LOG_P[p], mass).log_best_of(LOG_P[p], k))
        assert (off(row, law) < 4.5) == holds


def test_one_of_each_is_the_prior():
    found = Beam(1, 1, 2).steer(TABLE, TARGET, TABLE.prompts, 4000, WORLD.length, 1)
    assert all(off(row, WORLD.log_p0[p].exp().numpy()) < 4.5 for p, row in enumerate(answers(found.draws)))


def test_equal_ones_of_a_beam_are_told_apart_from_those_of_another():
    tokens = torch.tensor([[[1, 2], [1, 2], [1, 0], [1, 0], [1, 2], [1, 0]]])
    mask = torch.tensor([[[True, True], [True, True], [True, False], [True, True], [True, True], [True, False]]])
    found = repeated(Draws(tokens, mask, torch.zeros(1, 6, 2)), 3)
    assert found.tolist() == [[False, True, False, False, False, False]]  # 0 that is written is another text than one that has ended


def test_a_beam_of_copies_is_narrower(monkeypatch):
    """The mutant keeps duplicates: all places of the beam go to one prefix, and it misses what a wide one finds."""
    with_exact_value(monkeypatch)
    wanted = LOG_P.argmax(1)
    assert (modes(Beam(63, 60, 1)) == wanted[:, None]).all()
    monkeypatch.setattr(beam, "repeated", lambda now, size: np.zeros(now.tokens.shape[:2], dtype=bool))
    assert (modes(Beam(63, 60, 1)) != wanted[:, None]).any()


@pytest.mark.parametrize(
    "change, says", [({"seed": lambda seed: 0}, "the same seed"), ({"target": lambda t: TARGET}, "tokens and reward calls")]
)
def test_broken_ones_are_rejected(broken, change, says):
    assert any(name.startswith(says) for name in broken(check_steering(steering(Beam(2, 2, 2), **change))))


def test_the_fit_is_counted(monkeypatch, broken):
    monkeypatch.setattr(Seen, "of", classmethod(lambda cls, *given, made=Seen.of: replace(made(*given), tokens=0)))
    assert broken(check_steering(Beam(2, 2, 2))) == ["tokens and reward calls are counted"]


def test_one_choice_for_all_draws_is_rejected(monkeypatch, broken):
    taken = beam.taken

    def same(now, index):
        return taken(now, index[:, :1] + 0 * index if index.shape[1] < now.tokens.shape[1] else index)

    monkeypatch.setattr(beam, "taken", same)
    assert "draws of one call are independent" in broken(check_steering(Beam(1, 4, 2)))


def test_a_language_model():
    policy, prompts = wrap("p", model("llama", 0), tokenizer()), ["a", "b c a b"]
    target = TiltedPrior(policy, lambda prompts, completions, **kwargs: [float(c.count("b")) for c in completions], 0.5)
    means = []
    for width in (1, 6):
        found = Beam(width, width, 2, 40).steer(policy, target, prompts, 20, 6, 0)
        said = policy.log_prob(prompts, found.draws.tokens, found.draws.mask)
        assert torch.allclose(said, found.draws.log_q, atol=5e-5)
        tilt = target.tilt(target.rewards(prompts, policy.decode(found.draws.tokens, found.draws.mask)))
        means.append(float((said.sum(2).detach().numpy() + tilt).mean()))
    assert means[1] > means[0] + 1


def test_by_name_and_refusals():
    assert method.sampler("beam:16") == Beam(16)
    for given in ((0,), (4, 0), (4, 4, 0), (4, 4, 4, 0)):
        with pytest.raises(UserError, match="at least 1 prefix, candidate, token a block and fit draw"):
            Beam(*given)
