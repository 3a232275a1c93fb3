"""Laws of the hybrid policy gradient: minus grad J from both halves of the batch, with a baseline that moves no expectation."""

from dataclasses import replace

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import World, check_objective, expected_gradient, stated_gradient
from klbench.objectives.hnpg import HNPG

WORLD = World(counts=((3, 2, 1),), reward=((1.0, 0.0, 0.4),), draws=4, length=2)  # two draws of the prior, two own
LOGITS = torch.tensor([[0.2, 0.9, -0.4]], dtype=torch.float64)


def test_laws_hold(broken):
    assert broken(check_objective(HNPG())) == []


def gap(objective, world=WORLD, beta=0.7):
    wanted = stated_gradient(HNPG(), world, LOGITS, beta)
    return float((expected_gradient(objective, world, LOGITS, beta) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("draws", [2, 3, 4])
def test_the_factor_is_one(draws):
    assert gap(HNPG(), replace(WORLD, draws=draws)) < 1e-6


def written_out(batch, beta, weigh="mixture", baseline="none", held=True):
    log_q, log_p0 = batch.total(batch.log_q), batch.total(batch.log_p0)
    now = log_q.detach()
    weight = {
        "mixture": (now - torch.logaddexp(now, log_p0)).exp() * 2,
        "apart": torch.where(batch.own, 1.0, (now - log_p0).exp()),
        "nothing": torch.ones_like(now),
        "prior": (now - log_p0).exp(),
    }[weigh]
    gain = batch.reward - beta * ((now if held else log_q) - log_p0)
    if baseline == "all":  # the mean of the other draws, whoever drew them
        gain = gain - (gain.sum(1, keepdim=True) - gain) / (gain.shape[1] - 1)
    return -(weight * gain * log_q).mean()


@pytest.mark.parametrize("right", [{}, {"weigh": "apart"}])
def test_weights_against_the_mixture_or_apart_are_both_exact(mutant, right):
    assert gap(mutant(HNPG, loss=lambda self, *given: written_out(*given, **right))) < 1e-6


@pytest.mark.parametrize("wrong", [{"weigh": "nothing"}, {"weigh": "prior"}, {"baseline": "all"}, {"held": False}])
def test_mutants_are_rejected(mutant, wrong):
    assert gap(mutant(HNPG, loss=lambda self, *given: written_out(*given, **wrong))) > 1e-2


def group(log_q, log_p0, reward, own):
    shape = (1, len(reward), 1)
    q, p, r = (torch.tensor(x, dtype=torch.float64) for x in (log_q, log_p0, reward))
    return Batch(
        q.view(shape).long(), torch.ones(shape, dtype=torch.bool), q.view(shape).requires_grad_(), p.view(shape), r[None], r[None] * 0,
        own=torch.tensor([own]),
    )  # fmt: skip


def test_no_weight_is_above_one_over_the_own_share():
    # the prior's draw is e^9 times likelier under q; the own one e^9 times less likely
    batch = group([-1.0, -10.0], [-10.0, -1.0], [1.0, 1.0], [False, True])
    (pull,) = torch.autograd.grad(HNPG().loss(batch, 1e-12), batch.log_q)
    assert (-2 * pull).flatten().tolist() == pytest.approx(
        [2 / (1 + torch.tensor(-9.0).exp().item()), 2 / (1 + torch.tensor(9.0).exp().item())]
    )


def test_no_noise_at_the_target():
    beta = 0.5
    log_q, log_p0 = WORLD.log_target(beta)[0], WORLD.log_p0[0]
    at = [0, 1, 2, 0]
    batch = group(log_q[at].tolist(), log_p0[at].tolist(), WORLD.rewards[0][at].tolist(), [False, False, True, True])
    (pull,) = torch.autograd.grad(HNPG().loss(batch, beta), batch.log_q)
    assert float(pull.abs().max()) < 1e-12


def test_it_must_know_whose_draws_they_are():
    with pytest.raises(ValueError, match="own"):
        HNPG().loss(replace(group([-1.0], [-1.0], [0.0], [True]), own=None), 1.0)
