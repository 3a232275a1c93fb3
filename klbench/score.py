"""Policies to records: fresh draws on the score split, the bank beside them, every column with its error.

What a policy says of a draw is rounded to float32 before anything is estimated, because that is what `samples/<id>.npz` keeps: whoever
reads that file computes the same figures.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from klbench import bank as banks
from klbench import estimate, exact, measure, method, models, pool, probe, streams, weights
from klbench import task as tasks
from klbench.audit import Chosen, Drawn
from klbench.bank import Bank
from klbench.errors import UserError, unknown
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife
from klbench.estimators import diversity, entropy, forgetting
from klbench.estimators.control import bounded_mean, with_few
from klbench.harness import kept
from klbench.method import AbstractSampler, AbstractSteering, ClosedForm, RewardLaw, TiltedForm
from klbench.policies.causal_lm import CausalLM
from klbench.pool import Pool
from klbench.priors import SHIPPED, prior_path
from klbench.record import FrontierPoint, Record, Run, Sample, Score, digest, write_atomically
from klbench.samplers.ancestral import Ancestral
from klbench.sheet import NOT_DENSE, Law, Sheet
from klbench.target import Drawer, Policy, TiltedPrior, evaluate
from klbench.task import AbstractTask
from klbench.train import Curve, Measure, Report, train

RATE: Final = "learning_rate"  # file beside a policy whose rate was searched for
OWN: Final = "policy"  # a run's policy on its sheet
NEED_DENSITY: Final = (  # columns that a policy without a density lacks
    "kl_prior", "reverse_kl", "forward_kl", "tv", "js", "chi2", "wasted_nats", "beta_implied", "kl_efficiency", "forgetting", "entropy",
    "log_z", "reach", "ess", "khat",
)  # fmt: skip
ACCEPTED: Final = 256  # bank draws a prompt, at most, that speak for the posterior's own diversity
FRONTIER: Final = np.geomspace(0.04, 12.0, 30)  # multiples of 1/beta


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
    found["bank"] = file_hash(ready) if ready else f"drawn:{score.prior_draws}"
    if code := tasks.code_hash(task):
        found["task"] = code
    if score.lm_eval:
        found["lm_eval"] = kept.rests_on(score.lm_eval)
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cell(run: Run, out: Path, report: Report, include: tuple[Path, ...] = (), device: str = "cpu") -> None:
    """Trains (where there is something to train) and scores one run; its record is the last thing written."""
    task = tasks.load(run.task, include)
    prior = _prior(run.prior, device, _state_of(run.prior))
    target = task.target(prior, run.beta)
    bank = banks.open_bank(task, prior, target, out / "banks", run.score.prior_draws)
    started, policy = time.perf_counter(), None
    curve: Curve = []
    notes: list[str] = []
    if run.kind == "objective":
        policy, curve, notes = trained_policy(run, task, prior, target, bank, out, report, include)
    trained = time.perf_counter()
    report({"phase": "score", "step": 0, "of": 1})
    record, samples = score_run(run, task, prior, target, policy, bank, curve, include)
    record = record.model_copy(update={"notes": [*record.notes, *notes]})
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


@lru_cache(maxsize=1)
def _prior(spec: str, device: str, state: tuple[tuple[str, int, int], ...]) -> CausalLM:
    """The prior of a worker's cells, opened once: it has said of the bank what the next policy needs."""
    prior = models.open_prior(spec, device)
    assert isinstance(prior, CausalLM)
    return prior


