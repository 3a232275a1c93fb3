"""Laws of reward dropout: rloo on the thresholded reward, batch by batch, so that p* of that reward is its optimum."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from klbench.batch import Batch
from klbench.laws import check_objective
from klbench.method import RewardLaw
from klbench.objectives.reward_dropout import RewardDropout
from klbench.objectives.rloo import RLOO


@pytest.mark.parametrize("threshold", [0.0, 0.35])
def test_laws_hold(broken, threshold):
    assert broken(check_objective(RewardDropout(threshold))) == []


def group():
    log_q = torch.log(torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64))[..., None].requires_grad_()
    reward = torch.tensor([[-1.0, 0.3, 0.5, 2.0]], dtype=torch.float64)
    return Batch(
        torch.zeros(1, 4, 1).long(), torch.ones(1, 4, 1).bool(), log_q, log_q.detach() - 0.1 * reward[..., None], reward, reward * 0
    )


@pytest.mark.parametrize("threshold, left", [(0.0, [0, 0.3, 0.5, 2]), (0.5, [0, 0, 0.5, 2]), (0.6, [0, 0, 0, 2]), (-2, [-1, 0.3, 0.5, 2])])
def test_each_batch_is_rloo_on_the_thresholded_reward(threshold, left):
    batch = group()
    other = replace(batch, reward=torch.tensor([left], dtype=torch.float64))
    (found,) = torch.autograd.grad(RewardDropout(threshold).loss(batch, 0.5), batch.log_q)
    (wanted,) = torch.autograd.grad(RLOO().loss(other, 0.5), batch.log_q)
    torch.testing.assert_close(found, wanted)


def plain(batch, beta, drop, kl=1.0):
    log_q, K = batch.total(batch.log_q), batch.reward.shape[1]
    gain = drop(batch.reward) - kl * beta * (log_q - batch.total(batch.log_p0)).detach()
    return -((gain - gain.mean(1, keepdim=True)) * log_q).sum() / (K - 1)


@pytest.mark.parametrize(
    "drop, kl, holds",
    [
        (lambda r: r * (r >= 0), 1.0, True),
        (lambda r: r, 1.0, False),
        (lambda r: r * (r >= 0) * (r >= r.median(1, keepdim=True).values), 1.0, False),  # the batch's own quantile
        (lambda r: r * (r >= 0), 1.1, False),
    ],
)
def test_mutants_are_rejected(mutant, broken, drop, kl, holds):
    found = broken(check_objective(mutant(RewardDropout, loss=lambda self, batch, beta: plain(batch, beta, drop, kl))))
    assert (found == []) == holds


def test_declaring_the_posterior_is_rejected(mutant, broken):
    def own(self, reward, law, beta, draws):
        return reward / beta - law.log_mean_exp(law.levels / beta)

    assert broken(check_objective(mutant(RewardDropout, own=own))) == ["the gradient vanishes at the declared optimum"]


def test_own_by_hand():
    # -1 counts as 0, so two of four prior draws stay at weight 1 and two at e^2
    found = RewardDropout().own(np.array([-1.0, 1.0]), RewardLaw.of(np.array([-1.0, 0.0, 1.0, 1.0])), 0.5, 8)
    np.testing.assert_allclose(np.exp(found), np.array([1, np.e**2]) / ((1 + np.e**2) / 2))


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        RewardDropout().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
