"""Laws of D2O: DPO's loss of a pair where there is one own draw; a margin that only grows, and no resting point."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import logsigmoid

from klbench.batch import Batch
from klbench.laws import World, check_objective, expected_gradient
from klbench.objectives.d2o import D2O
from klbench.objectives.dpo import DPO

PAIR = World(counts=((3, 2, 1),), reward=((1.0, 0.0, 1.0),), draws=2, length=1, vocabulary=3)
TRIPLE = replace(PAIR, draws=3)  # one of the prior, two own
LOGITS = torch.tensor([[0.2, -0.7, 0.4]], dtype=torch.float64)


def test_laws_hold(broken):
    assert broken(check_objective(D2O())) == []


def wanted(logits, beta, negative=1.0):
    """The gradient on TRIPLE: every wrong l of the prior, every two own draws, their probabilities held fixed."""
    logits = logits.clone().requires_grad_()
    u, q = (logits.log_softmax(1) - TRIPLE.log_p0)[0], logits.detach().softmax(1)[0]
    anchor = (u[:, None] + u[None, :]) / 2
    loss = sum(
        -(p * q[:, None] * q[None, :] * logsigmoid(beta * (anchor - negative * u[i]))).sum()
        for i, p in enumerate(TRIPLE.log_p0[0].exp())
        if TRIPLE.reward[0][i] < 1
    )
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("beta, negative", [(0.1, 1.0), (1.3, 0.5)])
def test_the_expected_gradient(beta, negative):
    found = expected_gradient(D2O(negative=negative), TRIPLE, LOGITS, beta)
    torch.testing.assert_close(found, wanted(LOGITS, beta, negative))


def written_out(batch, beta, filtered=False, every=False, swapped=False):
    u = batch.total(batch.log_q - batch.log_p0)
    mine = torch.ones_like(u) if every else batch.own.double()
    mine = mine * batch.success() if filtered else mine
    wrong = (1 - batch.success()) * ~batch.own
    margin = (mine * u).sum(1, keepdim=True) / mine.sum(1, keepdim=True).clamp(min=1) - u
    return -(wrong * logsigmoid((-beta if swapped else beta) * margin)).sum(1).mean()


@pytest.mark.parametrize("wrong", [{}, {"filtered": True}, {"every": True}, {"swapped": True}])
def test_mutants_are_rejected(mutant, wrong):
    found = expected_gradient(mutant(D2O, loss=lambda self, *given: written_out(*given, **wrong)), TRIPLE, LOGITS, 0.7)
    assert torch.allclose(found, wanted(LOGITS, 0.7), rtol=1e-6, atol=1e-9) == (not wrong)


def pair(reward=(-50.0, 50.0), own=(False, True)):
    shape = (1, 2, 1)
    log_q = torch.tensor([-1.0, -2.5], dtype=torch.float64).view(shape).requires_grad_()
    log_p0 = torch.tensor([-1.7, -2.0], dtype=torch.float64).view(shape)
    given = torch.tensor([reward], dtype=torch.float64)
    return Batch(log_p0.long(), log_p0 < 0, log_q, log_p0, given, given * 0, top=torch.tensor([50.0]), own=torch.tensor([own]))


def test_one_own_draw_against_one_wrong_draw_is_dpo():
    # rewards 100 apart: DPO's label is certain, and the own draw has won
    batch = pair()
    loss, theirs = D2O().loss(batch, 0.3), DPO().loss(batch, 0.3)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, batch.log_q)[0], torch.autograd.grad(theirs, batch.log_q)[0])
    assert D2O(negative=2.0).loss(batch, 0.3).item() != pytest.approx(theirs.item(), rel=1e-3)


def test_a_prompt_without_a_wrong_draw_adds_nothing():
    batch = pair(reward=(50.0, -50.0))
    loss = D2O().loss(batch, 0.3)
    assert loss.item() == 0 and torch.autograd.grad(loss, batch.log_q)[0].abs().sum() == 0


def test_the_margin_only_grows():
    logits, passed = PAIR.log_p0.clone(), []
    for _ in range(60):
        logits = logits - 2.0 * expected_gradient(D2O(), PAIR, logits, 0.5)
        passed.append(float(logits.log_softmax(1)[0, 1]))
    assert all(later < earlier for earlier, later in pairwise(passed)) and passed[-1] < -4


def test_the_right_answers_of_the_prior_are_no_resting_point():
    # a pair lifts the logit of its own draw and lowers the wrong one's: the likelier right answer is lifted more often
    right_alone = torch.tensor([[0.75, 1e-13, 0.25]], dtype=torch.float64).log()
    lifted = -expected_gradient(D2O(), PAIR, right_alone, 0.1)[0]
    assert float(lifted[0]) == pytest.approx(3 * float(lifted[2]), rel=1e-6) and lifted[2] > 1e-4


@pytest.mark.parametrize("own", [None, (False, False)])
def test_own_draws_are_needed(own):
    batch = replace(pair(), own=None) if own is None else pair(own=own)
    with pytest.raises(ValueError, match="draws of the policy"):
        D2O().loss(batch, 1.0)
