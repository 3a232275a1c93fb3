"""Laws of NFT: on prior draws its end is p0(.|right); at q = p0 its gradient is Dr. GRPO's or GRPO's, draw by draw."""

import numpy as np
import pytest
import torch

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.laws import WORLDS, World, check_objective, expected_gradient, stated_gradient
from klbench.method import RewardLaw
from klbench.objectives.grpo import GRPO
from klbench.objectives.nft import NFT, OMEGA

TWO = World(counts=((3, 2, 1),), reward=((1.0, 0.0, 1.0),), draws=2, length=2)


def test_laws_hold(broken):
    assert broken(check_objective(NFT())) == []


def off(objective, of=None, world=WORLDS[1]):
    """Relative gap between the expected gradient and that of the stated loss, at the prior and on both sides of it."""
    points = [world.log_p0 + step * world.rewards.sin() for step in (0.0, 0.9, -0.9)]
    pairs = [(expected_gradient(objective, world, x, 1.0), stated_gradient(of or objective, world, x, 1.0)) for x in points]
    return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)


@pytest.mark.parametrize("objective", [NFT(omega="grpo"), NFT(floor=0.3)])
def test_the_gradient_is_that_of_the_stated_loss(objective):
    assert off(objective) < 1e-6


def written_out(batch, positives_only=False, clamp=False, per_token=False, fixed_p=False):
    """NFT, 1 - p, with its mistakes open."""
    right = batch.success()
    p = right.mean(1, keepdim=True).clamp(max=1 - 1e-9)
    u = batch.total(batch.log_q - batch.log_p0) / (batch.mask.sum(2) if per_token else 1)
    share = 0.4 if fixed_p else p
    wrong = (1 - share * u.exp()) / (1 - share)
    tail = torch.where(wrong < 1, 0.0 if clamp else wrong - 1, wrong.clamp(min=1).log())
    told = right * u + (0 if positives_only else 1) * (1 - right) * tail
    return -((p > 0) & (p < 1 - 1e-6)).mul((1 - p) * told).mean()


@pytest.mark.parametrize("wrong", [{}, {"positives_only": True}, {"clamp": True}, {"per_token": True}, {"fixed_p": True}])
def test_mutants_are_rejected(mutant, wrong):
    gap = off(mutant(NFT, loss=lambda self, batch, beta: written_out(batch, **wrong)), of=NFT())
    assert gap > 1e-2 if wrong else gap < 1e-6


def group(right, log_ratio=None, tokens=1):
    """One prompt, K draws that are right or wrong, at q = p0 e^log_ratio."""
    reward = torch.tensor([right], dtype=torch.float64)
    shape = (1, len(right), tokens)
    log_p0 = torch.full(shape, -2.0, dtype=torch.float64)
    log_q = log_p0 if log_ratio is None else log_p0 + torch.tensor(log_ratio, dtype=torch.float64).view(shape)
    mask = torch.ones(shape, dtype=torch.bool)
    return Batch(mask.long(), mask, log_q.clone().requires_grad_(), log_p0, reward, reward * 0, top=torch.ones(1))


def slope(objective, batch, beta=0.0):
    return torch.autograd.grad(objective.loss(batch, beta), batch.log_q)[0].flatten()


@pytest.mark.parametrize("right", [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, 0.0]])
def test_at_the_prior_it_is_grpo_or_dr_grpo(right):
    batch, S = group(right), torch.tensor(right, dtype=torch.float64)
    torch.testing.assert_close(slope(NFT(omega="grpo"), batch), slope(GRPO(delta=0.0), batch))
    torch.testing.assert_close(slope(NFT(), batch), -(S - S.mean()) / len(right))
    assert not torch.allclose(slope(NFT(), batch), slope(GRPO(delta=0.0), batch))


@pytest.mark.parametrize("floor", [1.0, 0.3])
def test_away_from_the_prior_the_negative_weight_is_that_of_the_straight_through_clamp(floor):
    u = torch.tensor([0.4, -1.0, 0.2, 1.5], dtype=torch.float64)
    found = slope(NFT(floor=floor), group([1.0, 0.0, 0.0, 0.0], u.tolist()))
    R, p = u.exp(), 0.25
    pull = (1 - p) * p * R / ((1 - p) * ((1 - p * R) / (1 - p)).clamp(min=floor))
    torch.testing.assert_close(found[1:], pull[1:] / 4)
    assert found[0].item() == pytest.approx(-(1 - p) / 4)


@pytest.mark.parametrize("right", [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("omega", OMEGA)
def test_a_group_of_one_kind_is_left_out(omega, right):
    assert slope(NFT(omega=omega), group(right, [0.5, -0.5, 3.0])).tolist() == [0.0, 0.0, 0.0]


def test_a_ratio_beyond_all_numbers_stays_finite():
    assert torch.isfinite(slope(NFT(), group([1.0, 0.0], [0.0, 2000.0]))).all()


def test_training_ends_at_the_right_answers_of_the_prior():
    logits = TWO.log_p0.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.5)
    for _ in range(30):
        logits.grad = expected_gradient(NFT(), TWO, logits, 1.0)
        adam.step()
    q = logits.detach().softmax(1)[0]
    assert q[1] < 1e-2 and float(q[0] / q[2]) == pytest.approx(3.0, rel=0.02)


def test_own_by_hand():
    law = RewardLaw.of(np.array([0.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(np.exp(NFT().own(np.array([0.0, 1.0]), law, 0.3, 8)), [0.0, 4.0])


FOUR = World(counts=((3, 2, 1),), reward=((1.0, 0.0, 1.0),), draws=4, length=2)  # sd .433 with one or three right, .5 with two


@pytest.mark.parametrize("least, drops", [(0.0, False), (0.43, False), (0.45, True)])
def test_groups_of_little_spread_are_left_out_and_the_optimum_stays(least, drops):
    some, every = NFT(least_spread=least), NFT()
    assert off(some, world=FOUR) < 1e-6
    assert (off(some, of=every, world=FOUR) > 1e-3) == drops
    right = torch.tensor([[3.0, 1e-15, 1.0]], dtype=torch.float64).log()
    at, start = (expected_gradient(some, FOUR, x, 1.0).norm() for x in (right, FOUR.log_p0))
    assert float(at) < 1e-9 < 1e-3 < float(start)


def test_a_least_spread_by_hand():
    one, two = group([1.0, 0.0, 0.0, 0.0]), group([1.0, 1.0, 0.0, 0.0])
    assert slope(NFT(least_spread=0.45), one).tolist() == [0.0] * 4
    assert torch.equal(slope(NFT(least_spread=0.45), two), slope(NFT(), two))
    assert slope(NFT(least_spread=0.45), two).abs().min() > 0


def test_refusals():
    with pytest.raises(UserError, match="least_spread is a standard deviation"):
        NFT(least_spread=0.5)
    with pytest.raises(UserError, match="omega of nft"):
        NFT(omega="gpo")
    with pytest.raises(ValueError, match="K >= 2"):
        NFT().loss(group([1.0]), 1.0)
