"""Causal language models: what is sampled is what is scored, and both are the sum over every continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import continuations, exact, model, saved, tokenizer

from klbench.errors import UserError
from klbench.policies.causal_lm import CausalLM, extra_words, load, token_laws, wrap
from klbench.policies.passes import Passes
from klbench.policies.vocabulary import draw

PROMPTS = ["a", "b c a b", "c c"]  # of different lengths, so that padding matters
T = 3


@pytest.fixture(params=["llama", "gpt2"])
def policy(request: pytest.FixtureRequest) -> CausalLM:
    return wrap(request.param, model(request.param, 0), tokenizer())


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([r + [0] * (T - len(r)) for r in rows])
    return tokens, torch.arange(T) < torch.tensor([len(r) for r in rows])[:, None]


def test_log_prob_is_the_plain_forward_for_every_continuation(policy: CausalLM) -> None:
    rows = continuations(4, T)
    tokens, mask = padded(rows)
    got = policy.log_prob(PROMPTS, tokens.expand(3, -1, -1), mask.expand(3, -1, -1)).sum(2)
    want = torch.stack([exact(policy.model, policy.encode(p), rows) for p in PROMPTS])
    assert torch.allclose(got.double(), want, atol=2e-5)
    assert torch.allclose(want.exp().sum(1), torch.ones(3, dtype=torch.float64), atol=1e-6)  # nothing is missing from the list
    shifted = policy.log_prob(PROMPTS, tokens.roll(1, 1).expand(3, -1, -1), mask.expand(3, -1, -1)).sum(2)
    assert not torch.allclose(shifted.double(), want, atol=1e-2)


def test_sampled_log_probabilities_are_those_of_the_scorer(policy: CausalLM) -> None:
    draws = policy.sample(PROMPTS, 40, T, seed=3)
    assert torch.allclose(policy.log_prob(PROMPTS, draws.tokens, draws.mask), draws.log_q, atol=2e-5)
    ended = (draws.tokens == policy.eos) & draws.mask
    assert ended.any() and (draws.mask.sum(2) >= 1).all()
    after = ended.cumsum(2) - ended.long()
    assert not (draws.mask & (after > 0)).any()  # nothing counts after EOS


def test_draws_follow_the_law(policy: CausalLM) -> None:
    rows = continuations(4, T)
    index = {tuple(r): i for i, r in enumerate(rows)}
    draws = policy.sample(PROMPTS[:1], 20000, T, seed=0)
    counts = torch.zeros(len(rows), dtype=torch.float64)
    for row, keep in zip(draws.tokens[0], draws.mask[0], strict=True):
        counts[index[tuple(row[keep].tolist())]] += 1
    p = exact(policy.model, policy.encode(PROMPTS[0]), rows).exp()
    z = (counts - 20000 * p) / (20000 * p * (1 - p)).sqrt().clamp(min=1e-9)
    assert z.abs().max() < 4.8
    wrong = (counts - 20000 * p.roll(1)) / (20000 * p.roll(1)).sqrt()
    assert wrong.abs().max() > 10


def test_seed_alone_decides_the_draws(policy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = policy.sample(PROMPTS, 24, T, seed=5)
    monkeypatch.setattr("klbench.policies.causal_lm.ROWS", 10)
    pieces = policy.sample(PROMPTS, 24, T, seed=5)
    assert torch.equal(whole.tokens, pieces.tokens)
    assert not torch.equal(whole.tokens, policy.sample(PROMPTS, 24, T, seed=6).tokens)


def test_token_laws_are_sums_over_the_vocabulary(policy: CausalLM) -> None:
    other = wrap("other", model("llama", 9), policy.tokenizer)
    draws = policy.sample(PROMPTS, 5, T, seed=1)
    laws = token_laws(policy, other, PROMPTS, draws.tokens, draws.mask)
    for p, prompt in enumerate(PROMPTS):
        ids = policy.encode(prompt)
        for n in range(5):
            for t in range(int(draws.mask[p, n].sum())):
                prefix = torch.tensor([ids + draws.tokens[p, n, :t].tolist()])
                with torch.no_grad():
                    lq, l0 = (m.model(prefix).logits[0, -1].double().log_softmax(-1) for m in (policy, other))
                assert laws.entropy[p, n, t] == pytest.approx(-(lq.exp() * lq).sum().item(), abs=2e-5)
                assert laws.cross[p, n, t] == pytest.approx(-(lq.exp() * l0).sum().item(), abs=2e-5)
                assert laws.log_p0[p, n, t] == pytest.approx(l0[draws.tokens[p, n, t]].item(), abs=2e-5)
                if t:  # the mutant that reads one position too early
                    assert laws.entropy[p, n, t] != pytest.approx(laws.entropy[p, n, t - 1].item(), abs=1e-6)


def test_gradient_of_the_tree_pass_is_that_of_the_plain_pass(policy: CausalLM) -> None:
    tokens = torch.tensor([[[1, 2, 3], [3, 3, 1]]])
    policy.log_probs(["b c"], tokens).sum().backward()
    head = policy.model.get_output_embeddings().weight
    tree = head.grad.clone()
    policy.model.zero_grad()
    for row in tokens[0].tolist():
        ids = torch.tensor([policy.encode("b c") + row])
        logp = policy.model(ids).logits[0, 1:-1].log_softmax(-1)
        logp[torch.arange(3), torch.tensor(row)].sum().backward()
    assert torch.allclose(tree, head.grad, atol=1e-5) and tree.abs().max() > 1e-3


def test_inverse_cdf_never_draws_a_token_of_probability_zero() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]).repeat(4, 1)
    token, logp = draw(logits.log_softmax(1), torch.tensor([0.0, 0.2689414, 0.5, 1 - 1e-17], dtype=torch.float64))
    assert set(token.tolist()) <= {0, 2} and torch.isfinite(logp).all()


def test_a_saved_policy_comes_back_with_its_hash(policy: CausalLM, tmp_path: Path) -> None:
    policy.save(tmp_path / "p")
    again = load(tmp_path / "p")
    assert again.weights_hash() == policy.weights_hash()
    assert not list((tmp_path / "p").glob("*.bin")) and list((tmp_path / "p").glob("*.safetensors"))


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no model in .*config\.json is missing"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="no model directory"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match="no EOS"):
        load(saved(tmp_path / "no_eos", "llama", 0, eos=None))
    weights = saved(tmp_path / "cut", "llama", 0) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match="no model could be loaded"):
        load(tmp_path / "cut")
    a, b = load(saved(tmp_path / "a", "llama", 0)), load(saved(tmp_path / "b", "llama", 0, words=["<eos>", "a", "b", "d"]))
    tokens = torch.zeros(1, 1, 2, dtype=torch.long)
    with pytest.raises(UserError, match="different tokenizers"):
        token_laws(a, b, ["a"], tokens, tokens == 0)


COMMON = {
    "vocab_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 1}
# class, configuration, and the layouts that agree with plain forwards: a model may lose one in a later transformers, never agree wrongly
ARCHITECTURES = {
    "tied": ("Llama", GROUPED | {"tie_word_embeddings": True}, ("cached", "tree")),
    "neox": ("GPTNeoX", COMMON, ("cached", "tree")),
    "opt": ("OPT", COMMON | {"ffn_dim": 24, "word_embed_proj_dim": 16}, ("cached", "tree")),
    "qwen2": ("Qwen2", GROUPED, ("cached", "tree")),
    "window of 3": ("Mistral", GROUPED | {"sliding_window": 3}, ()),
    "window of 6": ("Mistral", GROUPED | {"sliding_window": 6}, ("cached", "tree")),
    "gemma": ("Gemma", GROUPED | {"head_dim": 8}, ("cached", "tree")),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 8, "sliding_window": 3}, ()),
    "recurrent": ("Mamba", {"vocab_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, ()),
    "alibi": ("Bloom", {"vocab_size": 4, "hidden_size": 16, "n_layer": 2, "n_head": 2}, ("cached",)),
    "alibi by place": ("Mpt", {"vocab_size": 4, "d_model": 16, "n_layers": 2, "n_heads": 2}, ("cached",)),
}  # fmt: skip


def built(kind: str) -> torch.nn.Module:
    name, settings, _ = ARCHITECTURES[kind]
    torch.manual_seed(3)
    made = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**settings))
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.4)
    return made.eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_agrees_with_plain_forwards(kind: str) -> None:
    lm = built(kind)
    policy = wrap(kind, lm, tokenizer())
    assert policy.passes.layouts == ARCHITECTURES[kind][2]
    rows = continuations(4, T)
    tokens, mask = padded(rows)
    got = policy.log_prob(PROMPTS, tokens.expand(3, -1, -1), mask.expand(3, -1, -1))
    want = torch.stack([exact(lm, policy.encode(p), rows) for p in PROMPTS])
    assert torch.allclose(got.sum(2).double(), want, atol=3e-5)
    assert want.exp().sum(1).allclose(torch.ones(3, dtype=torch.float64), atol=1e-6) and want.std() > 0.3
    draws = policy.sample(PROMPTS, 12, T, seed=3)
    index = {tuple(r): i for i, r in enumerate(rows)}
    for p in range(3):
        for n in range(12):
            at = index[tuple(draws.tokens[p, n][draws.mask[p, n]].tolist())]
            assert draws.log_q[p, n].sum() == pytest.approx(float(want[p, at]), abs=3e-5)


def test_the_plain_layout_draws_what_the_cached_one_draws(policy: CausalLM) -> None:
    slow = CausalLM(policy.name, policy.model, policy.tokenizer, _passes=Passes(policy.model, ()))
    fast, other = policy.sample(PROMPTS, 30, T, seed=8), slow.sample(PROMPTS, 30, T, seed=8)
    assert torch.equal(fast.tokens, other.tokens) and torch.equal(fast.mask, other.mask)
    assert torch.allclose(fast.log_q, other.log_q, atol=1e-5)
    assert torch.allclose(slow.log_prob(PROMPTS, fast.tokens, fast.mask), fast.log_q, atol=1e-5)


def test_a_layout_that_breaks_beyond_what_was_tried_is_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As local attention does, or a table of positions that a long row overruns: right when loaded, wrong where it is used."""
    policy = wrap("q", model("llama", 0), tokenizer())
    tree = Passes._tree
    wrong = lambda self, rows, piece: tree(self, rows, piece) * (1.1 if max(map(len, rows)) > 2 else 1)  # noqa: E731
    monkeypatch.setattr(Passes, "_tree", wrong)
    draws = policy.sample(PROMPTS, 5, T, seed=1)
    for prompts, at in ((PROMPTS[:1], slice(1)), (PROMPTS, slice(3)), (PROMPTS[:1], slice(1))):
        found = policy.log_prob(prompts, draws.tokens[at], draws.mask[at])
        assert torch.allclose(found, draws.log_q[at], atol=2e-5)
    shapes = policy.passes.shapes["tree"]
    assert shapes.held and shapes.failed


