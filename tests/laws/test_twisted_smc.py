"""Laws of twisted SMC: any twist is unbiased, the fitted one is the soft value in the limit and steers better than the reward so far."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_smc import CONVERGES, EVERY, PROPER, TABLE, WORLD, reward, rewritten, steering
from tiny import model, tokenizer

from klbench import laws, weights
from klbench.errors import UserError
from klbench.laws import check_steering
from klbench.policies.causal_lm import wrap
from klbench.policies.tabular import Tabular
from klbench.samplers import twisted_smc
from klbench.samplers.smc import SMC
from klbench.samplers.twisted_smc import Seen, TwistedSMC, soft
from klbench.target import Draws, TiltedPrior

BETA = 0.4
TILT = WORLD.rewards.numpy() / BETA


def everything(times):
    """Every answer as often as the prior draws it, so that a mean over them is exact."""
    counts = torch.tensor(WORLD.counts)
    shares = counts * times // counts.sum(1, keepdim=True).max()
    index = [torch.arange(63).repeat_interleave(row) for row in shares]
    size = min(map(len, index))
    return torch.stack([row[torch.linspace(0, len(row) - 1, size).long()] for row in index])


def exact_value(of, mean):
    """(prompt, prefix) -> `mean` over the prior's answers that begin so of `of` [P, S]."""
    out = {}
    for p in range(2):
        mass = WORLD.log_p0[p].exp().numpy()
        for s, kept in enumerate(EVERY.mask):
            for t in range(1, int(kept.sum()) + 1):
                prefix = tuple(EVERY.tokens[s, :t].tolist())
                begins = ((EVERY.tokens[:, :t] == EVERY.tokens[s, :t]).all(1) & EVERY.mask[:, :t].all(1)).numpy()
                out[p, prefix] = mean(of[p][begins], mass[begins] / mass[begins].sum())
    return out


def gap(regression, of, middle, wanted, unit, times=2000, block=1):
    """Largest mean over prior prefixes at one end of a block of the gap between unit(fitted value) and unit(wanted)."""
    index = everything(times)
    drawn = Draws(EVERY.tokens[index], EVERY.mask[index], torch.zeros(0))
    ends = list(range(block, WORLD.length, block))
    begun = torch.stack([drawn.mask[..., t - 1] for t in ends], 2)
    draw = torch.arange(begun[..., 0].numel()).view(begun.shape[:2])[..., None].expand(begun.shape)
    states = TABLE.states(TABLE.prompts, drawn.tokens, drawn.mask)[:, :, ends]
    aim = np.take_along_axis(of, index.numpy(), 1)
    value = Seen(states[begun], draw[begun], aim, 0, 0).value(regression, aim, middle(aim))
    worst = 0.0
    for at, t in enumerate(ends):
        found, here = value(states[:, :, at]), begun[..., at]
        p = here.nonzero()[:, 0].tolist()
        right = [wanted[i, tuple(row)] for i, row in zip(p, drawn.tokens[here][:, :t].tolist(), strict=True)]
        worst = max(worst, float(np.mean(np.abs(unit(found[here.numpy()]) - unit(np.array(right))))))
    return worst


def least_squares(x, aim):
    return np.linalg.lstsq(x, aim, rcond=None)[0]


@pytest.mark.parametrize("size, block", [(32, 4), (6, 1), (7, 2)])
def test_laws_hold(size, block, broken):
    assert broken(check_steering(TwistedSMC(size, block))) == []


@pytest.mark.parametrize("regression, holds", [(soft, True), (least_squares, False)])
def test_the_value_tends_to_the_soft_one_where_states_tell_prefixes_apart(regression, holds):
    """As fit draws grow, here each answer as often as it is drawn; a regression of r/beta itself ends at its mean."""
    wanted = exact_value(TILT, lambda tilt, mass: math.log(mass @ np.exp(tilt)))
    few, many = (gap(regression, TILT, weights.log_mean_exp, wanted, np.exp, times) for times in (500, 2000))
    assert (many < 0.1 and many < few / 3) == holds
    assert holds or many > 1


def test_newton_ends_where_the_slope_is_zero():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.ones((400, 1)), rng.normal(size=(400, 5))], 1)
    aim = 12 * rng.normal(size=400)  # weights over many orders of magnitude
    aim -= weights.log_mean_exp(aim)
    line = soft(x, aim)
    slope = x.T @ (np.exp(x @ line) - np.exp(aim)) + line * (np.arange(6) > 0)
    assert float(np.abs(slope).max()) < 1e-3 * len(x)
    assert np.exp(x @ line).mean() == pytest.approx(1, abs=1e-3)  # the constant is free


def test_values_stay_where_means_can_be():
    seen = Seen(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50), np.zeros((1, 50)), 0, 0)
    aim = np.random.default_rng(0).normal(size=(1, 50))
    value = seen.value(soft, aim, weights.log_mean_exp(aim))
    far = value(torch.full((1, 2, 3), 1e6) * torch.tensor([[[1.0], [-1.0]]]))
    assert set(far.ravel().tolist()) <= {aim.min(), aim.max()}


