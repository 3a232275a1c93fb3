"""Gradients in parts: those of one piece, whatever the loss compares; parts that fit; layers run again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_train import Killed, Letters, asked
from tiny import model, tokenizer
from torch import Tensor

from klbench import gradient, method
from klbench.batch import Batch
from klbench.errors import UserError
from klbench.gradient import Fitted, Said, free_memory, layers_of, recomputed
from klbench.method import AbstractObjective
from klbench.policies.causal_lm import CausalLM, wrap
from klbench.record import Train
from klbench.train import train

PROMPTS = ["a", "b c", "c c b"]
KINDS = [  # one of each kind of loss
    "rloo", "ppo", "grpo", "dpo", "vargrad", "trajectory_balance", "rb_kl", "kl_in_loss", "superhf", "hnpg", "conditional_training",
    "implicit_prm", "sft:prompt_weight=0.5", "actor_critic", "fdpg",
]  # fmt: skip


@pytest.fixture
def prior() -> CausalLM:
    return wrap("tiny", model("llama", 4), tokenizer())


def gradients(objective: str, micro: int, prior: CausalLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Of all parameters, the objective's own too, at each optimiser step of two training steps that leave the weights alone."""
    seen: list[list[Tensor]] = []
    step = torch.optim.Adam.step

    def watched(self: torch.optim.Adam) -> None:
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None])
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: None)
        patch.setattr(torch.optim.Adam, "step", watched)
        train(asked(objective, steps=2, prompts=3, lr=0.0, micro=micro), Letters(), prior, folder)
    return seen


def apart(left: list[list[Tensor]], right: list[list[Tensor]]) -> float:
    """The greatest difference beside the greatest gradient."""
    assert len(left) == len(right) and all(len(a) == len(b) > 0 for a, b in zip(left, right, strict=True))
    largest = max(float(x.abs().max()) for step in left for x in step)
    return max(float((x - y).abs().max()) for a, b in zip(left, right, strict=True) for x, y in zip(a, b, strict=True)) / largest


