"""Laws of token-level DPO: DPO's loss and optimum; there the tokens' implied rewards are soft advantages and telescope."""

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient
from klbench.objectives.dpo import DPO
from klbench.objectives.token_dpo import TokenDPO

WORLD, BETA = WORLDS[0], 0.4


def test_laws_hold(broken):
    assert broken(check_objective(TokenDPO())) == []


def test_the_loss_is_that_of_dpo():
    world = WORLDS[1]
    logits = world.log_p0 + 0.5 * world.rewards.sin()
    found, wanted = (expected_gradient(objective, world, logits, 0.7) for objective in (TokenDPO(), DPO()))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda self, batch, beta: beta * (batch.log_q - batch.log_p0) * batch.mask / batch.mask.sum(2, keepdim=True),
        lambda self, batch, beta: (batch.log_q - batch.log_p0)[:, :, :-1] * beta * batch.mask[:, :, :-1],  # the last token left out
        lambda self, batch, beta: beta * batch.log_q * batch.mask,
    ],
)
def test_mutants_do_not_rest_at_the_target(mutant, wrong):
    world, beta = WORLDS[1], 0.4
    scale = float(expected_gradient(TokenDPO(), world, world.log_p0, beta).norm())
    assert float(expected_gradient(TokenDPO(), world, world.log_target(beta), beta).norm()) < 1e-12 * scale
    assert float(expected_gradient(mutant(TokenDPO, token_reward=wrong), world, world.log_target(beta), beta).norm()) > 1e-3 * scale


def everything(logits):
    """One group of all answers."""
    every, prior = WORLD.policy(logits).enumerate(), WORLD.policy(WORLD.log_p0).enumerate()
    shape = (1, *every.tokens.shape)
    return Batch(
        every.tokens.reshape(shape), every.mask.reshape(shape), every.log_prob, prior.log_prob, WORLD.rewards, torch.zeros(shape[:2])
    )


def values(soft):
    """[S, T + 1] value of each prefix of each answer, summed over its continuations: beta log E[exp(r/beta)], or E[r]."""
    tokens, p0, reward = everything(WORLD.log_p0).tokens[0], WORLD.log_p0[0].exp(), WORLD.rewards[0]
    rows = []
    for row in tokens:
        at = [(tokens[:, :t] == row[:t]).all(1) for t in range(tokens.shape[1] + 1)]
        mean = [(p0[a] * ((reward[a] / BETA).exp() if soft else reward[a])).sum() / p0[a].sum() for a in at]
        rows.append(torch.stack([BETA * m.log() if soft else m for m in mean]))
    return torch.stack(rows)


@pytest.mark.parametrize("soft", [True, False])
def test_at_the_target_each_token_earns_what_the_value_moves_by(soft):
    found = TokenDPO().token_reward(everything(WORLD.log_target(BETA)), BETA)[0]
    assert (float((found - values(soft).diff(dim=1)).abs().max()) < 1e-12) == soft  # a mean in place of the soft value is seen


def test_at_the_target_the_tokens_telescope_to_the_reward():
    log_z = (WORLD.log_p0 + WORLD.rewards / BETA).logsumexp(1, keepdim=True)
    found = TokenDPO().token_reward(everything(WORLD.log_target(BETA)), BETA).sum(2)
    torch.testing.assert_close(found, WORLD.rewards - BETA * log_z)


def test_a_token_behind_the_end_earns_nothing():
    batch = everything(WORLD.log_p0 + WORLD.rewards)
    loud = Batch(**{**vars(batch), "log_q": batch.log_q + 5.0 * ~batch.mask})
    torch.testing.assert_close(TokenDPO().token_reward(loud, BETA), TokenDPO().token_reward(batch, BETA))
    assert bool((TokenDPO().token_reward(loud, BETA)[~batch.mask] == 0).all())


def test_one_draw_is_refused():
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        TokenDPO().loss(Batch(one.long(), one.bool() | True, one, one, one[0], one[0]), 1.0)