def test_several_stops_end_a_sequence_and_are_counted(policy: CausalLM) -> None:
    both = policy.with_stops((0, 2))
    assert both.eos == 0 and policy.with_stops(policy.stops) is policy and both.with_stops((0, 2)) is both
    bodies = [[], [1], [3], [1, 1], [1, 3], [3, 1], [3, 3]]
    rows = [[*b, s] for b in bodies for s in (0, 2)] + [[*b, i] for b in bodies[3:] for i in (1, 3)]
    tokens, mask = padded(rows)
    total = both.log_prob(["b c"], tokens[None], mask[None]).sum(2).exp().sum()
    assert total == pytest.approx(1.0, abs=1e-5)  # every sequence that ends at one of two stops, or is cut
    draws = both.sample(PROMPTS, 40, T, seed=1)
    ended = torch.isin(draws.tokens, torch.tensor([0, 2])) & draws.mask
    assert (ended.sum(2) <= 1).all() and ((ended.sum(2) == 1) | draws.mask.all(2)).all()
    assert (draws.tokens[ended] == 2).any() and not any("b" in text for row in both.decode(draws.tokens, draws.mask) for text in row)
    assert torch.allclose(both.log_prob(PROMPTS, draws.tokens, draws.mask), draws.log_q, atol=2e-5)
    with pytest.raises(UserError, match=r"ends a sequence at ids \[0, 2\] and .* at \[0\]"):
        token_laws(both, policy, ["a"], draws.tokens[:1], draws.mask[:1])


