"""The table of answers: numbers worked by hand, sums over everything, refusals."""

import math

import pytest
import torch

from klbench.errors import UserError
from klbench.policies.tabular import Tabular, sequences
from klbench.target import Policy


@pytest.fixture
def table():
    # answers 0 | 10 | 110 | 111 with probabilities .1 .2 .3 .4; the second prompt reversed
    law = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    return Tabular(law.log() + 5.0, ("a", "b"), vocabulary=2, length=3, eos=0)


def test_answers_with_an_end():
    tokens, mask = sequences(2, 3, eos=0)
    assert tokens.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert mask.sum(1).tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize("vocabulary, length, eos, answers", [(3, 2, None, 9), (3, 2, 1, 7), (3, 3, 2, 15), (2, 4, 1, 5)])
def test_how_many(vocabulary, length, eos, answers):
    tokens, mask = sequences(vocabulary, length, eos)
    assert len({tuple(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)}) == len(tokens) == answers


def test_token_probabilities_by_hand(table):
    every = table.enumerate()
    wanted = torch.tensor([[0.1, 1, 1], [0.9, 2 / 9, 1], [0.9, 7 / 9, 3 / 7], [0.9, 7 / 9, 4 / 7]], dtype=torch.float64)
    torch.testing.assert_close(every.log_prob[0].exp(), wanted)
    assert float(every.log_prob[:, ~every.mask].abs().max()) == 0.0
    torch.testing.assert_close(every.log_prob.sum(2).exp().sum(1), torch.ones(2, dtype=torch.float64))


def test_log_prob_agrees_with_the_list_and_has_a_gradient(table):
    table.logits.requires_grad_()
    every = table.enumerate()
    rows = torch.tensor([[3, 0], [2, 1]])
    found = table.log_prob(["b", "a"], every.tokens[rows], every.mask[rows])
    torch.testing.assert_close(found, torch.stack([every.log_prob[1, rows[0]], every.log_prob[0, rows[1]]]))
    found.sum().backward()
    assert table.logits.grad is not None and float(table.logits.grad.norm()) > 0


def test_log_prob_reads_nothing_behind_the_end(table):
    tokens, mask = torch.tensor([[[1, 0, 1]]]), torch.tensor([[[True, True, False]]])
    assert float(table.log_prob(["a"], tokens, mask).sum()) == pytest.approx(math.log(0.2))


def test_a_shorter_cut_is_the_law_of_the_beginning(table):
    tokens, mask = torch.tensor([[[1, 1]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    assert float(table.log_prob(["a"], tokens, mask).sum()) == pytest.approx(math.log(0.7))
    draws = table.sample(["a"], 4000, 2, seed=1)
    both = (draws.tokens == 1).all(2).double().mean()
    assert abs(float(both) - 0.7) < 4 * math.sqrt(0.21 / 4000)


def test_draws_follow_the_table_and_carry_their_log_probabilities(table):
    assert isinstance(table, Policy)
    draws = table.sample(["b", "a"], 8000, 3, seed=11)
    again = table.sample(["b", "a"], 8000, 3, seed=11)
    assert torch.equal(draws.tokens, again.tokens) and draws.log_q.dtype == torch.float32
    torch.testing.assert_close(draws.log_q.double(), table.log_prob(["b", "a"], draws.tokens, draws.mask), rtol=1e-5, atol=1e-6)
    ends_at_once = (draws.mask.sum(2) == 1).double().mean(1)
    for found, p in zip(ends_at_once.tolist(), (0.4, 0.1), strict=True):
        assert abs(found - p) < 4 * math.sqrt(p * (1 - p) / 8000)


def test_another_seed_draws_otherwise(table):
    assert not torch.equal(table.sample(["a"], 50, 3, 1).tokens, table.sample(["a"], 50, 3, 2).tokens)


def test_kl_of_tokens_adds_up_to_that_of_answers(table):
    prior = Tabular(torch.tensor([[0.3, -1.0, 0.2, 0.0], [0.0, 0.0, 1.0, -2.0]], dtype=torch.float64), ("a", "b"), 2, 3, 0)
    every, log_p0 = table.enumerate(), prior.logits.log_softmax(1)
    log_q = every.log_prob.sum(2)
    per_token = table.kl_token(prior)
    assert float(per_token[:, ~every.mask].abs().max()) < 1e-12
    torch.testing.assert_close((log_q.exp() * per_token.sum(2)).sum(1), (log_q.exp() * (log_q - log_p0)).sum(1))
    # the wrong direction is another number
    assert abs(float(((log_q.exp() * per_token.sum(2)).sum(1) - (log_p0.exp() * (log_p0 - log_q)).sum(1))[0])) > 1e-3


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda t: t.sample(["c"], 1, 3, 0), "no prompt 'c'"),
        (lambda t: t.sample(["a"], 1, 4, 0), "1 to 3 tokens, not 4"),
        (lambda t: t.log_prob(["a"], torch.tensor([[[2, 0, 0]]]), torch.tensor([[[True, True, False]]])), r"tokens \[2, 0, 0\]"),
        (lambda t: t.log_prob(["a"], torch.zeros(1, 1, 4).long(), torch.ones(1, 1, 4).bool()), "at most 3 tokens"),
        (lambda t: Tabular(t.logits[:, :3], t.prompts, 2, 3, 0), r"\(2, 4\) \(prompts, answers\) expected"),
        (lambda t: sequences(30, 4), "at most 4096 answers"),
        (lambda t: sequences(3, 2, 3), "eos among the words"),
    ],
)
def test_refusals(table, call, says):
    with pytest.raises(UserError, match=says):
        call(table)
