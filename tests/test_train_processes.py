"""Two processes give the figures of one, with whole weights and with sharded ones; one that dies is not waited for."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import Letters, asked
from tiny import model, tokenizer

from klbench.errors import UserError
from klbench.gradient import Fitted
from klbench.policies.causal_lm import wrap
from klbench.processes import Processes, joined
from klbench.train import train

Case = tuple[str, str, dict[str, object], int]
SMALL: dict[str, object] = {"steps": 3, "prompts": 3, "lr": 3e-4}
WHOLE: dict[str, Case] = {
    "rloo": ("rloo", "llama", SMALL, 0),
    "ppo": ("ppo", "llama", SMALL, 0),
    "rb_kl": ("rb_kl", "gpt2", SMALL, 0),
    "dpg": ("dpg", "llama", SMALL, 0),
    "hnpg": ("hnpg", "llama", SMALL, 0),
    "actor_critic": ("actor_critic", "llama", SMALL, 0),
    "conditional_training": ("conditional_training", "llama", SMALL, 0),
    "idle": ("rloo", "llama", {**SMALL, "prompts": 1}, 0),  # the first process has no prompt at all
    "lora": ("rloo", "llama", {**SMALL, "lora_rank": 2, "micro": 1}, 0),
}
SHARDED: dict[str, Case] = {
    f"sharded_{name}": (objective, kind, {**settings, "shard": True, **more}, 0)
    for name, objective, kind, settings, more in (
        ("rloo", "rloo", "llama", SMALL, {}),
        ("ppo", "ppo", "llama", SMALL, {"micro": 2}),
        ("rb_kl", "rb_kl", "gpt2", SMALL, {}),  # its head and its embedding are one matrix
        ("dpg", "dpg", "llama", SMALL, {}),
        ("conditional_training", "conditional_training", "llama", SMALL, {"recompute": True}),
        ("idle", "rloo", "llama", {**SMALL, "prompts": 1}, {}),
        ("lora", "rloo", "llama", {**SMALL, "lora_rank": 2}, {}),
    )
}
RESUMED: dict[str, object] = {**SMALL, "steps": 5, "checkpoint_every": 2}
DYING: dict[str, Case] = {
    "cut": ("rloo", "llama", RESUMED, 4),
    "cut_sharded": ("rloo", "llama", {**RESUMED, "shard": True}, 4),
}


def launched(folder: Path, cases: Mapping[str, Case], count: int = 2) -> list[tuple[int, str]]:
    """Exit status and output of each process, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = [sys.executable, str(Path(__file__).with_name("training_processes.py")), str(folder), json.dumps(cases)]
    started = []
    for rank in range(count):
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
        }
        environment = {**os.environ, **{name: str(value) for name, value in told.items()}}
        started.append(subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    said = launched(folder, {**WHOLE, **SHARDED})
    assert [status for status, _ in said] == [0, 0], "\n".join(text[-3000:] for _, text in said)
    return folder


def alone(case: Case, folder: Path) -> Path:
    objective, kind, settings, _ = case
    run = asked(objective, **{k: v for k, v in settings.items() if k != "shard"})
    train(run, Letters(), wrap("tiny", model(kind, 4), tokenizer()), folder)
    return folder


def differs(left: Path, right: Path) -> float:
    """The greatest difference between two policies' weights and curves."""
    curves = [[json.loads(line) for line in (at / "curve.jsonl").read_text().splitlines()] for at in (left, right)]
    assert all(a.keys() == b.keys() for a, b in zip(*curves, strict=True)) and len(curves[0]) >= 3
    found = [abs(a[k] - b[k]) / max(1.0, abs(b[k])) for a, b in zip(*curves, strict=True) for k in a]
    weights = [load_file(at / "model.safetensors") for at in (left, right)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        apart = (value - weights[1][name]).abs()
        if name.endswith("c_attn.bias"):  # a key's bias adds alike to all that a query sees: its gradient is rounding, which Adam blows up
            apart = torch.cat([apart.chunk(3)[i] for i in (0, 2)])
        found.append(float(apart.max()))
    return max(found)


@pytest.mark.parametrize("name", [*WHOLE, *SHARDED])
def test_two_processes_give_the_figures_of_one(name: str, together: Path, tmp_path: Path) -> None:
    case = {**WHOLE, **SHARDED}[name]
    assert differs(together / name, alone(case, tmp_path / "one")) < 1e-6
    assert len({(together / f"{name}.{rank}").read_text() for rank in (0, 1)}) == 1  # both have it in the end
    other = (case[0], case[1], {**case[2], "lr": 2e-3}, 0)
    assert differs(together / name, alone(other, tmp_path / "mutant")) > 1e-5


def test_a_process_that_dies_is_not_waited_for_and_the_run_goes_on(tmp_path: Path) -> None:
    for name, case in DYING.items():
        started = time.monotonic()
        (status, said), (died, _) = launched(tmp_path, {name: case})
        lines = [line for line in said.splitlines() if line.startswith(name)]
        assert (status, died) == (2, 1) and time.monotonic() - started < 100, said[-3000:]
        assert lines == [f"{name}: process 0: another process of this run has ended, or did not answer for 0:30:00"]
        assert [p.name for p in tmp_path.glob(f".{name}.work/*")] == ["2"] and not (tmp_path / name).exists()
    again = {name: (objective, kind, settings, 0) for name, (objective, kind, settings, _) in DYING.items()}
    undisturbed = {f"{name}_whole": case for name, case in again.items()}
    said = launched(tmp_path, {**again, **undisturbed})
    assert [status for status, _ in said] == [0, 0], said[0][1][-3000:]
    for name in again:
        assert (tmp_path / f"{name}.0").read_text() == (tmp_path / f"{name}_whole.0").read_text()  # bit for bit
        assert (tmp_path / name / "curve.jsonl").read_text() == (tmp_path / f"{name}_whole" / "curve.jsonl").read_text()
        assert differs(tmp_path / name, alone(again[name], tmp_path / f"{name}_alone")) < 1e-6


# one process


def test_shares_are_all_rows_once_and_equal_to_one() -> None:
    for rows in range(9):
        for count in (1, 2, 3, 5):
            shares = [Processes(rank, count).share(rows) for rank in range(count)]
            assert [i for share in shares for i in range(share.start, share.stop)] == list(range(rows))
            sizes = [share.stop - share.start for share in shares]
            assert max(sizes) - min(sizes) <= 1


def test_draws_of_a_share_are_those_among_all() -> None:
    prior = wrap("tiny", model("llama", 4), tokenizer())
    whole, part = (prior.sample(["a", "b c", "c"], 5, 3, 7, share) for share in (slice(0, 3), slice(1, 3)))
    assert torch.equal(whole.tokens[1:], part.tokens) and torch.equal(whole.mask[1:], part.mask)
    torch.testing.assert_close(whole.log_q[1:], part.log_q)
    assert not torch.equal(prior.sample(["b c", "c"], 5, 3, 7).tokens, part.tokens)  # the mutant: drawn as if there were no others


def test_one_process_needs_no_launcher_and_does_not_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert joined("cpu") == (Processes(0, 1), "cpu")
    part = torch.tensor([[1.0, math.inf]])
    assert Processes().whole(part, 1) is part
    with pytest.raises(UserError, match="^train.shard spreads a model over processes: start `klbench train` with torchrun"):
        train(asked("rloo", shard=True), Letters(), wrap("tiny", model("llama", 4), tokenizer()), tmp_path / "p")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(UserError, match="of this machine has no GPU"):
        joined("cuda")
    assert Fitted(1).parts(Processes(0, 2).share(1)) == []
