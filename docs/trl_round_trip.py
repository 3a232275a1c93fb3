"""A policy that TRL trained and saved is scored with no special word.

    pip install -e ".[trl]"; python docs/trl_round_trip.py [DIR]

Makes a tiny random Llama and its tokenizer, trains it two steps with TRL's own GRPOTrainer, DPOTrainer and, through a LoRA adapter,
GRPOTrainer again, saves each with `save_model` and with `save_pretrained`, and opens what lies there as a policy of the untrained model.
For each it prints the largest gap, over every sequence of up to three tokens, between klbench's log-probabilities and those of plain
forwards through the model that transformers or peft loads from there; how far it is from the start; and what was saved.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import AutoPeftModelForCausalLM, LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from klbench.models import open_policy, open_prior, with_common_stops
from klbench.policies.causal_lm import CausalLM

WORDS = ["<eos>", "a", "b", "c"]
PROMPTS = ["a", "b c a"]
LENGTH = 3
QUIET: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_strategy": "no",
    "disable_tqdm": True, "bf16": False, "learning_rate": 0.05,
}  # fmt: skip


def beginning(folder: Path) -> Path:
    """A random model and its tokenizer, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.4)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return folder


def reward(completions: list[str], **rest: Any) -> list[float]:
    return [float(text.count("a")) for text in completions]


def trained(start: Path, out: Path) -> dict[str, Path]:
    """Directories by the way in which they came about."""
    words = PreTrainedTokenizerFast.from_pretrained(start)
    prompts = Dataset.from_dict({"prompt": PROMPTS * 8})
    pairs = Dataset.from_dict({"prompt": PROMPTS * 8, "chosen": [" a b"] * 16, "rejected": [" c"] * 16})
    grpo = GRPOConfig(output_dir=str(out / "grpo"), num_generations=4, max_completion_length=LENGTH, beta=0.1, **QUIET)
    dpo = DPOConfig(output_dir=str(out / "dpo"), **QUIET)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = {
        "grpo": GRPOTrainer(model=str(start), reward_funcs=reward, args=grpo, train_dataset=prompts, processing_class=words),
        "dpo": DPOTrainer(model=str(start), args=dpo, train_dataset=pairs, processing_class=words),
        "grpo+lora": GRPOTrainer(
            model=str(start), reward_funcs=reward, args=grpo, train_dataset=prompts, processing_class=words, peft_config=lora
        ),
    }
    found = {}
    for name, trainer in made.items():
        trainer.train()
        trainer.save_model(str(out / f"{name}-save_model"))
        trainer.model.save_pretrained(out / f"{name}-save_pretrained")  # weights alone
        found |= {f"{name} {way}": out / f"{name}-{way}" for way in ("save_model", "save_pretrained")}
    return found


def sequences() -> list[list[int]]:
    """Every continuation that ends with EOS or is cut at LENGTH."""
    going = range(1, len(WORDS))
    ended = [[*body, 0] for n in range(LENGTH) for body in product(going, repeat=n)]
    return [*ended, *(list(body) for body in product(going, repeat=LENGTH))]


@torch.no_grad()
def gap(policy: CausalLM, folder: Path) -> float:
    """Nats between klbench and plain forwards of what transformers (or peft) loads from the same place, in float32."""
    adapter = (folder / "adapter_config.json").is_file()
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32).eval()
    rows, worst = sequences(), 0.0
    tokens = torch.tensor([r + [0] * (LENGTH - len(r)) for r in rows])[None]
    mask = torch.arange(LENGTH) < torch.tensor([len(r) for r in rows])[:, None]
    for prompt in PROMPTS:
        said, start = policy.log_prob([prompt], tokens, mask[None])[0].sum(1), policy.encode(prompt)
        for row, value in zip(rows, said, strict=True):
            law = model(torch.tensor([start + row])).logits[0, len(start) - 1 : -1, : policy.columns].double().log_softmax(1)
            worst = max(worst, abs(float(law.gather(1, torch.tensor(row)[:, None]).sum()) - float(value)))
    return worst


def main(out: Path) -> int:
    disable_progress_bars()
    logging.disable_progress_bar()
    prior = open_prior(beginning(out / "start"))
    folders = trained(out / "start", out)
    opened = {name: open_policy(name, folder, prior) for name, folder in folders.items()}
    prior, opened = with_common_stops(prior, opened)
    worst = 0.0
    for name, policy in opened.items():
        assert isinstance(policy, CausalLM), f"{name}: {getattr(policy, 'reason', policy)}"
        moved = gap(policy, out / "start")
        off = gap(policy, folders[name])
        worst = max(worst, off)
        files = ", ".join(sorted(p.name for p in folders[name].iterdir()))
        print(f"{name}: off by {off:.1e} nats, {moved:.2f} from the start; {'; '.join(policy.notes) or 'nothing to note'} ({files})")
    return int(worst > 1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch)))
