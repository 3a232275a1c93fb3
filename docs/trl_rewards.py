"""Rewards go both ways between klbench and TRL, unchanged.

    pip install -e ".[trl]"; python docs/trl_rewards.py [DIR]

1. A reward of klbench, by its name, is `reward_funcs` of TRL's GRPOTrainer: a few steps on the prior that ships with klbench. What the
   trainer saved is then scored against the posterior of that very reward.
2. Reward functions of `trl.rewards` are `reward` of `klbench.score`. One reads messages, one reads token ids: klbench sees that from their
   signatures and gives each what TRL's trainers would.

Prints a line a policy, with the reward and the distance to the posterior. Two steps prove that the parts fit, and nothing about GRPO.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment, think_format_reward

import klbench
from klbench import rewards, task

LENGTH = 5
BETA = 0.5
QUIET: dict[str, Any] = {
    "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "bf16": False,
}  # fmt: skip


def trained(reward: Callable[..., Any], prompts: list[str], out: Path, steps: int = 2) -> Path:
    """The directory of a policy that TRL trained on a klbench reward."""
    config = GRPOConfig(
        output_dir=str(out / "grpo"), max_steps=steps, per_device_train_batch_size=8, num_generations=4, max_completion_length=LENGTH,
        beta=BETA, learning_rate=1e-4, **QUIET,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": prompts})
    trainer = GRPOTrainer(model=str(klbench.prior_path("mini")), reward_funcs=reward, args=config, train_dataset=data)
    trainer.train()
    trainer.save_model(str(out / "policy"))
    return out / "policy"


def scored(reward: Any, prompts: list[str], policies: dict[str, Any], reward_max: float) -> list[str]:
    """A line a policy: E[r] and the distance to the posterior of that reward."""
    result = klbench.score("mini", policies, prompts, reward, BETA, reward_max=reward_max, max_new_tokens=LENGTH, samples=256, pool=False)
    return [f"{name}: reward {p.reward.value:.3f}, reverse_kl {p.reverse_kl.value:.3f} nats ({p.status})" for name, p in result.items()]


def main(out: Path) -> None:
    disable_progress_bars()
    logging.disable_progress_bar()
    given = task.load("toxicity")
    train, score = given.prompts("train")[:16], given.prompts("score")[:2]

    toxicity = rewards.load("toxicity")
    folder = trained(toxicity, train, out)
    print("klbench's toxicity, trained on by TRL")
    print("\n".join(scored(toxicity, score, {"trl's policy": folder, "the prior": "prior"}, toxicity.reward_max)))

    for reward, most in (
        (get_soft_overlong_punishment(max_completion_len=LENGTH, soft_punish_cache=3), 0.0),
        (think_format_reward, 1.0),
    ):
        print(f"TRL's {reward.__name__}, scored by klbench")
        print("\n".join(scored(reward, score, {"trl's policy": folder, "the prior": "prior"}, most)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch))
