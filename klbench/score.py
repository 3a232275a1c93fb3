"""Policies to records: fresh draws on the score split, the bank beside them, every column with its error.

What a policy says of a draw is rounded to float32 before anything is estimated, because that is what `samples/<id>.npz` keeps: whoever
reads that file computes the same figures.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klbench import bank as banks
from klbench import estimate, method, pool, streams, weights
from klbench import task as tasks
from klbench.bank import Bank
from klbench.errors import UserError, unknown
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife
from klbench.estimators import diversity
from klbench.method import AbstractSampler, ClosedForm
from klbench.policies.causal_lm import CausalLM, load, token_laws
from klbench.pool import Pool, Rows
from klbench.priors import SHIPPED, prior_path
from klbench.record import FrontierPoint, Record, Run, Sample, Score, digest, write_atomically
from klbench.target import Draws, Policy, TiltedPrior, evaluate
from klbench.task import AbstractTask
from klbench.train import Curve, Report, train

PRIOR_CHUNK: Final = 256  # prior draws a prompt that a sampler is fed at a time
MOST_PRIOR_DRAWS: Final = 65536  # a prompt; a sampler that needs more is refused
ACCEPTED: Final = 256  # bank draws a prompt, at most, that speak for the posterior's own diversity
FRONTIER: Final = np.geomspace(0.04, 12.0, 30)  # multiples of 1/beta


def load_prior(name: str, device: str = "cpu") -> CausalLM:
    """A named prior, or a model directory or hub name."""
    if name in SHIPPED:
        return load(prior_path(name), name, device)
    if "/" not in name and not Path(name).exists():
        raise unknown("prior (nor a directory)", name, SHIPPED)
    return load(name, name, device)


def hashes(task: AbstractTask, prior: str, beta: float, score: Score) -> dict[str, str]:
    """What a run rests on, without loading a model: the prior's files, the bank's file where one ships, the prompts of all splits."""
    folder = prior_path(prior) if prior in SHIPPED else Path(prior)
    found = {"prompts": digest([task.prompts(split) for split in tasks.SPLITS])}
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json") and p.name != "bits_per_byte.json")
        found["prior"] = digest([[p.name, file_hash(p)] for p in files])
    elif prior.count("/") != 1:
        raise unknown("prior (nor a directory, nor owner/name on a hub)", prior, SHIPPED)
    ready = banks.shipped(task, prior)
    found["bank"] = file_hash(ready) if ready else f"drawn:{banks.DRAWS}"
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cell(run: Run, out: Path, report: Report, include: tuple[Path, ...] = (), device: str = "cpu") -> None:
    """Trains (where there is something to train) and scores one run; its record is the last thing written."""
    task = tasks.load(run.task)
    prior = load_prior(run.prior, device)
    target = task.target(prior, run.beta)
    bank = banks.open_bank(task, prior, target, out / "banks")
    started, policy = time.perf_counter(), None
    curve: Curve = []
    if run.kind == "objective":
        policy, curve = train(run, task, prior, out / "policies" / run.id, report, include)
    trained = time.perf_counter()
    report({"phase": "score", "step": 0, "of": 1})
    record, samples = score_run(run, task, prior, target, policy, bank, curve, include)
    write_atomically(out / "samples" / f"{run.id}.npz", samples)
    machine = {
        "seconds_train": round(trained - started, 3),
        "seconds_score": round(time.perf_counter() - trained, 3),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "host": platform.machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    record = record.model_copy(update={"cost": {**record.cost, "machine": machine}})
    write_atomically(out / "records" / f"{run.id}.json", record.to_json().encode())
    report({"phase": "score", "step": 1, "of": 1})


@dataclass(frozen=True)
class Scored:
    """A policy's own draws with what is known of them. prior_draws: what a sampler spent on them."""

    draws: Draws
    texts: list[list[str]]
    rows: Rows
    on_bank: Rows
    prior_draws: int


