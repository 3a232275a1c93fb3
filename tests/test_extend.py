"""Going on from where a draw stands: what is added follows the law of what is left, and the states are those of plain forwards."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import model, tokenizer

from klbench.errors import UserError
from klbench.policies.causal_lm import CausalLM, wrap
from klbench.policies.tabular import Tabular
from klbench.target import Steerable

PROMPTS = ["a", "b c a b", "c c"]  # of different lengths, so that padding matters
T = 5
TOKENS = torch.tensor([[[1, 0, 0], [1, 2, 1], [2, 2, 0]], [[2, 1, 2], [0, 0, 0], [1, 2, 1]], [[2, 1, 2], [1, 1, 1], [2, 0, 0]]])
MASK = torch.tensor([[[1, 1, 0], [1, 1, 1], [1, 1, 1]], [[1, 1, 1], [1, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 1], [1, 1, 0]]]).bool()
ENDED = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]]).bool()  # one of them with its stop as the last token given


@pytest.fixture
def table() -> Tabular:
    logits = torch.randn(2, 31, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Tabular(logits, ("a", "b"), vocabulary=3, length=4, eos=0)


@pytest.fixture(params=["llama", "gpt2"])
def policy(request: pytest.FixtureRequest) -> CausalLM:
    return wrap(request.param, model(request.param, 0), tokenizer())


def one(tokens: list[int], mask: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[tokens]], dtype=torch.int64), torch.tensor([[mask]], dtype=torch.bool)


def shares(table: Tabular, tokens: torch.Tensor, mask: torch.Tensor, of: str, draws: int) -> torch.Tensor:
    """[S] how often each whole answer follows a beginning."""
    every = table.enumerate()
    found = table.extend([of], tokens.expand(-1, draws, -1), mask.expand(-1, draws, -1), table.length - tokens.shape[2], seed=3)
    same = (found.tokens[0][:, None] == every.tokens).all(2) & (found.mask[0][:, None] == every.mask).all(2)
    assert bool((same.sum(1) == 1).all())
    return same.double().mean(0)


@pytest.mark.parametrize("beginning", [[], [1], [2, 1], [1, 1, 2]])
@pytest.mark.parametrize("of, taken_for, holds", [("a", "a", True), ("b", "b", True), ("b", "a", False)])
def test_a_table_goes_on_by_the_law_given_the_beginning(table, beginning, of, taken_for, holds):
    every, draws, t = table.enumerate(), 20_000, len(beginning)
    begins = (every.tokens[:, :t] == torch.tensor(beginning, dtype=torch.int64)).all(1) & every.mask[:, :t].all(1)
    law = table.logits[table.prompts.index(taken_for)].exp() * begins
    law = law / law.sum()
    share = shares(table, *one(beginning, [1] * t), of, draws)
    off = ((share - law).abs() / (law * (1 - law) / draws + 1 / draws**2).sqrt()).max()
    assert bool(off < 4.5) == holds


def test_a_table_leaves_what_has_ended_and_says_what_it_added(table):
    prompts, tokens, mask = ["b", "a", "b"], TOKENS, MASK
    found = table.extend(prompts, tokens, mask, 1, seed=5)
    assert found.tokens.shape == (3, 3, 4) and torch.equal(found.tokens[..., :3], tokens) and torch.equal(found.mask[..., :3], mask)
    assert torch.equal(found.mask[..., 3], ~ENDED)
    said = table.log_prob(prompts, found.tokens, found.mask)
    torch.testing.assert_close(found.log_q[..., 3:].double(), said[..., 3:], rtol=1e-5, atol=1e-6)
    assert float(found.log_q[..., :3].abs().max()) == 0 and bool((found.log_q[..., 3][~ENDED] < 0).all())
    again, other = table.extend(prompts, tokens, mask, 1, seed=5), table.extend(prompts, tokens, mask, 1, seed=6)
    assert torch.equal(found.tokens, again.tokens) and not torch.equal(found.tokens, other.tokens)


def test_many_laws_at_once_do_not_mix(table):
    tokens, mask = torch.tensor([[[1], [2], [0]]]).repeat(2, 2000, 1), torch.ones(2, 6000, 1, dtype=torch.bool)
    found = table.extend(["a", "b"], tokens, mask, 3, seed=0)
    assert torch.equal(found.tokens[..., :1], tokens)
    every = table.enumerate()
    for p in range(2):
        for word in (1, 2):
            second = found.tokens[p, :, 1][tokens[p, :, 0] == word]
            mine = every.tokens[:, 0] == word
            law = table.logits[p].exp() * mine
            ends = float(law[every.tokens[:, 1] == 0].sum() / law.sum())
            assert abs(float((second == 0).double().mean()) - ends) < 4.5 * math.sqrt(ends * (1 - ends) / 4000)


def test_states_of_a_table_tell_every_prompt_and_prefix_apart(table):
    every = table.enumerate()
    tokens, mask = every.tokens.expand(2, -1, -1), every.mask.expand(2, -1, -1)
    states = table.states(["b", "a"], tokens, mask)
    assert float(states.sum(3).min()) == float(states.sum(3).max()) == 1
    names: dict[int, tuple] = {}
    for p, prompt in enumerate(["b", "a"]):
        for row, kept, state in zip(every.tokens.tolist(), every.mask, states[p], strict=True):
            for t in range(5):
                prefix = (prompt, *row[: min(t, int(kept.sum()))])
                assert names.setdefault(int(state[t].argmax()), prefix) == prefix
    assert len(set(names.values())) == len(names) == 2 * (1 + 3 + 6 + 12 + 24)
    torch.testing.assert_close(table.states(["a"], tokens[:1, :, :2], mask[:1, :, :2]), states[1:, :, :3])
    assert table.states(["a"], tokens[:1, :, :0], mask[:1, :, :0]).shape == (1, 31, 1, states.shape[3])


@pytest.mark.parametrize("tokens, mask", [([0, 1], [1, 1]), ([1, 0], [1, 0]), ([3, 1], [1, 1]), ([1, -1], [1, 1])])
def test_a_table_refuses_what_none_of_its_answers_begins_with(table, tokens, mask):
    for ask in (lambda *x: table.extend(*x, 1, 0), table.states):
        with pytest.raises(UserError, match="no answer of this table begins"):
            ask(["a"], *one(tokens, mask))
    with pytest.raises(UserError, match="1 to 4 tokens, not 5"):
        table.extend(["a"], *one([1, 1], [1, 1]), 3, 0)


def test_both_are_steerable(table, policy):
    assert isinstance(table, Steerable) and isinstance(policy, Steerable)


@torch.no_grad()
def by_hand(policy: CausalLM, prompt: str, given: list[int], uniform: torch.Tensor) -> tuple[list[int], list[float]]:
    """Tokens by inverse CDF, a plain forward each, and their log-probabilities."""
    added: list[int] = []
    said: list[float] = []
    for u in uniform.tolist():
        law = policy.model(torch.tensor([policy.encode(prompt) + given + added])).logits[0, -1].log_softmax(-1)
        word = int((law.exp().cumsum(0) <= u).sum())
        added.append(word)
        said.append(float(law[word]))
        if word == policy.eos:
            break
    return added, said


@pytest.mark.parametrize("rows", [1024, 2])
def test_a_model_goes_on_from_where_it_stands(policy, rows, monkeypatch):
    monkeypatch.setattr("klbench.policies.causal_lm.ROWS", rows)
    found = policy.extend(PROMPTS, TOKENS, MASK, 4, seed=15)
    uniform = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(15), dtype=torch.float64)
    assert torch.equal(found.tokens[..., :3], TOKENS) and torch.equal(found.mask[..., :3], MASK)
    ends = set()
    for p, prompt in enumerate(PROMPTS):
        for n in range(3):
            added, said = ([], []) if ENDED[p, n] else by_hand(policy, prompt, TOKENS[p, n].tolist(), uniform[p, n])
            kept = len(added)
            assert found.tokens[p, n, 3:].tolist() == added + [0] * (4 - kept)
            assert found.mask[p, n, 3:].tolist() == [True] * kept + [False] * (4 - kept)
            assert found.log_q[p, n].tolist() == pytest.approx([0.0] * 3 + said + [0.0] * (4 - kept), abs=2e-5)
            ends.add(kept)
    assert len(ends) > 2  # some end, some are cut
    said = policy.log_prob(PROMPTS, found.tokens, found.mask)
    assert torch.allclose(found.log_q[..., 3:], said[..., 3:], atol=2e-5)
    assert not torch.allclose(found.log_q[..., 3:], policy.log_prob(PROMPTS[::-1], found.tokens, found.mask)[..., 3:], atol=1e-2)


def test_from_nothing_it_samples(policy):
    nothing = torch.zeros(3, 6, 0, dtype=torch.int64)
    found, drawn = policy.extend(PROMPTS, nothing, nothing.bool(), T, seed=11), policy.sample(PROMPTS, 6, T, seed=11)
    assert torch.equal(found.tokens, drawn.tokens) and torch.equal(found.mask, drawn.mask)
    assert torch.allclose(found.log_q, drawn.log_q, atol=2e-5)


def test_all_ended_is_left_alone(policy):
    tokens, mask = torch.tensor([[[1, 0], [0, 0]]]), torch.tensor([[[True, True], [True, False]]])
    found = policy.extend(["a"], tokens, mask, 3, seed=0)
    assert torch.equal(found.tokens, torch.cat([tokens, torch.zeros(1, 2, 3).long()], 2)) and not found.mask[..., 2:].any()
    assert float(found.log_q.abs().max()) == 0


def test_other_stops_end_too(policy):
    other = policy.with_stops((2, 0))
    found = other.extend(["a"], *one([2], [1]), 2, seed=0)
    assert found.mask.tolist() == [[[True, False, False]]] and found.tokens.tolist() == [[[2, 2, 2]]]


@torch.no_grad()
def last_hidden(policy: CausalLM, ids: list[int]) -> torch.Tensor:
    """[len(ids), D] what the head reads, of one plain forward."""
    return policy.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[-1][0]


@pytest.mark.parametrize("layouts", [("cached", "tree"), ()])
def test_states_are_the_hidden_states_of_plain_forwards(policy, layouts, monkeypatch):
    object.__setattr__(policy.passes, "layouts", layouts)
    monkeypatch.setattr("klbench.policies.passes.POSITIONS", 12)  # in pieces
    states = policy.states(PROMPTS, TOKENS, MASK)
    assert states.shape == (3, 3, 4, 16) and states.dtype == torch.float32
    for p, prompt in enumerate(PROMPTS):
        start = policy.encode(prompt)
        for n in range(3):
            own = TOKENS[p, n][MASK[p, n]].tolist()
            hidden = last_hidden(policy, start + own)[len(start) - 1 :]
            wanted = torch.cat([hidden, hidden[-1:].expand(3 - len(own), -1)])
            torch.testing.assert_close(states[p, n], wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states[:, :, 1:], states[:, :, :-1], atol=1e-2)
    assert policy.model.get_output_embeddings()._forward_hooks == {}  # the model is left as it was


def test_states_of_the_prompt_alone(policy):
    nothing = torch.zeros(3, 2, 0, dtype=torch.int64)
    states = policy.states(PROMPTS, nothing, nothing.bool())
    for p, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(states[p, :, 0], last_hidden(policy, policy.encode(prompt))[-1].expand(2, -1), rtol=1e-4, atol=1e-4)


def test_no_room_is_one_line(policy):
    full = torch.ones(1, 1, 64, dtype=torch.int64)
    assert policy.log_prob(["a"], full, full.bool()).shape == (1, 1, 64)  # the last token is not read
    with pytest.raises(UserError, match="with 65 new ones that is more than the 64"):
        policy.states(["a"], full, full.bool())
    with pytest.raises(UserError, match="with 65 new ones"):
        policy.extend(["a"], full, full.bool(), 1, seed=0)
