"""Laws of SuperHF: on one-token answers it rests where log(q/p0) = (b_K/q)/beta + const; of the reward only the order counts."""

from dataclasses import replace

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import World, check_objective, expected_gradient
from klbench.objectives.superhf import SuperHF

ONE = World(counts=((2, 5, 3),), reward=((1.0, 0.0, 0.4),), draws=3, length=1, vocabulary=3)
LOGITS = torch.tensor([[0.2, -0.7, 0.4]], dtype=torch.float64)


def best_of(log_q, world=ONE):
    """[S] b_K/q, from the chances that all K draws are at most, or below, each reward."""
    q, r = log_q.exp(), world.rewards[0]
    upto, below = ((r[None] <= r[:, None]) * q).sum(1), ((r[None] < r[:, None]) * q).sum(1)
    return (upto**world.draws - below**world.draws) / (upto - below)


def test_laws_hold(broken):
    assert broken(check_objective(SuperHF())) == []


def wanted(logits, beta):
    logits = logits.clone().requires_grad_()
    log_q = logits.log_softmax(1)[0]
    clone = (best_of(log_q) * log_q.exp()).detach()
    loss = -(clone * log_q).sum() + beta * (log_q.exp() * (log_q - ONE.log_p0[0])).sum()
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_expected_gradient_on_one_token(beta):
    torch.testing.assert_close(expected_gradient(SuperHF(), ONE, LOGITS, beta), wanted(LOGITS, beta))


def written_out(batch, beta, every=False, k3=False, beside=1.0):
    best = torch.ones_like(batch.reward) if every else (batch.reward == batch.reward.amax(1, keepdim=True)).double()
    u = batch.log_q - batch.log_p0
    penalty = (-u).exp() - 1 + u if k3 else batch.kl_token
    share = best / best.sum(1, keepdim=True)
    return (share * batch.total(beside * beta * penalty - batch.log_q)).sum(1).mean()


@pytest.mark.parametrize("wrong", [{}, {"every": True}, {"k3": True}, {"beside": -1.0}])
def test_mutants_are_rejected(mutant, wrong):
    # "k3": an estimate of the same KL, whose gradient at draws held fixed is another one's, and on kept draws neither's
    made = mutant(SuperHF, needs_prior=True, loss=lambda self, *given: written_out(*given, **wrong))
    assert torch.allclose(expected_gradient(made, ONE, LOGITS, 0.7), wanted(LOGITS, 0.7), rtol=1e-6, atol=1e-9) == (not wrong)


def rest(beta):
    """The fixed point of q = p0 exp((b_K/q)/beta)/norm, damped."""
    log_q = ONE.log_p0[0]
    for _ in range(400):
        log_q = (0.8 * log_q + 0.2 * (ONE.log_p0[0] + best_of(log_q) / beta)).log_softmax(0)
    return log_q


def test_one_token_answers_rest_at_the_fixed_point():
    log_q = rest(2.0)
    assert float((log_q - ONE.log_p0[0]).abs().max()) > 0.3
    assert float(expected_gradient(SuperHF(), ONE, log_q[None], 2.0).norm()) < 1e-9
    assert float(expected_gradient(SuperHF(), ONE, ONE.log_target(2.0), 2.0).norm()) > 1e-2
    longer = replace(ONE, length=2, vocabulary=2)
    assert float(expected_gradient(SuperHF(), longer, log_q[None], 2.0).norm()) > 1e-2


def test_only_the_order_of_rewards_counts():
    stretched = replace(ONE, reward=((900.0, -3.0, 0.4),))
    torch.testing.assert_close(expected_gradient(SuperHF(), stretched, LOGITS, 0.7), expected_gradient(SuperHF(), ONE, LOGITS, 0.7))


def test_kl_token_is_needed():
    one = torch.zeros(1, 2, 1)
    with pytest.raises(ValueError, match="kl_token"):
        SuperHF().loss(Batch(one.long(), one == 0, one, one, one[..., 0], one[..., 0]), 1.0)
