"""What klbench does on device cuda, without one: every operator runs on tensors that have a shape, a type and a device, and no values.

A tensor that was left on the CPU, or made there, meets one of the device and raises, as it would on a GPU; so does every look at a value,
for which a processor would have to wait. Decisions that need values (does this layout agree, is this a number) are settled beforehand.
What a GPU computes is not tested here: tests/test_static.py has the same code on a CPU, with values.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file
from tiny import model, tokenizer
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode, unset_fake_temporarily

from klbench import cli, run, suite
from klbench.batch import Batch
from klbench.method import objective
from klbench.policies import causal_lm, passes, static, vocabulary
from klbench.policies.causal_lm import CausalLM, token_laws
from klbench.policies.passes import LAYOUTS, Passes, Shapes
from klbench.policies.prefixes import Piece, Prefixes
from klbench.record import Record
from klbench.samplers.top_p import TopP
from klbench.score import cell as scored

PROMPTS = ["a", "b c a b", "c c"]
K, T = 5, 6
CUDA = torch.device("cuda", 0)
LIBRARY: Final = "libc10.dylib" if sys.platform == "darwin" else "libc10.so"
GUARDS: Final = "_ZN3c104impl26device_guard_impl_registryE"
META: Final = 14  # its number among c10::DeviceType; CUDA is 1
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Work of the processor on token ids, which has values."""

    def real(*given: Any) -> Any:
        with unset_fake_temporarily():
            return function(*given)

    return real