def score_run(
    run: Run, task: AbstractTask, prior: CausalLM, target: TiltedPrior, policy: Policy | None, bank: Bank, curve: Curve,
    include: tuple[Path, ...] = (),
) -> tuple[Record, bytes]:  # fmt: skip
    """The record of a run and its samples file. `policy` None means the run's sampler."""
    prompts = task.prompts("score")[: run.score.prompts or None]
    bank = bank.first(len(prompts))
    seed = streams.seed(run.seed, f"score/{run.task}/{run.method}")
    sampler = method.sampler(run.method, include) if run.kind == "sampler" else None
    drawer = sampler if sampler is not None and run.method != "ancestral" else policy or prior
    scored = measure(drawer, prior, target, prompts, bank, run.score.draws, run.score.bank, run.max_new_tokens, seed)
    rest = bank.reward[:, run.score.bank :]
    columns, per_prompt = figures(scored, rest, bank, task, target, prompts, prior)
    if run.method == "rejection":
        for name in ("reverse_kl", "forward_kl", "tv", "js", "wasted_nats"):
            columns[name] = estimate.exactly(0.0, scored.rows.log_q.size, "exact by construction: rejection draws the posterior")
    elif run.kind == "objective":
        own = own_kl(run, scored, rest, bank, target, prompts, include)
        if own is not None:
            columns["own_kl"] = own
    draws = scored.rows.log_q.size
    cost = {
        "train_draws": 0 if run.train is None else run.train.steps * min(run.train.prompts, len(task.prompts("train"))) * run.train.samples,
        "train_tokens": int(curve[-1]["tokens"]) if curve else 0,
        "score_draws": draws,
        "prior_draws": scored.prior_draws,
        "bank_draws": int(bank.reward.size),
    }
    cost["reward_calls"] = cost["train_draws"] + (scored.prior_draws or draws)
    data = samples_file(scored, prompts, target.beta)
    record = Record(
        run=run,
        status=columns["reverse_kl"].status,
        columns=columns,
        prompt_ids=prompts,
        prompts={name: [float(x) for x in values] for name, values in per_prompt.items()},
        frontier=frontier_of(bank, target, prompts),
        samples=examples(scored, prompts),
        curve=curve,
        cost=cost,
        hashes={"samples": hashlib.sha256(data).hexdigest(), "bank": bank.hash},
    )
    return record, data


def measure(
    policy: Policy | AbstractSampler, prior: Policy, target: TiltedPrior, prompts: Sequence[str], bank: Bank,
    draws: int, scored_bank: int, length: int, seed: int,
) -> Scored:  # fmt: skip
    """Draws of a policy or a sampler, and both models' word on them and on the first `scored_bank` draws of the bank."""
    n0 = min(scored_bank, bank.reward.shape[1])
    bank_tokens, bank_mask = torch.from_numpy(bank.tokens[:, :n0]).long(), torch.from_numpy(bank.mask[:, :n0])
    if isinstance(policy, AbstractSampler):
        own, reward, used = picked(policy, prior, target, prompts, bank, draws, length, seed)
        ratio = partial(_ratio, policy, target, prompts, bank)
        log_p0 = own.log_q.double().sum(2).numpy()
        rows = of_ratio(log_p0, reward, ratio(reward))
        on_bank = of_ratio(bank.log_p0[:, :n0], bank.reward[:, :n0], ratio(bank.reward[:, :n0]))
        return Scored(own, prior.decode(own.tokens, own.mask), rows, on_bank, used)
    own = policy.sample(prompts, draws, length, seed)
    texts = prior.decode(own.tokens, own.mask)
    reward = target.rewards(prompts, texts)
    tokens, mask = torch.cat([own.tokens, bank_tokens], 1), torch.cat([own.mask, bank_mask], 1)
    every = rows_of(policy, prior, prompts, tokens, mask, np.concatenate([reward, bank.reward[:, :n0]], 1))
    part = lambda at: Rows(**{k: v[:, at] for k, v in vars(every).items()})  # noqa: E731
    return Scored(own, texts, part(slice(0, draws)), part(slice(draws, None)), 0)


