"""Training an adapter: it is reached from the command line, resumes bit for bit, moves what it may and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_train import Killed, Letters, asked, reverse_kl
from tiny import model, tokenizer

from klbench import models
from klbench.errors import UserError
from klbench.policies import adapters
from klbench.policies.causal_lm import CausalLM, wrap
from klbench.record import Train
from klbench.train import train

RANK = 2


@pytest.fixture(params=["llama", "gpt2"])
def prior(request: pytest.FixtureRequest) -> CausalLM:
    return wrap("tiny", model(request.param, 4), tokenizer())


def moved(policy: CausalLM, prior: CausalLM) -> dict[str, torch.Tensor]:
    """What training added to each weight that is not the prior's any more."""
    before, after = prior.model.state_dict(), policy.model.state_dict()
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def rank_of(change: torch.Tensor) -> int:
    """Singular values above the rounding of a float32 sum."""
    values = torch.linalg.svdvals(change.double())
    return int((values > 1e-4 * values[0]).sum())


def test_linear_layers_move_by_their_rank_and_nothing_else_moves(prior: CausalLM, tmp_path: Path) -> None:
    before = prior.weights_hash()
    policy, _ = train(asked("rloo", lora_rank=RANK), Letters(), prior, tmp_path / "p")
    change = moved(policy, prior)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "c_proj", "c_fc"}
    assert change and {name.split(".")[-2] for name in change} <= names and all(name.endswith(".weight") for name in change)
    assert {rank_of(x) for x in change.values()} <= {1, RANK}
    assert prior.weights_hash() == before and all(p.requires_grad for p in prior.model.parameters())
    whole, _ = train(asked("rloo"), Letters(), prior, tmp_path / "whole")  # the mutant: all weights, of any rank
    everything = moved(whole, prior)
    assert len(everything) > len(change) and max(rank_of(everything[name]) for name in change) > RANK


def test_it_starts_at_the_prior_and_in_its_memory(prior: CausalLM) -> None:
    tuner = adapters.low_rank("tiny", prior.model, RANK, seed=5)
    policy = prior.with_model("p", tuner.model)
    tokens, mask = torch.tensor([[[1, 2, 0]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    assert torch.equal(policy.log_prob(["a"], tokens, mask), prior.log_prob(["a"], tokens, mask))
    memory = {p.data_ptr() for p in prior.model.parameters()}
    mine = [(name, p) for name, p in tuner.model.named_parameters() if p.data_ptr() not in memory]
    assert mine and all("lora_" in name and p.requires_grad for name, p in mine)
    assert all(not p.requires_grad for p in tuner.model.parameters() if p.data_ptr() in memory)
    again, other = (adapters.low_rank("tiny", prior.model, RANK, seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(x, again[name]) for name, x in tuner.state_dict().items())
    assert any(not torch.equal(x, other[name]) for name, x in tuner.state_dict().items())


@pytest.mark.parametrize("objective", ["rloo", "ppo", "trajectory_balance", "rb_kl", "conditional_training"])
def test_a_killed_run_goes_on_bit_for_bit(objective: str, prior: CausalLM, tmp_path: Path) -> None:
    run, task = asked(objective, lora_rank=RANK), Letters()
    whole, curve = train(run, task, prior, tmp_path / "whole" / "p")

    def kill(event: dict[str, object]) -> None:
        if event["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        train(run, task, prior, tmp_path / "cut" / "p", kill)
    (weights,) = (tmp_path / "cut").glob(".p.work/*/weights.safetensors")
    assert weights.stat().st_size < 20_000 and b"lora_A" in weights.read_bytes() and b"base_layer" not in weights.read_bytes()
    again, curve_again = train(run, task, prior, tmp_path / "cut" / "p")
    assert curve_again == curve and again.weights_hash() == whole.weights_hash()
    stored, curve_stored = train(run, task, prior, tmp_path / "cut" / "p", kill)  # done: nothing is trained again
    assert curve_stored == curve and stored.weights_hash() == whole.weights_hash()


def test_what_is_saved_is_a_policy_like_any_other(prior: CausalLM, tmp_path: Path) -> None:
    policy, _ = train(asked("rloo", lora_rank=RANK), Letters(), prior, tmp_path / "p")
    assert not list((tmp_path / "p").glob("adapter*"))
    opened = models.open_policy("mine", str(tmp_path / "p"), prior)
    assert isinstance(opened, CausalLM)
    tokens, mask = torch.tensor([[[1, 2, 0]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    assert torch.equal(opened.log_prob(["a"], tokens, mask), policy.log_prob(["a"], tokens, mask))
    further, _ = train(asked("rloo", steps=1), Letters(), opened, tmp_path / "q")  # and all of it can be trained on
    assert len(moved(further, opened)) == len(moved(train(asked("rloo", steps=1), Letters(), prior, tmp_path / "r")[0], prior))


def test_it_nears_the_posterior(prior: CausalLM, tmp_path: Path) -> None:
    run = asked("rloo", 60, samples=16, prompts=3, lr=0.01, checkpoint_every=1000, lora_rank=RANK)
    policy, _ = train(run, Letters(), prior, tmp_path / "p")
    assert reverse_kl(policy, prior) < 0.5 * reverse_kl(prior, prior)


def test_a_rank_is_part_of_the_id_and_none_is_not() -> None:
    assert "lora_rank" not in Train().model_dump() and Train(lora_rank=2).model_dump()["lora_rank"] == 2
    assert len({asked("rloo", **given).id for given in ({}, {"lora_rank": 0}, {"lora_rank": 1}, {"lora_rank": 2})}) == 3


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UserError, match="^mine takes no LoRA adapter: "):
        adapters.low_rank("mine", torch.nn.Sequential(torch.nn.Embedding(4, 4)), RANK, 0)
