"""Laws of KTO: the exact gradient at the prior, z without a gradient, and mass that leaves the minority whatever beta."""

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, World, check_objective, expected_gradient
from klbench.objectives.kto import KTO

WORLD = World(((1, 2, 3),), ((-1.5, 0.4, 1.1),), draws=2, length=2)


def desirable(world):
    """[P, S] P(x beats a prior draw)."""
    return ((world.rewards[:, :, None] - world.rewards[:, None, :]).sigmoid() * world.log_p0.exp()[:, None, :]).sum(2)


def test_laws_hold(broken):
    assert broken(check_objective(KTO())) == []


def swapped(self, batch, beta):
    return KTO(self.undesirable, self.desirable).loss(Batch(**{**vars(batch), "reward": -batch.reward}), beta)


def per_token(self, batch, beta):
    return KTO(self.desirable, self.undesirable).loss(Batch(**{**vars(batch), "log_q": batch.log_q / batch.mask.sum(2)[:, :, None]}), beta)


@pytest.mark.parametrize("wrong", [None, swapped, per_token, lambda self, batch, beta: KTO(1.3, 1.3).loss(batch, beta)])
@pytest.mark.parametrize("world", WORLDS)
def test_the_gradient_at_the_prior(mutant, world, wrong):
    # u = 0 there, so v = 0 and sigma(v) sigma(-v) = 1/4 at every draw
    beta, good = 0.7, desirable(world)
    weight = -beta / 4 * (1.5 * good - 0.7 * (1 - good)) * world.log_p0.exp()
    wanted = (weight - world.log_p0.exp() * weight.sum(1, keepdim=True)) / len(weight)
    objective = KTO(1.5, 0.7) if wrong is None else type("Mutant", (KTO,), {"loss": wrong})(1.5, 0.7)
    found = expected_gradient(objective, world, world.log_p0, beta)
    assert (float((found - wanted).abs().max()) < 1e-12) == (wrong is None)


def test_a_draw_by_hand():
    # K = 2, log-ratios 1 and 3: z is the other's, held constant; labels sigma(r_1 - r_2) and its complement
    log_q = torch.tensor([1.0, 3.0], dtype=torch.float64).reshape(1, 2, 1).requires_grad_()
    zero, reward = torch.zeros(1, 2, 1, dtype=torch.float64), torch.tensor([[0.2, 1.0]], dtype=torch.float64)
    loss = KTO(2.0, 0.5).loss(Batch(zero.long(), zero == 0, log_q, zero, reward, zero[..., 0]), 0.5)
    good = torch.tensor([-0.8, 0.8], dtype=torch.float64).sigmoid()
    v = 0.5 * torch.tensor([1.0 - 3.0, 3.0 - 1.0], dtype=torch.float64)
    assert float(loss.detach()) == pytest.approx(float((2 * good * (-v).sigmoid() + 0.5 * (1 - good) * v.sigmoid()).mean()))
    (gradient,) = torch.autograd.grad(loss, log_q)
    wanted = -0.5 * v.sigmoid() * (-v).sigmoid() * (2 * good - 0.5 * (1 - good)) / 2
    torch.testing.assert_close(gradient.flatten(), wanted)


@pytest.mark.parametrize("log_ratio, z", [(-2.0, 0.0), (0.5, 0.5)])
def test_the_reference_point_is_clamped(log_ratio, z):
    log_q = torch.full((1, 2, 1), log_ratio, dtype=torch.float64)
    zero = torch.zeros_like(log_q)
    loss = KTO(1.0, 0.0).loss(Batch(zero.long(), zero == 0, log_q, zero, zero[..., 0], zero[..., 0]), 1.0)
    assert float(loss) == pytest.approx(float(torch.tensor(z - log_ratio).sigmoid()) / 2)


def trained(objective, beta, steps=120):
    logits = WORLD.log_p0.clone()
    adam = torch.optim.Adam([logits], lr=0.15)
    for _ in range(steps):
        logits.grad = expected_gradient(objective, WORLD, logits, beta)
        adam.step()
    return logits.softmax(1)


@pytest.mark.parametrize("objective, kept", [(KTO(), [False, False, True]), (KTO(1.5, 1.0), [False, True, True])])
@pytest.mark.parametrize("beta", [0.4, 1.5])
def test_mass_leaves_the_minority_at_every_beta(objective, kept, beta):
    good = desirable(WORLD)
    assert ((objective.desirable * good > objective.undesirable * (1 - good))[0]).tolist() == kept
    q = trained(objective, beta)[0]
    assert (q > 5e-3).tolist() == kept
    assert float(q[good[0] < 0.2]) < 0.02 * float(WORLD.log_p0.exp()[0, 0])


def test_the_posterior_is_not_at_rest():
    scale = float(expected_gradient(KTO(), WORLD, WORLD.log_p0, 0.4).norm())
    assert float(expected_gradient(KTO(), WORLD, WORLD.log_target(0.4), 0.4).norm()) > 0.1 * scale


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        KTO().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
