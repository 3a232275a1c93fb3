"""Laws of DPO: the population's logistic loss over pairs, its optimum the posterior at the same beta."""

import pytest
from torch.nn.functional import logsigmoid

from klbench.laws import check_objective
from klbench.objectives.dpo import DPO
from klbench.preferences import bradley_terry, pairs


def test_laws_hold(broken):
    assert broken(check_objective(DPO())) == []


def logistic(batch, beta, per_token=False, certain=False, reference=True):
    u = batch.total(batch.log_q - batch.log_p0 if reference else batch.log_q)
    u = u / batch.mask.sum(2) if per_token else u
    i, j = pairs(u.shape[1])
    wins = bradley_terry(batch.reward)
    wins = (wins > 0.5).double() if certain else wins
    margin = beta * (u[:, i] - u[:, j])
    return -(wins * logsigmoid(margin) + (1 - wins) * logsigmoid(-margin)).mean()


@pytest.mark.parametrize("wrong", [{}, {"per_token": True}, {"certain": True}, {"reference": False}])
def test_mutants_are_rejected(mutant, broken, wrong):
    found = broken(check_objective(mutant(DPO, loss=lambda self, batch, beta: logistic(batch, beta, **wrong))))
    assert bool(found) == bool(wrong)


def test_a_wrong_beta_is_rejected(mutant, broken):
    found = broken(check_objective(mutant(DPO, loss=lambda self, batch, beta: logistic(batch, 1.1 * beta))))
    assert "the gradient vanishes at the declared optimum" in found
