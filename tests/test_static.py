"""The way in which a GPU draws, on a CPU: the draws and log-probabilities of the way of a CPU, and a step that bears being replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import pytest
import torch
from test_causal_lm import ARCHITECTURES, built
from tiny import model, tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from klbench.policies import passes, static
from klbench.policies.causal_lm import CausalLM, wrap
from klbench.policies.passes import Passes
from klbench.samplers.temperature import Temperature
from klbench.samplers.top_p import TopP

PROMPTS = ["a", "b c a b", "c c"]  # of different lengths, so that there is padding on the left


Force = Callable[[CausalLM], CausalLM]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Force:
    """The policy as it would be on a GPU, and no other way of drawing may be taken from here on."""

    def now(policy: CausalLM) -> CausalLM:
        monkeypatch.setattr(Passes, "drawing", property(lambda self: ("static",)))
        monkeypatch.setattr(Passes, "_cached", None)
        monkeypatch.setattr(Passes, "_uncached", None)
        return replace(policy, _passes=passes.checked(policy.name, policy.model))

    return now


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> Force:
    """The same, with the other ways behind it."""

    def now(policy: CausalLM) -> CausalLM:
        monkeypatch.setattr(Passes, "drawing", property(lambda self: ("static", "cached")))
        return replace(policy, _passes=replace(policy.passes, layouts=("static", "cached", "tree")))

    return now


def same(left: Any, right: Any) -> bool:
    return (
        torch.equal(left.tokens, right.tokens) and torch.equal(left.mask, right.mask) and torch.allclose(left.log_q, right.log_q, atol=1e-5)
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("change", ["", "stops", "decoded", "words", "one", "short"])
def test_the_draws_are_those_of_the_processor(kind: str, change: str, forced: Force) -> None:
    policy = wrap(kind, model(kind, 0), tokenizer())
    policy = {
        "stops": lambda: policy.with_stops((0, 2)),
        "decoded": lambda: policy.prompted("d", None, [Temperature(0.7), TopP(0.8)]),
        "words": lambda: policy.with_words(3),
    }.get(change, lambda: policy)()
    prompts, draws, length = (PROMPTS[1:2], 1, 20) if change == "one" else (PROMPTS, 24, 1 if change == "short" else 20)
    want = policy.sample(prompts, draws, length, seed=3)
    policy = forced(policy)
    found = policy.sample(prompts, draws, length, seed=3)
    assert same(found, want)
    assert policy.passes.shapes["static"].held  # compared with a plain forward, and not only by us
    assert not same(policy.sample(prompts, draws, length, seed=4), want)
    if change == "":
        assert not want.mask.all() and (want.mask.sum(2) > 16).any()  # some end early, some go on beyond the first look


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision(kind: str, weights: torch.dtype, forced: Force) -> None:
    """As training draws: products in bfloat16, log-probabilities summed in float32 and within its rounding of what float32 says."""
    single = wrap(kind, model(kind, 0), tokenizer())
    policy = forced(CausalLM(kind, model(kind, 0).to(weights), single.tokenizer))
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        found = policy.sample(PROMPTS, 24, 20, seed=3)
    assert policy.passes.shapes["static"].held and found.log_q.dtype == torch.float32
    want = single.log_prob(PROMPTS, found.tokens, found.mask)
    assert 0 < float((found.log_q - want).abs().max()) < 0.5 and float((found.log_q - want).abs().mean()) < 0.02


@pytest.mark.parametrize("kind", [k for k, (_, _, layouts) in ARCHITECTURES.items() if "cached" in layouts])
def test_every_architecture_that_takes_the_one_takes_the_other(kind: str, forced: Force) -> None:
    policy = wrap(kind, built(kind), tokenizer())
    want = policy.sample(PROMPTS, 12, 6, seed=3)
    policy = forced(policy)
    assert ("static" in policy.passes.layouts) == (kind != "alibi")  # which makes its biases of a mask of two dimensions
    if kind not in ("alibi", "window of 6"):  # beyond a window neither is used
        assert same(policy.sample(PROMPTS, 12, 6, seed=3), want)


def test_padding_that_is_seen_is_found_out(monkeypatch: pytest.MonkeyPatch, preferred: Force) -> None:
    """The mutant: a step to which the padding before a prompt is open. It is refused at its first use; the draws are right all the same."""
    policy = wrap("llama", model("llama", 0), tokenizer())
    want = policy.sample(PROMPTS, 24, 8, seed=3)
    policy = preferred(policy)
    made = static.Step.__init__

    def open_to_all(self: static.Step, *given: Any) -> None:
        made(self, *given)
        self.mask[..., : given[2].shape[1]] = 0

    monkeypatch.setattr(static.Step, "__init__", open_to_all)
    found = policy.sample(PROMPTS, 24, 8, seed=3)
    assert same(found, want) and policy.passes.shapes["static"].failed and not policy.passes.shapes["static"].held


def test_all_ended_is_noticed_at_a_look_and_costs_nothing_but_steps(monkeypatch: pytest.MonkeyPatch, forced: Force) -> None:
    policy = wrap("llama", model("llama", 0), tokenizer()).with_stops((0, 1, 2))
    want, steps = policy.sample(PROMPTS, 4, 60, seed=0), []
    step = static.Step.__call__
    monkeypatch.setattr(static.Step, "__call__", lambda self, token: steps.append(1) or step(self, token))
    policy = forced(policy)
    steps.clear()
    assert same(policy.sample(PROMPTS, 4, 60, seed=0), want)
    assert want.mask.sum(2).max() < 16 and len(steps) == 15


# CUDA graphs: no GPU is here. A graph is the kernels of one run over the memory of that run, and so is a list of the operators that were
# called, each with the very tensors that it was given: what a graph does not see (a tensor put in the place of another) this does not see.


@final
class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def replayed(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    with Recorded() as record:
        out = step()

    def run() -> Tensor:
        record.replay()
        return out

    return run


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_bears_being_replayed(kind: str, monkeypatch: pytest.MonkeyPatch, forced: Force) -> None:
    policy = wrap(kind, model(kind, 0), tokenizer())
    want = policy.sample(PROMPTS, 24, 20, seed=3)
    policy = forced(policy)
    monkeypatch.setattr(static, "captured", replayed)
    found = policy.sample(PROMPTS, 24, 20, seed=3)
    assert same(found, want) and policy.passes.shapes["static"].held


def test_a_step_that_does_not_bear_it_is_found_out(monkeypatch: pytest.MonkeyPatch, preferred: Force) -> None:
    """The mutant: positions in a new tensor at each step, which a graph does not see."""
    policy = wrap("llama", model("llama", 0), tokenizer())
    want = policy.sample(PROMPTS, 24, 20, seed=3)
    policy = preferred(policy)
    monkeypatch.setattr(static, "captured", replayed)
    call = static.Step.__call__

    def anew(self: static.Step, token: Tensor) -> Tensor:
        self.position = self.position.clone()
        return call(self, token)

    monkeypatch.setattr(static.Step, "__call__", anew)
    found = policy.sample(PROMPTS, 24, 20, seed=3)
    assert same(found, want) and policy.passes.shapes["static"].failed


@pytest.mark.parametrize("fails", [True, False])
def test_what_cannot_be_captured_runs_as_it_is(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for torch.cuda: the order of calls, and that an error of the capture leaves the plain step."""
    said: list[str] = []

    class Thing:
        def __init__(self, *given: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *given: Any) -> None: ...
        def wait_stream(self, other: Any) -> None:
            said.append("wait")

        def replay(self) -> None:
            said.append("replay")

    class Capture(Thing):
        def __enter__(self) -> None:
            said.append("capture")

        def __exit__(self, *given: Any) -> None:
            if fails:
                raise RuntimeError("operation not permitted when stream is capturing")

    for name, thing in {
        "is_available": lambda: True, "Stream": Thing, "CUDAGraph": Thing, "stream": Thing, "device": Thing, "graph": Capture,
        "current_stream": Thing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, thing)
    out = torch.zeros(2)
    step = lambda: said.append("step") or out  # noqa: E731
    run = static.captured(step, torch.device("cuda"))
    assert said == ["wait", "step", "wait", "capture", "step"] and (run is step) == fails
    said.clear()
    assert run() is out and said == (["step"] if fails else ["replay"])


def test_without_a_device_nothing_is_captured() -> None:
    step = lambda: torch.zeros(1)  # noqa: E731
    if not torch.cuda.is_available():
        assert static.captured(step, torch.device("cuda")) is step


def test_the_layout_is_chosen_by_the_device() -> None:
    policy = wrap("llama", model("llama", 0), tokenizer())
    assert policy.passes.drawing == ("cached",) and "static" not in policy.passes.layouts
    assert isinstance(policy, CausalLM)
