"""Draws of another engine: what is asked of it, what it says, and the gradient that its draws have to give. vLLM itself is not here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_train import Letters, asked
from tiny import continuations, exact, model, tokenizer
from torch import Tensor

from klbench import method
from klbench.batch import Batch
from klbench.errors import UserError
from klbench.policies import adapters, vllm
from klbench.policies.causal_lm import wrap
from klbench.policies.vllm import CORRECTED, Engine, Told, log_weights, weighed
from klbench.train import train

T, HOT = 2, 1.5  # the engine's law is the policy's, its logits divided by this
OUTCOMES = continuations(4, T)


def law(lm: torch.nn.Module, prompt: list[int], row: list[int], by: float) -> list[float]:
    with torch.no_grad():
        said = (lm(torch.tensor([prompt + row])).logits[0] / by).double().log_softmax(-1)
    return [float(said[len(prompt) - 1 + t, token]) for t, token in enumerate(row)]


class LLM:
    """Answers a request with every sequence there is, each once, under a law that is not the policy's."""

    lm: Any = None
    made: list[dict[str, Any]]
    asked: list[tuple[Any, ...]]
    answers: list[list[int]]

    def __init__(self, **given: Any) -> None:
        LLM.made.append(given)
        if given["model"] == "odd":
            raise ValueError("Model architectures ['Odd'] are not supported for now.")

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        LLM.asked.append((prompts, params, lora_request))
        out = []
        for prompt in prompts:
            said = [law(LLM.lm, prompt["prompt_token_ids"], row, HOT) for row in self.answers]
            ones = [
                SimpleNamespace(token_ids=row, logprobs=[{i: SimpleNamespace(logprob=p)} for i, p in zip(row, ps, strict=True)])
                for row, ps in zip(self.answers, said, strict=True)
            ]
            out.append(SimpleNamespace(outputs=ones))
        return out


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    top, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    top.LLM, top.SamplingParams = LLM, lambda **given: SimpleNamespace(**given)  # type: ignore[attr-defined]
    request.LoRARequest = lambda name, number, path: (name, number, path)  # type: ignore[attr-defined]
    for module in (top, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, value in {"lm": model("llama", 0), "made": [], "asked": [], "answers": OUTCOMES}.items():
        monkeypatch.setattr(LLM, name, value, raising=False)


def told(prompts: list[list[int]]) -> Told:
    return Engine("prior", 4).draw(prompts, len(OUTCOMES), T, (0,), 3, None)


def test_what_is_asked_and_what_comes_back(installed: None) -> None:
    engine = Engine("prior", 4, "float32")
    assert LLM.made == [
        {"model": "prior", "enable_lora": True, "max_lora_rank": 4, "dtype": "float32", "generation_config": "vllm", "max_loras": 1}
    ]
    found = engine.draw([[1], [2, 3]], len(OUTCOMES), T, (0, 2), 2**40 + 5, Path("a"))
    engine.draw([[1]], len(OUTCOMES), T, (0, 2), 5, Path("b"))
    engine.draw([[1]], len(OUTCOMES), T, (0, 2), 5, None)
    assert [request for _, _, request in LLM.asked] == [("step1", 1, "a"), ("step2", 2, "b"), None]  # another number for other weights
    prompts, params, _ = LLM.asked[0]
    assert prompts == [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2, 3]}]
    assert vars(params) == {
        "n": 13, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": T, "seed": 5, "logprobs": 0, "ignore_eos": True,
        "stop_token_ids": [0, 2], "detokenize": False,
    }  # fmt: skip
    assert found.tokens.shape == found.mask.shape == found.said.shape == (2, 13, T)
    assert [row[keep].tolist() for row, keep in zip(found.tokens[1], found.mask[1], strict=True)] == OUTCOMES
    assert found.said[1, 5].sum() == pytest.approx(sum(law(LLM.lm, [2, 3], OUTCOMES[5], HOT)), abs=1e-6)
    assert not found.said[~found.mask].any() and (found.tokens[~found.mask] == 0).all()


