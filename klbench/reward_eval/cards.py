"""A task and its rewards to a table: prior draws from the task's bank, validation texts from its folder, each reward asked once a text.

Gold is the task's gold reward. Where a task has none its own reward stands in: it is then what the others are measured against, and has
no figure against itself. Rows: the task's reward, its gold, other rewards of its family, what the user named, then the nulls, which know
nothing of what the text says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch

from klbench import models, rewards, streams, task
from klbench.bank import Bank, Reservoir
from klbench.errors import UserError
from klbench.estimate import Array, Estimate
from klbench.record import Record
from klbench.reward_eval import association, calibration, functional, intervals, over_optimisation, ranking, sharpness, validation
from klbench.reward_eval.board import Agreement, Card, Table
from klbench.reward_eval.intervals import Flags
from klbench.reward_eval.validation import Labelled, Pairs, Validation
from klbench.rewards.null import shorter
from klbench.target import Policy, Reward, evaluate
from klbench.task import AbstractTask

DRAWS: Final = 512  # a prompt, where no bank ships
SIZES: Final = (2, 4, 8)
BETAS: Final = tuple(2.0**k for k in range(3, -4, -1))  # multiples of the task's own
INVERSE: Final = tuple(2.0 ** (k / 2) for k in range(-6, 9))  # 1/beta of the over-optimisation curve, multiples of the task's own

BATCH: Final = 64  # texts in one pass of the prior

Say = Callable[[str], None]


@final
@dataclass(frozen=True)
class World:
    """A task with its prior's draws. texts [P][N]; log_p0 [P, N]."""

    task: AbstractTask
    prior: Policy
    bank: Bank
    prompts: list[str]
    texts: list[list[str]]

    @property
    def cluster(self) -> intervals.Index:
        """[P N] prompt of each draw."""
        return np.repeat(np.arange(len(self.prompts)), self.bank.reward.shape[1])

    @classmethod
    def of(cls, name: str, prior_name: str | None, samples: int | None, include: Sequence[Path] = ()) -> World:
        """Opens the task's prior and bank, and draws what it lacks. Raises UserError for an unknown name."""
        found = task.load(name, include)
        prior = models.open_prior(prior_name or found.prior)
        reservoir = Reservoir(found, prior, found.target(prior, found.beta), found.max_new_tokens, 0)
        bank = reservoir.upto(samples or 1)
        if samples is None and bank.reward.shape[1] < DRAWS:
            bank = reservoir.upto(DRAWS)
        bank = _first(bank, samples or bank.reward.shape[1])
        texts = prior.decode(torch.from_numpy(bank.tokens).long(), torch.from_numpy(bank.mask))
        return cls(found, prior, bank, found.prompts("score"), texts)


def _first(bank: Bank, draws: int) -> Bank:
    cut: dict[str, Any] = {
        name: None if (part := getattr(bank, name)) is None else part[:, :draws]
        for name in ("tokens", "mask", "log_p0", "reward", "gold", "feature")
    }
    return replace(bank, **cut)


@final
@dataclass(frozen=True)
class Judge:
    """A reward: its values on the draws [P, N], its ceiling [P], and itself, to be asked of other texts."""

    name: str
    role: str
    draws: Array
    ceiling: Array
    ask: Callable[[Sequence[str], Sequence[str]], Array]


@final
@dataclass(frozen=True)
class Asked:
    """A reward that is asked once for each distinct prompt and text, and checked at the door."""

    reward: Reward
    most: float = math.inf
    known: dict[tuple[str, str], float] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> Array:
        """[n] values."""
        keys = list(zip(prompts, texts, strict=True))
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        if new:
            values = evaluate(self.reward, [p for p, _ in new], [[t] for _, t in new], np.full(len(new), self.most))[:, 0]
            self.known.update(zip(new, map(float, values), strict=True))
        return np.array([self.known[key] for key in keys], dtype=np.float64)


def words(text: str) -> int:
    return len(text.split())


