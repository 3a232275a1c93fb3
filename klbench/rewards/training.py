"""Training reward models: what makes a text good, from labels or from comparisons.

    binary           max sum_i y_i log s(z_i) + (1 - y_i) log s(-z_i)                  y in [0, 1]: a label, or the share that it holds of
    bradley_terry    max sum_i log s(z(chosen_i) - z(rejected_i))                      s: logistic function, z: log-odds of good

    hashed           z linear in hashed n-grams of the completion (hashed.py)
    states:PRIOR     z linear in a causal language model's last hidden state (hidden_states.py)
    hf:PATH          a transformers body with a new head of one output, all of it trained (Adam, falling rate)

The two linear kinds are penalised logistic regressions (scikit-learn); for comparisons on differences of features, without intercept, each
taken both ways round. Data: a file of rows, or draws of a prior that a task's gold reward (its own where it has none) labels: fresh draws
of the *train* split on a stream that nothing else reads, never a bank's. Members of an ensemble beyond one are bootstraps over prompts; a
transformer's differ by the seed of head and order too. Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, for z.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
from numpy.typing import NDArray

from klbench import models, streams
from klbench import task as tasks
from klbench.errors import UserError, unknown
from klbench.estimate import Array, Estimate
from klbench.priors import SHIPPED, prior_path
from klbench.record import digest, write_atomically
from klbench.reward_eval import intervals, ranking
from klbench.rewards import classifier, hashed, hidden_states, trained
from klbench.rewards.trained import Manifest, Source, TrainedReward
from klbench.target import evaluate
from klbench.task import AbstractTask

if TYPE_CHECKING:
    from torch import Tensor

LOSSES: Final = ("binary", "bradley_terry")
STRENGTH: Final = {"hashed": 10.0, "states": 0.1}  # inverse of the penalty on |w|^2, against a sum over rows
BATCH: Final = 16
Report = Callable[[str], None]


@final
@dataclass(frozen=True)
class Rows:
    """n rows of training data. labels: of `texts`, in [0, 1]; or `rejected`, which `texts` were preferred to."""

    prompts: list[str]
    texts: list[str]
    labels: Array | None = None
    rejected: list[str] | None = None

    @property
    def loss(self) -> str:
        return "binary" if self.rejected is None else "bradley_terry"

    @property
    def groups(self) -> list[str]:
        """What may not stand on both sides of a split: the prompt; where there is none, the text."""
        return [p or t for p, t in zip(self.prompts, self.texts, strict=True)]

    def at(self, keep: NDArray[np.int64]) -> Rows:
        """Rows by number."""
        cut = lambda x: [x[i] for i in keep]  # noqa: E731
        return Rows(
            cut(self.prompts),
            cut(self.texts),
            None if self.labels is None else self.labels[keep],
            None if self.rejected is None else cut(self.rejected),
        )

    @property
    def hash(self) -> str:
        """SHA-256 of all of it."""
        return digest([self.prompts, self.texts, None if self.labels is None else self.labels.tolist(), self.rejected])


def read_rows(path: Path) -> Rows:
    """A .jsonl of {"text", "label", "prompt"?} or of {"prompt", "chosen", "rejected"}. Raises UserError with the line's number."""
    try:
        lines = [(n, line) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    except FileNotFoundError:
        raise UserError(f"no data at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: an object expected")
        rows.append((number, row))
    if not rows:
        raise UserError(f"{path}: no row in it")
    compared = "chosen" in rows[0][1]
    texts = ("prompt", "chosen", "rejected") if compared else ("text",)
    for number, row in rows:
        for key in texts:
            if not isinstance(row.get(key), str):
                raise UserError(f"{path}, line {number}: {' and '.join(f'{t!r}' for t in texts)} must be texts, {key!r} is not")
        if not isinstance(row.get("prompt", ""), str | None):
            raise UserError(f"{path}, line {number}: 'prompt' must be a text")
        label = row.get("label")
        if not compared and not (isinstance(label, int | float) and 0 <= label <= 1):
            raise UserError(f"{path}, line {number}: 'label' must be a number from 0 to 1, 1 for good")
    if compared:
        prompts, chosen, rejected = ([row[key] for _, row in rows] for key in texts)
        return Rows(prompts, chosen, rejected=rejected)
    labels = np.array([float(row["label"]) for _, row in rows])
    return Rows([row.get("prompt") or "" for _, row in rows], [row["text"] for _, row in rows], labels)


def drawn_rows(task: AbstractTask, prior: Any, loss: str, samples: int, seed: int) -> Rows:
    """`samples` prior draws of each train prompt, labelled by the task's gold reward, or its own: label r (binary, r in [0, 1]), or draw 2i
    against draw 2i + 1, the one of higher reward chosen and ties left out.

    Raises UserError where the reward is no share and labels are wanted, and where nothing is left to learn from.
    """
    prompts = task.prompts("train")
    drawn = prior.sample(prompts, samples, task.max_new_tokens, streams.seed(seed, f"reward/draws/{task.name}"))
    texts = prior.decode(drawn.tokens, drawn.mask)
    label = evaluate(task.gold() or task.target(prior, task.beta).reward, prompts, texts)
    if loss == "binary":
        if label.min() < 0 or label.max() > 1:
            raise UserError(f"{task.name}: its gold reward is no share in [0, 1] to learn labels from; write --loss bradley_terry")
        flat = [(p, t) for p, row in zip(prompts, texts, strict=True) for t in row]
        return Rows([p for p, _ in flat], [t for _, t in flat], label.ravel())
    found = [
        (p, row[i], row[i + 1]) if r[i] > r[i + 1] else (p, row[i + 1], row[i])
        for p, row, r in zip(prompts, texts, label, strict=True)
        for i in range(0, samples - 1, 2)
        if r[i] != r[i + 1]
    ]
    if not found:
        raise UserError(f"{task.name}: no two of {samples} draws a prompt differ in reward")
    return Rows([x[0] for x in found], [x[1] for x in found], rejected=[x[2] for x in found])


def train_reward(
    out: str | Path,
    data: str | Path | None = None,
    *,
    task: str | AbstractTask | None = None,
    prior: Any = "mini",
    model: str = "hashed",
    loss: str | None = None,
    members: int = 1,
    conservative: float = 0.0,
    clip: float = 4.0,
    held_out: float = 0.2,
    samples: int = 64,
    epochs: int = 3,
    lr: float = 3e-4,
    seed: int = 0,
    device: str = "cpu",
    include: Sequence[Path] = (),
    report: Report = lambda text: None,
) -> TrainedReward:
    """A reward model, trained, measured on what was held out, saved in `out` and read back from there.

    data: a .jsonl of labels or of comparisons (`read_rows`); or `task`, of whose train split `samples` draws of `prior` are labelled
    (`drawn_rows`). model: "hashed", "states:PRIOR" or "hf:PATH", PATH a shipped prior too.  loss: what the data is unless said; of a
    task "binary".  members: of an ensemble.  conservative: standard deviations over members to take off.  clip: log-odds beyond which
    the reward is flat, its reward_max.  held_out: share of prompts kept for the figures.  epochs, lr: of a transformer.
    The same words and seed give the same weights on one machine. Raises UserError for bad input; nothing is left half-written.
    """
    folder, kind, base = Path(out), model.partition(":")[0], model.partition(":")[2]
    kind = {"hf": "transformer"}.get(kind, kind)
    if kind not in trained.KINDS or (kind == "hashed") == bool(base):
        raise unknown("model", model, ["hashed", "states:PRIOR", "hf:PATH"])
    if loss is not None and loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name another directory")
    if (data is None) == (task is None):
        raise UserError("a reward model is trained on either a file of rows or a task's draws")
    if members < 1 or not (0 <= held_out < 1) or not (clip > 0 and math.isfinite(clip)) or conservative < 0 or samples < 2 or epochs < 1:
        raise UserError("members, samples, epochs at least 1 (2 draws), clip above 0, conservative at least 0, held_out in [0, 1) expected")
    if conservative and members == 1:
        raise UserError("one member disagrees with nobody: conservative needs members of 2 or more")
    if data is not None:
        rows, name = read_rows(Path(data)), Path(data).name
    else:
        given = task if isinstance(task, AbstractTask) else tasks.load(str(task), include)
        opened = models.open_prior(prior, device)
        report(f"drawing {samples} texts a prompt of {given.name}")
        rows, name = drawn_rows(given, opened, loss or "binary", samples, seed), f"draws of {opened.name} for {given.name}"
    if loss is not None and loss != rows.loss:
        raise UserError(f"{data} holds {'labels' if rows.loss == 'binary' else 'comparisons'}, which {loss} does not learn from")
    fit, test = parted(rows, held_out, seed)
    report(f"fitting {members} {'members' if members > 1 else 'model'} to {len(fit.texts)} rows")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        if kind == "transformer":
            settings = {"epochs": float(epochs), "lr": lr, "batch": float(BATCH)}
            base_hash = _transformers(part, base, fit, members, epochs, lr, seed, device, report)
        else:
            settings = {"strength": STRENGTH[kind]}
            base_hash = _linear(part, kind, base, fit, members, seed, device)
        asked = {"kind": kind, "loss": rows.loss, "members": members, "conservative": conservative, "clip": clip, "seed": seed}
        asked |= {"base": base, "base_hash": base_hash, "settings": settings, "versions": _versions(kind)}
        source = Source(name=name, hash=rows.hash, train=len(fit.texts), held_out=len(test.texts))
        manifest = Manifest(**asked, source=source, held_out={}, files=trained.listing(part))
        _write(part, manifest)
        report(f"measuring on {len(test.texts)} rows")
        _write(part, manifest.model_copy(update={"held_out": figures(trained.read(part, device), test)}))
        part.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return trained.read(folder, device)


def parted(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """(to fit, held out): a share of the prompts goes to the second, the rows of a prompt together."""
    groups = sorted(set(rows.groups))
    order = np.random.default_rng(streams.seed(seed, "reward/held_out")).permutation(len(groups))
    kept = {groups[i] for i in order[: round(share * len(groups))]}
    out = np.array([g in kept for g in rows.groups], dtype=bool)
    if out.all():
        raise UserError("nothing is left to fit: hold out less")
    return rows.at(np.flatnonzero(~out)), rows.at(np.flatnonzero(out))


def figures(reward: TrainedReward, rows: Rows) -> dict[str, Estimate]:
    """accuracy, and of labels auc, by the members' mean log-odds; prompts are the clusters of the error. Nothing where no row is held out.

    A label of .5 and more counts as good; accuracy of a label is that of the sign of the log-odds.
    """
    if not rows.texts:
        return {}
    z, cluster = reward.members(rows.texts, rows.prompts).mean(0), intervals.clusters(rows.groups)
    if rows.rejected is not None:
        return {"accuracy": ranking.pairwise(z, reward.members(rows.rejected, rows.prompts).mean(0), cluster)}
    assert rows.labels is not None
    good = rows.labels >= 0.5
    right = np.where(z == 0, 0.5, (z > 0) == good)
    return {"accuracy": intervals.share_of(right, cluster), "auc": ranking.auc(z, good, cluster)}


def _write(folder: Path, manifest: Manifest) -> None:
    data = {"format": Manifest.FORMAT, **json.loads(manifest.model_dump_json())}
    write_atomically(folder / trained.MANIFEST, (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def _versions(kind: str) -> dict[str, str]:
    packages = {"hashed": ("scikit-learn",), "states": ("scikit-learn", "torch", "transformers"), "transformer": ("torch", "transformers")}
    return {p: importlib.metadata.version(p) for p in ("klbench", "numpy", *packages[kind])}


def _counts(groups: Sequence[str], member: int, members: int, seed: int) -> Array:
    """[n] times that each row counts: once, or as often as its prompt came in a bootstrap over prompts."""
    if members == 1:
        return np.ones(len(groups))
    cluster = intervals.clusters(list(groups))
    size = int(cluster.max()) + 1
    chosen = np.random.default_rng(streams.seed(seed, f"reward/bootstrap/{member}")).integers(size, size=size)
    return np.bincount(chosen, minlength=size)[cluster].astype(np.float64)


def _linear(folder: Path, kind: str, base: str, rows: Rows, members: int, seed: int, device: str) -> str:
    """Fits and writes the weights; the hash of the language model underneath, "" without one."""
    from safetensors.numpy import save

    base_hash = ""
    if kind == "hashed":
        made = lambda texts: hashed.features(texts)  # noqa: E731
    else:
        model = hidden_states.language_model(base, device)
        base_hash = model.weights_hash()
        made = lambda texts: hidden_states.features(model, rows.prompts, texts)  # noqa: E731
    x = made(rows.texts)
    other = None if rows.rejected is None else made(rows.rejected)
    fits = [
        logistic(x, _counts(rows.groups, m, members, seed), STRENGTH[kind], labels=rows.labels, other=other, scaled=kind == "states")
        for m in range(members)
    ]
    parts: dict[str, NDArray[Any]] = {
        "weights": np.stack([w for w, _ in fits]).astype(np.float32),
        "bias": np.array([b for _, b in fits], dtype=np.float64),
    }
    write_atomically(folder / trained.WEIGHTS, save(parts))
    return base_hash


def logistic(
    x: Any, counts: Array, strength: float, *, labels: Array | None = None, other: Any = None, scaled: bool = False
) -> tuple[Array, float]:
    """(w [D], b) of a penalised logistic regression: of labels [n] on x, or of x preferred to `other` (b = 0).

    x, other [n, D], dense or sparse; counts [n] >= 0 weigh the rows; scaled: the penalty is on weights of columns of unit spread.
    Raises UserError where there is nothing to tell apart.
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    keep = np.flatnonzero(counts)
    x, counts = x[keep], counts[keep]
    if other is None:
        assert labels is not None
        rows, y = x, labels[keep]
        weight = np.concatenate([counts * y, counts * (1 - y)])
    else:
        rows = x - other[keep]
        weight = np.concatenate([counts, counts]) / 2
    spread = np.ones(rows.shape[1])
    if scaled:
        spread = np.sqrt((rows**2).mean(0) if other is not None else rows.var(0))
        spread[spread == 0] = 1.0
        rows = rows / spread
    stacked = (np.concatenate if isinstance(rows, np.ndarray) else vstack)([rows, rows if other is None else -rows])
    kind = np.concatenate([np.ones(rows.shape[0]), np.zeros(rows.shape[0])])
    there = np.flatnonzero(weight)
    if len(set(kind[there])) < 2 or not abs(rows).sum():
        raise UserError("the rows to fit are all alike: nothing tells good from bad")
    line = LogisticRegression(C=strength, fit_intercept=other is None, max_iter=5000, tol=1e-6)
    line.fit(stacked[there] if isinstance(stacked, np.ndarray) else stacked.tocsr()[there], kind[there], sample_weight=weight[there])
    return line.coef_[0] / spread, float(line.intercept_[0]) if other is None else 0.0


def _transformers(folder: Path, base: str, rows: Rows, members: int, epochs: int, lr: float, seed: int, device: str, report: Report) -> str:
    """Trains and saves the members; the hash of the weights they started from."""
    import torch

    from klbench.policies import causal_lm

    where = causal_lm.device_of(device)
    place = str(prior_path(base)) if base in SHIPPED else base
    base_hash = ""
    for m in range(members):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(streams.seed(seed, f"reward/head/{m}"))
            network = _with_head(place, f"{base}-{m}")
        network.model.to(where)
        if not base_hash:
            base_hash = digest({k: _bytes_hash(v) for k, v in sorted(network.model.base_model.state_dict().items())})
        counts = _counts(rows.groups, m, members, seed)
        _descend(network, rows, counts, epochs, lr, streams.seed(seed, f"reward/order/{m}"), report)
        target = folder / f"member-{m}"
        with classifier.quietly():
            network.model.save_pretrained(target)
        network.tokenizer.save_pretrained(target)
    return base_hash


def _bytes_hash(tensor: Tensor) -> str:
    import hashlib

    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _with_head(place: str, name: str) -> classifier.Network:
    """A body from a directory or hub, in float32, under a fresh head of one output. Raises UserError for what has no such form."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    from klbench.policies import causal_lm

    local = Path(place).is_dir()
    if not local and (Path(place).exists() or place.count("/") != 1 or place.startswith((".", "/"))):
        raise UserError(f"no directory of a model at {place}, which is no hub name owner/name either")
    tokenizer = causal_lm.tokenizer_of(place)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), None)
    try:
        with classifier.quietly():
            model = AutoModelForSequenceClassification.from_pretrained(
                place,
                num_labels=1,
                pad_token_id=pad,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=local,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError) as error:
        raise UserError(f"no model for a reward could be loaded from {place}: {' '.join(str(error).split())[:300]}") from None
    return classifier.Network(name, model, tokenizer)


def _descend(network: classifier.Network, rows: Rows, counts: Array, epochs: int, lr: float, seed: int, report: Report) -> None:
    """Adam with a rate that falls to 0 over the epochs; batches of BATCH rows in an order of the seed, padded at the right."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

    model = network.model.train()
    generator = np.random.default_rng(seed)
    order = np.repeat(np.arange(len(rows.texts)), counts.astype(int))
    steps = epochs * -(-len(order) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)

    def score(prompts: Sequence[str], texts: Sequence[str]) -> Tensor:
        ids = [network.joined(*pair) for pair in zip(prompts, texts, strict=True)]
        widest = max(map(len, ids))
        grid = torch.tensor([row + [model.config.pad_token_id] * (widest - len(row)) for row in ids], device=model.device)
        there = torch.arange(widest, device=model.device) < torch.tensor([len(row) for row in ids], device=model.device)[:, None]
        found: Tensor = model(input_ids=grid, attention_mask=there.long()).logits[:, 0]
        return found

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout, where the body has any
        for epoch in range(epochs):
            total, shuffled = 0.0, generator.permutation(order)
            for start in range(0, len(shuffled), BATCH):
                part = rows.at(shuffled[start : start + BATCH])
                z = score(part.prompts, part.texts)
                if part.rejected is not None:
                    loss = -logsigmoid(z - score(part.prompts, part.rejected)).mean()
                else:
                    loss = binary_cross_entropy_with_logits(z, torch.tensor(part.labels, dtype=z.dtype, device=z.device))
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                total += loss.item() * len(part.texts)
            report(f"{network.name}: epoch {epoch + 1} of {epochs}, loss {total / len(shuffled):.4f}")
    model.eval()
