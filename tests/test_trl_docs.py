"""The scripts of docs/ that go through TRL, run; and their own functions with a trainer that calls rewards as TRL's does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny

import klbench
from klbench import rewards

ROOT = Path(__file__).parents[1]
pytest.importorskip("datasets", reason="klbench's dependency `evaluate`, which brings `datasets`, is not installed here")
pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[dev]'")


def ran(name: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / name, folder], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_policies_that_trl_saved_are_scored(tmp_path: Path) -> None:
    lines = [line for line in ran("trl_round_trip.py", tmp_path).splitlines() if "off by" in line]
    assert len(lines) == 6 and all(f"{name} {way}:" in "\n".join(lines) for name in ("grpo", "dpo", "grpo+lora") for way in ("save_model",))
    assert all(float(re.search(r"off by (\S+) nats", line)[1]) < 1e-4 for line in lines)  # type: ignore[index]


def test_rewards_go_both_ways(tmp_path: Path) -> None:
    told = ran("trl_rewards.py", tmp_path)
    assert "klbench's toxicity, trained on by TRL" in told and (tmp_path / "policy" / "model.safetensors").is_file()
    figures = re.findall(r"^(.+): reward (\S+), reverse_kl (\S+) nats \((\w+)\)$", told, re.M)
    assert [name for name, *_ in figures] == ["trl's policy", "the prior"] * 3
    toxicity, overlong = [float(r) for _, r, *_ in figures[:2]], [float(r) for _, r, *_ in figures[2:4]]
    assert max(toxicity) <= 2.0 and all(-1 <= r < 0 for r in overlong)
    assert re.search(r"'rewards/harmless/mean': '?-?[\d.]+", told), "the trainer's own log names klbench's reward"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_trl_rewards", ROOT / "docs" / "trl_rewards.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing trl says is trl's
        spec.loader.exec_module(made)
    return made


class StandIn:
    """Calls its reward as GRPOTrainer does, once with texts and once with messages, and saves an untrained model."""

    values: list[list[float]]

    def __init__(self, model: str, reward_funcs: Any, args: Any, train_dataset: Any):
        self.reward, self.prompts, StandIn.values = reward_funcs, list(train_dataset["prompt"]), []

    def train(self) -> None:
        texts = [" he is a friend" for _ in self.prompts]
        chats = [[{"role": "user", "content": p}] for p in self.prompts], [[{"role": "assistant", "content": t}] for t in texts]
        for prompts, completions in ((self.prompts, texts), chats):
            StandIn.values.append(
                self.reward(
                    prompts=prompts, completions=completions, completion_ids=[[1]] * len(texts), trainer_state=None, log_extra=print,
                    log_metric=print,
                )
            )  # fmt: skip

    def save_model(self, folder: str) -> None:
        tiny.saved(Path(folder), "llama", 0)


def test_a_trainer_gets_the_reward_unchanged(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "GRPOTrainer", StandIn)
    reward = rewards.called(rewards.function("klbench_tasks.toxicity.task:harmless"))
    assert script.trained(reward, ["The man said", "You"], tmp_path) == tmp_path / "policy"
    of_texts, of_messages = StandIn.values
    assert of_texts == of_messages and len(of_texts) == 2 and 0 < of_texts[0] <= reward.reward_max


def test_trl_s_own_rewards_are_what_trl_says_they_are(script: ModuleType) -> None:
    think = rewards.called(script.think_format_reward)
    texts = ["<think>\nyes\n</think>\nno", "<think>\nyes\nno"]
    assert think(prompts=["p", "p"], completions=texts) == [1.0, 0.0]
    assert think(prompts=["p", "p"], completions=texts) == script.think_format_reward([[{"content": t}] for t in texts])
    overlong = rewards.called(script.get_soft_overlong_punishment(5, 3)).reading(tiny.tokenizer())
    assert overlong(prompts=["p"] * 3, completions=["a b", "a b c", "a b c a b c"]) == [0.0, -1 / 3, -1.0]
    with pytest.raises(klbench.UserError, match="accuracy_reward needs solution"):
        rewards.load("trl.rewards:accuracy_reward")