@pytest.fixture(scope="module", autouse=True)
def guard() -> Iterator[None]:
    """The no-op device guard that FakeTensorMode itself puts in where a build with CUDA finds no device; a build without CUDA has no place
    for it in Python, and gets the one of device meta, which does nothing either."""
    places = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / LIBRARY)), GUARDS)
    was = places[1]
    if was is None:
        places[1] = places[META]
    yield
    places[1] = was


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    of, pieces, vocabulary_spans = Prefixes.of, Prefixes.pieces, vocabulary.spans
    some = lambda x: torch.ones(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x  # noqa: E731
    monkeypatch.setattr(Prefixes, "of", outside(lambda *given: of(*map(some, given))))
    monkeypatch.setattr(Prefixes, "pieces", outside(lambda *given: list(pieces(*given))))
    spans = outside(lambda *given: list(vocabulary_spans(*given)))
    monkeypatch.setattr(vocabulary, "spans", spans)
    monkeypatch.setattr(causal_lm, "spans", spans)
    monkeypatch.setattr(Piece, "sees", outside(Piece.sees))
    monkeypatch.setattr(Piece, "deepest", property(outside(lambda piece: int(piece.depth.max()))))
    monkeypatch.setattr(static, "captured", lambda step, device: step)  # a test of its own
    monkeypatch.setattr(CausalLM, "_sound", lambda self, log_prob: log_prob)
    monkeypatch.setattr(vocabulary, "bool", lambda found: True, raising=False)  # are all sums finite?
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def placed(lm: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A module with its tensors on the device; those that it has twice it has twice there."""
    there: dict[int, Any] = {}
    for module in lm.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None and id(value) not in there:
                    empty = torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device=CUDA)
                    there[id(value)] = (value, torch.nn.Parameter(empty) if held is module._parameters else empty)
                held[name] = None if value is None else there[id(value)][1]
    return lm


def policy_of(kind: str, seed: int = 0, split: bool = True, dtype: torch.dtype = torch.float32, size: int = 4) -> CausalLM:
    with unset_fake_temporarily():
        lm = model(kind, seed, size=size)
    lm = placed(lm, dtype)
    held = {name: Shapes([(1 << 20, 1 << 20)]) for name in LAYOUTS}
    return CausalLM(kind, lm, WORDS, _passes=Passes(lm, LAYOUTS, split, held))


WORDS = tokenizer()


def drawn() -> tuple[Tensor, Tensor]:
    """Tokens and mask as they come back from the device: on the CPU, with values."""
    with unset_fake_temporarily():
        tokens = torch.randint(4, (len(PROMPTS), K, T), generator=torch.Generator().manual_seed(0))
        ended = (tokens == 0).cumsum(2) - (tokens == 0).long() > 0
        return tokens.masked_fill(ended, 0), ~ended


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("changed", ["", "decoded", "bfloat16"])
def test_draws(device: FakeTensorMode, kind: str, split: bool, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(kind, split=split, dtype=torch.bfloat16 if changed == "bfloat16" else torch.float32)
    if changed == "decoded":
        policy = policy.prompted("top_p", None, [TopP(0.9)])
    assert policy.device == CUDA and policy.passes.drawing == ("static", "cached")
    monkeypatch.setattr(Passes, "_cached", None)
    monkeypatch.setattr(Passes, "_uncached", None)
    draws = policy.sample(PROMPTS, K, T, seed=0)
    assert draws.tokens.shape == (len(PROMPTS), K, T) and draws.log_q.dtype == torch.float32
    assert {x.device.type for x in (draws.tokens, draws.mask, draws.log_q)} == {"cpu"}


def test_the_way_of_a_processor_looks_at_values(device: FakeTensorMode) -> None:
    """The mutant of the test above: what it shows can fail. Each such look is a wait for the device."""
    policy = policy_of("llama")
    falling = passes._Falling(policy.passes, torch.rand(1, K, T, dtype=torch.float64), lambda logits: logits, (0,))
    with pytest.raises(Exception, match=r"item|nonzero|unique|scalar_dense|Dynamic|data"):
        policy.passes._cached([[1, 2]], falling, slice(0))


def test_a_look_at_the_end_is_a_wait(device: FakeTensorMode) -> None:
    policy = policy_of("llama")
    policy.sample(PROMPTS, K, passes.LOOKS, seed=0)
    with pytest.raises(DataDependentOutputException):
        policy.sample(PROMPTS, K, passes.LOOKS + 1, seed=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(device: FakeTensorMode, kind: str, split: bool, dtype: torch.dtype) -> None:
    policy, tokens = policy_of(kind, split=split, dtype=dtype), drawn()
    assert (policy.linear is None) != split
    found = policy.log_prob(PROMPTS, *tokens)
    assert found.shape == (len(PROMPTS), K, T) and found.dtype == torch.float32 and found.device.type == "cpu"
    log_q = policy.log_probs(PROMPTS, *tokens)
    assert log_q.device == CUDA and log_q.dtype == torch.float32 and log_q.requires_grad
    assert policy.prompt_log_prob(PROMPTS).device == CUDA
    assert policy.states(PROMPTS, *tokens).device.type == "cpu"


@pytest.mark.parametrize("split", [True, False])
def test_laws_of_two(device: FakeTensorMode, split: bool) -> None:
    q, p0 = policy_of("llama", 0, split), policy_of("llama", 1, split)
    laws = token_laws(q, p0, PROMPTS, *drawn())
    assert {x.device.type for x in (laws.log_q, laws.log_p0, laws.entropy, laws.cross, laws.lost)} == {"cpu"}
    log_q, kl = causal_lm.log_probs_and_kl(q, p0, PROMPTS, *drawn())
    assert log_q.device == kl.device == CUDA and kl.requires_grad


def backward(loss: Tensor) -> None:
    """loss.backward() in Python: the same derivatives, called one after another. The engine asks for the device's streams, of which there
    are none; as it does, this refuses a gradient on another device than what it is the gradient of."""
    order: list[Any] = []
    seen: set[Any] = set()

    def visit(node: Any) -> None:
        if node not in seen:
            seen.add(node)
            for before, _ in node.next_functions:
                if before is not None:
                    visit(before)
            order.append(node)

    visit(loss.grad_fn)
    found: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in reversed(order):
            given = found.get(node, {})
            for place, meta in enumerate(node._input_metadata):
                if place not in given:
                    continue
                if given[place].device != meta.device:
                    raise RuntimeError(f"{node}: a gradient on device {given[place].device} of a tensor on {meta.device}")
                given[place] = given[place].sum_to_size(meta.shape).to(meta.dtype)  # of what was broadcast, or cast
            if hasattr(node, "variable"):
                node.variable.grad = given[0]
                continue
            upstream, ahead = [given.get(place) for place in range(len(node._input_metadata))], node.next_functions
            if callable(node):
                made = node(*upstream)
                made = made if isinstance(made, tuple) else (made,)
            else:  # one of klbench's own: it says something of its other arguments too
                made = [grad for grad, wanted in zip(node.apply(*upstream), node.needs_input_grad, strict=True) if wanted]
                ahead = [pair for pair in ahead if pair[0] is not None]
            for (before, place), grad in zip(ahead, made, strict=True):
                if before is not None and grad is not None:
                    there = found.setdefault(before, {})
                    there[place] = there[place] + grad if place in there else grad


def test_the_walk_has_the_gradients_of_the_engine() -> None:
    lm = model("llama", 0)
    policy = CausalLM("q", lm, WORDS, _passes=Passes(lm, split=True))
    found = []
    for walk in (backward, torch.autograd.backward):
        lm.zero_grad()
        walk(policy.log_probs(PROMPTS, *drawn()).sum())
        found.append([p.grad.clone() for p in lm.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(lm.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    assert max(float(g.abs().max()) for g in found[0]) > 1e-2


# Where there is no device, and how the suite of GPUs is read


@pytest.mark.parametrize("words", [
    ["run", "quick", "--out", "o"],
    ["score", "--prior", "mini", "--policy", "mini", "--task", "bias"],
    ["train", "--prior", "mini", "--task", "bias", "--objective", "rloo", "--out", "o"],
])  # fmt: skip
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu"])
def test_a_device_that_is_not_here_is_one_line(
    words: list[str], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda:7")  # a machine with one device, or none
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main([*words, "--device", device]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("klbench: ") and device in said and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_the_suite_takes_any_prior() -> None:
    given = suite.load("gpu", ["prior=owner/model", "train.steps=3"])
    like = suite.load("standard")
    assert given.prior == "owner/model" and (given.tasks, given.objectives, given.samplers) == (like.tasks, like.objectives, like.samplers)
    for name in given.objectives:
        asked = given.train_of("toxicity", name)
        assert (asked.dtype, asked.steps) == ("bfloat16", 3) and asked.lora_rank > 0
    assert like.train_of("toxicity", "rloo").dtype == "float32"


def test_a_cell_of_the_suite_runs(tmp_path: Path) -> None:
    """On the smallest prior and a processor: bfloat16, an adapter, and a record in float32 at the end."""
    wanted = ["prior=tiny", "samplers=[]", "train.steps=2", "train.prompts=4", "score.prompts=2", "score.draws=16", "score.bank=16"]
    wanted += ["methods={sft: {steps: 2}}"]
    chosen = run.suite_of("gpu", wanted, tasks=["exact/dense"], objectives=["rloo"])
    (cell,) = [r for r in run.resolve(chosen) if r.kind == "objective"]
    scored(cell, tmp_path, lambda event: None, device="cpu")
    record = Record.read(tmp_path / "records" / f"{cell.id}.json")
    assert record.run.train is not None and record.run.train.dtype == "bfloat16"
    held = load_file(tmp_path / "policies" / cell.id / "model.safetensors")
    assert {t.dtype for t in held.values()} == {torch.float32}


def stepped(kind: str, low: AbstractContextManager[Any], spoil: Callable[[Batch], None] = lambda batch: None) -> CausalLM:
    """One step of RLOO as klbench.train makes it: draws, rewards of the processor, loss, gradient, Adam."""
    policy, prior = policy_of(kind, 0), policy_of(kind, 1)
    adam = torch.optim.Adam(policy.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    with low:
        draws = policy.sample(PROMPTS, K, T, seed=0)
        tokens, mask = drawn()  # what is decoded and rewarded
        log_p0 = prior.log_prob(PROMPTS, tokens, mask)
        log_q = policy.log_probs(PROMPTS, tokens, mask, draws.log_q)
    reward = torch.zeros(len(PROMPTS), K)
    batch = Batch(
        tokens=tokens.to(CUDA), mask=mask.to(CUDA), log_q=log_q, log_p0=log_p0.to(CUDA), reward=reward.to(CUDA),
        log_weight=torch.zeros(reward.shape, device=CUDA),
    )  # fmt: skip
    spoil(batch)
    loss = objective("rloo").loss(batch, 0.5)  # type: ignore[union-attr, call-arg]
    assert loss.device == CUDA and loss.dtype == torch.float32
    backward(loss)
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    adam.step()
    assert (
        {p.device for p in policy.model.parameters()} == {p.grad.device for p in policy.model.parameters() if p.grad is not None} == {CUDA}
    )
    assert {v.device for row in adam.state.values() for v in row.values()} == {CUDA}
    return policy


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("half", [False, True])
def test_a_training_step(device: FakeTensorMode, kind: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:  # torch.autocast asks for a driver, once
        there.setattr(torch.cuda, "is_available", lambda: True)
        there.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        low = torch.autocast("cuda", torch.bfloat16, enabled=half)
    stepped(kind, low)


@pytest.mark.parametrize("field", ["reward", "log_p0", "mask"])
def test_a_step_with_a_tensor_on_the_cpu_raises(device: FakeTensorMode, field: str) -> None:
    def spoil(batch: Batch) -> None:
        object.__setattr__(batch, field, getattr(batch, field).cpu())

    with pytest.raises(RuntimeError, match=r"device cuda:0, cpu|device cpu, cuda:0|two different devices|same device"):
        stepped("llama", nullcontext(), spoil)


@pytest.mark.parametrize("part", ["padded", "weight", "token"])
def test_a_pass_with_a_tensor_on_the_cpu_raises(device: FakeTensorMode, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llama")
    if part == "padded":
        padded = Passes._padded
        monkeypatch.setattr(Passes, "_padded", lambda self, rows: (padded(self, rows)[0], padded(self, rows)[1].cpu()))
    elif part == "weight":
        norm = policy.model.model.norm
        norm.weight = torch.nn.Parameter(norm.weight.detach().cpu())
    else:
        log_probs = vocabulary.log_probs
        monkeypatch.setattr(vocabulary, "log_probs", lambda s, head, node, token: log_probs(s, head, node, token.cpu()))
    with pytest.raises(RuntimeError, match="device"):
        policy.sample(PROMPTS, K, T, seed=0)
        policy.log_prob(PROMPTS, *drawn())
