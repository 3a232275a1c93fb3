"""Laws of GRPO-Guard: ppo at q = q_old; away from it the drift of log q/q_old is taken out before the clip."""

from dataclasses import replace

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective
from klbench.objectives.grpo_guard import GRPOGuard
from klbench.objectives.ppo import PPO


def test_laws_hold(broken):
    assert broken(check_objective(GRPOGuard())) == []


def test_each_fresh_batch_has_the_gradient_of_ppo():
    generator = torch.Generator().manual_seed(1)
    log_q = -torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    log_q.requires_grad_()
    mask = torch.arange(4) < torch.tensor([[2, 4, 1], [3, 3, 4]])[:, :, None]
    reward = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    prior = -torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    batch = Batch(torch.zeros(2, 3, 4).long(), mask, log_q, prior, reward, reward * 0, old_log_q=log_q.detach())
    found, wanted = (torch.autograd.grad(o.loss(batch, 0.5), log_q)[0] for o in (GRPOGuard(), PPO()))
    assert float(wanted.norm()) > 0.1
    torch.testing.assert_close(found, wanted)


def shifted(batch, beta, flow=False, raw=False, tilt=1.0):
    """The loss with the drift's gradient let through, without a drift, or with another beta."""
    gain = batch.reward - tilt * beta * batch.total(batch.old_log_q - batch.log_p0)
    K = gain.shape[1]
    advantage = ((gain - gain.mean(1, keepdim=True)) * K / (K - 1))[:, :, None]
    log_ratio = (batch.log_q - batch.old_log_q) * batch.mask
    drift = (log_ratio.sum(1, keepdim=True) - log_ratio) / (batch.mask.sum(1, keepdim=True) - batch.mask.long()).clamp(min=1)
    log_ratio = log_ratio - (0 if raw else drift if flow else drift.detach())
    return -batch.total(log_ratio.exp() * advantage).mean()


@pytest.mark.parametrize("wrong", [{}, {"raw": True}, {"flow": True}, {"tilt": 1.1}])
def test_mutants_are_rejected(mutant, broken, wrong):
    # without a drift it is ppo, which the laws, all at q_old, cannot tell from it
    found = broken(check_objective(mutant(GRPOGuard, loss=lambda self, *given: shifted(*given, **wrong))))
    assert bool(found) == bool(wrong and not wrong.get("raw"))


def moved(log_ratio, lengths=None):
    """One prompt, one draw an entry, advantages of its rewards 1, -1, -1, ...; log q/q_old as given at every token."""
    K = len(log_ratio)
    mask = torch.arange(2) < torch.tensor(lengths or [1] * K)[:, None]
    old = torch.full((1, K, 2), -2.0, dtype=torch.float64)
    log_q = (old + torch.tensor(log_ratio, dtype=torch.float64)[:, None]).requires_grad_()
    reward = torch.tensor([[1.0] + [-1.0] * (K - 1)], dtype=torch.float64)
    return Batch(torch.zeros(1, K, 2).long(), mask[None], log_q, old, reward, reward * 0, old_log_q=old)


@pytest.mark.parametrize(
    "log_ratio, ppo, guard",
    [
        ((-0.1, -0.5, -0.5), (True, False, False), (False, True, True)),  # the good one is .4 above the drift, the bad ones are .2 below
        ((0.3, 0.3, 0.3), (False, True, True), (True, True, True)),
        ((0.0, 0.0, 0.0), (True, True, True), (True, True, True)),
    ],
)
def test_the_clip_is_about_the_drift(log_ratio, ppo, guard):
    for objective, wanted in ((PPO(), ppo), (GRPOGuard(), guard)):
        batch = moved(log_ratio)
        (gradient,) = torch.autograd.grad(objective.loss(batch, 0.5), batch.log_q)
        assert tuple((gradient[0, :, 0] != 0).tolist()) == wanted


def test_the_drift_by_hand():
    found = GRPOGuard().log_ratio(moved((-0.1, -0.5, -0.3), [2, 1, 2]))
    wanted = [[0.3, 0.2], [-0.3, 0.0], [0.0, -0.2]]  # the second token is one of two draws
    torch.testing.assert_close(found[0], torch.tensor(wanted, dtype=torch.float64))
    alone = GRPOGuard().log_ratio(moved((-0.1, -0.5), [2, 1]))
    assert alone[0, 0, 1].item() == pytest.approx(-0.1)  # nobody to compare with: the raw ratio


@pytest.mark.parametrize("world", WORLDS)
def test_the_drift_of_the_first_token_is_exact_in_expectation(world):
    """E[log rho' | y_1] = log rho + KL(q_old || q), by all pairs drawn from q_old; so its mean under q_old is 0."""
    prior, policy = world.policy(world.log_p0), world.policy(world.log_p0 + world.rewards.cos())
    old, now = prior.enumerate(), policy.enumerate()
    S = old.tokens.shape[0]
    first, second = torch.cartesian_prod(torch.arange(S), torch.arange(S)).unbind(1)
    d = torch.stack([first, second], 1)  # [S S, 2]: every pair, as prompts
    for p in range(len(world.counts)):
        reward = torch.zeros(S * S, 2, dtype=torch.float64)
        log_q, log_p0 = now.log_prob[p][d], old.log_prob[p][d]
        batch = Batch(old.tokens[d], old.mask[d], log_q, log_p0, reward, reward, old_log_q=log_p0)
        chance = old.log_prob[p].sum(1).exp()  # q_old(x)
        mean = (GRPOGuard().log_ratio(batch)[:, 0, 0].reshape(S, S) * chance).sum(1)  # over the other draw
        raw = (now.log_prob[p] - old.log_prob[p])[:, 0]
        kl = -float((chance * raw).sum())
        assert kl > 1e-4
        torch.testing.assert_close(mean, raw + kl)
        assert abs(float((mean * chance).sum())) < 1e-12


def test_refusals():
    with pytest.raises(ValueError, match="old_log_q"):
        GRPOGuard().loss(replace(moved((0.0, 0.0)), old_log_q=None), 1.0)
    with pytest.raises(ValueError, match="K >= 2"):
        GRPOGuard().loss(moved((0.0,)), 1.0)