def rows_of(policy: Policy, prior: Policy, prompts: Sequence[str], tokens: Tensor, mask: Tensor, reward: Array) -> Rows:
    """What both models say of given sequences, rounded to float32. Policies without token laws get no control variates."""
    if isinstance(policy, CausalLM) and isinstance(prior, CausalLM):
        laws = token_laws(policy, prior, prompts, tokens, mask)
        lq, l0, h, c = (x.double().sum(2).numpy() for x in (laws.log_q, laws.log_p0, laws.entropy, laws.cross))
        return _rounded(Rows(lq, l0, reward, -lq - h, -l0 - c, c - h, h))
    lq, l0 = (p.log_prob(prompts, tokens, mask).double().sum(2).numpy() for p in (policy, prior))
    return of_ratio(l0, reward, lq - l0)


def of_ratio(log_p0: Array, reward: Array, log_ratio: Array) -> Rows:
    """Rows of a law known by its density alone."""
    zero = np.zeros_like(log_p0)
    return _rounded(Rows(log_p0 + log_ratio, log_p0, reward, zero, zero, log_ratio, -log_p0 - log_ratio))


def _rounded(rows: Rows) -> Rows:
    return Rows(**{k: v.astype(np.float32).astype(np.float64) for k, v in vars(rows).items()})


def _ratio(sampler: AbstractSampler, target: TiltedPrior, prompts: Sequence[str], bank: Bank, reward: Array) -> Array:
    """[P, N] log q/p0 of a sampler at given rewards, the law of the reward taken from the whole bank of each prompt."""
    tops = target.ceiling(prompts)
    return np.stack([sampler.log_ratio(r, b, target.beta, float(top)) for r, b, top in zip(reward, bank.reward, tops, strict=True)])


def picked(
    sampler: AbstractSampler, prior: Policy, target: TiltedPrior, prompts: Sequence[str], bank: Bank, draws: int, length: int, seed: int
) -> tuple[Draws, Array, int]:
    """`draws` draws a prompt of a sampler, from as many fresh prior draws as it asks for; their rewards; prior draws used in all."""
    tops = target.ceiling(prompts)
    parts: list[list[Any]] = []
    for p, prompt in enumerate(prompts):
        need = sampler.cost(bank.reward[p], target.beta, float(tops[p])) * draws
        tokens, masks, logs, rewards = [], [], [], []
        chunk = 0
        while True:
            more = PRIOR_CHUNK * max(1, int(need * 1.15 / PRIOR_CHUNK)) if not chunk else PRIOR_CHUNK
            fresh = prior.sample([prompt], more, length, streams.seed(seed, f"{prompt}/{chunk}"))
            chunk += 1
            tokens.append(fresh.tokens[0])
            masks.append(fresh.mask[0])
            logs.append(fresh.log_q[0])
            rewards.append(target.rewards([prompt], prior.decode(fresh.tokens, fresh.mask))[0])
            reward = np.concatenate(rewards)
            try:
                index, used = sampler.pick(reward, target.beta, float(tops[p]), draws, streams.seed(seed, f"{prompt}/pick"))
            except UserError:
                if len(reward) >= MOST_PRIOR_DRAWS:
                    raise
                continue
            at = torch.from_numpy(np.asarray(index))
            parts.append([torch.cat(tokens)[at], torch.cat(masks)[at], torch.cat(logs)[at], reward[index], used])
            break
    tokens_, masks_, logs_ = (torch.stack([part[i] for part in parts]) for i in range(3))
    return Draws(tokens_, masks_, logs_), np.stack([part[3] for part in parts]), int(sum(part[4] for part in parts))


