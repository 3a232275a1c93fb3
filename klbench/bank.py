"""The bank: prior draws of one (prior, task) on its score split, kept by content hash, extended and never redrawn.

Chunk j of the draws depends on the task, the prior and j alone, so a longer bank begins with the shorter one. Banks of the `mini` prior
ship in `<task package>/banks/`; others are drawn once into the folder given. Draws of a bank feed no training, no lambda, no selection.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray

from klbench import streams
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.record import digest, write_atomically
from klbench.target import Policy, TiltedPrior, evaluate
from klbench.task import AbstractTask, code_hash

CHUNK: Final = 256


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
        """SHA-256 of the draws and what was said of them."""
        found = hashlib.sha256(digest(self.meta).encode())
        for part in (self.tokens, self.mask, self.log_p0, self.reward, self.gold, self.feature):
            if part is None:
                continue
            found.update(np.ascontiguousarray(part).tobytes())
        return found.hexdigest()

    @classmethod
    def joined(cls, *parts: Bank) -> Bank:
        """Chunks side by side; what they depend on is said by the first."""

        def side_by_side(name: str) -> Any:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else np.concatenate(found, 1)

        whole = {name: side_by_side(name) for name in ("tokens", "mask", "log_p0", "reward", "gold", "feature")}
        return cls(**whole, meta={**parts[0].meta, "draws": whole["reward"].shape[1]})

    def rewarded(self, task: AbstractTask, prior: Policy, target: TiltedPrior, prompts: Sequence[str]) -> Bank:
        """The same draws with this target's rewards."""
        texts = prior.decode(torch.from_numpy(self.tokens).long(), torch.from_numpy(self.mask))
        gold, feature = task.gold(), task.features()
        single = lambda x: x.astype(np.float32).astype(np.float64)  # noqa: E731
        return replace(
            self,
            reward=single(target.rewards(prompts, texts)),
            gold=None if gold is None else single(evaluate(gold, prompts, texts)),
            feature=None if feature is None else single(evaluate(feature[0], prompts, texts)),
        )

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

    def token_lists(self, keep: NDArray[np.bool_], ends: Sequence[int]) -> list[list[list[int]]]:
        """Draws marked in keep [P, N0] as lists of ids without the tokens that end an output."""
        return [
            [[int(t) for t, m in zip(row, mask, strict=True) if m and t not in ends] for row, mask in zip(tokens[k], masks[k], strict=True)]
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
            for name, part in double.items():
                if part is not None and part.shape != tokens.shape[:2]:
                    raise ValueError(f"{name} has shape {part.shape}, its tokens {tokens.shape}")
            meta = json.loads(parts["meta"].tobytes())
            return cls(tokens, mask, double["log_p0"], double["reward"], double["gold"], double["feature"], meta)
        except Exception as error:  # np.load raises whatever the zip or header parser meets
            raise UserError(f"{where} is not a bank: {' '.join(str(error).split())[:200]}") from None


def meta_of(task: AbstractTask, prior: Policy, draws: int, length: int | None = None) -> dict[str, Any]:
    """What a bank's draws depend on. Raises UserError for a prior whose weights have no hash."""
    if not hasattr(prior, "weights_hash"):
        raise UserError(f"the draws of {prior.name} cannot be kept: it has no weights_hash() to know them by")
    meta = {
        "task": task.name,
        "version": task.version,
        "prior": prior.weights_hash(),
        "prompts": digest(task.prompts("score")),
        "max_new_tokens": length or task.max_new_tokens,
        "draws": draws,
    }
    stops = tuple(getattr(prior, "stops", ()))
    if stops not in ((), (getattr(prior, "eos", None),)):
        meta["stops"] = list(stops)
    if getattr(prior, "chat", False):
        meta["chat"] = True
    if code := code_hash(task):
        meta["code"] = code
    return meta


def shipped(task: AbstractTask, name: str) -> Path | None:
    """The bank file that ships with a task for a named prior, `banks/[VARIANT-]PRIOR.npz` in the family's folder; or None."""
    package = sys.modules[type(task).__module__].__package__ or ""
    if not package:
        return None
    variant = task.name.partition("/")[2]
    path = Path(str(files(package).joinpath("banks", f"{variant}-{name}.npz" if variant else f"{name}.npz")))
    return path if path.is_file() else None


def chunk(task: AbstractTask, prior: Policy, target: TiltedPrior, prompts: Sequence[str], length: int, draws: int, seed: int) -> Bank:
    """`draws` prior draws a prompt with their rewards, in the precision of the file."""
    drawn = prior.sample(prompts, draws, length, seed)
    single = lambda x: x.astype(np.float32).astype(np.float64)  # noqa: E731
    log_p0 = single(drawn.log_q.double().sum(2).numpy())
    none = np.zeros_like(log_p0)
    bank = Bank(drawn.tokens.numpy().astype(np.int32), drawn.mask.numpy(), log_p0, none, None, None, {"draws": draws})
    return bank.rewarded(task, prior, target, prompts)


def draw(
    task: AbstractTask, prior: Policy, target: TiltedPrior, draws: int, report: Callable[[int], None] = lambda n: None,
    begun: Bank | None = None, length: int | None = None,
) -> Bank:  # fmt: skip
    """A bank of `draws` (rounded up to 256) prior draws a prompt of a task's score split: `begun` and what it lacks."""
    prompts, parts = task.prompts("score"), [] if begun is None else [begun]
    for j in range((begun.reward.shape[1] if begun else 0) // CHUNK, -(-draws // CHUNK)):
        report(j * CHUNK)
        seed = streams.seed(0, f"bank/{task.name}/{j}")
        parts.append(chunk(task, prior, target, prompts, length or task.max_new_tokens, CHUNK, seed))
    joined = Bank.joined(*parts)
    return replace(joined, meta=meta_of(task, prior, joined.reward.shape[1], length))


def open_bank(task: AbstractTask, prior: Policy, target: TiltedPrior, folder: Path, draws: int, length: int | None = None) -> Bank:
    """The bank that ships for this prior; or the one in `folder`, at least `draws` long: made, extended, never redrawn."""
    wanted = meta_of(task, prior, 0, length)
    ready = shipped(task, prior.name)
    if ready is not None:
        bank = Bank.from_bytes(ready.read_bytes(), str(ready))
        if {**bank.meta, "draws": 0} == wanted:
            return bank
    path = folder / f"{digest(wanted)[:16]}.npz"
    with _alone(path):
        begun = Bank.from_bytes(path.read_bytes(), str(path)) if path.is_file() else None
        if begun is not None and {**begun.meta, "draws": 0} != wanted:
            raise UserError(f"{path}: the bank of another prior or task; move it away")
        if begun is not None and begun.reward.shape[1] >= draws:
            return begun
        bank = draw(task, prior, target, draws, begun=begun, length=length)
        write_atomically(path, bank.to_bytes())
    return bank


@final
@dataclass
class Reservoir:
    """The prior's draws of one scoring: those that ship with the task, those kept in a directory, or fresh ones; longer when asked."""

    task: AbstractTask
    prior: Policy
    target: TiltedPrior
    length: int
    seed: int
    kept: Path | None = None
    _bank: Bank | None = field(default=None, init=False)
    _chunks: int = field(default=0, init=False)

    def upto(self, draws: int) -> Bank:
        """At least so many draws a prompt; those of earlier calls come first, unchanged."""
        bank = self._bank if self._bank is not None else self._shipped()
        if bank is None or bank.reward.shape[1] < draws:
            bank = self._longer(bank, draws)
        self._bank = bank
        return bank

    def _shipped(self) -> Bank | None:
        ready = shipped(self.task, self.prior.name) if self.length == self.task.max_new_tokens else None
        if ready is None:
            return None
        bank = Bank.from_bytes(ready.read_bytes(), str(ready))
        return bank if {**bank.meta, "draws": 0} == meta_of(self.task, self.prior, 0) else None

    def _longer(self, begun: Bank | None, draws: int) -> Bank:
        if self.kept is not None:  # a user's reward may have changed since: the draws are kept, their rewards made anew
            bank = open_bank(self.task, self.prior, self.target, self.kept, draws, self.length)
            return bank.rewarded(self.task, self.prior, self.target, self.task.prompts("score"))
        if begun is not None and "task" in begun.meta:
            return draw(self.task, self.prior, self.target, draws, begun=begun)
        parts = [] if begun is None else [begun]
        more = draws - sum(part.reward.shape[1] for part in parts)
        seed = streams.seed(self.seed, f"score/prior/{self._chunks}" if parts else "score/prior")
        self._chunks += 1
        return Bank.joined(*parts, chunk(self.task, self.prior, self.target, self.task.prompts("score"), self.length, more, seed))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time makes or extends a bank: the others wait and then read it. The lock goes with its owner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
