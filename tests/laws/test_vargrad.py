"""Laws of VarGrad: twice grad KL(q || p*) with divisor K - 1, which is 2/beta times rloo in every single batch."""

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient, stated_gradient
from klbench.objectives.rloo import RLOO
from klbench.objectives.vargrad import VarGrad


def test_laws_hold(broken):
    assert broken(check_objective(VarGrad())) == []


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("correction, factor", [(1, lambda K: 2.0), (0, lambda K: 2 * (K - 1) / K)])
def test_the_factor(mutant, world, correction, factor):
    def loss(self, batch, beta):
        gap = batch.total(batch.log_q - batch.log_p0) - batch.reward / beta
        return gap.var(1, correction=correction).mean()

    objective = VarGrad() if correction else mutant(VarGrad, loss=loss)
    logits = world.log_p0 + 0.5 * world.rewards.sin()
    wanted = factor(world.draws) * stated_gradient(VarGrad(), world, logits, 0.7)
    torch.testing.assert_close(expected_gradient(objective, world, logits, 0.7), wanted, rtol=1e-6, atol=1e-8)


def variance(batch, beta, tilt=1.0, per_token=False, over_prompts=False, highest=False):
    gap = batch.total(batch.log_q - batch.log_p0) - tilt * batch.reward / beta
    gap = gap / batch.mask.sum(2) if per_token else gap
    if over_prompts:
        return gap.flatten().var()
    return ((gap - (gap.detach().amax(1, keepdim=True) if highest else gap.mean(1, keepdim=True))) ** 2).mean()


@pytest.mark.parametrize("wrong", [{"tilt": 1.1}, {"tilt": -1.0}, {"per_token": True}, {"highest": True}])
def test_mutants_are_rejected(mutant, broken, wrong):
    assert broken(check_objective(mutant(VarGrad, loss=lambda self, *given: variance(*given, **wrong))))


@pytest.mark.parametrize("right", [{}, {"over_prompts": True}])
def test_other_prompts_move_no_expectation(mutant, broken, right):
    assert broken(check_objective(mutant(VarGrad, loss=lambda self, *given: variance(*given, **right)))) == []


def group(log_q):
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3, 4)
    mask = torch.arange(4) < torch.tensor([[2, 4, 1], [3, 3, 4]])[:, :, None]
    return Batch(
        torch.zeros(shape, dtype=torch.int64),
        mask,
        log_q,
        -torch.rand(shape, generator=generator, dtype=torch.float64),
        torch.randn(2, 3, generator=generator, dtype=torch.float64),
        torch.zeros(2, 3),
    )


def test_every_batch_has_the_gradient_of_rloo():
    log_q = -torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    log_q.requires_grad_()
    (found,) = torch.autograd.grad(VarGrad().loss(group(log_q), 0.4), log_q)
    (wanted,) = torch.autograd.grad(RLOO().loss(group(log_q), 0.4), log_q)
    assert float(found.norm()) > 0.1
    torch.testing.assert_close(found, 2 / 0.4 * wanted)


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        VarGrad().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