@pytest.mark.parametrize("value", [lambda states: np.sin(9.0 * states.argmax(3 - 1).numpy()), lambda states: np.zeros(states.shape[:2])])
def test_any_value_is_unbiased(value, monkeypatch, broken):
    monkeypatch.setattr(Seen, "value", lambda self, *rest: value)
    monkeypatch.setattr(laws, "CLOSE", 50)
    assert PROPER not in broken(check_steering(TwistedSMC(8, 1)))


@pytest.mark.parametrize(
    "old, new",
    [
        ("torch.ones_like(known) if end == length else ~now.mask[..., -1]", "~now.mask[..., -1]"),  # a guess at the end, too
        ("tilt(reward)", "tilt(2 * reward)"),
    ],
)
def test_a_broken_twist_is_rejected(monkeypatch, broken, old, new):
    rewritten(monkeypatch, twisted_smc, "foreseen", old, new)
    monkeypatch.setattr(laws, "CLOSE", 50)  # the limit is not waited for
    assert PROPER in broken(check_steering(TwistedSMC(8, 2)))


def test_a_wrong_beta_is_rejected(broken):
    found = broken(check_steering(steering(TwistedSMC(8, 2), target=lambda t: replace(t, beta=1.25 * t.beta))))
    assert PROPER in found and CONVERGES in found


def test_the_fit_is_counted(monkeypatch, broken):
    monkeypatch.setattr(Seen, "of", classmethod(lambda cls, *given, made=Seen.of: replace(made(*given), tokens=0)))
    assert broken(check_steering(TwistedSMC(8, 2))) == ["tokens and reward calls are counted"]


def test_it_sees_what_is_still_to_be_earned():
    """Four of three words, paid when all are there: the reward so far says nothing."""
    late = Tabular(torch.zeros(1, 81), ("c",), vocabulary=3, length=4)
    paid = TiltedPrior(late, lambda prompts, completions, **kwargs: [c.count("2") * (len(c.split()) == 4.0) for c in completions], 0.3)
    blind, seeing = (of.steer(late, paid, ["c"], 1500, 4, 5) for of in (SMC(8, 1), TwistedSMC(8, 1, 1000)))
    assert seeing.log_z.std() < 0.85 * blind.log_z.std()
    wanted = 4 * math.exp(1 / 0.3) / (2 + math.exp(1 / 0.3))
    twos = [float((found.draws.tokens == 2).sum(2).double().mean()) for found in (blind, seeing)]
    assert wanted - twos[1] < 0.5 * (wanted - twos[0])


def test_one_value_for_all_seeds(monkeypatch):
    seeds = []
    monkeypatch.setattr(Seen, "of", classmethod(lambda cls, *given, made=Seen.of: [seeds.append(given[-1]), made(*given)][1]))
    target = TiltedPrior(TABLE, reward, BETA)
    for seed in (1, 2):
        TwistedSMC(2).steer(TABLE, target, TABLE.prompts, 3, WORLD.length, seed)
    assert len(seeds) == 2 and len(set(seeds)) == 1


def test_a_block_as_long_as_the_text_needs_no_value():
    target = TiltedPrior(TABLE, reward, BETA)
    found, plain = (of.steer(TABLE, target, TABLE.prompts, 30, WORLD.length, 5) for of in (TwistedSMC(4, 9), SMC(4, 9)))
    assert torch.equal(found.draws.tokens, plain.draws.tokens) and found.prior_tokens == plain.prior_tokens


def test_a_language_model():
    policy, prompts = wrap("p", model("gpt2", 0), tokenizer()), ["a", "b c a b"]

    def told(prompts, completions, **kwargs):
        return [0.7 * c.count("b") - 0.5 * c.count("c") for c in completions]

    target = TiltedPrior(policy, told, 0.5)
    found = TwistedSMC(4, 2, 50).steer(policy, target, prompts, 30, 6, 0)
    said = policy.log_prob(prompts, found.draws.tokens, found.draws.mask)
    torch.testing.assert_close(found.draws.log_q, said, rtol=1e-4, atol=3e-5)
    prior = policy.sample(prompts, 4000, 6, seed=9)
    z = np.exp(target.tilt(target.rewards(prompts, policy.decode(prior.tokens, prior.mask))))
    estimates = np.exp(found.log_z)
    error = np.sqrt(estimates.var(1) / 30 + z.var(1) / 4000)
    assert (np.abs(estimates.mean(1) - z.mean(1)) < 4.5 * error).all()


def test_refusals():
    for given in ((0,), (4, 0), (4, 4, 0)):
        with pytest.raises(UserError, match="at least 1 particle, token a block and fit draw"):
            TwistedSMC(*given)
