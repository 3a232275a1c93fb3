"""Laws of unlikelihood: its minimum is one prefix by prefix, p0(.|right) for answers of one token; ascent falls for ever."""

import math

import pytest
import torch

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.laws import World, check_objective, expected_gradient
from klbench.objectives.unlikelihood import Unlikelihood

ONE = World(counts=((3, 2, 1),), reward=((1.0, 0.0, 1.0),), draws=1, length=1, vocabulary=3)
# answers [0], [1, 0], [1, 1]: the last alone is right, and shares its first token with the second
SHARED = World(counts=((1, 2, 3),), reward=((0.0, 0.0, 1.0),), draws=1, length=2)


@pytest.mark.parametrize("form", ["token", "ascent"])
def test_laws_hold(broken, form):
    assert broken(check_objective(Unlikelihood(form=form))) == []


def written_out(batch, alpha=1.0, keep=1.0, sign=1.0, whole=False):
    log_q = batch.total(batch.log_q)
    away = (1 - log_q.exp()).log() if whole else batch.total((1 - batch.log_q.exp()).clamp(min=1e-5).log())
    return -(keep * batch.success() * log_q + sign * alpha * (1 - batch.success()) * away).mean()


@pytest.mark.parametrize("wrong", [{}, {"alpha": 2.0}, {"keep": 0.0}, {"sign": -1.0}])
def test_the_expected_gradient_on_one_token(mutant, wrong):
    logits = torch.tensor([[0.2, -0.7, 0.4]], dtype=torch.float64, requires_grad=True)
    q, p0, right = logits.softmax(1), ONE.log_p0.exp(), ONE.rewards
    (wanted,) = torch.autograd.grad(-(p0 * (right * q.log() + (1 - right) * (1 - q).log())).sum(), logits)
    found = expected_gradient(mutant(Unlikelihood, loss=lambda self, batch, beta: written_out(batch, **wrong)), ONE, logits, 1.0)
    assert torch.allclose(found, wanted, atol=1e-12) == (not wrong)
    torch.testing.assert_close(expected_gradient(Unlikelihood(), ONE, logits, 1.0), wanted)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_a_right_answer_pays_for_the_tokens_it_shares(mutant, alpha):
    # of the first token: (C + alpha A) log q(1) + alpha B log(1 - q(1)) is greatest
    first = (3 + alpha) / (3 + alpha + 2 * alpha)
    rest = torch.tensor([[1 - first, 1e-12, first]], dtype=torch.float64).log()
    right_alone = torch.tensor([[1e-3, 1e-3, 1.0]], dtype=torch.float64).log()
    whole = mutant(Unlikelihood, loss=lambda self, batch, beta: written_out(batch, alpha=alpha, whole=True))
    slope = lambda objective, at: float(expected_gradient(objective, SHARED, at, 1.0).norm())  # noqa: E731
    assert slope(Unlikelihood(alpha=alpha), rest) < 1e-9 and slope(Unlikelihood(alpha=alpha), right_alone) > 0.1
    assert slope(whole, rest) > 0.1 and slope(whole, right_alone) < 1e-2


def descended(objective, steps, rate=0.5):
    """q of the three one-token answers at each of `steps`, by gradient descent."""
    logits, passed = ONE.log_p0.clone(), []
    for step in range(1, max(steps) + 1):
        logits = logits - rate * expected_gradient(objective, ONE, logits, 1.0)
        if step in steps:
            passed.append(logits.softmax(1)[0])
    return passed


def test_one_token_answers_end_at_the_right_ones_of_the_prior_as_one_over_steps():
    early, late = descended(Unlikelihood(), (100, 300), rate=2.0)
    assert float(late[0] / late[2]) == pytest.approx(3.0, rel=1e-2)
    assert float((early[1] / late[1]).log()) / math.log(3) == pytest.approx(1.0, rel=0.1)


def test_ascent_falls_by_a_constant_a_step():
    first, second, third = (float(q[1].log()) for q in descended(Unlikelihood(form="ascent"), (60, 120, 180)))
    assert second - third == pytest.approx(first - second, rel=0.02) and third < -30


def test_a_certain_token_stays_finite_and_one_behind_the_end_counts_nothing():
    log_q = torch.tensor([[[-1e-9, 0.0], [-0.5, 0.0]]], requires_grad=True)
    mask = torch.tensor([[[True, False], [True, False]]])
    batch = Batch(mask.long(), mask, log_q, log_q.detach(), torch.zeros(1, 2), torch.zeros(1, 2), top=torch.ones(1))
    loss = Unlikelihood().loss(batch, 1.0)
    (pull,) = torch.autograd.grad(loss, log_q)
    assert loss.item() == pytest.approx(-(math.log(1e-5) + math.log(1 - math.exp(-0.5))) / 2, rel=1e-5)
    assert torch.isfinite(pull).all() and pull[0, :, 1].tolist() == [0.0, 0.0]
    assert pull[0, 1, 0].item() == pytest.approx(math.exp(-0.5) / (1 - math.exp(-0.5)) / 2)


def test_an_unknown_form_is_refused():
    with pytest.raises(UserError, match="form of unlikelihood"):
        Unlikelihood(form="tokens")