def test_a_hash_names_the_law(policy: CausalLM) -> None:
    from klbench.samplers.top_p import TopP

    others = [
        policy.with_stops((0, 2)),
        policy.prompted("q", None, [TopP(0.5)]),
        policy.prompted("q", "be brief", []),
        policy.with_words(3),
    ]
    hashes = [m.weights_hash() for m in (policy, policy.with_stops((0,)), *others)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 5


def test_words_beyond_the_cut_have_no_mass(policy: CausalLM) -> None:
    cut = policy.with_words(3)
    tokens, mask = torch.tensor([[[1, 2, 1], [1, 3, 1]]]), torch.ones(1, 2, T, dtype=torch.bool)
    found, whole = cut.log_prob(["a"], tokens, mask), policy.log_prob(["a"], tokens, mask)
    assert found[0, 1, 1] == -torch.inf and torch.isfinite(found[0, 0]).all()
    with torch.no_grad():
        missing = policy.model(torch.tensor([policy.encode("a")])).logits[0, -1].double().log_softmax(-1)[3].exp()
    assert (found - whole)[0, 0, 0] == pytest.approx(float(-torch.log1p(-missing)), abs=1e-5)
    assert not (cut.sample(["a"], 200, T, seed=0).tokens == 3).any()
    laws = token_laws(cut, policy, ["a"], tokens[:, :1], mask[:, :1])
    assert torch.isfinite(laws.cross).all()
    assert (token_laws(policy, cut, ["a"], tokens[:, :1], mask[:, :1]).cross == torch.inf).all()


def test_words_are_compared_by_their_ids() -> None:
    base = tokenizer()
    assert extra_words(tokenizer(), base) == {}
    assert extra_words(tokenizer(["<eos>", "a", "b", "c", "<pad>"]), base) == {"<pad>": 4}
    assert extra_words(tokenizer(["<eos>", "a", "b"]), base) == {}
    assert extra_words(tokenizer(["<eos>", "a", "c", "b"]), base) is None
    assert extra_words(tokenizer(["<eos>", "a", "b", "d"]), base) is None
    assert extra_words(tokenizer(["<eos>", "w", "x", "y"]), base) is None
    assert extra_words(tokenizer(["<pad>", "<eos>", "a", "b", "c"]), base) is None


def test_absurd_models_are_named(tmp_path: Path) -> None:
    lm = model("llama", 0)
    with torch.no_grad():
        lm.model.embed_tokens.weight[3] = torch.nan
    with pytest.raises(UserError, match=r"hole: its log-probabilities are not numbers \(NaN\)"):
        wrap("hole", lm, tokenizer())
    late = CausalLM("hole", lm, tokenizer())
    with pytest.raises(UserError, match="hole: its log-probabilities are not numbers"):
        late.sample(["c"], 4, T, seed=0)
    tokens = torch.tensor([[[3, 1, 1]]])
    for score in (late.log_prob, lambda *a: token_laws(late, late, *a)):
        with pytest.raises(UserError, match="hole: its log-probabilities are not numbers"):
            score(["a"], tokens, tokens > 0)
    with pytest.raises(UserError, match=r"prompt 'a( a)+ ?\.\.\.' has 63 tokens: with 3 new ones that is more than the 64 of q"):
        wrap("q", model("gpt2", 0), tokenizer()).sample(["a " * 63], 1, 3, 0)
    assert wrap("q", model("gpt2", 0), tokenizer()).sample(["a " * 62], 1, 3, 0).tokens.shape == (1, 1, 3)
    short = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=4, n_embd=16, n_layer=1, n_head=2, n_positions=3, bos_token_id=0, eos_token_id=0))
    assert wrap("q", short, tokenizer()).sample(["a b"], 2, 2, 0).tokens.shape == (1, 2, 2)
    with pytest.raises(UserError, match="has token 3, and q reads 3 of them"):
        wrap("q", model("llama", 0, size=3), tokenizer()).sample(["c"], 1, 1, 0)


