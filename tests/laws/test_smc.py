"""Laws of sequential Monte Carlo, each with a filter that breaks it; one block against SNIS; a model against its every continuation."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import continuations, exact, model, tokenizer

from klbench import laws
from klbench.errors import UserError
from klbench.laws import BRANCHING, Converging, check_steering
from klbench.method import RewardLaw
from klbench.policies.causal_lm import wrap
from klbench.samplers import smc
from klbench.samplers.smc import SMC, distinct, systematic
from klbench.samplers.snis import SNIS
from klbench.target import TiltedPrior

PROPER = "exp(log_z) is unbiased for Z, its draws weighted by it for p*"
CONVERGES = "draws follow the target at the effort of `converged`"
WORLD = BRANCHING
TABLE = WORLD.policy(WORLD.log_p0)
EVERY = TABLE.enumerate()
TEXTS = TABLE.decode(EVERY.tokens[None], EVERY.mask[None])[0]


def reward(prompts, completions, **kwargs):
    return [WORLD.reward[TABLE.prompts.index(p)][TEXTS.index(c)] for p, c in zip(prompts, completions, strict=True)]


def rewritten(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, old: str, new: str) -> None:
    """The module's function with one piece of its text replaced."""
    source = inspect.getsource(getattr(module, name))
    assert source.count(old) == 1
    room = dict(vars(module))
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), name, "exec"), room)
    monkeypatch.setattr(module, name, room[name])


def answers(draws):
    """[P, N] index of each draw among the answers."""
    number = {tuple(row): i for i, row in enumerate(torch.where(EVERY.mask, EVERY.tokens, -1).tolist())}
    return np.array([[number[tuple(row)] for row in rows] for rows in torch.where(draws.mask, draws.tokens, -1).tolist()])


def off(found, law, least=0.01):
    """Largest gap of answers [N] from a law [S] in standard errors; rare answers are taken together."""
    seen = np.bincount(found, minlength=len(law)) / len(found)
    rare = law < least
    seen, law = np.append(seen[~rare], seen[rare].sum()), np.append(law[~rare], law[rare].sum())
    return float(np.max(np.abs(seen - law) / np.sqrt(law * (1 - law) / len(found))))


@pytest.mark.parametrize("size, block", [(32, 4), (6, 1), (7, 2), (1, 3)])
def test_laws_hold(size, block, broken):
    assert broken(check_steering(SMC(size, block))) == []


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("log_z = log_z + np.where(uneven, weights.log_mean_exp(log_w), 0.0)", "pass", PROPER),  # what resampling took is forgotten
        ("np.where(uneven[..., None], 0.0, log_w)", "log_w", PROPER),  # or kept
        ("log_z + weights.log_mean_exp(log_w), written", "log_z + log_w.mean(2), written", PROPER),  # log Z without bias, not Z
        ("(after - log_psi)", "after", PROPER),  # the factors do not telescope
        ("np.take_along_axis(log_psi, index, 1)", "log_psi", PROPER),  # twists stay behind where particles move
        (
            "systematic(share.reshape(-1, size), uniform.ravel(), 1)",
            "systematic(0 * share.reshape(-1, size) + 1, uniform.ravel(), 1)",
            PROPER,
        ),
        ("systematic(share[uneven], uniform[uneven], size)", "systematic(share[uneven] ** 2, uniform[uneven], size)", PROPER),
        ("picked + size * np.arange(runs)", "picked[:, :1] + 0 * picked", "draws of one call are independent"),  # one run for all
        ("written + new, calls + asked", "written + new, calls", "tokens and reward calls are counted"),
        ("written + new, calls + asked", "new, calls + asked", "tokens and reward calls are counted"),
    ],
)
def test_a_broken_filter_is_rejected(monkeypatch, broken, old, new, says):
    rewritten(monkeypatch, smc, "filtered", old, new)
    monkeypatch.setattr(laws, "CLOSE", 50)  # none of them waits for the limit
    assert says in broken(check_steering(SMC(8, 2)))


def steering(of, **changed):
    """The steering with arguments of `steer` replaced by functions of them."""

    def steer(self, prior, target, prompts, draws, length, seed):
        given = {"prior": prior, "target": target, "prompts": prompts, "draws": draws, "length": length, "seed": seed}
        return type(of).steer(of, **given | {name: change(given[name]) for name, change in changed.items()})

    methods = {"steer": steer}
    if isinstance(of, Converging):
        methods["converged"] = lambda self: steering(of.converged(), **changed)
    return type("Mutant", (type(of),), methods)()


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_wrong_beta_is_rejected(broken, factor):
    found = broken(check_steering(steering(SMC(8, 2), target=lambda t: replace(t, beta=t.beta * factor))))
    assert PROPER in found and CONVERGES in found


TICK = itertools.count()


@pytest.mark.parametrize("change", [lambda seed: 0, lambda seed: next(TICK)])
def test_seeds_of_its_own_are_rejected(monkeypatch, broken, change):
    monkeypatch.setattr(laws, "CLOSE", 50)
    assert "the same seed gives the same draws, another others" in broken(check_steering(steering(SMC(4, 2), seed=change)))


