"""Laws of Dr. GRPO: its mean shrinks the reward's gradient by (K-1)/K and so raises beta; length does not enter."""

import numpy as np
import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, World, check_objective, expected_gradient, stated_gradient
from klbench.method import RewardLaw
from klbench.objectives.dr_grpo import DrGRPO
from klbench.objectives.rloo import RLOO


def test_laws_hold(broken):
    assert broken(check_objective(DrGRPO())) == []


@pytest.mark.parametrize("world", WORLDS)
def test_the_gradient_is_the_stated_one_over_the_length(world):
    logits = world.log_p0 + 0.5 * world.rewards.sin()
    found, wanted = (f(DrGRPO(), world, logits, 0.7) for f in (expected_gradient, stated_gradient))
    torch.testing.assert_close(found, wanted / world.length, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("world", WORLDS)
def test_it_is_rloo_at_a_larger_beta(world):
    K, logits = world.draws, world.log_p0 + 0.5 * world.rewards.sin()
    found = expected_gradient(DrGRPO(), world, logits, 0.7)
    wanted = expected_gradient(RLOO(), world, logits, 0.7 * K / (K - 1)) * (K - 1) / K / world.length
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def plain(batch, beta, mean=False, scale=False, inside=False, shrunk=True, k3=False):
    """Dr. GRPO on fresh draws with its choices open."""
    K, log_q = batch.reward.shape[1], batch.total(batch.log_q)
    u = (log_q - batch.total(batch.log_p0)).detach()
    gain = batch.reward - beta * u if inside else batch.reward
    advantage = (gain - gain.mean(1, keepdim=True)) * (1 if shrunk else K / (K - 1))
    if scale:
        advantage = advantage / (batch.reward.std(1, correction=0, keepdim=True) + 1e-4)
    if not (inside or k3):
        advantage = advantage - beta * (u - u.mean(1, keepdim=True)) * K / (K - 1)
    back = batch.total(batch.log_p0) - log_q
    per_draw = -advantage * log_q + (beta * (back.exp() - 1 - back) if k3 else 0)
    return (per_draw / (batch.mask.sum(2) if mean else batch.mask.shape[2])).mean()


@pytest.mark.parametrize("wrong", [{}, {"mean": True}, {"scale": True}, {"inside": True}, {"shrunk": False}, {"k3": True}])
def test_the_stated_gradient_tells_mutants(mutant, wrong):
    world = WORLDS[0]
    logits = world.log_p0 + 0.5 * world.rewards.sin()
    found = expected_gradient(mutant(DrGRPO, loss=lambda self, *given: plain(*given, **wrong)), world, logits, 0.7)
    gap = (found * world.length - stated_gradient(DrGRPO(), world, logits, 0.7)).norm() / found.norm()
    assert float(gap) > 1e-2 if wrong else float(gap) < 1e-7


def test_a_kl_inside_the_mean_is_rejected(mutant, broken):
    # everything is shrunk then, so p* itself is where it stops
    found = broken(check_objective(mutant(DrGRPO, loss=lambda self, *given: plain(*given, inside=True))))
    assert "the gradient vanishes at the declared optimum" in found


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_with_k3_the_fixed_point_is_another(mutant, beta):
    world = World(counts=((5, 3, 2),), reward=((0.0, 0.0, 1.0),), draws=3, length=1, vocabulary=3)
    objective, shrink, start = mutant(DrGRPO, loss=lambda self, *given: plain(*given, k3=True)), 2 / 3, 0.2
    # beta (p - p_0) = p (1 - p) (K-1)/K: a p^2 + (beta - a) p - beta p_0 = 0
    p = (shrink - beta + np.sqrt((beta - shrink) ** 2 + 4 * shrink * beta * start)) / (2 * shrink)
    at = torch.tensor([[(1 - p) * 0.625, (1 - p) * 0.375, p]], dtype=torch.float64).log()
    assert float(expected_gradient(objective, world, at, beta).norm()) < 1e-12
    assert float(expected_gradient(DrGRPO(), world, at, beta).norm()) > 1e-3


def group(log_ratio=(0.0, 0.0)):
    """Two draws of 1 and 3 tokens, rewards +1 and -1, q and p0 alike at the draw; log q/q_old as given, at every token."""
    mask = torch.arange(3) < torch.tensor([[1], [3]])
    old = torch.full((1, 2, 3), -1.0, dtype=torch.float64)
    log_q = (old + torch.tensor(log_ratio, dtype=torch.float64)[:, None]).requires_grad_()
    reward = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    return Batch(torch.zeros(1, 2, 3).long(), mask[None], log_q, old, reward, reward * 0, old_log_q=old)


def test_length_does_not_enter():
    batch = group()
    (gradient,) = torch.autograd.grad(DrGRPO().loss(batch, 0.5), batch.log_q)
    third = 1 / 3 / 2  # |A| = 1, T = 3, K = 2
    torch.testing.assert_close(gradient, torch.tensor([[[-third, 0, 0], [third, third, third]]], dtype=torch.float64))


@pytest.mark.parametrize("log_ratio, active", [((0.3, 0.3), (False, True)), ((-0.3, -0.3), (True, False)), ((0.1, -0.1), (True, True))])
def test_the_active_set(log_ratio, active):
    batch = group(log_ratio)
    (gradient,) = torch.autograd.grad(DrGRPO().loss(batch, 0.5), batch.log_q)
    assert tuple((gradient[0, :, 0] != 0).tolist()) == active


def test_own_by_hand():
    # K = 2 doubles beta: e^(r / (2 beta)) over its mean under the prior
    found = DrGRPO().own(np.array([1.0]), RewardLaw.of(np.array([0.0, 1.0])), 0.5, 2)
    np.testing.assert_allclose(np.exp(found), np.e / ((1 + np.e) / 2))


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        DrGRPO().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
