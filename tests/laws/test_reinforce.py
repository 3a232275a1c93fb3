"""Laws of REINFORCE: the gradient of E_q[r], whatever the baseline, and no prior read."""

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import check_objective
from klbench.objectives.reinforce import Reinforce


@pytest.mark.parametrize("objective", [Reinforce(), Reinforce(baseline=1.7), Reinforce(leave_one_out=True)])
def test_laws_hold(objective, broken):
    assert broken(check_objective(objective)) == []


def test_a_baseline_that_reads_its_own_draw_is_rejected(mutant, broken):
    def loss(self, batch, beta):
        advantage = batch.reward - batch.reward.amax(1, keepdim=True)
        return -(advantage * batch.total(batch.log_q)).mean()

    assert broken(check_objective(mutant(Reinforce, loss=loss)))


def test_the_wrong_sign_is_rejected(mutant, broken):
    found = broken(check_objective(mutant(Reinforce, loss=lambda self, batch, beta: (batch.reward * batch.total(batch.log_q)).mean())))
    assert "the expected gradient is that of the stated loss" in found
    assert "the first step from the prior raises the reward" in found


def test_reading_the_prior_is_rejected(mutant, broken):
    def loss(self, batch, beta):
        gain = batch.reward - beta * batch.total(batch.log_q - batch.log_p0).detach()
        return -(gain * batch.total(batch.log_q)).mean()

    assert broken(check_objective(mutant(Reinforce, loss=loss)))


def test_one_draw_has_no_rest():
    one = torch.zeros(1, 1, 1)
    batch = Batch(one.long(), one.bool() | True, one, one, one[0], one[0])
    with pytest.raises(ValueError, match="K >= 2"):
        Reinforce(leave_one_out=True).loss(batch, 1.0)
