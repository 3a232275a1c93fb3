"""The Python interface: `score` for anybody's checkpoints, `train` for one policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
from numpy.typing import NDArray

from klbench import estimate, method, models, rewards, streams
from klbench import task as tasks
from klbench.bank import Reservoir
from klbench.errors import UserError, unknown
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife, finite_or_word, signed
from klbench.estimators import betting, diversity
from klbench.estimators import named as named_estimators
from klbench.estimators.control import plain, with_few
from klbench.measure import Measure
from klbench.method import AbstractSampler
from klbench.policies.causal_lm import CausalLM
from klbench.pool import INTERVALS
from klbench.processes import joined
from klbench.ranks import certain_bracket, paired_difference, rank_ranges
from klbench.record import Run, Score, Train, write_atomically
from klbench.rewards.calling import Called
from klbench.score import accepted, figures
from klbench.sheet import Sheet
from klbench.task import AbstractTask, GivenTask
from klbench.train import train as train_run
from klbench.weights import log_mean_exp

if TYPE_CHECKING:
    import pandas

LAW_DRAWS: Final = 2048  # prior draws a prompt, at least, that tell a sampler's density; their rewards alone are needed
Model = Any  # a path, a hub name, a transformers model, or a klbench Policy


@final
@dataclass(frozen=True)
class PolicyScore:
    """One policy's figures: an attribute per column of DESIGN.md section 3, each an Estimate in nats unless its column says otherwise.

    prompts: per-prompt arrays [P] (free, log_z, reverse_kl, reach, reward, kl_prior).  rank: least and greatest place by paired
    differences, in which log Z cancels.  bracket: ends between which reverse_kl lies whatever log Z is, the upper one None without
    reward_max; both None for a policy without a density or one that needs neither.  notes: what was done to a stranger's model.
    log_z_bounds: (lower, upper) of log Z, mean over prompts; None without a density.  at_cap [P, N]: its draws that earn all there is to
    earn, None without reward_max.
    """

    name: str
    columns: dict[str, Estimate]
    prompts: dict[str, Array] = field(repr=False)
    rank: tuple[int, int] | None = None
    bracket: tuple[float, float | None] | None = None
    notes: tuple[str, ...] = ()
    log_z_bounds: tuple[Estimate, Estimate] | None = None
    at_cap: NDArray[np.bool_] | None = field(default=None, repr=False)

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
    """What `score` returns: policies by name, and log Z per prompt (nats, from the prior's draws alone).

    pool: names of the policies whose draws stood behind every figure.  stopped: what ended a search for a precision, "" without one.
    """

    policies: dict[str, PolicyScore]
    log_z: list[Estimate]
    prompts: list[str]
    beta: float
    pool: tuple[str, ...] = ()
    stopped: str = ""

    def __getitem__(self, name: str) -> PolicyScore:
        if name not in self.policies:
            raise KeyError(str(unknown("policy", name, self.policies)))
        return self.policies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.policies)

    def __len__(self) -> int:
        return len(self.policies)

    def difference(self, a: str, b: str) -> Estimate:
        """reverse_kl of `a` minus that of `b`, nats: log Z cancels, so its status is certified whatever theirs are.

        low, high: these prompts, the two errors added (in a pool they share draws); population: t over the paired differences. Of what
        draws the posterior by construction the distance is 0, and the difference is the other's own figure.
        """
        for one, other, sign in ((a, b, -1.0), (b, a, 1.0)):
            if self[one].status == "exact" and self[one].columns["reverse_kl"].value == 0.0:
                return signed(self[other].columns["reverse_kl"], sign)
        return paired_difference(*(self[name].prompts[key] for name in (a, b) for key in ("free", "free_stderr")))

    def regressions(self, before: str, after: str) -> Estimate:
        """Update regression rate: mean over prompts of P(right before) P(wrong after), right: a draw earns reward_max. In [0, 1].

        The two draw independently, so the product of a prompt's two means is unbiased. low, high: these prompts, a jackknife over the draws
        of each policy; population: t over prompts. Source of the idea: FlipGuard, Zhu et al. 2024, arXiv:2410.00508,
        which counts drops of a reward. Raises UserError without reward_max and for one policy twice, whose draws would be the same.
        """
        if before == after:
            raise UserError(f"regressions from {before!r} to itself: its draws would be compared with themselves")
        right, was = self[after].at_cap, self[before].at_cap
        if right is None or was is None:
            raise UserError("which draws are right is not known without reward_max")
        return regression_rate(was, right)

    def to_frame(self) -> pandas.DataFrame:
        """A row a policy and column: policy, column, value, low, high, stderr, n, status, reason."""
        import pandas

        return pandas.DataFrame(
            [
                {"policy": name, "column": column}
                | {key: getattr(e, key) for key in ("value", "low", "high", "stderr", "n", "status", "reason")}
                for name, policy in self.policies.items()
                for column, e in policy.columns.items()
            ]
        )

    def to_json(self, path: str | Path) -> None:
        """Writes all estimates, atomically; keys as in DESIGN.md; infinite numbers as "inf"."""
        import json

        data = {
            "beta": self.beta,
            "prompts": self.prompts,
            "log_z": [e.to_json() for e in self.log_z],
            "pool": list(self.pool),
            "stopped": self.stopped,
            "policies": {
                name: {
                    "status": p.status,
                    "rank": p.rank,
                    "notes": list(p.notes),
                    "reverse_kl_certain": p.bracket,
                    "log_z_bounds": None if p.log_z_bounds is None else [e.to_json() for e in p.log_z_bounds],
                    "columns": {k: e.to_json() for k, e in p.columns.items()},
                    "prompts": {k: [finite_or_word(float(x)) for x in v] for k, v in p.prompts.items()},
                }
                for name, p in self.policies.items()
            },
        }
        write_atomically(Path(path), (json.dumps(data, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode())


def score(
    prior: Model,
    policies: Mapping[str, Model] | Sequence[Model] | Model,
    prompts: Sequence[str] | None = None,
    reward: str | Callable[..., list[float]] | None = None,
    beta: float | None = None,
    *,
    task: str | AbstractTask | None = None,
    reward_max: float = math.inf,
    max_new_tokens: int | None = None,
    samples: int = 1000,
    precision: float | None = None,
    budget: int | None = None,
    interval: str = "jackknife",
    pool: bool = True,
    measures: Sequence[str] = (),
    bank: str | Path | None = None,
    chat: bool = False,
    seed: int = 0,
    device: str | None = None,
    tokenizer: Any = None,
    include: tuple[Path, ...] = (),
    report: Callable[[str], None] = lambda text: None,
) -> ScoreResult:
    """How far each policy is from p*(x|c) = p0(x|c) exp(r(c, x)/beta) / Z(c), with 95 % intervals.

    prior, policies: a directory in Hugging Face format, a hub name, a transformers model (with `tokenizer`, else the one it was loaded
    with, else the prior's), a klbench Policy; for policies also `base+adapter`, a sampler (`best_of_n:16`, `rejection`) or a decoding
    (`temperature:0.7`, `path@top_p:0.9`), as klbench/models.py reads them. One without a density gets the columns that need none.
    prompts, reward: texts and f(prompts, completions) -> list[float], or what klbench.rewards.load names; or `task` in their place. A
    reward whose `completions` is annotated as lists of dicts gets messages, as TRL's own read them.
    chat: prompts go through the chat template.
    reward_max: no reward is above it; without it, and where the reward has none of its own, nothing that holds log Z can be certified.
    samples: draws a prompt from the prior and from each policy, at least 16; max_new_tokens: where a continuation is cut (16).
    precision: draw on until every reverse_kl interval is at most so many nats wide, or `budget` draws a prompt (16 x samples) are spent.
    interval: "jackknife", or "betting" for a log Z interval that is exact at any number of draws.
    pool: estimate each policy with the draws of all (at most eight) as strata. measures: named estimators to add, as "kl_prior.k3".
    bank: directory in which prior draws are kept by content, extended and never redrawn.  include: directories with tasks and samplers of
    your own.  report: told what is being done.

    Raises UserError for bad input, once: a reward of the wrong length, NaN, infinite or above reward_max (with its prompt and
    completion), a tokenizer without EOS, a directory without a model, log-probabilities that are not numbers.
    """
    if samples < estimate.LEAST_DRAWS:
        raise UserError(f"samples must be at least {estimate.LEAST_DRAWS}, got {samples}: fewer draws have no honest interval")
    if interval not in INTERVALS:
        raise unknown("interval", interval, INTERVALS)
    if precision is not None and not (math.isfinite(precision) and precision > 0):
        raise UserError(f"precision must be a positive number of nats, got {precision}")
    most = 16 * samples if budget is None else budget
    if most < samples:
        raise UserError(f"budget {most} is below samples {samples}")
    extra = [Measure.parse(text) for text in measures]
    estimates = {str(m): named_estimators.of(m) for m in extra}
    if isinstance(reward, str):
        reward = rewards.load(reward, include, device or "cpu")
    given = _task(task, prompts, reward, reward_max, max_new_tokens, include)
    beta = given.beta if beta is None and task is not None else beta
    if beta is None:
        raise UserError("beta is needed: the KL penalty of the posterior to measure against")
    length, texts, where = max_new_tokens or given.max_new_tokens, given.prompts("score"), device or "cpu"
    named = _named(policies)
    p0 = models.open_prior(prior, where, chat=chat, tokenizer=tokenizer)
    loaded = {name: models.open_policy(name, model, p0, where, chat=chat, include=include) for name, model in named.items()}
    p0, loaded = models.with_common_stops(p0, loaded)
    if isinstance(given, GivenTask) and isinstance(given.reward, Called) and isinstance(p0, CausalLM):
        given = replace(given, reward=given.reward.reading(p0.tokenizer))
    target = given.target(p0, beta)
    reservoir = Reservoir(given, p0, target, length, seed, None if bank is None else Path(bank))
    sampled = any(isinstance(policy, AbstractSampler) for policy in loaded.values())
    bank_draws = max(samples, LAW_DRAWS) if sampled else samples  # a sampler's density is a function of the reward's law in the bank
    sheet = Sheet(p0, target, texts, reservoir.upto(bank_draws), samples, length)
    common = not pool and len(loaded) > 1  # the same uniforms for all: differences have less noise, but a pool needs draws of their own
    for name, policy in loaded.items():
        report(f"drawing from {name}")
        sheet.add(name, policy, samples, streams.seed(seed, "score/policy" if common else f"score/policy/{name}"))
    members = sheet.members(list(loaded), 32, seed) if pool and len(loaded) > 1 else []
    stopped = "" if precision is None else _narrow(sheet, list(loaded), members, reservoir, precision, most, interval, report)
    found = {}
    for name in loaded:
        report(f"estimating {name}")
        columns, per_prompt = figures(sheet, name, given, members, interval)
        if not sheet.why_none(name):
            columns |= {
                label: f(sheet.rows(name, name), sheet.rows(name, "")).mean(n=sheet.laws[name].reward.size)
                for label, f in estimates.items()
            }
        found[name] = PolicyScore(
            name, columns, per_prompt, notes=tuple(getattr(loaded[name], "notes", ())),
            log_z_bounds=log_z_bounds(sheet, name, per_prompt) if sheet.measured(name) else None,
            at_cap=diversity.at_cap(sheet.laws[name].reward, sheet.tops),
        )  # fmt: skip
    return ScoreResult(_placed(found, sheet), _log_z(sheet, interval), texts, beta, tuple(members), stopped)


def _narrow(
    sheet: Sheet, names: list[str], members: list[str], reservoir: Reservoir, precision: float, most: int, interval: str,
    report: Callable[[str], None],
) -> str:  # fmt: skip
    """Draws until each reverse_kl interval is at most `precision` wide or `most` draws a prompt are spent; says which.

    Draws are doubled, never topped up by a few: each look is a chance to stop on an interval that is narrow by luck, so few are taken.
    Prior draws that nobody scores cost little and come first where what they may have missed keeps the interval wide.
    """
    while True:
        widths, missed = {}, 0.0
        for name in filter(sheet.measured, names):
            figure, reach = (x := sheet.pool(name, members).columns(1.0 / sheet.target.beta, interval))[0]["reverse_kl"], x[2]
            if figure.status == "exact":
                continue
            widths[name] = math.inf if figure.low is None or figure.high is None else figure.high - figure.low
            missed = max(missed, float(np.mean(estimate.widening(np.maximum(reach, 1e-300)))))
            report(f"{name}: {sheet.laws[name].size:,} draws, {sheet.bank.reward.shape[1]:,} of the prior: {widths[name]:.3g} nats wide")
        wide = {name: width for name, width in widths.items() if width > precision}
        if not wide:
            return f"precision {precision:g} reached: the widest reverse_kl interval has {max(widths.values(), default=0.0):.3g} nats"
        length, scored = sheet.bank.reward.shape[1], sheet.laws[""].size
        if missed > precision / 2 and length < most:
            sheet.set_bank(reservoir.upto(min(2 * length, most)), scored)
            continue
        growing = [name for name, width in wide.items() if math.isfinite(width) and sheet.laws[name].size < most]
        if not growing:
            return f"budget of {most:,} draws a prompt spent: {len(wide)} of {len(widths)} intervals are wider than {precision:g} nats"
        for name in growing:
            sheet.draw(name, min(sheet.laws[name].size, most - sheet.laws[name].size))
        scored = min(2 * scored, most)
        sheet.set_bank(reservoir.upto(max(length, scored)), scored)


def _placed(found: dict[str, PolicyScore], sheet: Sheet) -> dict[str, PolicyScore]:
    """With ranks of all policies that have a density, and brackets of those whose reverse_kl is uncertified."""
    dense = {name: p for name, p in found.items() if "free" in p.prompts}
    if not dense:
        return found
    free, stderr = (np.stack([p.prompts[key] for p in dense.values()]) for key in ("free", "free_stderr"))
    cap = sheet.tops / sheet.target.beta if np.isfinite(sheet.tops).all() else None
    out = dict(found)
    for i, (name, place) in enumerate(zip(dense, rank_ranges(free), strict=True)):
        bracket = None
        if found[name].status == "uncertified" and np.isfinite(free[i]).all():
            bracket = certain_bracket(free[i], stderr[i], np.delete(free, i, 0), np.delete(stderr, i, 0), cap)
        out[name] = replace(found[name], rank=place, bracket=bracket)
    return out


def train(
    prior: Model, task: str, objective: str, out: str | Path, beta: float | None = None, *, train: Train | None = None, seed: int = 0,
    device: str | None = None, include: tuple[Path, ...] = (),
) -> CausalLM:  # fmt: skip
    """One policy, trained under an objective on a task's train split and saved in `out` (safetensors, tokenizer, curve.jsonl).

    Run again it continues from its last checkpoint. Started by torchrun or accelerate, all processes work at it, with a GPU each where
    `device` is "cuda". Raises UserError for an unknown task or objective, or when `out` holds something else.
    """
    loaded, folder = tasks.load(task, include), Path(out)
    method.objective(objective, include)
    processes, place = joined(device or "cpu")
    if processes.first:
        if folder.exists() and not (folder / "curve.jsonl").is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and holds no trained policy; name another directory")
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    p0 = models.open_prior(prior, "cpu" if train is not None and train.shard else place)  # no device holds the whole of what is sharded
    if not isinstance(p0, CausalLM):
        raise UserError("training needs a causal language model as prior")
    run = Run(
        task=loaded.name, task_version=loaded.version, method=objective, kind="objective", prior=str(prior), seed=seed,
        beta=loaded.beta if beta is None else beta, max_new_tokens=loaded.max_new_tokens, train=train or Train(), score=Score(),
    )  # fmt: skip
    return train_run(run, loaded, p0, folder, include=include, processes=processes, device=place)[0]


def _task(
    task: str | AbstractTask | None, prompts: Sequence[str] | None, reward: Any, reward_max: float, length: int | None,
    include: tuple[Path, ...] = (),
) -> AbstractTask:  # fmt: skip
    if task is not None:
        if prompts is not None or reward is not None:
            raise UserError("a task brings its own prompts and reward: give either task or prompts and reward")
        return task if isinstance(task, AbstractTask) else tasks.load(task, include)
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
    read = rewards.called(reward)
    ceiling = read.reward_max if reward_max == math.inf else reward_max
    return GivenTask(texts, read, ceiling, max_new_tokens=length or 16)


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


def regression_rate(was: NDArray[np.bool_], right: NDArray[np.bool_]) -> Estimate:
    """mean_p a_p (1 - b_p), a and b the shares of True in independent draws was [P, N] and right [P, M]; N, M >= 16."""
    a, b = (estimate.jackknife(x.astype(np.float64)) for x in (was, right))
    rate, prompts = a.full * (1 - b.full), len(was)
    variance = a.variances * (1 - b.full) ** 2 + a.full**2 * b.variances
    stderr = math.sqrt(float(variance.sum())) / prompts
    half, value, population = estimate.t_quantile(min((BLOCKS - 1) * prompts, 30)) * stderr, float(rate.mean()), None
    if prompts > 1:
        spread = estimate.t_quantile(prompts - 1) * float(rate.std(ddof=1)) / math.sqrt(prompts)
        population = (max(0.0, value - spread), min(1.0, value + spread))
    figure = Estimate(value, value - half, value + half, stderr, was.size + right.size, population=population)
    figure = with_few(figure, (was if was.size < right.size else right).astype(np.float64), 1.0)
    assert figure.low is not None and figure.high is not None
    return replace(figure, low=max(0.0, figure.low), high=min(1.0, figure.high))


def log_z_bounds(sheet: Sheet, name: str, per_prompt: Mapping[str, Array]) -> tuple[Estimate, Estimate]:
    """E_q[log w] <= log Z <= E_p*[log w],  w = p0 exp(r/beta) / q,  mean over prompts in nats: apart by KL(q||p*) + KL(p*||q).

    The lower one is -free; the upper one is a mean over the bank's scored draws that exact rejection accepts, draws of p* all of them, and
    has no value where some prompt has fewer than 16 of those or no ceiling is known. low, high: these prompts; neither end needs log Z.
    """
    free, stderr = per_prompt["free"], per_prompt["free_stderr"]
    prompts, rows = len(free), sheet.rows(name, "")
    half = estimate.t_quantile(min((BLOCKS - 1) * prompts, 30)) * (error := math.sqrt(float((stderr**2).sum())) / prompts)
    value = float(-free.mean())
    lower = Estimate(value, value - half, value + half, error, sheet.laws[name].reward.size, status="lower")
    accept = accepted(sheet.bank, sheet.target, sheet.prompts)[:, : rows.log_q.shape[1]]
    least = int(accept.sum(1).min())
    if least < estimate.LEAST_DRAWS:
        return lower, estimate.undefined(f"{least} draws of the posterior at some prompt, {estimate.LEAST_DRAWS} needed", "upper", least)
    with np.errstate(invalid="ignore"):
        log_w = rows.log_p0 + sheet.target.tilt(rows.reward) - rows.log_q
    even = np.stack([row[keep][:least] for row, keep in zip(log_w, accept, strict=True)])
    return lower, replace(plain(even).mean(n=even.size), status="upper", population=None)


def _log_z(sheet: Sheet, interval: str) -> list[Estimate]:
    """log Z of each prompt, log mean exp(r/beta) over the bank, stretched by its reach; or its betting interval."""
    tilt, ceiling = sheet.target.tilt(sheet.bank.reward), sheet.tops / sheet.target.beta
    block = estimate.blocks_of(tilt.shape[1])
    bets = betting.log_z_interval(tilt, ceiling) if interval == "betting" else None
    out = []
    for p, (row, top) in enumerate(zip(tilt, ceiling, strict=True)):
        full = log_mean_exp(row[None])
        jack = Jackknife(full, np.stack([log_mean_exp(row[None, block != b]) for b in range(BLOCKS)]))
        reach = len(row) * np.exp(np.minimum(full - top, 0.0))
        figure = jack.mean(n=len(row), widen=estimate.widening(np.maximum(reach, 1e-300)))
        if bets is None:
            out.append(estimate.by_reach(figure, reach, len(row)))
        else:
            out.append(estimate.by_betting(figure, float(bets[0][p]), float(bets[1][p]), reach))
    return out
