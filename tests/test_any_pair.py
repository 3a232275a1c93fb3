"""Any two models side by side: what both say of every sequence, against sums over plain forwards. peft is imported in this file alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import WORDS, continuations, exact, model, saved, tokenizer

from klbench.errors import UserError
from klbench.models import open_policy, open_prior, with_common_stops
from klbench.policies import adapters
from klbench.policies.causal_lm import CausalLM, token_laws, wrap
from klbench.target import WithoutDensity

PROMPTS, T = ["a", "b c a b"], 3
ROWS = continuations(4, T)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def prior() -> CausalLM:
    return wrap("p0", model("llama", 0), tokenizer())


def every(rows: list[list[int]] = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([r + [0] * (T - len(r)) for r in rows])
    mask = torch.arange(T) < torch.tensor([len(r) for r in rows])[:, None]
    return tokens.expand(len(PROMPTS), -1, -1), mask.expand(len(PROMPTS), -1, -1)


def law(policy: CausalLM) -> torch.Tensor:
    """[P, S] log-probabilities of every sequence, and that draws are scored as they were drawn."""
    draws = policy.sample(PROMPTS, 30, T, seed=4)
    assert torch.allclose(policy.log_prob(PROMPTS, draws.tokens, draws.mask), draws.log_q, atol=3e-5)
    return policy.log_prob(PROMPTS, *every()).sum(2).double()


def plain(lm: torch.nn.Module, policy: CausalLM, words: int = 4) -> torch.Tensor:
    """[P, S] by one plain forward a sequence, each next-token law renormalised over the first so many ids."""

    def cut(ids: torch.Tensor) -> Any:
        return type("Out", (), {"logits": lm(ids).logits[..., :words]})

    return torch.stack([exact(cut, policy.encode(p), ROWS) for p in PROMPTS])  # type: ignore[arg-type]


def resized(size: int, seed: int = 3) -> torch.nn.Module:
    """A model with rows behind the words, which write something: their logits are far from 0."""
    return model("llama", seed, size=size)


def test_a_pad_token_that_a_trainer_added_is_left_out(prior: CausalLM, tmp_path: Path) -> None:
    lm, words = resized(5), tokenizer([*WORDS, "<pad>"])
    lm.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    q = open_policy("mine", tmp_path, prior)
    assert isinstance(q, CausalLM) and q.columns == 4
    assert q.notes == ("1 words that the prior lacks ('<pad>') are left out of its law, renormalised over the prior's",)
    assert torch.allclose(law(q), plain(lm, q), atol=3e-5)
    assert not torch.allclose(law(q), plain(lm, q, 5), atol=1e-2)
    p0, both = with_common_stops(prior, {"mine": q})
    assert p0 is prior and both["mine"] is q


@pytest.mark.parametrize("wide, narrow", [(8, 4), (8, 6)])
def test_columns_that_pad_one_side_are_left_out_of_both(wide: int, narrow: int) -> None:
    """8 and 6 columns for 4 words: the common ones are compared, whichever side has more of them."""
    large, small = resized(wide), resized(narrow, seed=4)
    p0, q = wrap("p0", large, tokenizer()), open_policy("q", small, wrap("p0", large, tokenizer()))
    assert isinstance(q, CausalLM) and q.columns == narrow and q.notes == ()
    cut, both = with_common_stops(p0, {"q": q})
    assert isinstance(cut, CausalLM) and cut.columns == narrow and both["q"] is q
    assert torch.allclose(law(cut), plain(large, cut, narrow), atol=3e-5)
    other = open_policy("q", large, wrap("p0", small, tokenizer()))
    assert isinstance(other, CausalLM) and other.columns == narrow
    assert other.notes == (f"{wide - narrow} columns beyond the prior's are left out of its law, renormalised",)
    laws = token_laws(q, cut, PROMPTS, *every())
    assert torch.isfinite(laws.cross).all()
    same, _ = with_common_stops(p0, {"q": open_policy("q", resized(wide, 4), p0)})
    assert same is p0  # padding that both have is compared as any id


def test_a_word_put_into_the_padding_is_left_out_of_both() -> None:
    p0 = wrap("p0", resized(8), tokenizer())
    q = open_policy("q", resized(8, 4), p0, tokenizer=tokenizer([*WORDS, "<pad>"]))
    cut, both = with_common_stops(p0, {"q": q})
    assert isinstance(cut, CausalLM) and cut.columns == 4 and both["q"].columns == 4  # type: ignore[union-attr]


def test_words_of_the_prior_are_never_left_out() -> None:
    """A model narrower than the prior's vocabulary never writes its last words: infinitely far from it in one direction, and said so."""
    p0 = wrap("p0", model("llama", 0), tokenizer())
    q = open_policy("q", model("llama", 3, size=3), p0, tokenizer=tokenizer(WORDS[:3]))
    assert isinstance(q, CausalLM) and q.notes == ("its embeddings end before the prior's last 1 words, which it never writes",)
    cut, both = with_common_stops(p0, {"q": q})
    assert cut is p0 and both["q"] is q
    tokens, mask = every()
    laws = token_laws(q, p0, ["a", "a b"], tokens, mask)
    assert ((laws.log_q == -torch.inf) == ((tokens == 3) & mask)).all()
    assert torch.isfinite(laws.cross).all() and torch.isfinite(laws.log_p0).all()
    assert laws.log_q.sum(2)[0].exp().sum() == pytest.approx(1.0, abs=1e-5)