def test_weights_are_ratios_to_the_scorer(installed: None) -> None:
    policy, prompts = wrap("q", model("llama", 0), tokenizer()), ["a", "b c"]
    rows = [policy.encode(p) for p in prompts]
    draws = told(rows)
    log_q = policy.log_prob(prompts, draws.tokens, draws.mask)
    log_w, share = log_weights(log_q, draws, most=1e9)
    for p, row in enumerate(rows):
        q, m = exact(policy.model, row, OUTCOMES), torch.tensor([sum(law(LLM.lm, row, o, HOT)) for o in OUTCOMES])
        assert torch.allclose(log_w[p].double(), q - m, atol=1e-4)
    w = log_w.double().exp().flatten()
    assert share == pytest.approx(float(w.sum() ** 2 / (w**2).sum() / len(w)), rel=1e-5) and share < 0.95
    cut, same = log_weights(log_q, draws, most=1.1)
    assert float(cut.exp().max()) == pytest.approx(1.1) and same == share  # of the weights as they were
    itself, whole = log_weights(draws.said, draws)
    assert not itself.any() and whole == pytest.approx(1.0)


def expected(name: str, lm: Any, hot: float, mend: bool, K: int = 3) -> Tensor:
    """The gradient of an objective's loss, summed over every K draws of the engine's law."""
    g = torch.Generator().manual_seed(1)
    logits, reward = lm.clone().requires_grad_(), torch.randn(len(lm), generator=g, dtype=torch.float64)
    log_p0 = torch.randn(len(lm), generator=g, dtype=torch.float64).log_softmax(0)
    objective, total = method.objective(name), torch.zeros((), dtype=torch.float64)
    for draw in torch.cartesian_prod(*[torch.arange(len(lm))] * K):
        log_q, log_m = logits.log_softmax(0)[draw].reshape(1, K, 1), (lm / hot).log_softmax(0)[draw].reshape(1, K, 1)
        draws = Told(draw.reshape(1, K, 1), torch.ones(1, K, 1, dtype=torch.bool), log_m)
        log_w = log_weights(log_q, draws, most=1e9)[0]
        batch = Batch(
            tokens=draws.tokens, mask=draws.mask, log_q=weighed(log_q, log_w) if mend else log_q, log_p0=log_p0[draw].reshape(1, K, 1),
            reward=reward[draw][None], log_weight=log_w, old_log_q=log_q.detach(), own=draws.mask[:, :, 0],
        )  # fmt: skip
        total = total + log_m.sum().exp() * objective.loss(batch, 0.7)  # type: ignore[union-attr, call-arg]
    return torch.autograd.grad(total, logits)[0]


LOGITS = torch.tensor([0.4, -1.0, 1.3], dtype=torch.float64)


@pytest.mark.parametrize("name", [*CORRECTED, "grpo", "d3s", "inpo"])
def test_the_expected_gradient_is_that_of_the_policys_own_draws(name: str) -> None:
    want = expected(name, LOGITS, 1.0, mend=False)
    gap = lambda found: float((found - want).abs().max() / want.abs().max())  # noqa: E731
    assert (gap(expected(name, LOGITS, HOT, mend=True)) < 1e-6) == (name in CORRECTED)
    assert gap(expected(name, LOGITS, HOT, mend=False)) > 1e-2  # the mutant: the engine's draws as if they were the policy's