def figures(
    scored: Scored, rest: Array, bank: Bank, task: AbstractTask, target: TiltedPrior, prompts: Sequence[str], prior: Policy
) -> tuple[dict[str, Estimate], dict[str, Array]]:
    """Every column of a policy, and per-prompt arrays."""
    own, tops = scored.rows, target.ceiling(prompts)
    joint = Pool(own, scored.on_bank, rest, tops)
    columns, per_prompt, _ = joint.columns(1.0 / target.beta)
    kl = pool.kl_prior(own)
    columns["kl_prior"] = kl.mean(n=own.log_q.size)
    span = float(bank.reward.max() - bank.reward.min())
    difference = own.A - own.B
    columns["reward"] = pool.bounded_mean(own.reward, difference, span)
    columns["entropy"] = pool.regressed(own.entropy, own.A).mean(n=own.log_q.size)
    columns["forgetting"] = estimate.jackknife(scored.on_bank.log_p0 - scored.on_bank.log_q).mean(n=scored.on_bank.log_q.size)
    per_prompt |= {"reward": own.reward.mean(1), "kl_prior": kl.estimates}
    if np.isfinite(tops).all():
        per_prompt["reward_max"] = tops
    gold = task.gold()
    if gold is not None:
        columns["gold"] = pool.bounded_mean(evaluate(gold, prompts, scored.texts), difference, 1.0)
    feature = task.features()
    if feature is not None:
        phi, wanted = feature
        found = pool.bounded_mean(evaluate(phi, prompts, scored.texts), difference, 1.0)
        columns["moments"] = replace(found, reason=f"wanted: {wanted:g}")
    columns |= diverse(scored, prior)
    columns |= of_target(bank, target, prompts, prior)
    return columns, per_prompt


def diverse(scored: Scored, prior: Policy) -> dict[str, Estimate]:
    """Diversity of the policy's own draws."""
    eos = _eos(prior)
    ids = [
        [
            [int(t) for t, m in zip(row, keep, strict=True) if m and t != eos]
            for row, keep in zip(rows.tolist(), masks.tolist(), strict=True)
        ]
        for rows, masks in zip(scored.draws.tokens, scored.draws.mask, strict=True)
    ]
    out = {f"distinct_{n}": diversity.distinct(ids, n) for n in (1, 2, 3, 4)}
    return {**out, "unique": diversity.unique(ids), "self_bleu": diversity.self_bleu(scored.texts)}


def _eos(prior: Policy) -> int:
    return int(getattr(prior, "eos", -1))


def of_target(bank: Bank, target: TiltedPrior, prompts: Sequence[str], prior: Policy) -> dict[str, Estimate]:
    """The posterior's own figures, from the bank alone: self-normalised means, and diversity of draws that exact rejection accepts."""
    tops, n = target.ceiling(prompts), bank.reward.size
    tilt = target.tilt(bank.reward)
    block = estimate.blocks_of(bank.reward.shape[1])

    def mean(f: Callable[[Array, Array], Array]) -> Jackknife:
        """f(tilt, columns kept) -> [P], full and with each block left out."""
        whole = np.ones(len(block), bool)
        return Jackknife(f(tilt, whole), np.stack([f(tilt[:, block != b], block != b) for b in range(BLOCKS)]))

    def snis(values: Array) -> Callable[[Array, Array], Array]:
        def f(t: Array, keep: Array) -> Array:
            share = np.exp(t - t.max(1, keepdims=True))
            return np.asarray((share * values[:, keep]).sum(1) / share.sum(1))

        return f

    log_z = lambda t, keep: weights.log_mean_exp(t)  # noqa: E731
    spent = lambda t, keep: snis(tilt)(t, keep) - log_z(t, keep)  # noqa: E731
    unlike = lambda t, keep: -snis(bank.log_p0 + tilt)(t, keep) + log_z(t, keep)  # noqa: E731
    wanted: dict[str, Callable[[Array, Array], Array]] = {
        "reward_target": snis(bank.reward),
        "kl_prior_target": spent,
        "entropy_target": unlike,
    }
    if bank.feature is not None:
        wanted["moments_target"] = snis(bank.feature)
    known = bool(np.isfinite(tops).all())
    reach = (
        bank.reward.shape[1] * np.exp(np.minimum(weights.log_mean_exp(tilt) - tops / target.beta, 0.0)) if known else np.zeros(len(tops))
    )
    out = {name: _guarded(mean(f).mean(n=n), reach, known) for name, f in wanted.items()}
    accept = accepted(bank, target, prompts)
    least = int(accept.sum(1).min())
    ids = [rows[:ACCEPTED] for rows in bank.token_lists(accept, _eos(prior))]
    even = [rows[: min(map(len, ids))] for rows in ids]
    for name, figure in (("distinct_2_target", partial(diversity.distinct, n=2)), ("unique_target", diversity.unique)):
        out[name] = figure(even) if known and least >= diversity.SET else estimate.undefined("too few bank draws are accepted", n=least)
    return out


