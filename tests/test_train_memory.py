"""What training keeps: the prior's own weights under an adapter, and all that a resumed run needs, in full and in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import Killed, Letters, asked
from tiny import model, tokenizer

from klbench.policies import adapters
from klbench.policies.causal_lm import CausalLM, wrap
from klbench.train import train

TOKENS, MASK = torch.tensor([[[1, 2, 0], [3, 3, 1]]]), torch.ones(1, 2, 3, dtype=torch.bool)
SETTINGS: list[dict[str, Any]] = [
    {}, {"lora_rank": 2}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora_rank": 2}, {"micro": 1}, {"recompute": True, "micro": 1},
]  # fmt: skip


@pytest.fixture
def prior() -> CausalLM:
    return wrap("tiny", model("llama", 4), tokenizer())


def test_an_adapter_that_is_off_is_the_prior_bit_for_bit(prior: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuners: list[Any] = []
    made = adapters.low_rank

    def kept(*given: Any) -> Any:
        tuners.append(made(*given))
        return tuners[-1]

    monkeypatch.setattr(adapters, "low_rank", kept)
    before = prior.log_prob(["a"], TOKENS, MASK)
    train(asked("rloo", lora_rank=2), Letters(), prior, tmp_path / "p")
    assert torch.equal(prior.log_prob(["a"], TOKENS, MASK), before)
    (tuner,) = tuners
    policy = prior.with_model("p", tuner.model)
    assert not torch.equal(policy.log_prob(["a"], TOKENS, MASK), before)  # on, it says what was learnt
    tuner.disable_adapter_layers()
    assert torch.equal(policy.log_prob(["a"], TOKENS, MASK), before)
    memory = {p.data_ptr() for p in prior.model.parameters()}
    held = {name: p.data_ptr() in memory for name, p in tuner.model.named_parameters()}
    assert {name for name, shared in held.items() if not shared} == {name for name in held if "lora_" in name}
    assert {p.data_ptr() for p in tuner.model.parameters()} >= memory


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("objective", ["rloo", "ppo", "actor_critic"])
def test_a_resumed_run_is_bit_equal_down_to_adams_state(objective: str, settings: dict[str, Any], prior: CausalLM, tmp_path: Path) -> None:
    """Both are stopped behind the checkpoint of step 4; one of them was stopped behind that of step 2 before."""
    run = asked(objective, steps=6, **settings)

    def until(step: int) -> Any:
        def kill(event: dict[str, Any]) -> None:
            if event["step"] == step:
                raise Killed

        return kill

    for name, stops in (("whole", [5]), ("cut", [3, 5])):
        for stop in stops:
            with pytest.raises(Killed):
                train(run, Letters(), prior, tmp_path / name / "p", until(stop))
    whole, cut = (tmp_path / name / ".p.work" / "4" for name in ("whole", "cut"))
    files = sorted(p.name for p in whole.iterdir())
    assert files == ["adam.safetensors", "curve.jsonl", "micro", "state.safetensors", "weights.safetensors"]
    for file in files:
        assert (whole / file).read_bytes() == (cut / file).read_bytes(), file
    moments = load_file(whole / "adam.safetensors")
    assert {float(v) for k, v in moments.items() if k.endswith(".step")} == {4.0 * (2 if objective == "ppo" else 1)}
    (a, curve), (b, other) = (train(run, Letters(), prior, tmp_path / name / "p") for name in ("whole", "cut"))
    assert curve == other and a.weights_hash() == b.weights_hash()


def test_a_checkpoint_without_adams_state_would_be_noticed(prior: CausalLM, tmp_path: Path) -> None:
    """The mutant: moments that are 0 again."""
    run = asked("rloo", steps=6)

    def kill(event: dict[str, Any]) -> None:
        if event["step"] == 3:
            raise Killed

    whole, _ = train(run, Letters(), prior, tmp_path / "whole" / "p")
    with pytest.raises(Killed):
        train(run, Letters(), prior, tmp_path / "cut" / "p", kill)
    (file,) = (tmp_path / "cut").glob(".p.work/2/adam.safetensors")
    from safetensors.torch import save_file

    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    again, _ = train(run, Letters(), prior, tmp_path / "cut" / "p")
    assert again.weights_hash() != whole.weights_hash()