@pytest.mark.parametrize("by, holds", [(1.0, True), (1.1, False)])  # an engine whose word is wrong by a tenth: no weight mends that
def test_the_gradient_of_a_model_over_all_it_can_say(installed: None, by: float, holds: bool) -> None:
    """RLOO with two draws of a prompt, through a network: sum over all 169 pairs that the engine can give."""
    policy, prompt = wrap("q", model("llama", 0), tokenizer()), "b c"
    draws = told([policy.encode(prompt)])
    reward, log_p0 = torch.linspace(-1, 1, 13), torch.full((1, 13, T), -1.2)
    mean = lambda log_law, used: sum(  # noqa: E731
        float((log_law[i] + log_law[j]).exp())
        * method.objective("rloo").loss(  # type: ignore[union-attr, call-arg]
            Batch(
                tokens=draws.tokens[:, [i, j]], mask=draws.mask[:, [i, j]], log_q=used[:, [i, j]], log_p0=log_p0[:, [i, j]],
                reward=reward[None, [i, j]], log_weight=torch.zeros(1, 2),
            ),
            0.5,
        )
        for i in range(13)
        for j in range(13)
    )  # fmt: skip
    gradients = []
    for own in (True, False):
        policy.model.zero_grad()
        log_q = policy.log_probs([prompt], draws.tokens, draws.mask)
        heard = Told(draws.tokens, draws.mask, draws.said * by)
        used = log_q if own else weighed(log_q, log_weights(log_q, heard, most=1e9)[0])
        mean((log_q.detach() if own else draws.said).double().sum(2)[0], used).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    assert (float((gradients[1] - gradients[0]).abs().max() / gradients[0].abs().max()) < 1e-4) == holds


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_is_written_as_peft_reads_it(kind: str, tmp_path: Path) -> None:
    prior = model(kind, 0)
    tuner = adapters.low_rank("q", prior, 2, 5)
    with torch.no_grad():
        for name, p in tuner.named_parameters():
            if "lora_B" in name:
                p.normal_()
    vllm.write(tuner, tmp_path / "a")
    ids = torch.tensor([[1, 2, 3]])
    found, want = adapters.merged("q", prior, tmp_path / "a")(ids).logits, tuner.model(ids).logits
    assert torch.allclose(found, want, atol=1e-5) and not torch.allclose(found, prior(ids).logits, atol=1e-2)


def test_refusals(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="set train.lora_rank"):
        Engine("prior", 0)
    with pytest.raises(UserError, match=r"vllm does not take odd: Model architectures \['Odd'\]"):
        Engine("odd", 4)
    draws = told([[1]])
    with pytest.raises(UserError, match="no mass"):
        log_weights(torch.full(draws.said.shape, -torch.inf), draws)
    monkeypatch.setattr(LLM, "answers", [[1]])
    with pytest.raises(UserError, match="gave 1 of 2 tokens to a draw that no stop ended"):
        Engine("prior", 4).draw([[1]], 1, T, (0,), 3, None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        Engine("prior", 4)


class Honest:
    """An engine that draws from the adapter it is given, from the uniforms that the policy's own fall from. off: nats it misstates."""

    prior: Any = None
    off = 0.0

    def __init__(self, folder: Any, rank: int, dtype: str) -> None:
        assert rank == 2 and dtype == "float32"

    @torch.no_grad()
    def draw(self, rows: list[list[int]], draws: int, length: int, stops: tuple[int, ...], seed: int, adapter: Path) -> Told:
        lm = self.prior.with_model("merged", adapters.merged("prior", self.prior.model, adapter))
        uniform = torch.rand(len(rows), draws, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        tokens, mask, log_q = lm.passes.sample(rows, uniform, lambda logits: logits, stops)
        return Told(tokens, mask, log_q + self.off * mask)


@pytest.mark.parametrize("micro", [0, 1])
def test_training_on_its_draws_is_training_on_ones_own(micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = wrap("tiny", model("llama", 4), tokenizer())
    monkeypatch.setattr(Honest, "prior", prior)
    monkeypatch.setattr(sys.modules["klbench.train"], "Engine", Honest)

    def run(name: str, **more: str) -> Any:
        return train(asked("rloo", steps=3, lora_rank=2, micro=micro, **more), Letters(), prior, tmp_path / name)

    (own, curve), (there, other) = run("own"), run("there", sampler="vllm")
    assert [row["ess"] for row in other] == pytest.approx([1.0] * 3, abs=1e-4)
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in curve], abs=1e-5)
    for a, b in zip(own.model.parameters(), there.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    monkeypatch.setattr(Honest, "off", 0.2)  # the mutant: draws weighed by what is not their ratio
    weighed_down, _ = run("off", sampler="vllm")
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own.model.parameters(), weighed_down.model.parameters(), strict=True))


@pytest.mark.parametrize(("objective", "more", "says"), [("grpo", {"lora_rank": 2}, "grpo cannot be corrected"), ("rloo", {}, "lora_rank")])
def test_draws_that_cannot_be_corrected_are_refused(objective: str, more: dict[str, int], says: str, tmp_path: Path) -> None:
    prior = wrap("tiny", model("llama", 4), tokenizer())
    with pytest.raises(UserError, match=says):
        train(asked(objective, steps=1, sampler="vllm", **more), Letters(), prior, tmp_path / "p")