def _state_of(spec: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the weights in a directory: others under the same name are another prior."""
    stats = [(path.name, path.stat()) for path in sorted(Path(spec).glob("*.safetensors"))]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def trained_policy(
    run: Run, task: AbstractTask, prior: CausalLM, target: TiltedPrior, bank: Bank, out: Path, report: Report, include: tuple[Path, ...]
) -> tuple[Policy, Curve, list[str]]:
    """The policy of an objective, its curve, and which learning rate was chosen where there was a choice.

    Every rate is trained for the same steps on the same draws' seeds; the nearest on the dev split is kept. A rate at which the loss is not
    finite is passed over. Raises UserError where none is left.
    """
    settings, folder = run.train, out / "policies" / run.id
    assert settings is not None
    prompts = task.prompts("score")[: run.score.prompts or None]
    measure = probe.Curve(run, prior, target, prompts, bank.first(len(prompts))) if settings.curve else None
    if not settings.search:
        return *train(run, task, prior, folder, report, include, measure), []
    if not (folder / RATE).is_file():
        _search(run, task, prior, target, folder, report, include, measure)
    rate = float((folder / RATE).read_text())
    policy, curve = train(run, task, prior, folder, report, include, measure)  # reads what lies there
    for place in folder.parent.glob(f".{run.id}.rate*"):
        shutil.rmtree(place, ignore_errors=True)
    return policy, curve, [f"learning rate {rate:.3g}, the nearest of {len(settings.search)} on the dev split"]


def _search(
    run: Run, task: AbstractTask, prior: CausalLM, target: TiltedPrior, folder: Path, report: Report, include: tuple[Path, ...],
    measure: Measure | None,
) -> None:  # fmt: skip
    """Trains every learning rate and leaves the nearest policy in `folder`, with its rate beside it."""
    settings = run.train
    assert settings is not None
    search = probe.Search.of(run, method.objective(run.method, include), task, prior, target)
    tried: dict[float, tuple[float, Path]] = {}
    why = ""
    for i, factor in enumerate(settings.search):
        rate = settings.lr * factor
        one = run.model_copy(update={"train": settings.model_copy(update={"lr": rate, "search": ()})})
        place = folder.with_name(f".{run.id}.rate{i}")
        try:
            policy, _ = train(one, task, prior, place, report, include, measure)
        except UserError as error:
            why = str(error)
            continue
        tried[rate] = search.free(policy), place
    if not tried:
        raise UserError(f"{run.id}: no learning rate of {len(settings.search)} gave a finite loss; the last: {why}")
    best = min(tried, key=lambda rate: tried[rate][0])
    (tried[best][1] / RATE).write_text(f"{best!r}\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(tried[best][1], folder)


def score_run(
    run: Run, task: AbstractTask, prior: CausalLM, target: TiltedPrior, policy: Policy | None, bank: Bank, curve: Curve,
    include: tuple[Path, ...] = (),
) -> tuple[Record, bytes]:  # fmt: skip
    """The record of a run and its samples file. `policy` None means the run's sampler."""
    prompts = task.prompts("score")[: run.score.prompts or None]
    sheet = Sheet(prior, target, prompts, bank.first(len(prompts)), run.score.bank, run.max_new_tokens)
    drawer = policy or models.open_policy(run.method, run.method, prior, include=include)
    stream = f"score/{run.task}" if run.score.common else f"score/{run.task}/{run.method}"
    sheet.add(OWN, drawer, run.score.draws, streams.seed(run.seed, stream))
    record, data = told(run, task, sheet, include), samples_file(sheet)
    truths: dict[str, float] = {}
    if run.score.truth:
        objective = method.objective(run.method, include) if run.kind == "objective" else None
        truths = exact.truths(drawer, task, prior, target, prompts, run.max_new_tokens, objective, run.train.samples if run.train else 0)
    known = {
        "columns": {**record.columns, **_kept(run, drawer, prior)},
        "curve": curve,
        "cost": {**record.cost, "train_tokens": int(curve[-1]["tokens"]) if curve else 0},
        "hashes": {"samples": hashlib.sha256(data).hexdigest(), "bank": bank.hash},
        "truths": truths,
    }
    return record.model_copy(update=known), data


def _kept(run: Run, drawer: object, prior: CausalLM) -> dict[str, Estimate]:
    """Columns `lm_eval.*` of a trained policy and of the prior, where the run asks for them; a sampler has no model of its own."""
    if not run.score.lm_eval or not isinstance(drawer, CausalLM) or not (run.kind == "objective" or drawer is prior):
        return {}
    return kept.kept(drawer, run.score.lm_eval, run.score.lm_eval_limit)


def told(run: Run, task: AbstractTask, sheet: Sheet, include: tuple[Path, ...] = ()) -> Record:
    """All that a sheet says of a run's policy; what only the run knows (its curve, hashes, exact values, training tokens) is not there."""
    columns, per_prompt = figures(sheet, OWN, task)
    law, draws = sheet.laws[OWN], sheet.laws[OWN].reward.size
    if run.kind == "objective":
        own = own_kl(run, sheet, include)
        if own is not None:
            columns["own_kl"] = own
    cost = {
        "train_draws": _train_draws(run, task),
        "score_draws": draws,
        "prior_draws": law.prior_draws,
        "bank_draws": int(sheet.bank.reward.size),
    }
    cost["reward_calls"] = cost["train_draws"] + (law.prior_draws or draws)
    return Record(
        run=run,
        status=columns["reverse_kl"].status,
        columns=columns,
        prompt_ids=sheet.prompts,
        prompts={name: [float(x) for x in values] for name, values in per_prompt.items()},
        frontier=frontier_of(sheet.bank, sheet.target, sheet.prompts),
        samples=examples(sheet),
        cost=cost,
    )


def _train_draws(run: Run, task: AbstractTask) -> int:
    """Draws that training saw, of all learning rates that were tried."""
    if run.train is None:
        return 0
    return run.train.steps * min(run.train.prompts, len(task.prompts("train"))) * run.train.samples * max(1, len(run.train.search))


def figures(
    sheet: Sheet, name: str, task: AbstractTask, members: Sequence[str] = (), interval: str = "jackknife"
) -> tuple[dict[str, Estimate], dict[str, Array]]:
    """Every column of a policy of the sheet, and per-prompt arrays. members: of the pool that it is estimated in.

    A policy without a density gets what its texts alone say; the other columns have the reason in place of a value.
    """
    law, prompts, bank = sheet.laws[name], sheet.prompts, sheet.bank
    why = sheet.why_none(name)
    if why:
        columns: dict[str, Estimate] = {column: estimate.undefined(why) for column in NEED_DENSITY}
        per_prompt: dict[str, Array] = {}
        controls: tuple[Array, ...] = ()
        size = law.reward.size
    else:
        own, on_bank = sheet.rows(name, name), sheet.rows(name, "")
        controls, size = (own.A, own.B), own.log_q.size
        joint = sheet.pool(name, members)
        columns, per_prompt, _ = joint.columns(1.0 / sheet.target.beta, interval)
        columns["kl_prior"] = with_few(joint.kl.mean(n=size), own.kl, _span(own.kl, on_bank.kl))
        surprise = joint.own_draws(entropy.regressed)
        columns["entropy"] = with_few(surprise.mean(n=size), own.entropy, _span(own.entropy, on_bank.entropy))
        forgotten = joint.own_draws(forgetting.regressed, on_bank=True).mean(n=on_bank.log_q.size)
        columns["forgetting"] = with_few(forgotten, on_bank.lost, _span(own.lost, on_bank.lost))
        if isinstance(law.policy, AbstractSampler) and law.policy.draws_target:  # its density holds log Z, and what log Z may lack
            up = float(np.mean(estimate.widening(np.maximum(per_prompt["reach"], 1e-300))))
            for column, low, high in (("kl_prior", up, 0.0), ("entropy", 0.0, up), ("forgetting", 0.0, up)):
                figure = columns[column]
                columns[column] = replace(figure, low=(figure.low or 0.0) - low, high=(figure.high or 0.0) + high, population=None)
        per_prompt |= {"kl_prior": joint.kl.estimates, "entropy": surprise.estimates}
    if isinstance(law.policy, AbstractSampler) and law.policy.draws_target:
        exact = estimate.exactly(0.0, size, "exact by construction: this sampler draws the posterior")
        columns |= dict.fromkeys(("reverse_kl", "forward_kl", "tv", "js", "chi2", "wasted_nats"), exact)
    mean = lambda values, span: bounded_mean(values, *controls, span=span)  # noqa: E731
    most = float(np.where(np.isfinite(sheet.tops), sheet.tops, bank.reward.max(1)).max())  # what may be earned, drawn or not
    columns["reward"] = mean(law.reward, max(most, float(law.reward.max())) - float(min(bank.reward.min(), law.reward.min())))
    per_prompt["reward"] = law.reward.mean(1)
    if np.isfinite(sheet.tops).all():
        per_prompt["reward_max"] = sheet.tops
    gold = task.gold()
    if gold is not None:
        earned = evaluate(gold, prompts, law.texts)
        columns["gold"], per_prompt["gold"] = mean(earned, 1.0), earned.mean(1)
    feature = task.features()
    if feature is not None:
        phi, wanted = feature
        columns["moments"] = replace(mean(evaluate(phi, prompts, law.texts), 1.0), reason=f"wanted: {wanted:g}")
    columns |= diverse(law, sheet.prior, diversity.at_cap(law.reward, sheet.tops) if feature is None else None)
    if sheet.posterior is None:
        sheet.posterior = of_target(bank, sheet.target, prompts, sheet.prior)
    columns |= sheet.posterior
    columns |= audited(sheet, name, task)
    return {column: measure.bounded(column, figure) for column, figure in columns.items()}, per_prompt


def audited(sheet: Sheet, name: str, task: AbstractTask) -> dict[str, Estimate]:
    """Column `audit.NAME` of each of the task's audits. Audits of the same prompts share what was drawn of them and said of their texts."""
    law = sheet.laws[name]
    policy = sheet.prior if isinstance(law.policy, Ancestral) else law.policy  # the prior's own row, which answers like any policy
    out: dict[str, Estimate] = {}
    texts: dict[Any, list[list[str]]] = {}
    log_q: dict[Any, Array] = {}
    for audit in task.audits():
        try:
            if isinstance(audit, Drawn):
                out[audit.column] = _of_draws(audit, policy, law, sheet, texts)
            elif isinstance(audit, Chosen):
                out[audit.column] = _of_texts(audit, policy, sheet, log_q)
        except UserError as error:  # its own prompts may not fit a stranger's model
            out[audit.column] = estimate.undefined(str(error))
    return out


def _of_draws(audit: Drawn, policy: Any, law: Law, sheet: Sheet, texts: dict[Any, list[list[str]]]) -> Estimate:
    if not audit.prompts:
        return audit.of(sheet.prompts, law.texts)
    if not isinstance(policy, Drawer) or isinstance(policy, AbstractSampler | AbstractSteering):
        return estimate.undefined("a sampler draws for this task's own prompts alone")
    if audit.prompts not in texts:
        seed = streams.seed(law.seed, f"audit/{digest(audit.prompts)}")
        texts[audit.prompts] = audit.texts(policy, sheet.length, law.size // 2, seed)
    return audit.of(audit.prompts, texts[audit.prompts])


def _of_texts(audit: Chosen, policy: Any, sheet: Sheet, log_q: dict[Any, Array]) -> Estimate:
    if isinstance(policy, NOT_DENSE) or not isinstance(policy, Policy) or not isinstance(sheet.prior, CausalLM):
        return estimate.undefined("it asks for probabilities of given texts, which this policy or its prior does not tell")

    prior = sheet.prior

    def said(by: Policy) -> Array:
        key = by is prior, audit.prompts, audit.texts, audit.whole
        if key not in log_q:
            log_q[key] = audit.log_q(by, prior)
        return log_q[key]

    figure = audit.of(said(policy), None if audit.weights is None else said(prior))
    return replace(figure, reason=f"of p* itself: {audit.of_posterior(sheet.target, prior).value:.3g}") if audit.whole else figure


def _span(*seen: Array) -> float:
    """Between the least and the most of what was seen, at the policy's prefixes and at the prior's."""
    every = np.concatenate([x[np.isfinite(x)] for x in seen])
    return float(every.max() - every.min()) if every.size else 0.0


def diverse(law: Law, prior: Policy, valid: NDArray[np.bool_] | None) -> dict[str, Estimate]:
    """Diversity of a policy's own draws; valid [P, N]: of those that are good, where the reward says which are (no moment's does)."""
    assert law.draws is not None
    ends = _ends(prior)
    ids = [
        [
            [int(t) for t, m in zip(row, keep, strict=True) if m and t not in ends]
            for row, keep in zip(rows.tolist(), masks.tolist(), strict=True)
        ]
        for rows, masks in zip(law.draws.tokens, law.draws.mask, strict=True)
    ]
    out = {f"distinct_{n}": diversity.distinct(ids, n) for n in (1, 2, 3, 4)}
    if valid is not None:
        out["unique_valid"] = diversity.unique(ids, valid)
    return {**out, "unique": diversity.unique(ids), "self_bleu": diversity.self_bleu(law.texts)}


def _ends(prior: Policy) -> tuple[int, ...]:
    """Tokens that end an output, which no n-gram counts."""
    eos = getattr(prior, "eos", None)
    return tuple(getattr(prior, "stops", ())) or (() if eos is None else (int(eos),))


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
    hidden = float((3.0 / (reach + 3.0)).mean())  # the most of p* that no prior draw has seen (95 %)
    out = {}
    for name, f in wanted.items():
        seen = SEEN[name](bank, tilt)
        out[name] = _guarded(_with_hidden(mean(f).mean(n=n), hidden, float(seen.min()), float(seen.max())), reach, known, n // len(tops))
    accept = accepted(bank, target, prompts)
    least = int(accept.sum(1).min())
    ids = [rows[:ACCEPTED] for rows in bank.token_lists(accept, _ends(prior))]
    even = [rows[: min(map(len, ids))] for rows in ids]
    shapes: dict[str, Callable[..., Estimate]] = {"distinct_2_target": partial(diversity.distinct, n=2), "unique_target": diversity.unique}
    valid = diversity.at_cap(bank.reward, tops) if bank.feature is None else None
    if valid is not None:
        good = [row[keep][: len(even[0])] for row, keep in zip(valid, accept, strict=True)]
        shapes["unique_valid_target"] = partial(diversity.unique, valid=np.stack(good))
    for name, figure in shapes.items():
        out[name] = figure(even) if known and least >= diversity.SET else estimate.undefined("too few bank draws are accepted", n=least)
    return out


SEEN: Final[dict[str, Callable[[Bank, Array], Array]]] = {  # what each draw adds to a mean over p*
    "reward_target": lambda bank, tilt: bank.reward,
    "kl_prior_target": lambda bank, tilt: tilt - weights.log_mean_exp(tilt)[:, None],
    "entropy_target": lambda bank, tilt: weights.log_mean_exp(tilt)[:, None] - bank.log_p0 - tilt,
    "moments_target": lambda bank, tilt: tilt if bank.feature is None else bank.feature,
}


def _with_hidden(figure: Estimate, hidden: float, least: float, most: float) -> Estimate:
    """A mean over p* whose share `hidden` nobody has seen: there its terms may be anything that was seen elsewhere."""
    if figure.low is None or figure.high is None:
        return figure
    keep = 1.0 - hidden
    return replace(figure, low=keep * figure.low + hidden * least, high=keep * figure.high + hidden * most, population=None)


def _guarded(figure: Estimate, reach: Array, known: bool, draws: int) -> Estimate:
    if known:
        return estimate.by_reach(figure, reach, draws)
    return replace(figure, low=None, high=None, population=None, status="uncertified", reason="no reward_max was declared")


def accepted(bank: Bank, target: TiltedPrior, prompts: Sequence[str]) -> NDArray[np.bool_]:
    """[P, N0] bank draws that rejection accepts: draws of p*, exactly. All False where no ceiling was declared."""
    gap = target.tilt(bank.reward - target.ceiling(prompts)[:, None])
    uniform = np.random.default_rng(streams.seed(0, "bank/accept")).random(gap.shape)
    return np.asarray(uniform < np.exp(gap))


def own_kl(run: Run, sheet: Sheet, include: tuple[Path, ...]) -> Estimate | None:
    """KL(q || the objective's own optimum), where it has a closed form: the pool's reverse KL with the optimum's log-ratio as tilt."""
    objective = method.objective(run.method, include)
    if run.train is None or not isinstance(objective, ClosedForm | TiltedForm):
        return None
    bank, tops, samples = sheet.bank, sheet.tops, run.train.samples
    own, on_bank = sheet.rows(OWN, OWN), sheet.rows(OWN, "")
    if isinstance(objective, TiltedForm):  # it reads more than the reward: nothing says what its most is
        tilt = lambda log_p0, reward: objective.own_tilt(log_p0, reward, run.beta, samples)  # noqa: E731
        own, on_bank = (replace(rows, reward=tilt(rows.log_p0, rows.reward)) for rows in (own, on_bank))
        rest = tilt(bank.log_p0, bank.reward)[:, on_bank.reward.shape[1] :]
        return Pool(own, on_bank, rest, np.full(len(tops), math.inf)).columns(1.0)[0]["reverse_kl"]
    laws = [RewardLaw.of(row) for row in bank.reward]

    def tilted(reward: Array) -> Array:
        return np.stack([objective.own(r, law, run.beta, samples) for r, law in zip(reward, laws, strict=True)])

    if np.isneginf(tilted(own.reward)).any():
        return estimate.exactly(math.inf, own.log_q.size, "the policy has mass where its own optimum has none")
    if np.isneginf(tilted(bank.reward)).any():
        return estimate.undefined("its own optimum has no mass where the prior has some: it is approached, never reached")
    top = np.maximum(tilted(bank.reward).max(1), tilted(tops[:, None])[:, 0] if np.isfinite(tops).all() else -np.inf)
    own, on_bank = (replace(rows, reward=tilted(rows.reward)) for rows in (own, on_bank))
    rest = sheet.rest
    return Pool(own, on_bank, tilted(rest) if rest.shape[1] else rest, top).columns(1.0)[0]["reverse_kl"]


def frontier_of(bank: Bank, target: TiltedPrior, prompts: Sequence[str]) -> list[FrontierPoint]:
    """The optimal frontier of the task at multiples of 1/beta; empty where no ceiling was declared."""
    tops = target.ceiling(prompts)
    if not np.isfinite(tops).all():
        return []
    curve = pool.frontier(bank.reward, tops, FRONTIER / target.beta)
    names = ("lam", "reward", "kl", "low", "high", "reach")
    return [FrontierPoint(**{n: float(getattr(curve, n)[i]) for n in names}) for i in range(len(curve.lam))]


def examples(sheet: Sheet, count: int = 12) -> list[Sample]:
    """The first draw of the first prompts: not chosen."""
    rows, texts = sheet.rows(OWN, OWN), sheet.laws[OWN].texts
    return [
        Sample(
            prompt=p,
            completion=texts[i][0],
            reward=float(rows.reward[i, 0]),
            log_p0=float(rows.log_p0[i, 0]),
            log_q=float(rows.log_q[i, 0]),
        )
        for i, p in enumerate(sheet.prompts[:count])
    ]


def samples_file(sheet: Sheet) -> bytes:
    """Compressed npz, a row a draw: tokens, length, text, and the per-draw sums of `Rows`, own draws and the scored part of the bank."""
    out, law = io.BytesIO(), sheet.laws[OWN]
    assert law.draws is not None
    parts: dict[str, Any] = {
        "tokens": law.draws.tokens.numpy().astype(np.int32),
        "length": law.draws.mask.sum(2).numpy().astype(np.uint16),
    }
    for label, rows in (("own", sheet.rows(OWN, OWN)), ("bank", sheet.rows(OWN, ""))):
        parts |= {f"{label}_{k}": v.astype(np.float32) for k, v in vars(rows).items()}
    text = json.dumps({"prompts": sheet.prompts, "texts": law.texts, "beta": sheet.target.beta}, ensure_ascii=False).encode()
    np.savez_compressed(out, text=np.frombuffer(text, np.uint8), **parts)
    return out.getvalue()
