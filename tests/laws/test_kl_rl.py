"""Laws of KL-regularised REINFORCE: minus the gradient of J, zero at p*."""

import torch

from klbench.laws import check_objective
from klbench.objectives.kl_rl import KLRL


def test_laws_hold(broken):
    assert broken(check_objective(KLRL())) == []


def test_a_forgotten_stop_gradient_is_rejected(mutant, broken):
    def loss(self, batch, beta):
        log_q = batch.total(batch.log_q)
        gain = batch.reward - beta * (log_q - batch.total(batch.log_p0))
        return -(gain * log_q).mean()

    assert broken(check_objective(mutant(KLRL, loss=loss)))


def test_k1_beside_the_reward_is_rejected(mutant, broken):
    # its expected gradient is 0: the policy would collapse as without any KL
    def loss(self, batch, beta):
        log_q = batch.total(batch.log_q)
        return -(batch.reward * log_q).mean() + beta * (log_q - batch.total(batch.log_p0)).mean()

    assert broken(check_objective(mutant(KLRL, loss=loss)))


def test_a_baseline_that_holds_the_draw_is_rejected(mutant, broken):
    # over the whole batch, weighted by the reward, so that no single factor repairs it
    def loss(self, batch, beta):
        log_q = batch.total(batch.log_q)
        gain = batch.reward - beta * (log_q - batch.total(batch.log_p0)).detach()
        return -((gain - (gain * torch.softmax(batch.reward, 1)).sum(1, keepdim=True)) * log_q).mean()

    assert broken(check_objective(mutant(KLRL, loss=loss)))