def test_texts_cut_short_are_rejected(broken):
    def steer(self, prior, target, prompts, draws, length, seed):
        found = SMC(4).steer(prior, target, prompts, draws, length, seed)
        mask = found.draws.mask & (torch.arange(length) < length - 1)
        return replace(found, draws=replace(found.draws, mask=mask))

    assert broken(check_steering(type("Mutant", (SMC,), {"steer": steer})())) == ["draws are answers"]


def test_log_q_of_another_law_is_rejected(broken):
    def steer(self, prior, target, prompts, draws, length, seed):
        found = SMC(4).steer(prior, target, prompts, draws, length, seed)
        return replace(found, draws=replace(found.draws, log_q=found.draws.log_q * 2))

    assert "log_q is the prior's" in broken(check_steering(type("Mutant", (SMC,), {"steer": steer})()))


def test_results_of_another_shape_are_refused():
    with pytest.raises(UserError, match="steer: tokens .* expected"):
        check_steering(steering(SMC(2), draws=lambda n: n + 1))


@pytest.mark.parametrize("n, as_if, holds", [(5, 5, True), (5, 8, False)])
def test_one_block_is_snis(n, as_if, holds):
    beta, draws = 0.4, 4000
    found = SMC(n, WORLD.length).steer(TABLE, TiltedPrior(TABLE, reward, beta), TABLE.prompts, draws, WORLD.length, 3)
    for p, answer in enumerate(answers(found.draws)):
        law = RewardLaw.of(np.array(WORLD.reward[p]), np.array(WORLD.counts[p]))
        density = np.exp(WORLD.log_p0[p].numpy() + SNIS(as_if).log_ratio(np.array(WORLD.reward[p]), law, beta, 9.0))
        assert (off(answer, density) < 4.5) == holds


def test_a_constant_reward_changes_nothing():
    flat = TiltedPrior(TABLE, lambda prompts, completions, **kwargs: [0.6] * len(prompts), 0.4)
    found = SMC(3, 2).steer(TABLE, flat, TABLE.prompts, 3000, WORLD.length, 1)
    np.testing.assert_allclose(found.log_z, 1.5)
    assert all(off(row, WORLD.log_p0[p].exp().numpy()) < 4.5 for p, row in enumerate(answers(found.draws)))


def test_systematic_takes_each_in_proportion():
    weight = np.array([[0.0, 3.0, 0.5, 0.0, 1.5, 0.0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 9]])
    share, grid = weight / weight.sum(1, keepdims=True), 4000
    uniform = (np.arange(grid) + 0.5) / grid
    for row, wanted in zip(weight, share, strict=True):
        found = systematic(np.tile(row, (grid, 1)), uniform, 7)
        counts = np.stack([(found == i).sum(1) for i in range(6)], 1)  # [grid, 6]
        np.testing.assert_allclose(counts.mean(0), 7 * wanted, atol=2 / grid)  # over every u: in proportion
        assert (np.abs(counts - 7 * wanted) < 1 + 1e-9).all()  # at each u: to less than one
    many = systematic(np.tile(weight, (3000, 1)), np.full(9000, 1 - 1e-16), 7)
    assert (np.tile(weight, (3000, 1))[np.arange(9000)[:, None], many] > 0).all()  # none without weight, at the edge of any row


def test_equal_rows_are_numbered_once():
    rows = np.random.default_rng(0).integers(-1, 3, (500, 4))
    wide = rows * 2**40 // 3  # more than one number of 64 bits holds
    for some in (rows, wide):
        first, back = distinct(some)
        np.testing.assert_array_equal(some[first][back], some)
        assert len(first) == len(np.unique(some, axis=0)) < 500


def test_a_language_model_against_every_continuation():
    """Prompts of different lengths; a reward that reads half-written texts too."""
    policy, prompts, rows, length = wrap("p", model("llama", 0), tokenizer()), ["a", "b c a b"], continuations(4, 3), 3
    tokens = torch.tensor([r + [0] * (length - len(r)) for r in rows])
    mask = torch.arange(length) < torch.tensor([len(r) for r in rows])[:, None]
    texts = policy.decode(tokens[None], mask[None])[0]

    def told(prompts, completions, **kwargs):
        return [0.7 * c.count("b") - 0.5 * c.count("c") + 0.1 * len(p) for p, c in zip(prompts, completions, strict=True)]

    found = SMC(6, 1).steer(policy, TiltedPrior(policy, told, 0.5), prompts, 400, length, 0)
    said = policy.log_prob(prompts, found.draws.tokens, found.draws.mask)
    torch.testing.assert_close(found.draws.log_q, said, rtol=1e-4, atol=3e-5)
    for p, prompt in enumerate(prompts):
        log_p0 = exact(policy.model, policy.encode(prompt), rows).numpy()
        z = float(np.exp(log_p0 + np.array(told([prompt] * len(texts), texts)) / 0.5).sum())
        estimates = np.exp(found.log_z[p])
        assert abs(estimates.mean() - z) < 4.5 * estimates.std() / math.sqrt(400) < 0.15 * z
    assert found.prior_tokens <= 2 * 400 * 6 * length and 0 < found.reward_calls < 300


def test_refusals():
    for size, block in ((0, 4), (4, 0)):
        with pytest.raises(UserError, match="at least 1 particle and 1 token"):
            SMC(size, block)
