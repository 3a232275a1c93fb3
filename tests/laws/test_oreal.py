"""Laws of OREAL: on one-token answers the gradient and the resting share of right ones have closed forms; longer answers rest elsewhere."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import brentq

from klbench.batch import Batch
from klbench.laws import World, check_objective, expected_gradient
from klbench.objectives.oreal import OREAL

ONE = World(counts=((2, 5, 3),), reward=((1.0, 0.0, 1.0),), draws=3, length=1, vocabulary=3)
RIGHT = ONE.rewards


def test_laws_hold(broken):
    assert broken(check_objective(OREAL())) == []


def shares(p, K):
    """Of a group: P(0 < n < K), and E[A+], E[A-] over such groups."""
    chance = {n: math.comb(K, n) * p**n * (1 - p) ** (K - n) for n in range(1, K)}
    mixed = sum(chance.values())
    return mixed, sum(c * (K - n) for n, c in chance.items()) / (K - 1) / mixed, sum(c * n for n, c in chance.items()) / (K - 1) / mixed


def wanted(logits, beta, negative=0.5):
    """mixed (-A+ grad log p + negative A- grad log(1-p)), and beta E[(1 - p0/q) s] under half right, half wrong."""
    logits = logits.clone().requires_grad_()
    log_q = logits.log_softmax(1)
    q = log_q.detach().exp()
    p = float((q * RIGHT).sum())
    mixed, plus, minus = shares(p, ONE.draws)
    log_p = (log_q.exp() * RIGHT).sum().log()
    log_wrong = (log_q.exp() * (1 - RIGHT)).sum().log()
    half = q * (RIGHT / p + (1 - RIGHT) / (1 - p)) / 2
    loss = mixed * (-plus * log_p + negative * minus * log_wrong + beta * (half * (1 - ONE.log_p0.exp() / q) * log_q).sum())
    return torch.autograd.grad(loss, logits)[0]


LOGITS = torch.tensor([[0.2, -0.7, 0.4]], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.01, 2.0])
def test_the_expected_gradient_on_one_token(beta):
    torch.testing.assert_close(expected_gradient(OREAL(), ONE, LOGITS, beta), wanted(LOGITS, beta))


def written_out(batch, beta, negative=0.5, alone=True, everyone=False, swap=False):
    K, right = batch.reward.shape[1], batch.success()
    n = right.sum(1, keepdim=True)
    good, bad = right / n.clamp(min=1), (1 - right) / (K - n).clamp(min=1)
    pull = (negative * n * bad - (K - n) * good) / (K - 1 if alone else K)
    u = batch.log_q - batch.log_p0
    penalty = batch.total(u**2 / 2 if swap else (-u).exp() - 1 + u) * (1 / K if everyone else (good + bad) / 2)
    return (((n > 0) & (n < K)) * (pull * batch.total(batch.log_q) + beta * penalty)).sum(1).mean()


@pytest.mark.parametrize("wrong", [{}, {"negative": 1.0}, {"alone": False}, {"everyone": True}, {"swap": True}])
def test_mutants_are_rejected(mutant, wrong):
    found = expected_gradient(mutant(OREAL, loss=lambda self, *given: written_out(*given, **wrong)), ONE, LOGITS, 2.0)
    assert torch.allclose(found, wanted(LOGITS, 2.0), rtol=1e-6, atol=1e-9) == (not wrong)


def rest(beta, K, negative=0.5):
    """log q of the resting point of ONE's counts: the prior within right and wrong, the share p from the docstring's equation."""
    before = ONE.log_p0.exp()
    p0 = float((before * RIGHT).sum())

    def force(p):
        _, plus, minus = shares(p, K)
        return plus / p + negative * minus / (1 - p) - beta / 2 * (p - p0) * (p**-2 + (1 - p) ** -2)

    p = brentq(force, p0, 1 - 1e-12)
    return p, (before * (RIGHT * p / p0 + (1 - RIGHT) * (1 - p) / (1 - p0))).log()


@pytest.mark.parametrize("beta", [0.01, 0.3, 2.0])
def test_one_token_answers_rest_where_the_equation_says(beta):
    p, log_q = rest(beta, ONE.draws)
    assert float(RIGHT @ ONE.log_p0.exp().T) + 0.05 < p < 1
    scale = float(expected_gradient(OREAL(), ONE, ONE.log_p0, beta).norm())
    assert float(expected_gradient(OREAL(), ONE, log_q, beta).norm()) < 1e-9 * scale
    _, other = rest(beta, ONE.draws, negative=1.0)
    assert float(expected_gradient(OREAL(), ONE, other, beta).norm()) > 1e-5 * scale


def test_longer_answers_do_not_rest_there():
    _, log_q = rest(0.3, ONE.draws)
    longer = replace(ONE, length=2, vocabulary=2)
    assert float(expected_gradient(OREAL(), longer, log_q, 0.3).norm()) > 1e-2


def group(right):
    one = torch.full((1, len(right), 1), -1.0, dtype=torch.float64)
    reward = torch.tensor([right], dtype=torch.float64)
    return Batch(one.long(), one < 0, one.clone().requires_grad_(), one, reward, reward * 0, top=torch.ones(1))


def test_pulls_by_hand():
    # one right of three: A+ = 1, A- = 1/2; each wrong one gets half of .5 A-
    batch = group([0.0, 1.0, 0.0])
    (pull,) = torch.autograd.grad(OREAL().loss(batch, 0.0), batch.log_q)
    assert pull.flatten().tolist() == pytest.approx([0.125, -1.0, 0.125])


@pytest.mark.parametrize("right", [[0.0, 0.0], [1.0, 1.0]])
def test_a_group_of_one_kind_is_left_out(right):
    batch = group(right)
    assert torch.autograd.grad(OREAL().loss(batch, 1.0), batch.log_q)[0].abs().sum() == 0


def test_one_draw_is_refused():
    with pytest.raises(ValueError, match="K >= 2"):
        OREAL().loss(group([1.0]), 1.0)
