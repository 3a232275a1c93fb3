"""Laws of RWR: the direction of grad KL(p* || q) at every visit, since no weight is divided by a mean that holds it."""

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, World, check_objective, expected_gradient, fresh_state, settled_state, stated_gradient
from klbench.objectives.rwr import RWR

WORLD = WORLDS[0]
LOGITS = WORLD.log_p0 + 0.5 * WORLD.rewards.sin()


def test_laws_hold(broken):
    assert broken(check_objective(RWR())) == []


def off_direction(objective, beta=0.7):
    found = expected_gradient(objective, WORLD, LOGITS, beta, fresh_state(objective, WORLD))
    wanted = stated_gradient(RWR(), WORLD, LOGITS, beta)
    return float(1 - torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0))


def weighted(batch, beta, state, own_z=False, most=1e300, per_token=False):
    weight = (batch.reward / beta).exp().clamp(max=most)
    mean = weight.mean(1, keepdim=True) if own_z else state["log_z"][batch.prompt][:, None].exp()
    log_q = batch.total(batch.log_q) / (batch.mask.sum(2) if per_token else 1)
    return -(weight / mean * log_q).mean(), state


def test_the_first_visit_is_exact_in_direction():
    assert off_direction(RWR()) < 1e-12


def test_dividing_a_weight_by_a_mean_that_holds_it_is_rejected(mutant):
    assert off_direction(mutant(RWR, loss=lambda self, *given: weighted(*given, own_z=True))) > 1e-3


@pytest.mark.parametrize("wrong", [{}, {"most": 10.0}, {"per_token": True}])
def test_mutants_are_rejected(mutant, wrong):
    made, world = mutant(RWR, loss=lambda self, *given: weighted(*given, **wrong)), WORLDS[0]
    found = expected_gradient(made, world, LOGITS, 0.7, settled_state(made, world, 0.7))
    wanted = stated_gradient(RWR(), world, LOGITS, 0.7)
    gap = float((found - wanted).norm() / wanted.norm())
    assert gap > 1e-2 if wrong else gap < 1e-6


def test_self_normalised_weights_of_two_miss_the_target():
    # the docstring's figure: the fixed point of w_i / (w_i + w_j) is p0 E_j[w_i / (w_i + w_j)], here far from p*
    world = World(counts=((1, 1, 1, 1, 1),), reward=((0.0, 0.5, 1.0, 1.5, 2.0),), draws=2, length=4)
    w = (world.rewards[0] / 0.5).exp()
    fixed = (w[:, None] / (w[:, None] + w)).mean(1)
    gap = 0.5 * (fixed / fixed.sum() - world.log_target(0.5)[0].exp()).abs().sum()
    assert gap > 0.1


def group(reward, prompt):
    shape = (1, len(reward), 1)
    one, given = torch.zeros(shape, dtype=torch.float64), torch.tensor([reward], dtype=torch.float64)
    return Batch(one.long(), one.bool() | True, one - 1, one, given, torch.zeros_like(given), prompt=torch.tensor([prompt]))


def test_the_state_is_the_log_mean_of_all_weights_and_the_given_one_stays():
    first = state = RWR().init(3, 0)
    for reward, prompt in (([0.0, 1.0], 2), ([2.0, 0.5], 2), ([3.0, 3.0], 0)):
        _, state = RWR().loss(group(reward, prompt), 0.5, state)
    seen = torch.tensor([0.0, 2.0, 4.0, 1.0], dtype=torch.float64)
    assert state["log_z"].tolist() == pytest.approx([6.0, 0.0, float(seen.exp().mean().log())])
    assert state["seen"].tolist() == [2.0, 0.0, 4.0] and first["seen"].tolist() == [0.0, 0.0, 0.0]


def test_a_loss_by_hand():
    # weights e^2 and 1: each over the other, log q = -1
    loss, _ = RWR().loss(group([1.0, 0.0], 0), 0.5, RWR().init(1, 0))
    e2 = torch.tensor(2.0).exp().item()
    assert loss.item() == pytest.approx((e2 + 1 / e2) / 2)


def test_prompt_and_two_draws_are_needed():
    with pytest.raises(ValueError, match="K >= 2"):
        RWR().loss(group([1.0], 0), 1.0, RWR().init(1, 0))
