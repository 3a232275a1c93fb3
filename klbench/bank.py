"""The bank: prior draws of one (prior, task) on its score split, kept by content hash, extended and never redrawn.

Chunk j of the draws depends on the task, the prior and j alone, so a longer bank begins with the shorter one. Banks of the `mini` prior
ship in `<task package>/banks/`; others are drawn once into the folder given. Draws of a bank feed no training, no lambda, no selection.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray

from klbench import streams
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.policies.causal_lm import CausalLM
from klbench.record import digest, write_atomically
from klbench.target import TiltedPrior, evaluate
from klbench.task import AbstractTask

CHUNK: Final = 256
DRAWS: Final = 512  # of a bank that is made because none ships


@final
@dataclass(frozen=True)
class Bank:
    """Prior draws [P, N0, T] with what does not depend on any policy.

    tokens; mask; log_p0 [P, N0] nats; reward [P, N0] of the target; gold, feature [P, N0] or None; meta: what the draws depend on.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]
    log_p0: Array
    reward: Array
    gold: Array | None
    feature: Array | None
    meta: dict[str, Any]

    @property
    def hash(self) -> str:
        """SHA-256 of the draws and their rewards."""
        found = hashlib.sha256(digest(self.meta).encode())
        for part in (self.tokens, self.mask, self.log_p0, self.reward):
            found.update(np.ascontiguousarray(part).tobytes())
        return found.hexdigest()

    def first(self, prompts: int) -> Bank:
        """The bank of the first so many prompts; 0 means all."""
        if not prompts:
            return self
        cut = lambda x: None if x is None else x[:prompts]  # noqa: E731
        return Bank(
            self.tokens[:prompts],
            self.mask[:prompts],
            self.log_p0[:prompts],
            self.reward[:prompts],
            cut(self.gold),
            cut(self.feature),
            self.meta,
        )

    def token_lists(self, keep: NDArray[np.bool_], eos: int) -> list[list[list[int]]]:
        """Draws marked in keep [P, N0] as lists of ids without EOS."""
        return [
            [[int(t) for t, m in zip(row, mask, strict=True) if m and t != eos] for row, mask in zip(tokens[k], masks[k], strict=True)]
            for tokens, masks, k in zip(self.tokens, self.mask, keep, strict=True)
        ]

    def to_bytes(self) -> bytes:
        """Compressed npz; deterministic."""
        out = io.BytesIO()
        parts: dict[str, Any] = {"tokens": self.tokens.astype(np.uint16 if self.tokens.max(initial=0) < 65536 else np.int32)}
        parts |= {
            "length": self.mask.sum(2).astype(np.uint16),
            "log_p0": self.log_p0.astype(np.float32),
            "reward": self.reward.astype(np.float32),
        }
        parts |= {name: value.astype(np.float32) for name in ("gold", "feature") if (value := getattr(self, name)) is not None}
        np.savez_compressed(out, meta=np.frombuffer(json.dumps(self.meta, sort_keys=True).encode(), np.uint8), **parts)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Bank:
        """Raises UserError that names the file when it is not a bank."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                parts = {name: file[name] for name in file.files}
            tokens = parts["tokens"].astype(np.int32)
            mask = np.arange(tokens.shape[2]) < parts["length"][:, :, None]
            double = {name: parts[name].astype(np.float64) if name in parts else None for name in ("log_p0", "reward", "gold", "feature")}
            assert double["log_p0"] is not None and double["reward"] is not None
            meta = json.loads(parts["meta"].tobytes())
            return cls(tokens, mask, double["log_p0"], double["reward"], double["gold"], double["feature"], meta)
        except Exception as error:  # np.load raises whatever the zip or header parser meets
            raise UserError(f"{where} is not a bank: {' '.join(str(error).split())[:200]}") from None


def meta_of(task: AbstractTask, prior: CausalLM, draws: int) -> dict[str, Any]:
    """What a bank's draws depend on."""
    return {
        "task": task.name,
        "version": task.version,
        "prior": prior.weights_hash(),
        "prompts": digest(task.prompts("score")),
        "max_new_tokens": task.max_new_tokens,
        "draws": draws,
    }


def shipped(task: AbstractTask, name: str) -> Path | None:
    """The bank file that ships with a task for a named prior, or None."""
    package = sys.modules[type(task).__module__].__package__ or ""
    if not package:
        return None
    path = Path(str(files(package).joinpath("banks", f"{name}.npz")))
    return path if path.is_file() else None


def draw(task: AbstractTask, prior: CausalLM, target: TiltedPrior, draws: int, report: Callable[[int], None] = lambda n: None) -> Bank:
    """A fresh bank of `draws` (a multiple of 256) prior draws a prompt."""
    prompts = task.prompts("score")
    parts = []
    for chunk in range(-(-draws // CHUNK)):
        parts.append(prior.sample(prompts, CHUNK, task.max_new_tokens, streams.seed(0, f"bank/{task.name}/{chunk}")))
        report(chunk * CHUNK)
    tokens, mask = torch.cat([p.tokens for p in parts], 1), torch.cat([p.mask for p in parts], 1)
    texts = prior.decode(tokens, mask)
    gold, feature = task.gold(), task.features()
    return Bank(
        tokens.numpy().astype(np.int32),
        mask.numpy(),
        torch.cat([p.log_q for p in parts], 1).double().sum(2).numpy().astype(np.float32).astype(np.float64),
        target.rewards(prompts, texts).astype(np.float32).astype(np.float64),
        None if gold is None else evaluate(gold, prompts, texts).astype(np.float32).astype(np.float64),
        None if feature is None else evaluate(feature[0], prompts, texts).astype(np.float32).astype(np.float64),
        meta_of(task, prior, tokens.shape[1]),
    )


def open_bank(task: AbstractTask, prior: CausalLM, target: TiltedPrior, folder: Path) -> Bank:
    """The bank that ships for this prior, or the one in `folder`, or a new one drawn there."""
    wanted = meta_of(task, prior, 0)
    candidates = [p for p in (shipped(task, prior.name), folder / f"{digest(wanted)[:16]}.npz") if p is not None]
    for path in candidates:
        if path.is_file():
            bank = Bank.from_bytes(path.read_bytes(), str(path))
            if {**bank.meta, "draws": 0} == wanted:
                return bank
    bank = draw(task, prior, target, DRAWS)
    write_atomically(candidates[-1], bank.to_bytes())
    return bank