@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("micro", [1, 2])
def test_parts_have_the_gradient_of_one_piece(
    objective: str, micro: int, prior: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradients(objective, 3, prior, tmp_path / "whole", monkeypatch)
    assert apart(whole, gradients(objective, micro, prior, tmp_path / "parts", monkeypatch)) < 1e-6


def test_a_loss_worked_out_part_by_part_has_another(prior: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: trajectory balance over prompts whose mean is taken in each part."""
    made = method.objective("trajectory_balance")
    assert apart(*(gradients("trajectory_balance", m, prior, tmp_path / f"{m}", monkeypatch) for m in (3, 1))) < 1e-6

    @dataclass(frozen=True)
    class InParts(AbstractObjective):
        optimum, source = "none", "none"

        def loss(self, batch: Batch, beta: float) -> Tensor:
            gap = batch.total(batch.log_q - batch.log_p0) - batch.reward / beta
            return ((gap - gap.detach().mean(1, keepdim=True)) ** 2).mean()

    @dataclass(frozen=True)
    class Across(InParts):
        def loss(self, batch: Batch, beta: float) -> Tensor:
            gap = batch.total(batch.log_q - batch.log_p0) - batch.reward / beta
            return ((gap - gap.mean()) ** 2).mean()  # compares all prompts: no sum of parts' losses

    assert made is not None
    monkeypatch.setattr("klbench.method.objective", lambda *_: Across())
    whole, parts = (gradients("rloo", m, prior, tmp_path / f"across{m}", monkeypatch) for m in (3, 1))
    assert apart(whole, parts) < 1e-6
    monkeypatch.setattr("klbench.method.objective", lambda *_: InParts())
    assert apart(whole, gradients("rloo", 1, prior, tmp_path / "mutant", monkeypatch)) > 1e-2


def test_known_values_are_not_worked_out_again(prior: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    kept = CausalLM.log_probs

    def counted(self: CausalLM, *given: object) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return kept(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(CausalLM, "log_probs", counted)
    train(asked("rloo", steps=1, prompts=3, micro=1), Letters(), prior, tmp_path / "p")
    assert calls == [False] + [True] * 3  # the prior's, then the parts' gradients; fresh draws are known
    calls.clear()
    train(asked("dpg", steps=1, prompts=3, micro=1), Letters(), prior, tmp_path / "q")
    assert calls.count(True) == 3


# what fits


def filled(at: int, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException] = torch.OutOfMemoryError) -> list[int]:
    """A device that is full when the gradient of `at` prompts and more is asked for; the sizes that were tried."""
    sizes: list[int] = []
    kept: Callable[..., dict[str, Tensor]] = Said.of

    def small(self: Said, prompts: list[str], *given: Tensor) -> dict[str, Tensor]:
        if torch.is_grad_enabled():
            sizes.append(len(prompts))
            if len(prompts) >= at:
                raise kind("full")
        return kept(self, prompts, *given)

    monkeypatch.setattr(Said, "of", small)
    monkeypatch.setattr(gradient.Fitted, "measured", lambda self, rows, each, free: setattr(self, "size", self.size or rows))
    return sizes


@pytest.mark.parametrize("objective", ["rloo", "ppo", "actor_critic"])
def test_a_full_device_halves_the_parts_and_loses_nothing(
    objective: str, prior: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = asked(objective, steps=3, prompts=3)
    told, other = train(run.model_copy(update={"train": run.train.model_copy(update={"micro": 1})}), Letters(), prior, tmp_path / "a")
    sizes = filled(2, monkeypatch)
    policy, curve = train(run, Letters(), prior, tmp_path / "b")
    assert sizes[:2] == [3, 1] and set(sizes[1:]) == {1}  # halved once, for good
    assert curve == other and policy.weights_hash() == told.weights_hash()


def test_a_device_too_small_for_one_prompt_is_told(prior: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(1, monkeypatch)
    with pytest.raises(
        UserError, match="^a GPU's memory does not do for 1 prompt at once: set train.recompute=true, or lower train.samples$"
    ):
        train(asked("rloo", prompts=3), Letters(), prior, tmp_path / "p")
    with pytest.raises(UserError, match="does not do for 2 prompts at once: lower train.micro$"):
        Fitted(2).tried(3, full)


def full() -> None:
    raise torch.OutOfMemoryError("full")


def test_parts_are_equal_to_one_and_in_order() -> None:
    assert Fitted(2).parts(slice(0, 5)) == [slice(0, 1), slice(1, 3), slice(3, 5)]
    assert Fitted(0).parts(slice(2, 7)) == [slice(2, 7)] and Fitted(9).parts(slice(0, 5)) == [slice(0, 5)]
    assert Fitted(1).parts(slice(3, 3)) == []


def test_a_part_is_what_free_memory_holds(prior: CausalLM) -> None:
    fitted = Fitted(0)
    fitted.measured(16, lambda: 1000, 10_000)  # .8 of it, twice the graph each
    assert fitted.size == 4
    fitted.measured(16, lambda: 1, 10_000)
    assert fitted.size == 4  # once
    for rows, each, free, size in ((16, 1000, 100, 1), (16, 1000, 10**9, 16), (16, 1000, None, 16)):
        fitted = Fitted(0)
        fitted.measured(rows, lambda each=each: each, free)
        assert fitted.size == size


def test_what_a_graph_keeps_is_counted(prior: CausalLM) -> None:
    policy = prior.with_model("q", prior.model)
    said = Said(method.objective("rloo"), policy, prior)
    one, two = (
        said.kept("a", torch.ones(1, k, 3, dtype=torch.long) * torch.arange(1, k + 1)[:, None] % 4, torch.ones(1, k, 3).bool())
        for k in (1, 3)
    )
    weights = sum(p.numel() * 4 for p in prior.model.parameters())
    assert 0 < one < two < 100 * weights
    with recomputed(prior.model, True):
        assert said.kept("a", torch.ones(1, 3, 3, dtype=torch.long), torch.ones(1, 3, 3).bool()) < one


def test_free_memory_is_a_number_of_this_machine() -> None:
    free = free_memory()
    assert free is None or 0 < free < 1 << 50


def test_little_memory_makes_small_parts(prior: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["klbench.train"], "free_memory", lambda: 1)  # the package has the function of that name
    run = asked("rloo", steps=3, prompts=3, checkpoint_every=2)
    (tmp_path / "cut").mkdir()

    def kill(event: dict[str, object]) -> None:
        if event["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        train(run, Letters(), prior, tmp_path / "cut" / "p", kill)
    assert (tmp_path / "cut" / ".p.work" / "2" / "micro").read_text() == "0 1"
    monkeypatch.setattr(
        sys.modules["klbench.train"], "free_memory", lambda: None
    )  # more of it now: the size of before is kept, and so are the last bits
    again, curve = train(run, Letters(), prior, tmp_path / "cut" / "p")
    one = run.model_copy(update={"train": run.train.model_copy(update={"micro": 1})})
    told, other = train(one, Letters(), prior, tmp_path / "one")
    assert curve == other and again.weights_hash() == told.weights_hash()


# layers run again


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"micro": 1}])
def test_layers_run_again_give_the_same(kind: str, settings: dict[str, int], tmp_path: Path) -> None:
    prior = wrap("tiny", model(kind, 4), tokenizer())
    runs: list[int] = []
    layer = layers_of(prior.model)[0]
    layer.register_forward_hook(lambda *given: runs.append(1))
    (one, curve), (two, other) = (
        train(asked("rloo", steps=3, prompts=3, recompute=again, **settings), Letters(), prior, tmp_path / f"{again}")
        for again in (False, True)
    )
    assert curve == other
    for (name, a), b in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
    assert all("forward" not in vars(x) for x in layers_of(two.model)) and runs


def test_layers_are_as_they_were_after_an_error(prior: CausalLM) -> None:
    with pytest.raises(Killed), recomputed(prior.model, True):
        assert all("forward" in vars(x) for x in layers_of(prior.model))
        raise Killed
    assert not any("forward" in vars(x) for x in layers_of(prior.model)) and len(layers_of(prior.model)) == 2
    with pytest.raises(UserError, match="Linear does not say which of its modules are layers"), recomputed(torch.nn.Linear(2, 2), True):
        pass


def test_settings_that_round_are_not_written_at_their_defaults() -> None:
    assert {"micro", "recompute", "shard"}.isdisjoint(Train().model_dump())
    ids = {asked("rloo", **given).id for given in ({}, {"micro": 0}, {"recompute": False}, {"shard": False})}
    assert len(ids) == 1 and asked("rloo", micro=4).id not in ids
