"""A reward model that klbench trained: a folder with its weights and a manifest that says where they come from.

    reward.json                    what was asked, of which data, how good it is on what was held out, SHA-256 of every other file
    weights.safetensors            `weights` [M, D], `bias` [M]                       kinds hashed and states
    member-0/ member-1/ ...        a transformers model and its tokenizer each        kind transformer

    r(c, x) = clip( mean_m z_m - k std_m z_m, -clip, clip )        z_m: log-odds of "good" by member m, std with M - 1

The ceiling `clip` is the model's reward_max: without one no posterior can be certified. k ("conservative", 0 unless asked for) charges
what the members disagree on (Coste et al. 2024, arXiv:2310.02743).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol, final

import numpy as np
from pydantic import Field, ValidationError

from klbench.errors import UserError
from klbench.estimate import Array
from klbench.record import EstimateField, Strict
from klbench.rewards import classifier, hashed, hidden_states
from klbench.rewards.calling import texts_of
from klbench.rewards.classifier import Network

MANIFEST: Final = "reward.json"
WEIGHTS: Final = "weights.safetensors"
KINDS: Final = ("hashed", "states", "transformer")


class Source(Strict):
    """What it was trained on. name: a file or `TASK of PRIOR`.  hash: SHA-256 of the rows.  train, held_out: rows of each part."""

    name: str
    hash: str
    train: int = Field(ge=1)
    held_out: int = Field(ge=0)


class Manifest(Strict):
    """What a folder says of itself. base: the language model that is read or was trained on, its weights by hash.

    held_out: `accuracy` and, of labels, `auc`, on rows whose prompts no training row has.
    """

    kind: Literal["hashed", "states", "transformer"]
    loss: Literal["binary", "bradley_terry"]
    members: int = Field(ge=1)
    conservative: float = Field(ge=0)
    clip: float = Field(gt=0)
    seed: int
    base: str
    base_hash: str
    source: Source
    held_out: dict[str, EstimateField]
    settings: dict[str, float]
    versions: dict[str, str]
    files: dict[str, str]

    FORMAT: ClassVar[str] = "klbench reward model 1"


class Margins(Protocol):
    """What is under a trained reward."""

    def margins(self, prompts: Sequence[str], completions: Sequence[str]) -> Array:
        """[M, n] log-odds of good by each member."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Transformers:
    """Members that are networks of one output, on prompt + completion."""

    networks: tuple[Network, ...]

    def margins(self, prompts: Sequence[str], completions: Sequence[str]) -> Array:
        """[M, n]."""
        pairs = list(zip(prompts, completions, strict=True))
        return np.stack([n.outputs([n.joined(*pair) for pair in pairs])[:, 0] for n in self.networks])


@final
@dataclass(frozen=True, eq=False)
class TrainedReward:
    """A reward model with its manifest; `name` is its folder."""

    name: str
    model: Margins
    manifest: Manifest

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def reward_max(self) -> float:
        return self.manifest.clip

    def members(self, completions: Sequence[Any], prompts: Sequence[Any] | None = None) -> Array:
        """[M, n] log-odds of good by each member, unclipped; empty prompts where none are given."""
        texts = texts_of(completions)
        before = [""] * len(texts) if prompts is None else texts_of(prompts)
        return self.model.margins(before, texts) if texts else np.zeros((self.manifest.members, 0))

    def disagreement(self, completions: Sequence[Any], prompts: Sequence[Any] | None = None) -> Array:
        """[n] standard deviation over members of the log-odds; 0 for a single one."""
        return _spread(self.members(completions, prompts))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: object) -> list[float]:
        found = self.members(completions, prompts)
        value = found.mean(0) - self.manifest.conservative * _spread(found)
        return [float(x) for x in np.clip(value, -self.manifest.clip, self.manifest.clip)]


def _spread(members: Array) -> Array:
    return np.asarray(members.std(0, ddof=1)) if len(members) > 1 else np.zeros(members.shape[1])


def is_reward(folder: Path) -> bool:
    """Whether a directory says that it holds a reward model of klbench."""
    return (folder / MANIFEST).is_file()


def listing(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, by its path within the folder."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def read(folder: Path, device: str = "cpu") -> TrainedReward:
    """Raises UserError, of one line that names the file, for a folder that is not whole or not what its manifest says."""
    if not is_reward(folder):
        raise UserError(f"no reward model in {folder}: {MANIFEST} is missing")
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.pop("format", None) != Manifest.FORMAT:
            raise UserError(f"{folder / MANIFEST}: its format is not {Manifest.FORMAT!r}")
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{folder / MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}") from None
    here = listing(folder)
    for name in sorted({*here, *manifest.files}):
        if here.get(name) != manifest.files.get(name):
            what = "is missing" if name not in here else "is none of its files" if name not in manifest.files else "is not what was written"
            raise UserError(f"{folder}: {name} {what}: the reward model is not whole")
    return TrainedReward(str(folder), _opened(folder, manifest, device), manifest)


def _opened(folder: Path, manifest: Manifest, device: str) -> Margins:
    if manifest.kind == "transformer":
        names = [f"member-{m}" for m in range(manifest.members)]
        return Transformers(tuple(classifier.network_of(folder / name, f"{folder}/{name}", device) for name in names))
    weights, bias = _arrays(folder / WEIGHTS, manifest.members)
    if manifest.kind == "hashed":
        if weights.shape[1] != hashed.WORDS + hashed.CHARACTERS:
            raise UserError(f"{folder / WEIGHTS}: {hashed.WORDS + hashed.CHARACTERS} columns expected, found {weights.shape[1]}")
        return hashed.Hashed(weights, bias)
    model = hidden_states.language_model(manifest.base, device)
    if model.weights_hash() != manifest.base_hash:
        raise UserError(f"{folder} reads the states of {manifest.base!r}, and what has that name now is another model")
    return hidden_states.HiddenStates(model, weights, bias)


def _arrays(path: Path, members: int) -> tuple[Array, Array]:
    """weights [M, D], bias [M] as float64."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        parts = {name: value.astype(np.float64) for name, value in load(path.read_bytes()).items()}
        weights, bias = parts["weights"], parts["bias"]
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} holds no weights and bias: {error}") from None
    if weights.ndim != 2 or bias.shape != (members,) or len(weights) != members or not np.isfinite(weights).all():
        raise UserError(f"{path}: finite weights [{members}, D] and bias [{members}] expected, found {weights.shape} and {bias.shape}")
    return weights, bias
