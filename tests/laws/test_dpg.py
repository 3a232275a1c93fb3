"""Laws of DPG: the direction of grad KL(p* || q) at every visit, since no weight is divided by itself."""

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient, fresh_state, stated_gradient
from klbench.objectives.dpg import DPG

WORLD = WORLDS[0]
LOGITS = WORLD.log_p0 + 0.5 * WORLD.rewards.sin()


def test_laws_hold(broken):
    assert broken(check_objective(DPG())) == []


def off_direction(objective, beta=0.7):
    found = expected_gradient(objective, WORLD, LOGITS, beta, fresh_state(objective, WORLD))
    wanted = stated_gradient(DPG(), WORLD, LOGITS, beta)
    return float(1 - torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0))


def test_the_first_visit_is_exact_in_direction():
    assert off_direction(DPG()) < 1e-12


def weighted(batch, beta, state, own_z=False, baseline=1.0, swap=False):
    log_q = batch.total(batch.log_q)
    log_w = (batch.total(batch.log_p0) + batch.reward / beta - log_q).detach()
    log_z = log_w.logsumexp(1, keepdim=True) - torch.tensor(log_w.shape[1]).log() if own_z else state["log_z"][batch.prompt][:, None]
    advantage = log_w - log_z if swap else (log_w - log_z).exp() - baseline
    return -(advantage * log_q).mean(), state


def test_dividing_a_weight_by_a_mean_that_holds_it_is_rejected(mutant, broken):
    wrong = mutant(DPG, loss=lambda self, *given: weighted(*given, own_z=True))
    assert off_direction(wrong) > 1e-4
    assert broken(check_objective(wrong))


def test_swapping_the_kl_is_rejected(mutant, broken):
    assert broken(check_objective(mutant(DPG, loss=lambda self, *given: weighted(*given, swap=True))))


def test_the_baseline_moves_no_expectation(mutant, broken):
    # at the settled state only; a fresh state has no log_z, and this double takes 0 for it
    assert "the expected gradient is that of the stated loss" not in broken(
        check_objective(mutant(DPG, loss=lambda self, *given: weighted(*given, baseline=0.0)))
    )


def group(log_q, log_p0, reward, prompt):
    shape = (*reward.shape, 1)
    return Batch(
        torch.zeros(shape, dtype=torch.int64),
        torch.ones(shape, dtype=torch.bool),
        log_q.reshape(shape),
        log_p0.reshape(shape),
        reward,
        torch.zeros_like(reward),
        prompt=torch.tensor(prompt),
    )


def test_the_state_is_the_log_mean_of_all_weights():
    state = DPG().init(3, 0)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    for reward, prompt in (([0.0, 1.0], 2), ([2.0, 0.5], 2), ([3.0, 3.0], 0)):
        _, state = DPG().loss(group(zero, zero, torch.tensor([reward], dtype=torch.float64), [prompt]), 0.5, state)
    seen = torch.tensor([0.0, 2.0, 4.0, 1.0], dtype=torch.float64)
    assert state["log_z"].tolist() == pytest.approx([6.0, 0.0, float(seen.exp().mean().log())])
    assert state["seen"].tolist() == [2.0, 0.0, 4.0]


def test_the_given_state_is_left_alone():
    state = DPG().init(1, 0)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    DPG().loss(group(zero, zero, zero + 1, [0]), 0.5, state)
    assert state["seen"].tolist() == [0.0]


def test_prompt_is_needed():
    one = torch.zeros(1, 2, 1)
    with pytest.raises(ValueError, match="prompt"):
        DPG().loss(Batch(one.long(), one.bool() | True, one, one, one[..., 0], one[..., 0]), 1.0, DPG().init(1, 0))