def test_mass_on_a_pad_token_is_seen(prior: CausalLM) -> None:
    """The law that keeps the pad token's mass is not the one that is stated."""
    lm = resized(5)
    kept = wrap("q", lm, prior.tokenizer)
    assert law(kept).exp().sum(1).min() < 0.9  # some of its mass is where the prior has no words
    cut = open_policy("q", lm, prior, tokenizer=tokenizer([*WORDS, "<pad>"]))
    assert isinstance(cut, CausalLM)
    assert torch.allclose(law(cut).exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-5)


def lora(folder: Path, kind: str = "llama", seed: int = 0, **settings: Any) -> peft.PeftModel:
    """An adapter with weights that say something, saved; the wrapped model, unmerged."""
    base = settings.pop("base", None) or model(kind, seed)
    targets = ["q_proj", "v_proj"] if kind == "llama" else ["c_attn"]
    made = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", **settings)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    made.save_pretrained(folder)
    return made.eval()


@pytest.mark.parametrize(
    "kind, settings", [("llama", {}), ("gpt2", {}), ("llama", {"use_dora": True}), ("llama", {"modules_to_save": ["lm_head"]})]
)
def test_an_adapter_is_its_wrapped_model(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    wrapped = lora(tmp_path / "adapter", kind, **settings)
    p0 = wrap("p0", model(kind, 0), tokenizer())
    before = p0.weights_hash()
    found = [open_policy("q", spec, p0) for spec in (f"prior+{tmp_path / 'adapter'}", tmp_path / "adapter")]
    saved(tmp_path / "base", kind, 0)
    found.append(open_policy("q", f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", p0))
    for q in found:
        assert isinstance(q, CausalLM) and q.model.dtype == torch.float32
        assert torch.allclose(law(q), plain(wrapped, q), atol=5e-5)
    assert p0.weights_hash() == before and (law(found[0]) - law(p0)).abs().max() > 0.1
    memory = open_policy("q", wrapped, p0)  # as a trainer holds it
    assert isinstance(memory, CausalLM) and torch.allclose(law(memory), plain(wrapped, memory), atol=5e-5)
    cold = open_policy("q", f"prior+{tmp_path / 'adapter'}@temperature:0.5", p0)
    assert isinstance(cold, CausalLM) and cold.decodings and not torch.allclose(law(cold), law(found[0]), atol=0.01)


def test_an_adapter_knows_its_base(tmp_path: Path, prior: CausalLM) -> None:
    from transformers import LlamaForCausalLM

    folder = saved(tmp_path / "base", "llama", 7)
    wrapped = lora(tmp_path / "adapter", base=LlamaForCausalLM.from_pretrained(folder))
    assert adapters.base_of(tmp_path / "adapter") == str(folder)
    for q in (open_prior(tmp_path / "adapter"), open_policy("q", tmp_path / "adapter", prior)):
        assert isinstance(q, CausalLM) and torch.allclose(law(q), plain(wrapped, q), atol=5e-5)
    folder.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"is a PEFT adapter and its base '.*base' is no directory here: write BASE\+"):
        open_prior(tmp_path / "adapter")
    on_prior = open_policy("q", tmp_path / "adapter", prior)
    assert isinstance(on_prior, CausalLM) and not torch.allclose(law(on_prior), plain(wrapped, on_prior), atol=0.1)


def test_an_adapter_with_words_of_its_own(tmp_path: Path, prior: CausalLM) -> None:
    base = model("llama", 0)
    base.resize_token_embeddings(6, mean_resizing=False)
    wrapped = lora(tmp_path / "adapter", base=base)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer([*WORDS, "<pad>", "<im>"]).save_pretrained(tmp_path / "adapter")
    q = open_policy("q", tmp_path / "adapter", prior)
    assert isinstance(q, CausalLM) and q.passes.width == 6 and q.columns == 4 and "'<im>', '<pad>'" in q.notes[0]
    assert torch.allclose(law(q), plain(wrapped, q), atol=5e-5) and prior.passes.width == 4


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, prior: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lora(tmp_path / "adapter")
    with pytest.raises(UserError, match="does not fit prior: .*not found in the base model"):
        open_policy("q", f"prior+{tmp_path / 'adapter'}", wrap("p0", model("gpt2", 0), tokenizer()))
    small, deep = model("llama", 0).config, model("llama", 0).config
    small.num_hidden_layers = 1
    deep.num_hidden_layers = 3
    for config in (small, deep):
        config.layer_types = None
        other = wrap("p0", type(prior.model)(config), tokenizer())
        with pytest.raises(UserError, match="does not fit prior: 4 of its weights have no place there"):
            open_policy("q", f"prior+{tmp_path / 'adapter'}", other)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="is a PEFT adapter, and peft is not installed: pip install peft"):
        open_policy("q", f"prior+{tmp_path / 'adapter'}", prior)
    monkeypatch.undo()
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors in .*; adapter_model\.bin is a pickle, which klbench never loads"):
        open_policy("q", f"prior+{tmp_path / 'adapter'}", prior)
    both = saved(tmp_path / "both", "llama", 0)
    (tmp_path / "adapter" / "adapter_config.json").rename(both / "adapter_config.json")
    with pytest.raises(UserError, match="holds both a model and an adapter"):
        open_policy("q", both, prior)
    prompts = peft.get_peft_model(model("llama", 0), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    prompts.save_pretrained(tmp_path / "prompts")
    with pytest.raises(UserError, match="is PROMPT_TUNING: it cannot be merged into weights"):
        open_policy("q", tmp_path / "prompts", prior)


def test_a_system_prompt_is_a_policy_of_its_own(prior: CausalLM, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("b b\n")
    q = open_policy("q", f"system:{tmp_path / 'system.txt'}", prior)
    assert isinstance(q, CausalLM)
    want = torch.stack([exact(prior.model, prior.encode(f"b b\n{p}"), ROWS) for p in PROMPTS])
    assert torch.allclose(law(q), want, atol=3e-5) and not torch.allclose(law(q), law(prior), atol=0.1)
    laws = token_laws(q, prior, PROMPTS, *every())
    assert torch.allclose(laws.log_p0.sum(2).double(), law(prior), atol=3e-5) and torch.isfinite(laws.cross).all()


def test_chat_on_both_sides(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = "{% for m in messages %}a {{ m['content'] }} {% endfor %}b"
    for name, seed in (("p0", 0), ("q", 3)):
        model("llama", seed).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    (tmp_path / "system.txt").write_text("c")
    p0 = open_prior(tmp_path / "p0", chat=True)
    assert isinstance(p0, CausalLM)
    q, told = (open_policy("q", s, p0, chat=True) for s in (tmp_path / "q", f"{tmp_path / 'q'}@system:{tmp_path / 'system.txt'}"))
    assert isinstance(q, CausalLM) and isinstance(told, CausalLM)
    assert p0.encode("c b") == q.encode("c b") == [1, 3, 2, 2] and told.encode("c b") == [1, 3, 1, 3, 2, 2]
    assert p0.stops == q.stops == (0, 2)  # EOS, and what the model's own generation configuration says
    rows = [[*body, stop] for body in ([], [1], [3], [1, 1], [1, 3], [3, 1], [3, 3]) for stop in (0, 2)]
    rows += [r for r in ROWS if set(r) <= {1, 3}]
    for policy in (p0, q, told):
        mass = policy.log_prob(PROMPTS, *every(rows)).sum(2).exp().sum(1)
        assert torch.allclose(mass, torch.ones(2), atol=1e-5)


def test_a_stranger_with_a_foreign_tokenizer_still_draws(prior: CausalLM, tmp_path: Path) -> None:
    folder = saved(tmp_path / "other", "gpt2", 3, words=["<eos>", "x", "y", "z", "w"])
    q = open_policy("q", folder, prior)
    assert isinstance(q, WithoutDensity) and "the tokenizer of q (5 words) is another than the tokenizer of p0" in q.reason
    draws = q.sample(PROMPTS, 4, T, 0)
    assert {c for row in q.decode(draws.tokens, draws.mask) for text in row for c in text} <= set("xyzw ")
