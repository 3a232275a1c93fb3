"""Laws of D3S: the subset is the one of largest variance, logit p takes the place of p, and p* stays the fixed point."""

from itertools import combinations

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, World, check_objective, expected_gradient
from klbench.objectives.d3s import D3S
from klbench.objectives.rloo import RLOO

SMALL = WORLDS[1]
RIGHT = World(counts=((5, 3, 2),), reward=((0.0, 0.0, 1.0),), draws=3, length=1, vocabulary=3)
LOGITS = torch.tensor([[0.2, -0.7, 0.9]], dtype=torch.float64)


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_laws_hold(broken, share):
    assert broken(check_objective(D3S(share))) == []


@pytest.mark.parametrize("share, keep", [(0.1, 2), (0.5, 4), (0.6, 5), (1.0, 7)])
def test_no_other_subset_varies_more(share, keep):
    gain = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    kept = D3S(share).kept(gain)
    assert kept.shape == (40, keep) and all(len(set(row)) == keep for row in kept.tolist())
    best = torch.stack([gain[:, list(some)].var(1) for some in combinations(range(7), keep)]).amax(0)
    torch.testing.assert_close(gain.gather(1, kept).var(1), best)


@pytest.mark.parametrize("share, keep", [(0.5, 2), (1.0, 3)])
def test_right_and_wrong(share, keep):
    """One of each gives logit p, a quarter of it where a group holds both; all three give p, (K-1)/K of it."""
    logits = LOGITS.clone().requires_grad_()
    log_q = logits.log_softmax(1)
    p = log_q[0, 2].exp()
    at = p.item()
    gain = (1 - at**3 - (1 - at) ** 3) / 4 * (p / (1 - p)).log() if keep == 2 else 2 / 3 * p
    (wanted,) = torch.autograd.grad(-gain, logits)
    torch.testing.assert_close(expected_gradient(D3S(share), RIGHT, LOGITS, 0.0), wanted)


def test_all_kept_is_rloo_shrunk():
    world = WORLDS[0]
    found = expected_gradient(D3S(1.0), world, LOGITS[:, [0, 1, 2, 1]], 0.7)
    torch.testing.assert_close(found, expected_gradient(RLOO(), world, LOGITS[:, [0, 1, 2, 1]], 0.7) * 2 / 3)


def picked(batch, beta, outside=False, uncentred=False, factor=1.0):
    log_q = batch.total(batch.log_q)
    u = (log_q - batch.total(batch.log_p0)).detach()
    gain = batch.reward if outside else batch.reward - factor * beta * u
    kept = D3S().kept(gain)
    chosen = gain.gather(1, kept)
    loss = -((chosen - (0 if uncentred else chosen.mean(1, keepdim=True))) * log_q.gather(1, kept)).mean()
    K = u.shape[1]
    return loss + (beta * (u - u.mean(1, keepdim=True)) * K / (K - 1) * log_q).mean() if outside else loss


@pytest.mark.parametrize("wrong", [{}, {"outside": True}, {"uncentred": True}, {"factor": 1.1}])
def test_mutants_are_rejected(mutant, broken, wrong):
    found = broken(check_objective(mutant(D3S, loss=lambda self, *given: picked(*given, **wrong))))
    assert bool(found) == bool(wrong)


def test_training_ends_at_the_target():
    # no loss is known of which this is the gradient, so the law at p* does not say that p* is reached
    world = World(counts=((1, 2, 3),), reward=((0.4, -0.3, 1.1),), draws=3, length=2)
    logits = world.log_p0.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.1)
    for _ in range(120):
        logits.grad = expected_gradient(D3S(), world, logits, 0.5)
        adam.step()
    q = logits.detach().log_softmax(1)
    assert float((q.exp() * (q - world.log_target(0.5))).sum()) < 1e-3
    assert float((q.exp() * (q - world.log_p0)).sum()) > 0.1


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        D3S().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
