"""Causal language models small enough to sum over every continuation they can write."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<eos>", "a", "b", "c"]  # EOS is id 0


def tokenizer(words: list[str] = WORDS, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[1]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos)


def model(kind: str, seed: int, sharp: float = 4.0, size: int = len(WORDS)) -> torch.nn.Module:
    """A random Llama or GPT-2 with a sharpened head; its config claims other special ids, as strangers' configs do."""
    torch.manual_seed(seed)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        made: torch.nn.Module = LlamaForCausalLM(config)
    else:
        config = GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
        made = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.4)
        made.get_output_embeddings().weight.mul_(sharp / 2)
    return made.eval()


def saved(folder: Path, kind: str, seed: int, words: list[str] = WORDS, eos: str | None = "<eos>") -> Path:
    model(kind, seed, size=len(words)).save_pretrained(folder)
    tokenizer(words, eos).save_pretrained(folder)
    return folder


def continuations(size: int, length: int, eos: int = 0) -> list[list[int]]:
    """Every sequence of ids that ends with EOS or has `length` ids."""
    out = []
    for n in range(1, length + 1):
        for body in itertools.product([i for i in range(size) if i != eos], repeat=n - 1):
            out.append([*body, eos])
        if n == length:
            out += [list(x) for x in itertools.product([i for i in range(size) if i != eos], repeat=n)]
    return out


@torch.no_grad()
def exact(lm: torch.nn.Module, prompt: list[int], rows: list[list[int]]) -> torch.Tensor:
    """[S] log-probabilities by one plain forward a sequence: no padding, no cache, no tree."""
    out = []
    for row in rows:
        ids = torch.tensor([prompt + row])
        logp = lm(ids).logits[0].double().log_softmax(-1)
        out.append(sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(row)))
    return torch.stack(out)