def test_other_kinds_of_models_are_refused_by_name(tmp_path: Path) -> None:
    bert = tf.BertConfig(vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    t5 = tf.T5Config(vocab_size=4, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    for made, says in (
        (tf.BertForMaskedLM(bert), "BertForMaskedLM is a masked language model"),
        (tf.BertLMHeadModel(bert), "BertLMHeadModel predicts moves when later tokens are added: it is not causal"),
        (tf.T5ForConditionalGeneration(t5), "T5ForConditionalGeneration is an encoder-decoder"),
        (tf.LlamaModel(model("llama", 0).config), "LlamaModel has no language-model head"),
    ):
        with pytest.raises(UserError, match=says):
            wrap("odd", made.eval(), tokenizer())
        made.save_pretrained(tmp_path / says)
        tokenizer().save_pretrained(tmp_path / says)
        with pytest.raises(UserError, match="weights are missing|is a masked|is an encoder|is not causal|could be loaded"):
            load(tmp_path / says, "odd")


def test_a_prompt_of_chat_is_a_turn(policy: CausalLM) -> None:
    words = tokenizer()
    words.bos_token = "a"
    turn = "{{ m['role'][0] }} {{ m['content'] }} "
    words.chat_template = f"{{{{ bos_token }}}} {{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}b{{% endif %}}"
    chat = wrap("q", policy.model, words, chat=True)
    ids = words.get_vocab()
    assert chat.encode("c") == [ids["a"], ids["a"], ids["c"], ids["b"]]  # BOS once; the role 'u' is no word and reads as a
    assert chat.prompted("q", "b b", []).encode("c") == [1, 1, 2, 2, 1, 3, 2]
    draws = chat.sample(["c", "b c"], 10, T, seed=0)
    assert torch.allclose(chat.log_prob(["c", "b c"], draws.tokens, draws.mask), draws.log_q, atol=2e-5)
    assert policy.prompted("q", "b b", []).encode("c") == policy.encode("b b\nc") != policy.encode("c")
    with pytest.raises(UserError, match="q: its tokenizer has no chat template"):
        wrap("q", policy.model, tokenizer(), chat=True)
    words.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(UserError, match="the chat template of q does not take prompt 'c': no system here"):
        wrap("q", policy.model, words, chat=True).encode("c")


def test_a_chat_ends_where_the_model_says_too(policy: CausalLM) -> None:
    words = tokenizer()
    words.chat_template = "{{ messages[0]['content'] }}"
    lm = model("llama", 0)
    lm.generation_config.eos_token_id = [2, 0]
    assert wrap("q", lm, words, chat=True).stops == (0, 2) and wrap("q", lm, words).stops == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_users_model_is_left_as_it_is(dtype: torch.dtype) -> None:
    lm = model("llama", 0).to(dtype).train()
    lm.config.attention_dropout = 0.5
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    config, generation = lm.config.to_dict(), lm.generation_config.to_dict()
    state = torch.random.get_rng_state()
    policy = wrap("q", lm, tokenizer())
    draws = policy.sample(PROMPTS, 4, T, seed=0)
    token_laws(policy, policy, PROMPTS, draws.tokens, draws.mask)
    assert torch.equal(state, torch.random.get_rng_state())
    assert lm.training and all(m.training for m in lm.modules()) and not policy.model.training
    assert all(torch.equal(v, before[k]) and v.dtype == dtype for k, v in lm.state_dict().items())
    assert lm.config.to_dict() == config and lm.generation_config.to_dict() == generation
    shared = policy.model.lm_head.weight.data_ptr() == lm.lm_head.weight.data_ptr()
    assert shared == (dtype == torch.float32) and policy.model.dtype == torch.float32


def test_half_precision_weights_are_scored_in_single(tmp_path: Path) -> None:
    half = model("llama", 0).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    tokenizer().save_pretrained(tmp_path / "half")
    disk, memory = load(tmp_path / "half"), wrap("q", half, tokenizer())
    rows = continuations(4, T)
    tokens, mask = padded(rows)
    want = exact(tf.LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32), disk.encode("b c a b"), rows)
    for policy in (disk, memory):
        found = policy.log_prob(["b c a b"], tokens[None], mask[None]).sum(2)[0].double()
        assert torch.allclose(found, want, atol=3e-5)
    assert disk.weights_hash() == memory.weights_hash()
    coarse = half(torch.tensor([[2, 3, 1, 2]])).logits[0, -1].float().log_softmax(-1)
    fine = memory.model(torch.tensor([[2, 3, 1, 2]])).logits[0, -1].log_softmax(-1)
    assert (coarse - fine).abs().max() > 1e-3  # what it would have been off by


def test_what_a_prior_said_of_a_bank_is_kept_until_its_weights_change(policy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = wrap("prior", model("llama", 9), policy.tokenizer)
    draws = prior.sample(PROMPTS, 5, T, seed=1)
    asked: list[Any] = []
    states = Passes.states
    monkeypatch.setattr(Passes, "states", lambda self, *given: asked.append(self.model) or states(self, *given))
    ask = lambda: token_laws(policy, prior, PROMPTS, draws.tokens, draws.mask)  # noqa: E731
    first, second = ask(), ask()
    assert [m is prior.model for m in asked] == [False, True, False] and torch.equal(first.cross, second.cross)
    with torch.no_grad():
        prior.model.get_output_embeddings().weight.mul_(1.5)
    assert not torch.allclose(ask().cross, first.cross) and len(asked) == 5
    monkeypatch.setattr("klbench.policies.causal_lm.KEPT", 0)
    ask()
    assert not prior._kept