def _guarded(figure: Estimate, reach: Array, known: bool) -> Estimate:
    if known:
        return estimate.by_reach(figure, reach)
    return replace(figure, low=None, high=None, population=None, status="uncertified", reason="no reward_max was declared")


def accepted(bank: Bank, target: TiltedPrior, prompts: Sequence[str]) -> NDArray[np.bool_]:
    """[P, N0] bank draws that rejection accepts: draws of p*, exactly. All False where no ceiling was declared."""
    gap = target.tilt(bank.reward - target.ceiling(prompts)[:, None])
    uniform = np.random.default_rng(streams.seed(0, "bank/accept")).random(gap.shape)
    return np.asarray(uniform < np.exp(gap))


def own_kl(
    run: Run, scored: Scored, rest: Array, bank: Bank, target: TiltedPrior, prompts: Sequence[str], include: tuple[Path, ...]
) -> Estimate | None:
    """KL(q || the objective's own optimum), where it has a closed form: the pool's reverse KL with the optimum's log-ratio as tilt."""
    objective = method.objective(run.method, include)
    if not isinstance(objective, ClosedForm) or run.train is None:
        return None
    tops = target.ceiling(prompts)

    def tilted(reward: Array) -> Array:
        return np.stack([objective.own(r, b, run.beta, run.train.samples) for r, b in zip(reward, bank.reward, strict=True)])  # type: ignore[union-attr]

    top = np.maximum(tilted(bank.reward).max(1), tilted(tops[:, None])[:, 0] if np.isfinite(tops).all() else -np.inf)
    own, on_bank = replace(scored.rows, reward=tilted(scored.rows.reward)), replace(scored.on_bank, reward=tilted(scored.on_bank.reward))
    return Pool(own, on_bank, tilted(rest) if rest.shape[1] else rest, top).columns(1.0)[0]["reverse_kl"]


def frontier_of(bank: Bank, target: TiltedPrior, prompts: Sequence[str]) -> list[FrontierPoint]:
    """The optimal frontier of the task at multiples of 1/beta; empty where no ceiling was declared."""
    tops = target.ceiling(prompts)
    if not np.isfinite(tops).all():
        return []
    curve = pool.frontier(bank.reward, tops, FRONTIER / target.beta)
    names = ("lam", "reward", "kl", "low", "high", "reach")
    return [FrontierPoint(**{n: float(getattr(curve, n)[i]) for n in names}) for i in range(len(curve.lam))]


def examples(scored: Scored, prompts: Sequence[str], count: int = 12) -> list[Sample]:
    """The first draw of the first prompts: not chosen."""
    rows = scored.rows
    return [
        Sample(
            prompt=p,
            completion=scored.texts[i][0],
            reward=float(rows.reward[i, 0]),
            log_p0=float(rows.log_p0[i, 0]),
            log_q=float(rows.log_q[i, 0]),
        )
        for i, p in enumerate(prompts[:count])
    ]


def samples_file(scored: Scored, prompts: Sequence[str], beta: float) -> bytes:
    """Compressed npz, a row a draw: tokens, length, text, and the per-draw sums of `Rows`, own draws and the scored part of the bank."""
    out = io.BytesIO()
    parts: dict[str, Any] = {
        "tokens": scored.draws.tokens.numpy().astype(np.int32),
        "length": scored.draws.mask.sum(2).numpy().astype(np.uint16),
    }
    for label, rows in (("own", scored.rows), ("bank", scored.on_bank)):
        parts |= {f"{label}_{k}": v.astype(np.float32) for k, v in vars(rows).items()}
    text = json.dumps({"prompts": list(prompts), "texts": scored.texts, "beta": beta}, ensure_ascii=False).encode()
    np.savez_compressed(out, text=np.frombuffer(text, np.uint8), **parts)
    return out.getvalue()
