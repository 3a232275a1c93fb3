"""What people write for priors and policies: the grammar, what it opens, and one clear line for what it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, model, saved, tokenizer
from torch import Tensor

from klbench import method, models
from klbench.errors import UserError
from klbench.models import Spec, open_policy, open_prior, union_of_stops, with_common_stops
from klbench.policies.causal_lm import CausalLM, wrap
from klbench.policies.tabular import Tabular
from klbench.samplers.best_of_n import BestOfN
from klbench.samplers.temperature import Temperature
from klbench.samplers.top_p import TopP
from klbench.target import Draws, Policy, WithoutDensity


@pytest.fixture(scope="module")
def prior() -> CausalLM:
    return wrap("p0", model("llama", 0), tokenizer())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a+b", "v@2", "ad@1"):
        (tmp_path / name).mkdir()
    (tmp_path / "brief.txt").write_text("be brief\n")
    (tmp_path / "a,b.txt").write_text("speak")
    return tmp_path


@pytest.mark.parametrize(
    "text, spec",
    [
        ("base", Spec("base")),
        ("a+b", Spec("a+b")),
        ("v@2", Spec("v@2")),
        ("owner/name", Spec("owner/name")),
        ("temperature:0.7", Spec("prior", "", (Temperature(0.7),))),
        ("top-p:0.9", Spec("prior", "", (TopP(0.9),))),
        ("temperature:0.7,top_p:0.9", Spec("prior", "", (Temperature(0.7), TopP(0.9)))),
        ("top_p:0.9,temperature:0.7", Spec("prior", "", (TopP(0.9), Temperature(0.7)))),
        ("prior@temperature:2", Spec("prior", "", (Temperature(2.0),))),
        ("base+owner/adapter", Spec("base", "owner/adapter")),
        ("a+b+owner/adapter", Spec("a+b", "owner/adapter")),
        ("owner/name+base@top_p:0.5", Spec("owner/name", "base", (TopP(0.5),))),
        ("base+ad@1", Spec("base", "ad@1")),
        ("base+ad@1@top_p:0.5", Spec("base", "ad@1", (TopP(0.5),))),
        ("v@2@temperature:0.5", Spec("v@2", "", (Temperature(0.5),))),
        ("mini+base", Spec("mini", "base")),
        ("system:brief.txt", Spec("prior", "", (), "be brief")),
        ("base@system:brief.txt,top_p:0.5", Spec("base", "", (TopP(0.5),), "be brief")),
        ("base@top_p:0.5,system:a,b.txt", Spec("base", "", (TopP(0.5),), "speak")),
    ],
)
def test_grammar(here: Path, text: str, spec: Spec) -> None:
    assert Spec.parse(text) == spec


@pytest.mark.parametrize(
    "text, says",
    [
        ("base@temperatur:0.7", "no sampler 'temperatur'; did you mean 'temperature'"),
        ("base@best_of_n:4", "'best_of_n:4' draws from the prior by itself"),
        ("base@temperature:0", "a number above 0 expected"),
        ("base@", "with nothing empty"),
        ("base+", "with nothing empty"),
        ("+base", "with nothing empty"),
        ("@temperature:1", "with nothing empty"),
        ("base@system:none.txt", "system prompt 'none.txt' cannot be read"),
        ("base@system:brief.txt,system:brief.txt", "one system prompt expected"),
        ("temperature:0.7,rejection", "'rejection' draws from the prior by itself"),
    ],
)
def test_grammar_refuses(here: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Spec.parse(text)


def test_an_empty_system_prompt_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        Spec.parse(f"prior@system:{tmp_path / 'none'}")


def test_what_is_one_already_is_returned(prior: CausalLM) -> None:
    table = Tabular(torch.zeros(1, 4), ("a",), 2, 2)
    for policy in (prior, table):
        assert open_prior(policy) is policy and open_policy("q", policy, prior) is policy
    assert open_policy("q", "prior", prior) is prior and open_policy("q", "ancestral", prior) is prior
    assert open_policy("q", BestOfN(4), prior) == BestOfN(4) == open_policy("q", "best-of-n:4", prior)
    assert isinstance(open_policy("q", "rejection", table), method.AbstractSampler)
    without = WithoutDensity(prior, "so")
    assert open_policy("q", without, prior) is without


def test_a_decoding_is_the_prior_decoded(prior: CausalLM) -> None:
    for spec in ("temperature:0.5,top_p:0.8", "prior@temperature:0.5,top_p:0.8"):
        q = open_policy("q", spec, prior)
        assert isinstance(q, CausalLM) and q.model is prior.model and q.decodings == (Temperature(0.5), TopP(0.8)) and q.name == "q"
    again = open_policy("q", Temperature(2.0), replace(prior, decodings=(TopP(0.5),)))
    assert isinstance(again, CausalLM) and again.decodings == (TopP(0.5), Temperature(2.0))
    with pytest.raises(UserError, match="needs a causal language model, and the prior is none"):
        open_policy("q", "temperature:0.5", Tabular(torch.zeros(1, 4), ("a",), 2, 2))


def test_a_sampler_of_ones_own(prior: CausalLM, tmp_path: Path) -> None:
    (tmp_path / "hotter.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar, final\nfrom klbench.method import AbstractDecoding\n\n"
        "@final\n@dataclass(frozen=True)\nclass Hotter(AbstractDecoding):\n    by: float = 2.0\n    source: ClassVar[str] = 'me'\n\n"
        "    def law(self, log_probs):\n        return (log_probs / self.by).log_softmax(-1)\n"
    )
    q = open_policy("q", "hotter:3.5", prior, include=(tmp_path,))
    assert isinstance(q, CausalLM) and q.decodings[0].by == 3.5  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no model directory, hub name or sampler 'hotter'"):
        open_policy("q", "hotter", prior)


def test_directories_and_shipped_names(prior: CausalLM, tmp_path: Path) -> None:
    folder = saved(tmp_path / "q", "llama", 3)
    q = open_policy("mine", folder, prior)
    assert isinstance(q, CausalLM) and q.name == "mine" and q.notes == () and q.tokenizer is not prior.tokenizer
    assert open_prior(str(folder)).name == str(folder)
    mini = open_prior("mini")
    assert isinstance(mini, CausalLM) and mini.name == "mini" and mini.columns == 2816
    decoded = open_prior(f"{folder}@top_p:0.5")
    assert isinstance(decoded, CausalLM) and decoded.decodings == (TopP(0.5),)


def test_a_policy_without_a_tokenizer_takes_the_priors(prior: CausalLM, tmp_path: Path) -> None:
    for kind in ("llama", "gpt2"):  # transformers makes an empty GPT-2 tokenizer up where there is none
        model(kind, 3).save_pretrained(tmp_path / kind)
        q = open_policy("q", str(tmp_path / kind), prior)
        assert isinstance(q, CausalLM) and q.tokenizer is prior.tokenizer
        assert q.notes == ("no tokenizer lies beside its weights: the prior's is used",)
        with pytest.raises(UserError, match=f"no tokenizer in {tmp_path / kind}: save one there"):
            open_prior(tmp_path / kind)
        assert isinstance(open_prior(tmp_path / kind, tokenizer=tokenizer()), CausalLM)
        tokenizer().save_pretrained(tmp_path / "words")
        assert isinstance(open_prior(tmp_path / kind, tokenizer=str(tmp_path / "words")), CausalLM)


def test_models_in_memory(prior: CausalLM, tmp_path: Path) -> None:
    lm = model("llama", 3)
    q = open_policy("q", lm, prior)
    assert isinstance(q, CausalLM) and q.tokenizer is prior.tokenizer and q.model.lm_head.weight is lm.lm_head.weight
    with pytest.raises(UserError, match="a transformers model in memory needs tokenizer"):
        open_prior(lm)
    assert isinstance(open_prior(lm, tokenizer=tokenizer()), CausalLM)
    folder = saved(tmp_path / "q", "llama", 3)
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(folder)
    for opened in (open_prior(loaded), open_policy("q", loaded, prior, device=None)):
        assert isinstance(opened, CausalLM) and opened.tokenizer.get_vocab() == prior.tokenizer.get_vocab()
    half = open_policy("q", model("llama", 3).bfloat16(), prior)
    assert isinstance(half, CausalLM) and half.notes == ("weights in bfloat16 are scored as a float32 copy",)


class Oracle:
    """Draws, and does not know with what probability."""

    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int) -> Draws:
        ones = torch.ones(len(prompts), draws, max_new_tokens)
        return Draws(ones.long(), ones.bool(), 0 * ones)

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        return [["a"] * tokens.shape[1]] * tokens.shape[0]


def test_what_only_draws_has_no_density(prior: CausalLM) -> None:
    q = open_policy("q", Oracle(), prior)
    assert isinstance(q, WithoutDensity) and not isinstance(q, Policy) and "no log_prob" in q.reason and q.name == "Oracle"
    draws = q.sample(["a"], 2, 3, 0)
    assert q.decode(draws.tokens, draws.mask) == [["a", "a"]]


@pytest.mark.parametrize("words", [["<eos>", "a", "c", "b"], ["<eos>", "x", "y", "z", "w"]])
def test_a_foreign_tokenizer_has_no_density_and_both_are_named(prior: CausalLM, words: list[str]) -> None:
    q = open_policy("mine", model("llama", 3, size=len(words)), prior, tokenizer=tokenizer(words))
    assert isinstance(q, WithoutDensity)
    assert q.reason == (
        f"the tokenizer of mine ({len(words)} words) is another than the tokenizer of p0 (4 words): "
        "their probabilities are of different sequences"
    )
    draws = q.sample(["a"], 3, 2, 0)
    assert len(q.decode(draws.tokens, draws.mask)[0]) == 3


def test_a_policy_that_ends_with_a_word_of_its_own_has_no_density(prior: CausalLM) -> None:
    words = tokenizer([*WORDS, "<end>"], eos="<end>")
    q = open_policy("mine", model("llama", 3, size=5), prior, tokenizer=words)
    assert isinstance(q, WithoutDensity) and q.reason == "mine ends a sequence with '<end>', which the tokenizer of p0 has not"


def test_stops_are_those_of_all(prior: CausalLM) -> None:
    words = tokenizer()
    words.eos_token = "c"
    q = open_policy("q", model("llama", 3), prior, tokenizer=words)
    assert isinstance(q, CausalLM) and q.stops == (3,)
    others: dict[str, Any] = {
        "q": q,
        "same": prior,
        "cold": open_policy("cold", "temperature:0.5", prior),
        "n": BestOfN(2),
        "w": WithoutDensity(q, ""),
    }
    assert union_of_stops(prior, others.values()) == (0, 3) and union_of_stops(prior, [prior]) == (0,)
    p0, found = with_common_stops(prior, others)
    assert isinstance(p0, CausalLM) and p0.stops == (0, 3) and found["same"] is p0
    assert found["q"].stops == found["cold"].stops == (0, 3) and found["cold"].model is p0.model  # type: ignore[union-attr]
    assert found["n"] is others["n"] and found["w"] is others["w"]
    p0, found = with_common_stops(prior, {"same": prior, "cold": others["cold"]})
    assert p0 is prior and found["cold"] is others["cold"]  # nothing to change, nothing changed
    table = Tabular(torch.zeros(1, 4), ("a",), 2, 2)
    assert with_common_stops(table, {"q": q}) == (table, {"q": q}) and union_of_stops(table, [q]) == ()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals(prior: CausalLM, tmp_path: Path) -> None:
    assert refusal(lambda: open_prior("minni")) == "no prior (nor a directory) 'minni'; did you mean 'mini'?"
    assert "'prior' is the prior itself" in refusal(lambda: open_prior("prior"))
    assert "got int" in refusal(lambda: open_prior(3)) and "q: " in refusal(lambda: open_policy("q", 3, prior))
    assert "no model directory, hub name or sampler 'best_of_m:4'; did you mean 'best_of_n'" in refusal(
        lambda: open_policy("q", "best_of_m:4", prior)
    )
    assert "no model directory, hub name or sampler 'minni'; did you mean 'mini'" in refusal(lambda: open_policy("q", "minni", prior))
    assert "no model directory at" in refusal(lambda: open_policy("q", str(tmp_path / "absent"), prior))
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    saved(tmp_path / "run" / "checkpoint-10", "llama", 0)
    assert refusal(lambda: open_policy("q", tmp_path / "run", prior)).endswith(f"did you mean {tmp_path / 'run' / 'checkpoint-10'}?")
    assert "has no chat template" in refusal(lambda: open_prior("mini", chat=True))
    assert "no adapter directory at" in refusal(lambda: open_policy("q", f"prior+{tmp_path / 'absent'}", prior))
    assert "no adapter in" in refusal(lambda: open_policy("q", f"prior+{tmp_path}", prior))
    assert "cpu, cuda, cuda:N or mps expected" in refusal(lambda: open_prior("mini", device="gpu"))
    if not torch.cuda.is_available():
        assert "no CUDA device" in refusal(lambda: open_prior("mini", device="cuda"))


def test_nothing_unsafe_is_loaded(prior: CausalLM, tmp_path: Path) -> None:
    folder = saved(tmp_path / "q", "llama", 0)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no model could be loaded" in refusal(lambda: open_policy("q", folder, prior))
    assert models.HUB.fullmatch("owner/na.me-2") and not models.HUB.fullmatch("../x") and not models.HUB.fullmatch("/a/b")