def judges(world: World, given: Sequence[tuple[str, Reward]]) -> list[Judge]:
    """All rows of a table. A reward of the family's own that is the task's reward or its gold gives that row its name."""
    target, gold, shape = world.task.target(world.prior, world.task.beta), world.task.gold(), world.bank.reward.shape
    flat_prompts = [p for p, row in zip(world.prompts, world.texts, strict=True) for _ in row]
    flat = [text for row in world.texts for text in row]

    def judge(name: str, role: str, reward: Reward, draws: Array | None = None, ceiling: Array | None = None) -> Judge:
        most = float(getattr(reward, "reward_max", math.inf))
        top = np.full(shape[0], most) if ceiling is None else ceiling
        ask = Asked(reward, most)
        return Judge(name, role, ask(flat_prompts, flat).reshape(shape) if draws is None else draws, top, ask)

    found = [judge("reward", "reward", target.reward, world.bank.reward, target.ceiling(world.prompts))]
    family = world.task.name.partition("/")[0]
    if gold is not None and world.bank.gold is not None:
        found.append(judge("gold", "gold", gold, world.bank.gold))
        for name in rewards.names():  # without a gold there is nothing to hold them to
            if name.startswith(f"{family}/") and name not in [n for n, _ in given]:
                other = judge(name, "other", rewards.load(name))
                same = next((i for i, j in enumerate(found) if np.allclose(j.draws, other.draws, rtol=1e-6, atol=1e-6)), None)
                if same is None:
                    found.append(other)
                elif found[same].name == found[same].role:
                    found[same] = replace(found[same], name=name)
    found += [judge(name, "other", reward) for name, reward in given]
    return [
        *found,
        judge("length", "null", shorter),
        judge("prior", "null", PriorAlone(world.prior), world.bank.log_p0),
        judge("constant", "null", constant),
    ]


