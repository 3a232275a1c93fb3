"""Laws of implicit PRM: partial sums are values of prefixes; as a policy it goes to the prior conditioned on success, at every beta."""

import math

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, World, check_objective, expected_gradient
from klbench.objectives.implicit_prm import ImplicitPRM

WORLD, BETA = WORLDS[0], 0.4
SMALL = World(((1, 2, 3),), ((0.0, 1.0, 1.0),), draws=1, length=2)  # two right answers, 5/6 of the prior
RIGHT = torch.tensor([[0.0, 0.4, 0.6]], dtype=torch.float64)  # p0(. | right)


def test_laws_hold(broken):
    assert broken(check_objective(ImplicitPRM())) == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda self, logit, right: ImplicitPRM()._cost(logit, 1 - right),
        lambda self, logit, right: ImplicitPRM()._cost(logit, right) * right,  # the wrong answers left out
        lambda self, logit, right: (logit.sigmoid() - right) ** 2,
    ],
)
def test_a_wrong_cost_is_rejected(mutant, broken, wrong):
    cost = mutant(ImplicitPRM, _cost=wrong, stated=lambda self, *given: ImplicitPRM().stated(*given))
    assert "the expected gradient is that of the stated loss" in broken(check_objective(cost))


def everything(logits):
    """One group of all answers."""
    every, prior = WORLD.policy(logits).enumerate(), WORLD.policy(WORLD.log_p0).enumerate()
    shape = (1, *every.tokens.shape)
    return Batch(
        every.tokens.reshape(shape), every.mask.reshape(shape), every.log_prob, prior.log_prob, WORLD.rewards, torch.zeros(shape[:2])
    )


@pytest.mark.parametrize("beta, holds", [(BETA, True), (1.1 * BETA, False)])
def test_at_the_posterior_partial_sums_are_soft_values(beta, holds):
    batch = everything(WORLD.log_target(BETA))
    found = ImplicitPRM().process_reward(batch, beta)[0]
    tokens, p0, reward = batch.tokens[0], WORLD.log_p0[0].exp(), WORLD.rewards[0]
    log_z = (p0 * (reward / BETA).exp()).sum().log()
    worst = 0.0
    for s, row in enumerate(tokens):
        for t in range(1, tokens.shape[1] + 1):
            same = (tokens[:, :t] == row[:t]).all(1)
            law = p0[same] / p0[same].sum()
            value = BETA * (law * (reward[same] / BETA).exp()).sum().log()
            assert (law * reward[same]).sum() - 1e-12 <= value <= reward[same].max() + 1e-12
            worst = max(worst, float((found[s, t - 1] - value + BETA * log_z).abs()))
    assert (worst < 1e-12) == holds


def loss_of(q, beta):
    return float(ImplicitPRM().stated(q.log(), SMALL.log_p0[0], SMALL.rewards[0], beta, 1))


@pytest.mark.parametrize("beta", [0.05, 0.4, 1.5])
def test_no_law_goes_below_the_infimum(beta):
    infimum = 5 / 6 * math.log(1 + (5 / 6) ** beta)
    logits = 4 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert all(loss_of(q, beta) > infimum for q in logits.softmax(1))
    assert loss_of(RIGHT[0].clamp(min=1e-300), beta) == pytest.approx(infimum, abs=1e-8)


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_training_goes_to_the_prior_conditioned_on_success(beta):
    logits = SMALL.log_p0.clone()
    adam = torch.optim.Adam([logits], lr=0.2)
    for _ in range(200):
        logits.grad = expected_gradient(ImplicitPRM(), SMALL, logits, beta)
        adam.step()
    q = logits.log_softmax(1)
    assert float((RIGHT[:, 1:] * (RIGHT[:, 1:].log() - q[:, 1:])).sum()) < 0.02  # KL(p0(.|right) || q)
    assert float(q.exp()[0, 0]) < 0.1 / 6  # of the prior's sixth


def test_without_a_ceiling_nothing_is_right():
    with pytest.raises(ValueError, match="ceiling"):
        ImplicitPRM().loss(everything(WORLD.log_p0), 1.0)
