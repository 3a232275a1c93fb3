"""Laws of PPO: REINFORCE's gradient at q = q_old, none from tokens already past the clip."""

from dataclasses import replace

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import check_objective
from klbench.objectives.ppo import PPO


def test_laws_hold(broken):
    assert broken(check_objective(PPO())) == []


def test_an_advantage_without_kl_is_rejected(mutant, broken):
    def loss(self, batch, beta):
        advantage = (batch.reward - batch.reward.mean(1, keepdim=True))[:, :, None]
        return -batch.total((batch.log_q - batch.old_log_q).exp() * advantage).mean()

    assert broken(check_objective(mutant(PPO, loss=loss)))


def test_a_mean_over_tokens_is_rejected(mutant, broken):
    def loss(self, batch, beta):
        gain = batch.reward - beta * batch.total(batch.old_log_q - batch.log_p0)
        advantage = (gain - gain.mean(1, keepdim=True))[:, :, None]
        return -(batch.total((batch.log_q - batch.old_log_q).exp() * advantage) / batch.mask.sum(2)).mean()

    assert broken(check_objective(mutant(PPO, loss=loss)))


def moved(log_ratio):
    """One prompt, two draws of one token: advantages +2 and -2, log q/q_old as given."""
    old = torch.log(torch.tensor([0.4, 0.3], dtype=torch.float64)).reshape(1, 2, 1)
    log_q = (old + torch.tensor(log_ratio, dtype=torch.float64).reshape(1, 2, 1)).requires_grad_()
    return Batch(
        torch.zeros(1, 2, 1, dtype=torch.int64),
        torch.ones(1, 2, 1, dtype=torch.bool),
        log_q,
        old,
        torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        torch.zeros(1, 2),
        old_log_q=old,
    )


@pytest.mark.parametrize(
    "log_ratio, active",
    [((0.0, 0.0), (True, True)), ((0.3, 0.3), (False, True)), ((-0.3, -0.3), (True, False)), ((0.1, -0.1), (True, True))],
)
def test_the_active_set(log_ratio, active):
    batch = moved(log_ratio)
    (gradient,) = torch.autograd.grad(PPO().loss(batch, 0.5), batch.log_q)
    assert tuple((gradient.flatten() != 0).tolist()) == active
    # each active draw: -(A rho) / K with A = +2, -2
    wanted = [-a * torch.tensor(x).exp().item() / 2 if on else 0.0 for a, x, on in zip((2.0, -2.0), log_ratio, active, strict=True)]
    torch.testing.assert_close(gradient.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_wider_clip_lets_more_through():
    batch = moved((0.3, 0.0))
    assert float(torch.autograd.grad(PPO(clip=0.5).loss(batch, 0.5), batch.log_q)[0].flatten()[0]) != 0.0


def test_old_log_q_is_needed():
    with pytest.raises(ValueError, match="old_log_q"):
        PPO().loss(replace(moved((0.0, 0.0)), old_log_q=None), 1.0)
