"""The tiny prior: a Llama of eight words whose every output can be listed; random weights, the first seed whose laws are interesting.

    python klbench/priors/tiny/provenance/make.py

Made on the CPU with one thread; the same torch writes the same bytes. Nothing is trained: what matters here is that every figure can also
be summed over all 4,681 outcomes of a prompt, and that these sums are neither flat nor settled by one outcome.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from klbench import exact
from klbench.policies.causal_lm import CausalLM, wrap

FOLDER = Path(__file__).resolve().parents[1]
WORDS = ["<eos>", "sun", "rain", "wind", "snow", "fog", "warm", "cold", "calm"]
LENGTH = 4  # tokens an output
SHARP = 4.5  # factor on the head's weights
ENTROPY, LEAST, ENDED = (4.6, 5.4), 3.0, (0.35, 0.55)  # nats: mean and least over prompts; share of outputs that end before the cut


def tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; texts are words with a blank between them."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="calm"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def model(seed: int) -> LlamaForCausalLM:
    """Weights N(0, 0.35), head times SHARP."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35)
        made.lm_head.weight.mul_(SHARP / made.lm_head.weight.shape[1] ** 0.5)
    return made.float().eval()


def figures(prior: CausalLM) -> dict[str, float]:
    """Of all two-word prompts: entropy, the share of outputs that end before the cut, the likeliest output's mass."""
    prompts = [" ".join(pair) for pair in itertools.product(WORDS[1:], repeat=2)]
    tokens, mask = exact.outcomes(len(WORDS), [0], LENGTH)
    law = exact.log_law(prior, prompts, tokens, mask)
    p = np.exp(law)
    entropy = -(p * law).sum(1)
    ended = p[:, ((tokens == 0) & mask).any(1).numpy()].sum(1)
    return {
        "entropy": round(float(entropy.mean()), 3),
        "entropy_least": round(float(entropy.min()), 3),
        "entropy_greatest": round(float(entropy.max()), 3),
        "ended": round(float(ended.mean()), 3),
        "likeliest": round(float(p.max()), 3),
        "outcomes": len(tokens),
        "parameters": sum(x.numel() for x in prior.model.parameters()),
    }


def main() -> None:
    torch.set_num_threads(1)
    for seed in itertools.count():
        prior = wrap("tiny", model(seed), tokenizer())
        found = figures(prior)
        print(seed, found)
        if ENTROPY[0] <= found["entropy"] <= ENTROPY[1] and found["entropy_least"] >= LEAST and ENDED[0] <= found["ended"] <= ENDED[1]:
            break
    prior.save(FOLDER)
    (FOLDER / "training.json").write_text(json.dumps({"seed": seed, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