def constant(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """Nothing at all."""
    return [0.0] * len(completions)


@final
@dataclass(frozen=True)
class PriorAlone:
    """log p0(text | prompt), nats. A text without a prompt is taken as what follows its first word."""

    prior: Policy
    reward_max: float = 0.0

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        if not hasattr(self.prior, "spelled"):
            raise UserError(f"{self.prior.name} spells no texts")
        rows = []
        for prompt, text in zip(prompts, completions, strict=True):
            head, gap, rest = (prompt, "", text) if prompt else text.partition(" ")
            rows.append((head, gap + rest))
        out = [0.0] * len(rows)
        order = sorted((i for i, row in enumerate(rows) if row[1]), key=lambda i: len(rows[i][1]))  # texts of like length share a batch
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            heads = [rows[i][0] for i in some]
            tokens, mask = self.prior.spelled(heads, [[rows[i][1]] for i in some])
            for i, value in zip(some, self.prior.log_prob(heads, tokens, mask).double().sum(2)[:, 0].tolist(), strict=True):
                out[i] = value
        return out


def card(
    world: World, judge: Judge, gold: Judge, checks: Validation, policies: Sequence[Record], seed: int, say: Say
) -> tuple[Card, float]:
    """Everything of one reward, and the threshold above which it calls a draw good."""
    say(f"{world.task.name}: {judge.name}")
    columns: dict[str, Estimate] = {}
    notes: list[str] = []
    if judge is not gold:
        columns["pairs.prior"] = ranking.among_draws(judge.draws, gold.draws)
        columns |= {f"best_of_{k}": figure for k, figure in ranking.best_of(judge.draws, gold.draws, SIZES).items()}
    reliability: dict[str, list[calibration.Bin]] = {}
    seen: list[tuple[Array, Flags]] = []
    cut = calibration.middle(judge.draws)
    threshold = None
    try:
        for pairs in checks.pairs:
            columns[f"pairs.{pairs.name}"] = _pairs(judge, pairs)
        for texts in checks.labelled:
            reward = judge.ask(texts.prompts, texts.texts)
            if 0 < (texts.label >= 0.5).mean() < 1:  # a file of one kind parts nothing
                seen.append((reward, texts.label >= 0.5))
            figures, curve = _labelled(reward, texts, streams.seed(seed, f"reward/{texts.name}"))
            columns |= figures
            if curve:
                reliability[texts.name] = curve
        if seen:
            found = calibration.threshold(*(np.concatenate(side) for side in zip(*seen, strict=True)))
            cut = cut if found is None else found
        if checks.cases:
            reward = judge.ask([""] * len(checks.cases), [case.text for case in checks.cases])
            threshold = cut if seen else calibration.middle(reward)
            tested = functional.figures(checks.cases, reward, threshold, streams.seed(seed, "reward/functional"))
            columns |= {f"functional.{name}": figure for name, figure in tested.items()}
    except (KeyError, UserError) as error:
        notes.append(f"not asked of the validation texts: {type(error).__name__}: {error}")
    lengths = np.array([[float(words(t)) for t in row] for row in world.texts])
    for name, other in (("length", lengths), ("prior", world.bank.log_p0)):
        columns[f"{name}.within"] = association.within(judge.draws, other)
        columns[f"{name}.overall"] = association.overall(judge.draws.ravel(), other.ravel(), world.cluster)
    sharp, edge, curves = [], None, []
    if judge.role != "null":
        sharp = [sharpness.at(judge.draws, judge.ceiling, world.task.beta * x) for x in BETAS]
        edge = sharpness.edge(judge.draws, judge.ceiling)
        if judge is not gold:
            curves = _curves(world, judge, gold, policies, seed)
    made = Card(
        reward=judge.name, role=judge.role, columns=dict(sorted(columns.items())), reliability=dict(sorted(reliability.items())),
        threshold=threshold, sharpness=sharp, edge=edge, curves=curves, notes=notes,
    )  # fmt: skip
    return made, cut


def _pairs(judge: Judge, pairs: Pairs) -> Estimate:
    chosen, rejected = (judge.ask(pairs.prompts, texts) for texts in (pairs.chosen, pairs.rejected))
    return ranking.pairwise(chosen, rejected, pairs.cluster)


def _labelled(reward: Array, texts: Labelled, seed: int) -> tuple[dict[str, Estimate], list[calibration.Bin]]:
    name, label, cluster = texts.name, texts.label, texts.cluster
    good = label >= 0.5
    found = {f"auc.{name}": ranking.auc(reward, good, cluster)}
    if not np.isin(label, (0.0, 1.0)).all():
        found[f"rho.{name}"] = association.overall(reward, label, cluster)
    half = calibration.halves(cluster, seed)
    if len(label) < calibration.LEAST or min(kind[side].sum() for kind in (label, 1 - label) for side in (half, ~half)) < 2:
        return found, []
    p = calibration.cross_fitted(reward, label, cluster, seed)
    found |= {f"{key}.{name}": figure for key, figure in calibration.figures(p, label, cluster, seed).items()}
    if np.ptp(reward) == 0:  # p is then the base rate of the other half, whose slope means nothing
        del found[f"slope.{name}"]
        return found, []
    found[f"platt.{name}"] = calibration.slope_of(calibration.fit(reward, label, cluster), len(label))
    if reward.min() >= 0 and reward.max() <= 1 and np.ptp(reward) > 0:
        found |= {f"raw_{key}.{name}": figure for key, figure in calibration.figures(reward, label, cluster, seed).items()}
    return found, calibration.curve(p, label, cluster)


def _curves(world: World, judge: Judge, gold: Judge, policies: Sequence[Record], seed: int) -> list[over_optimisation.Curve]:
    span, gold_span = float(np.ptp(judge.draws)), float(np.ptp(gold.draws))
    lams = [x / world.task.beta for x in INVERSE]
    found = [
        over_optimisation.best_of(judge.draws, gold.draws, span, gold_span, streams.seed(seed, "reward/best of n")),
        over_optimisation.posterior(judge.draws, gold.draws, judge.ceiling, lams, streams.seed(seed, "reward/posterior")),
    ]
    if judge.role == "reward" and policies:
        named = [(r.run.method, r.columns["kl_prior"], r.columns["gold"]) for r in policies]
        found.append(over_optimisation.policies(named, float(gold.draws.mean())))
    return [curve for curve in found if curve.points]


def trained(folder: Path, world: World) -> list[Record]:
    """The policies that were trained on this task with this prior, from the records of a run; those without gold or kl_prior left out."""
    records = [Record.read(path) for path in sorted((folder / "records").glob("*.json"))]
    if not records:
        raise UserError(f"{folder}: no records/*.json in it")

    def finite(record: Record, name: str) -> bool:
        value = record.columns[name].value if name in record.columns else None
        return value is not None and math.isfinite(value)

    mine = [r for r in records if r.run.task == world.task.name and r.run.prior == world.prior.name and r.run.kind != "sampler"]
    return [r for r in mine if finite(r, "kl_prior") and finite(r, "gold")]


def agreement(world: World, rows: Sequence[Judge], cuts: dict[str, float], checks: Validation) -> list[Agreement]:
    """Of each two rewards that are no nulls, on the prior's draws and on each labelled file that both can be asked."""
    found = []
    real = [judge for judge in rows if judge.role != "null"]
    for a, b in itertools.combinations(real, 2):
        x, y, cluster = a.draws.ravel(), b.draws.ravel(), world.cluster
        found.append(
            Agreement(
                texts="prior", first=a.name, second=b.name, within=association.within(a.draws, b.draws),
                overall=association.overall(x, y, cluster), kappa=association.kappa(x > cuts[a.name], y > cuts[b.name], cluster),
            )
        )  # fmt: skip
    for texts in checks.labelled:
        values = {}
        for judge in real:
            try:
                values[judge.name] = judge.ask(texts.prompts, texts.texts)
            except (KeyError, UserError):
                continue
        for first, second in itertools.combinations(values, 2):
            x, y, cluster = values[first], values[second], texts.cluster
            found.append(
                Agreement(
                    texts=texts.name, first=first, second=second, within=None, overall=association.overall(x, y, cluster),
                    kappa=association.kappa(x > cuts[first], y > cuts[second], cluster),
                )
            )  # fmt: skip
    return found


def table(
    name: str, given: Sequence[tuple[str, Reward]], pairs: Pairs | None, prior: str | None, samples: int | None, seed: int,
    policies: Path | None, include: Sequence[Path], say: Say,
) -> Table:  # fmt: skip
    """All rewards on one task."""
    say(f"{name}: prior draws")
    world = World.of(name, prior, samples, include)
    rows = judges(world, given)
    gold = rows[1] if rows[1].role == "gold" else rows[0]
    checks = validation.of(world.task)
    notes = [f"{world.task.name.partition('/')[0]} ships no {' and no '.join(checks.missing)}"] if checks.missing else []
    if gold.role == "reward":
        notes.append("the task has no gold reward: its own is what the others are measured against")
    if pairs is not None:
        checks = replace(checks, pairs=(*checks.pairs, pairs))
    records = [] if policies is None else trained(policies, world)
    if policies is not None and not records:
        notes.append(f"no policy trained on {world.task.name} with {world.prior.name} has a gold reward among the records given")
    made = [card(world, judge, gold, checks, records, seed, say) for judge in rows]
    cuts = {judge.name: cut for judge, (_, cut) in zip(rows, made, strict=True)}
    sizes = {f"pairs.{p.name}": len(p.chosen) for p in checks.pairs} | {t.name: len(t.texts) for t in checks.labelled}
    if checks.cases:
        sizes["functional"] = len(checks.cases)
    return Table(
        task=world.task.name, version=world.task.version, prior=world.prior.name, beta=world.task.beta, prompts=len(world.prompts),
        draws=world.bank.reward.shape[1], gold=gold.name, sizes=dict(sorted(sizes.items())), cards=[c for c, _ in made],
        agreement=agreement(world, rows, cuts, checks), notes=notes,
        hashes={"bank": world.bank.hash, "prior": str(getattr(world.prior, "weights_hash", lambda: "")()), **dict(checks.hashes)},
    )  # fmt: skip
