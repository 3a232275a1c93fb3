"""The Python interface: `score` for anybody's checkpoints, `train` for one policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from klbench import bank as banks
from klbench import estimate, method, streams
from klbench import task as tasks
from klbench.bank import Bank
from klbench.errors import UserError, unknown
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife
from klbench.method import AbstractSampler
from klbench.policies import causal_lm
from klbench.policies.causal_lm import CausalLM
from klbench.record import Run, Score, Train, write_atomically
from klbench.score import figures, load_prior, measure
from klbench.target import Policy, TiltedPrior, evaluate
from klbench.task import AbstractTask, GivenTask
from klbench.train import train as train_run
from klbench.weights import log_mean_exp

if TYPE_CHECKING:
    import pandas

Model = Any  # a path, a hub name, a transformers model, or a klbench Policy


@final
@dataclass(frozen=True)
class PolicyScore:
    """One policy's figures: an attribute per column of DESIGN.md section 3, each an Estimate in nats unless its column says otherwise.

    prompts: per-prompt arrays [P] (free, log_z, reverse_kl, reach, reward, kl_prior).
    """

    name: str
    columns: dict[str, Estimate]
    prompts: dict[str, Array] = field(repr=False)

    def __getattr__(self, name: str) -> Estimate:
        columns: dict[str, Estimate] = self.__dict__.get("columns", {})
        if name in columns:
            return columns[name]
        raise AttributeError(str(unknown("column", name, columns)))

    @property
    def status(self) -> str:
        """That of reverse_kl."""
        return self.columns["reverse_kl"].status


@final
@dataclass(frozen=True)
class ScoreResult(Mapping[str, PolicyScore]):
    """What `score` returns: policies by name, and log Z per prompt (nats, from the prior's draws alone)."""

    policies: dict[str, PolicyScore]
    log_z: list[Estimate]
    prompts: list[str]
    beta: float

    def __getitem__(self, name: str) -> PolicyScore:
        if name not in self.policies:
            raise KeyError(str(unknown("policy", name, self.policies)))
        return self.policies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.policies)

    def __len__(self) -> int:
        return len(self.policies)

    def to_frame(self) -> pandas.DataFrame:
        """A row a policy and column: policy, column, value, low, high, stderr, n, status, reason."""
        import pandas

        rows = [
            {
                "policy": name,
                "column": column,
                "value": e.value,
                "low": e.low,
                "high": e.high,
                "stderr": e.stderr,
                "n": e.n,
                "status": e.status,
                "reason": e.reason,
            }
            for name, policy in self.policies.items()
            for column, e in policy.columns.items()
        ]
        return pandas.DataFrame(rows)

    def to_json(self, path: str | Path) -> None:
        """Writes all estimates, atomically; keys as in DESIGN.md."""
        import json

        data = {
            "beta": self.beta,
            "prompts": self.prompts,
            "log_z": [e.to_json() for e in self.log_z],
            "policies": {
                name: {
                    "status": p.status,
                    "columns": {k: e.to_json() for k, e in p.columns.items()},
                    "prompts": {k: [float(x) for x in v] for k, v in p.prompts.items()},
                }
                for name, p in self.policies.items()
            },
        }
        write_atomically(Path(path), (json.dumps(data, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode())


def score(
    prior: Model,
    policies: Mapping[str, Model] | Sequence[Model] | Model,
    prompts: Sequence[str] | None = None,
    reward: Callable[..., list[float]] | None = None,
    beta: float | None = None,
    *,
    task: str | AbstractTask | None = None,
    reward_max: float = math.inf,
    max_new_tokens: int | None = None,
    samples: int = 1000,
    seed: int = 0,
    device: str | None = None,
    tokenizer: Any = None,
) -> ScoreResult:
    """How far each policy is from p*(x|c) = p0(x|c) exp(r(c, x)/beta) / Z(c), with 95 % intervals.

    prior, policies: a directory in Hugging Face format, a hub name, a transformers model (with `tokenizer`, else the one it was loaded
    with, else the prior's), a klbench Policy, or for policies a sampler's name (`best_of_n:16`, `rejection`).
    prompts, reward: texts and f(prompts, completions) -> list[float]; or `task` in their place.
    reward_max: no reward is above it; without it nothing that holds log Z can be certified.
    samples: draws a prompt from the prior and from each policy, at least 16; max_new_tokens: where a continuation is cut (16).

    Raises UserError for bad input, once: a reward of the wrong length, NaN, infinite or above reward_max (with its prompt and
    completion), a tokenizer without EOS, models of different vocabularies, a directory without a model.
    """
    if samples < estimate.LEAST_DRAWS:
        raise UserError(f"samples must be at least {estimate.LEAST_DRAWS}, got {samples}: fewer draws have no honest interval")
    given = _task(task, prompts, reward, reward_max, max_new_tokens)
    beta = given.beta if beta is None and task is not None else beta
    if beta is None:
        raise UserError("beta is needed: the KL penalty of the posterior to measure against")
    length = max_new_tokens or (given.length if isinstance(given, GivenTask) else given.max_new_tokens)
    where = device or "cpu"
    p0 = _policy("prior", prior, tokenizer, None, where)
    named = _named(policies)
    loaded = {name: _policy(name, model, None, p0, where) for name, model in named.items()}
    target = given.target(p0, beta)
    texts = given.prompts("score")
    bank = _bank(given, p0, target, texts, length, samples, seed)
    found = {}
    for name, policy in loaded.items():
        scored = measure(policy, p0, target, texts, bank, samples, samples, length, streams.seed(seed, f"score/policy/{name}"))
        columns, per_prompt = figures(scored, bank.reward[:, samples:], bank, given, target, texts, p0)
        found[name] = PolicyScore(name, columns, per_prompt)
    return ScoreResult(found, _log_z(bank, target, texts), texts, beta)


def train(
    prior: Model, task: str, objective: str, out: str | Path, beta: float | None = None, *, train: Train | None = None, seed: int = 0,
    device: str | None = None, include: tuple[Path, ...] = (),
) -> CausalLM:  # fmt: skip
    """One policy, trained under an objective on a task's train split and saved in `out` (safetensors, tokenizer, curve.jsonl).

    Run again it continues from its last checkpoint. Raises UserError for an unknown task or objective, or when `out` holds something else.
    """
    loaded, folder = tasks.load(task), Path(out)
    method.objective(objective, include)
    if folder.exists() and not (folder / "curve.jsonl").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and holds no trained policy; name another directory")
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    p0 = _policy("prior", prior, None, None, device or "cpu")
    if not isinstance(p0, CausalLM):
        raise UserError("training needs a causal language model as prior")
    run = Run(
        task=loaded.name, task_version=loaded.version, method=objective, kind="objective", prior=str(prior), seed=seed,
        beta=loaded.beta if beta is None else beta, max_new_tokens=loaded.max_new_tokens, train=train or Train(), score=Score(),
    )  # fmt: skip
    return train_run(run, loaded, p0, folder, include=include)[0]


def _task(
    task: str | AbstractTask | None, prompts: Sequence[str] | None, reward: Any, reward_max: float, length: int | None
) -> AbstractTask:
    if task is not None:
        if prompts is not None or reward is not None:
            raise UserError("a task brings its own prompts and reward: give either task or prompts and reward")
        return task if isinstance(task, AbstractTask) else tasks.load(task)
    if not prompts or reward is None:
        raise UserError("prompts and reward are needed, or a task")
    texts = tuple(prompts)
    if any(not isinstance(p, str) for p in texts):
        raise UserError("prompts must be a list of texts")
    if len(set(texts)) < len(texts):
        raise UserError(f"prompt {next(p for p in texts if texts.count(p) > 1)!r} is given twice")
    if math.isnan(reward_max) or reward_max == -math.inf:
        raise UserError(f"reward_max must be a number, got {reward_max}")
    if length is not None and length < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {length}")
    return GivenTask(texts, reward, reward_max, length or 16)


def _named(policies: Any) -> dict[str, Model]:
    if isinstance(policies, Mapping):
        named = {str(k): v for k, v in policies.items()}
    elif isinstance(policies, (str, Path)) or not isinstance(policies, Sequence):
        named = {str(policies) if isinstance(policies, (str, Path)) else "policy": policies}
    else:
        named = {str(p) if isinstance(p, (str, Path)) else f"policy_{i}": p for i, p in enumerate(policies)}
    if not named:
        raise UserError("no policy to score")
    return named


def _policy(name: str, model: Model, tokenizer: Any, prior: Policy | None, device: str) -> Any:
    """A Policy, or for policies an AbstractSampler."""
    if isinstance(model, (Policy, AbstractSampler)):
        return model
    if isinstance(model, (str, Path)):
        text = str(model)
        if prior is not None and text.partition(":")[0].replace("-", "_") in method.names("samplers") and not Path(text).exists():
            return prior if text == "ancestral" else method.sampler(text)
        return load_prior(text, device) if prior is None else causal_lm.load(text, name, device)
    if hasattr(model, "forward") and hasattr(model, "config"):
        words = tokenizer or (prior.tokenizer if isinstance(prior, CausalLM) else None)
        if words is None:
            source = getattr(model.config, "_name_or_path", "")
            if not source:
                raise UserError(f"{name}: a transformers model in memory needs tokenizer=...")
            words = causal_lm.tokenizer_of(source)
        return causal_lm.wrap(name, model, words, device)
    raise UserError(f"{name}: a path, a hub name, a transformers model or a klbench Policy expected, got {type(model).__name__}")


def _bank(task: AbstractTask, prior: Policy, target: TiltedPrior, prompts: list[str], length: int, samples: int, seed: int) -> Bank:
    """The bank that ships for this task and prior where it is long enough, else `samples` fresh prior draws a prompt."""
    if isinstance(prior, CausalLM) and length == task.max_new_tokens:
        path = banks.shipped(task, prior.name)
        if path is not None:
            bank = Bank.from_bytes(path.read_bytes(), str(path))
            if {**bank.meta, "draws": 0} == banks.meta_of(task, prior, 0) and bank.reward.shape[1] >= samples:
                return bank
    draws = prior.sample(prompts, samples, length, streams.seed(seed, "score/prior"))
    texts = prior.decode(draws.tokens, draws.mask)
    feature = task.features()
    return Bank(
        draws.tokens.numpy().astype(np.int32),
        draws.mask.numpy(),
        draws.log_q.double().sum(2).numpy(),
        target.rewards(prompts, texts),
        None,
        None if feature is None else evaluate(feature[0], prompts, texts),
        {},
    )


def _log_z(bank: Bank, target: TiltedPrior, prompts: list[str]) -> list[Estimate]:
    """log Z of each prompt, log mean exp(r/beta) over the bank, stretched by its reach."""
    tilt, tops = target.tilt(bank.reward), target.ceiling(prompts)
    block = estimate.blocks_of(tilt.shape[1])
    out = []
    for row, top in zip(tilt, tops, strict=True):
        full = log_mean_exp(row[None])
        jack = Jackknife(full, np.stack([log_mean_exp(row[None, block != b]) for b in range(BLOCKS)]))
        reach = len(row) * np.exp(np.minimum(full - top / target.beta, 0.0))
        figure = estimate.by_reach(jack.mean(n=len(row), widen=estimate.widening(np.maximum(reach, 1e-300))), reach)
        out.append(figure)
    return out
