"""The laws that come with the contracts of method.py: run by the tests on every method here, and by `klbench validate` on anybody's.

    E_groups[ grad loss ] = sum over every way to draw K answers of each prompt of  q(draws) grad loss(draws)

No law of an objective samples: the policies are tables of a few answers of different lengths (`klbench.policies.tabular`), so that
every expectation is a finite sum, and a wrong sign, a wrong beta, a dropped correction or a mean in place of a sum stands out by
many orders above rounding. An objective may offer two methods beyond its contract, and is held to what they say:

    stated(log_q [S], log_p0 [S], reward [S], beta, draws) -> scalar    whose gradient is that of the expected loss, up to a positive factor
    own(reward [N], law: RewardLaw, beta, draws) -> [N]                 log of its optimum over p0; required where optimum is "own",
                                                                        or own_tilt where that reads more than the reward

and a steering one, `Converging.converged`, whose draws are then held to p*. What a steering draws nobody can sum over: its laws compare
frequencies with exact sums, at fixed seeds.

A state entry called "log_z" is an objective's own estimate of log Z per prompt and "seen" the draws behind it: the law on the
gradient sets both to the truth, the law on the optimum starts from the first visit too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from klbench.batch import Batch
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import (
    AbstractBlend,
    AbstractDecoding,
    AbstractSampler,
    AbstractStatefulObjective,
    AbstractSteering,
    ClosedForm,
    Objective,
    RewardLaw,
    Sampler,
    State,
    TiltedForm,
)
from klbench.policies.tabular import Tabular, sequences
from klbench.target import Draws, TiltedPrior

EXACT: Final = 1e-6  # largest gap of a law that holds; central differences are good to about 1e-8
SEEN: Final = 1e-3  # least gap that a wrong ingredient must open
BETAS: Final = (0.4, 1.5)
INSIDE: Final = -60.0  # nats: the least log-density of an optimum that the laws look at
PICKS: Final = 20_000
FAR: Final = 4.5  # standard errors that a sampler's frequency may be off; the seed is fixed, so a pass stays a pass
CALLS: Final = 4  # of a steering, at seeds of their own
STEERED: Final = 250  # draws a prompt of each
CLOSE: Final = 1000  # and of one that should have converged
RARE: Final = 0.02  # of p*: a frequency is near normal from here


@dataclass(frozen=True)
class Law:
    """One verdict. gap: what `holds` was decided on, in the unit that `detail` names."""

    name: str
    holds: bool
    gap: float
    detail: str


@runtime_checkable
class Stated(Protocol):
    """An objective that writes down its expected loss."""

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        """Scalar of one prompt, S answers enumerated."""
        ...


@final
@dataclass(frozen=True)
class World:
    """Prompts whose S answers can be listed: p0 = counts / sum, and K draws a prompt. eos is word 0; V words, T tokens."""

    counts: tuple[tuple[int, ...], ...]
    reward: tuple[tuple[float, ...], ...]
    draws: int
    length: int
    vocabulary: int = 2

    def policy(self, logits: Tensor) -> Tabular:
        """The table with logits [P, S]."""
        return Tabular(logits, tuple(f"prompt {p}" for p in range(len(self.counts))), self.vocabulary, self.length, eos=0)

    @property
    def log_p0(self) -> Tensor:
        """[P, S] float64."""
        return torch.tensor(self.counts, dtype=torch.float64).log().log_softmax(1)

    @property
    def rewards(self) -> Tensor:
        """[P, S] float64."""
        return torch.tensor(self.reward, dtype=torch.float64)

    @property
    def features(self) -> Tensor:
        """[P, S, T, D] one-hot of the prompt and the prefix before each token: a critic on them can be any function of the prefix."""
        tokens, _ = sequences(self.vocabulary, self.length, 0)
        prefixes = {row: i for i, row in enumerate(dict.fromkeys((t, *x[:t]) for x in tokens.tolist() for t in range(self.length)))}
        at = torch.tensor([[prefixes[(t, *x[:t])] for t in range(self.length)] for x in tokens.tolist()])
        prompts, here = len(self.counts), torch.nn.functional.one_hot(at, len(prefixes)).double()
        return torch.stack([torch.cat([here * (p == i) for i in range(prompts)], 2) for p in range(prompts)])

    @property
    def top(self) -> Tensor:
        """[P] the most that a prompt can earn."""
        return self.rewards.amax(1)

    def law(self, prompt: int) -> RewardLaw:
        """The reward's law under the prior."""
        return RewardLaw.of(np.array(self.reward[prompt]), np.array(self.counts[prompt]))

    def log_target(self, beta: float) -> Tensor:
        """[P, S] log p*."""
        return (self.log_p0 + self.rewards / beta).log_softmax(1)


WORLDS: Final = (
    World(counts=((2, 3, 4, 1),), reward=((1.0, -0.5, 2.0, 0.3),), draws=3, length=3),
    World(counts=((1, 2, 3), (4, 1, 2)), reward=((0.4, -0.3, 1.1), (0.0, 0.9, 0.9)), draws=2, length=2),
)


def fresh_state(objective: Objective, world: World) -> State | None:
    """The state before the first step, None for an objective without memory."""
    return objective.init(len(world.counts), world.features.shape[3]) if isinstance(objective, AbstractStatefulObjective) else None


def settled_state(objective: Objective, world: World, beta: float) -> State | None:
    """The state in which "log_z" is the true one and rests on so many draws that no group can move it."""
    state = fresh_state(objective, world)
    if state is not None:
        for name, value in state.items():
            if name == "log_z":
                true = (world.log_p0 + world.rewards / beta).logsumexp(1).to(value.dtype)
                state[name] = true.requires_grad_(value.requires_grad)
            elif name == "seen":
                state[name] = torch.full_like(value, 1e15)
    return state


@final
class Answers:
    """Every answer of a table with these logits, and training batches of chosen ones."""

    def __init__(self, objective: Objective, world: World, logits: Tensor):
        policy, prior = world.policy(logits), world.policy(world.log_p0)
        self.objective, self.world = objective, world
        self.every, self.before = policy.enumerate(), prior.enumerate().log_prob
        self.kl_token = policy.kl_token(prior) if objective.needs_kl else None
        self.features = world.features if objective.needs_features else None
        # an objective that says it needs no prior gets none: a read of it shows up as NaN
        self.given = self.before if objective.needs_prior else torch.full_like(self.before, torch.nan)

    def own(self, draws: int) -> Tensor:
        """[draws] whether the policy draws each of a prompt's K, or the prior."""
        return torch.arange(draws) >= {"policy": 0, "both": draws // 2, "prior": draws}[self.objective.draws]

    def batch(self, d: Tensor) -> Batch:
        """Of answers by number, d [P, K]; old_log_q is under the law that drew each."""
        world, every, own = self.world, self.every, self.own(d.shape[1])
        row = torch.arange(len(d))
        at = row[:, None]
        return Batch(
            tokens=every.tokens[d],
            mask=every.mask[d],
            log_q=every.log_prob[at, d],
            log_p0=self.given[at, d],
            reward=world.rewards[at, d],
            log_weight=torch.zeros(d.shape, dtype=torch.float64),
            old_log_q=torch.where(own[:, None], every.log_prob.detach()[at, d], self.before[at, d]),
            prompt=row,
            top=world.top,
            own=own.expand(d.shape),
            kl_token=None if self.kl_token is None else self.kl_token[at, d],
            features=None if self.features is None else self.features[at, d],
        )


def expected_gradient(objective: Objective, world: World, logits: Tensor, beta: float, state: State | None = None) -> Tensor:
    """[P, S] gradient of the expected loss at the table with these logits: all S^(P K) batches, of whoever draws them."""
    logits = logits.detach().clone().requires_grad_()
    answers, total = Answers(objective, world, logits), torch.zeros((), dtype=torch.float64)
    prompts, count = world.rewards.shape
    for group in product(range(count), repeat=prompts * world.draws):
        batch = answers.batch(torch.tensor(group).reshape(prompts, world.draws))
        if isinstance(objective, AbstractStatefulObjective):
            if state is None:
                raise ValueError("an objective with memory needs a state: fresh_state or settled_state")
            loss, _ = objective.loss(batch, beta, state)
        else:
            loss = objective.loss(batch, beta)
        assert batch.old_log_q is not None
        total = total + batch.old_log_q.sum().exp() * loss
    if not total.requires_grad:
        return torch.zeros_like(logits.detach())
    (gradient,) = torch.autograd.grad(total, logits, allow_unused=True)
    return torch.zeros_like(logits.detach()) if gradient is None else gradient


def stated_gradient(objective: Stated, world: World, logits: Tensor, beta: float, step: float = 1e-6) -> Tensor:
    """[P, S] central differences of the mean over prompts of `stated`: no autograd, so that a stray detach cannot agree with itself."""

    def mean(at: Tensor) -> float:
        log_q = at.log_softmax(1)
        rows = zip(log_q, world.log_p0, world.rewards, strict=True)
        return sum(float(objective.stated(q, p0, r, beta, world.draws)) for q, p0, r in rows) / len(log_q)

    slope = torch.zeros_like(logits)
    for p, s in product(*map(range, logits.shape)):
        nudge = torch.zeros_like(logits)
        nudge[p, s] = step
        slope[p, s] = (mean(logits + nudge) - mean(logits - nudge)) / (2 * step)
    return slope


def optimum(objective: Objective, world: World, beta: float) -> Tensor | None:
    """[P, S] log-density of the declared optimum, None where none is. Raises UserError on an unknown word or a missing `own`."""
    if objective.optimum == "target":
        return world.log_target(beta)
    if objective.optimum == "none":
        return None
    if objective.optimum != "own":
        raise UserError(f"optimum {objective.optimum!r} of {type(objective).__name__} is none of target, own, none")
    if isinstance(objective, TiltedForm):
        tilts = [objective.own_tilt(p0, r, beta, world.draws) for p0, r in zip(world.log_p0.numpy(), world.rewards.numpy(), strict=True)]
        return (world.log_p0 + torch.from_numpy(np.stack(tilts))).log_softmax(1)
    if not isinstance(objective, ClosedForm):
        raise UserError(f"{type(objective).__name__} declares an optimum of its own and has no method own(reward, law, beta, draws)")
    rows = [objective.own(np.array(r), world.law(p), beta, world.draws) for p, r in enumerate(world.reward)]
    return world.log_p0 + torch.from_numpy(np.stack(rows))


def _points(world: World) -> list[tuple[Tensor, float]]:
    """Policies at the prior, near it, far from it, and so close to the target that even total variation tells beta from 1.1 beta."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(world.rewards.shape, generator=generator, dtype=torch.float64)
    near, far = BETAS
    return [
        (world.log_p0, near),
        (world.log_p0 + 0.3 * noise, near),
        (world.log_p0 + 1.2 * noise, far),
        (world.log_target(1.05 * far) + 0.01 * noise, far),
    ]


def _direction_gap(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Largest |g - c s| / |g| over (g, s), c > 0 the best one factor of all prompts; inf when some c is not positive or g not finite."""
    worst = 0.0
    for found, wanted in pairs:
        factor = float((found * wanted).sum() / (wanted * wanted).sum())
        if not (bool(torch.isfinite(found).all()) and factor > 0):
            return math.inf
        worst = max(worst, float((found - factor * wanted).norm() / found.norm()))
    return worst


def _gradient_laws(objective: Objective) -> list[Law]:
    if not isinstance(objective, Stated):
        return []
    cases = [(world, logits, beta) for world in WORLDS for logits, beta in _points(world)]
    wanted = [stated_gradient(objective, world, logits, beta) for world, logits, beta in cases]

    def found(factor: float) -> list[Tensor]:
        return [expected_gradient(objective, w, x, b * factor, settled_state(objective, w, b * factor)) for w, x, b in cases]

    right, off = found(1.0), found(1.1)
    gap = _direction_gap(zip(right, wanted, strict=True))
    laws = [Law("the expected gradient is that of the stated loss", gap < EXACT, gap, "relative, up to one positive factor")]
    moved = _direction_gap((stated_gradient(objective, w, x, 1.1 * b), s) for (w, x, b), s in zip(cases, wanted, strict=True))
    wrong = _direction_gap(zip(off, wanted, strict=True))
    if moved < EXACT:
        laws.append(Law("beta is not read", wrong < EXACT, wrong, "relative change of the gradient's direction at 1.1 beta"))
    else:
        laws.append(Law("a beta wrong by 1.1 shows", wrong > SEEN, wrong, "relative gap to the stated loss at the right beta"))
    flipped = _direction_gap((-g, s) for g, s in zip(right, wanted, strict=True))
    return [*laws, Law("the wrong sign shows", math.isinf(flipped), flipped, "inf: the factor is not positive")]


def _optimum_laws(objective: Objective) -> list[Law]:
    if optimum(objective, WORLDS[0], BETAS[0]) is None:
        return []
    there, missed = 0.0, math.inf
    for world, beta in product(WORLDS, BETAS):
        best = optimum(objective, world, beta)
        assert best is not None
        best = best.clamp(min=INSIDE).log_softmax(1)  # an optimum without mass on some answers is approached from inside
        short = torch.logaddexp(best, world.log_p0) - math.log(2)
        for state in (fresh_state(objective, world), settled_state(objective, world, beta)):
            scale = float(expected_gradient(objective, world, world.log_p0, beta, state).norm())
            at = float(expected_gradient(objective, world, best, beta, state).norm())
            halfway = float(expected_gradient(objective, world, short, beta, state).norm())
            there = max(there, at / scale if scale > 0 and math.isfinite(at + scale) else math.inf)
            missed = min(missed, halfway / scale if scale > 0 else 0.0)
    return [
        Law("the gradient vanishes at the declared optimum", there < EXACT, there, "norm relative to the prior's"),
        Law("the gradient does not vanish short of it", missed > SEEN, missed, "norm halfway to the optimum relative to the prior's"),
    ]


def _uphill(objective: Objective) -> Law:
    """d E_q[r] under a step along -p0^-1 grad at q = p0: every method that follows the reward starts by raising it."""
    least = math.inf
    for world, beta in product(WORLDS, BETAS):
        gradient = expected_gradient(objective, world, world.log_p0, beta, settled_state(objective, world, beta))
        mean = (world.log_p0.exp() * world.rewards).sum(1, keepdim=True)
        rise = -((world.rewards - mean) * gradient).sum(1) / gradient.norm()
        least = min(least, float(rise.min()) if bool(torch.isfinite(rise).all()) else -math.inf)
    return Law("the first step from the prior raises the reward", least > 0, least, "least slope over prompts, per unit of gradient")


def check_objective(objective: Objective) -> tuple[Law, ...]:
    """All laws that apply to what the objective declares. Raises UserError when the declaration itself is unsound."""
    return (*_gradient_laws(objective), *_optimum_laws(objective), _uphill(objective))


def _picked_law(sampler: AbstractSampler, world: World, beta: float, ceiling: float, seed: int) -> tuple[Array, float]:
    """[S] shares of the answers among PICKS draws of the sampler, fed with prior draws; and the prior draws used for one."""
    share = np.array(world.counts[0]) / sum(world.counts[0])
    expected = sampler.cost(world.law(0), beta, ceiling)
    stream = np.random.default_rng(seed).choice(len(share), size=int(1.1 * expected * PICKS) + 1000, p=share)
    index, used = sampler.pick(np.array(world.reward[0])[stream], beta, ceiling, PICKS, seed + 1)
    if len(index) != PICKS or used < int(index.max()) + 1:
        raise UserError(f"{type(sampler).__name__}.pick: {PICKS} indices expected within the draws used, got {len(index)} of {used}")
    return np.bincount(stream[index], minlength=len(share)) / PICKS, used / PICKS


def check_decoding(decoding: AbstractDecoding) -> tuple[Law, ...]:
    """Whether `law` makes laws of laws, by itself, in the order of the tokens and in the type of its argument."""
    generator = torch.Generator().manual_seed(0)
    laws = (
        torch.randn(40, 12, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 6, 40, dtype=torch.float64)[:, None]
    ).log_softmax(1)
    laws = torch.cat([laws, laws[:8].masked_fill(torch.arange(12) % 3 == 0, -torch.inf).log_softmax(1)])  # some tokens have no mass
    ties = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [1] + [0] * 11, [3, 1, 1, 1, 2, 2, 1, 1, 0, 0, 0, 0]], dtype=torch.float64)
    every = torch.cat([laws, (ties / ties.sum(1, keepdim=True)).log()])
    found = decoding.law(every)
    mass = found.exp()
    total = float((mass.sum(1) - 1).abs().nan_to_num(math.inf).max())
    ordered = mass.gather(1, every.sort(dim=1, descending=True, stable=True).indices)
    risen = float(ordered.diff(dim=1).nan_to_num(math.inf).max())
    fresh = float(mass[every == -torch.inf].nan_to_num(math.inf).max())
    shuffle = torch.randperm(12, generator=generator)
    moved = float((decoding.law(laws[:40, shuffle]).exp() - mass[:40, shuffle]).abs().nan_to_num(math.inf).max())
    alone = torch.stack([decoding.law(row) for row in every]).exp()
    mixed = float((decoding.law(every.view(3, 17, 12)).exp().flatten(0, 1) - alone).abs().nan_to_num(math.inf).max())
    single = decoding.law(every.float())
    coarse = float((single.double().exp() - mass).abs().nan_to_num(math.inf).max()) if single.dtype == torch.float32 else math.inf
    return (
        Law("a decoded law is normalised", total < EXACT, total, "|sum q - 1|"),
        Law("a likelier token stays at least as likely", risen < EXACT, risen, "mass by which a less likely token comes out above"),
        Law("a token without mass gets none", fresh == 0, fresh, "largest mass of such a token"),
        Law("ids do not matter where nothing ties", moved < EXACT, moved, "mass moved by another order of the tokens"),
        Law("each law is decoded by itself", mixed < EXACT, mixed, "mass moved by laws beside it"),
        Law("single precision is kept, and is enough", coarse < 1e-4, coarse, "mass apart from double; inf for another type"),
    )


def check_blend(blend: AbstractBlend) -> tuple[Law, ...]:
    """Whether `law` makes laws of pairs of laws, each pair by itself, in no order of the tokens and in the type of its arguments."""
    generator = torch.Generator().manual_seed(0)
    sharp = torch.linspace(0.1, 6, 40, dtype=torch.float64)[:, None]
    q, p0 = ((torch.randn(40, 12, generator=generator, dtype=torch.float64) * sharp).log_softmax(1) for _ in range(2))
    bare = torch.arange(12) % 3 == 0  # tokens that neither has, below in some of the pairs
    q, p0 = (torch.cat([x, x[:8].masked_fill(bare, -torch.inf).log_softmax(1)]) for x in (q, p0))
    found = blend.law(q, p0)
    mass = found.exp()
    total = float((mass.sum(1) - 1).abs().nan_to_num(math.inf).max())
    fresh = float(mass[40:, bare].nan_to_num(math.inf).max())
    shuffle = torch.randperm(12, generator=generator)
    moved = float((blend.law(q[:, shuffle], p0[:, shuffle]).exp() - mass[:, shuffle]).abs().nan_to_num(math.inf).max())
    alone = torch.stack([blend.law(a, b) for a, b in zip(q, p0, strict=True)]).exp()
    mixed = float((blend.law(q.view(3, 16, 12), p0.view(3, 16, 12)).exp().flatten(0, 1) - alone).abs().nan_to_num(math.inf).max())
    single = blend.law(q.float(), p0.float())
    coarse = float((single.double().exp() - mass).abs().nan_to_num(math.inf).max()) if single.dtype == torch.float32 else math.inf
    return (
        Law("a blended law is normalised", total < EXACT, total, "|sum q - 1|"),
        Law("a token that neither has gets no mass", fresh == 0, fresh, "largest mass of such a token"),
        Law("ids do not matter", moved < EXACT, moved, "mass moved by another order of the tokens"),
        Law("each pair is blended by itself", mixed < EXACT, mixed, "mass moved by pairs beside it"),
        Law("single precision is kept, and is enough", coarse < 1e-4, coarse, "mass apart from double; inf for another type"),
    )


@runtime_checkable
class Converging(Protocol):
    """A steering whose draws tend to p* as it spends more."""

    def converged(self) -> AbstractSteering:
        """Itself at an effort at which a few hundred draws are p*'s, where chi2(p*||p0) is a few."""
        ...


def _branching() -> World:
    """Two prompts with 63 answers of one to five words, each length about as likely. The words 2 earn: a text half written says much."""
    tokens, mask = sequences(3, 5, 0)
    size, twos = mask.sum(1).tolist(), ((tokens == 2) & mask).sum(1).tolist()
    counts = tuple(tuple((2 + (5 * i + p) % 3) << (5 - n) for i, n in enumerate(size)) for p in range(2))
    reward = tuple(
        tuple(round(0.3 * math.sin(1.7 * i + 2 * p) + 0.5 * t - 0.2 * n, 3) for i, (n, t) in enumerate(zip(size, twos, strict=True)))
        for p in range(2)
    )
    return World(counts, reward, draws=1, length=5, vocabulary=3)


BRANCHING: Final = _branching()


@final
class _Counted:
    """A world's prior and reward, which count the tokens that they write and the texts that they score. Every text has a reward."""

    name = "counted"

    def __init__(self, world: World):
        self.table = world.policy(world.log_p0)
        every = self.table.enumerate()
        texts = self.table.decode(every.tokens[None], every.mask[None])[0]
        self.known = {(p, t): r for p, row in zip(self.table.prompts, world.reward, strict=True) for t, r in zip(texts, row, strict=True)}
        self.tokens = self.calls = 0

    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int) -> Draws:
        found = self.table.sample(prompts, draws, max_new_tokens, seed)
        self.tokens += int(found.mask.sum())
        return found

    def extend(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor, new: int, seed: int) -> Draws:
        found = self.table.extend(prompts, tokens, mask, new, seed)
        self.tokens += int(found.mask.sum() - mask.sum())
        return found

    def log_prob(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        return self.table.log_prob(prompts, tokens, mask)

    def states(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        return self.table.states(prompts, tokens, mask)

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        return self.table.decode(tokens, mask)

    def reward(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        self.calls += len(completions)
        return [self.known[p, c] for p, c in zip(prompts, completions, strict=True)]


@final
@dataclass(frozen=True, eq=False)
class _Ran:
    """What a steering gave in one call. answer [P, N]: index of each draw among the answers, -1 for none of them.  log_z [P, N] or None.

    miscounted: tokens and reward calls, claimed against counted.  off: largest gap of log_q.
    """

    answer: Array
    log_z: Array | None
    miscounted: float
    off: float


def _steered(steering: AbstractSteering, beta: float, draws: int, seed: int) -> _Ran:
    world, prior = BRANCHING, _Counted(BRANCHING)
    target = TiltedPrior(prior, prior.reward, beta, reward_max=float(world.rewards.max()))
    prompts, every = list(prior.table.prompts), prior.table.enumerate()
    found = steering.steer(prior, target, prompts, draws, world.length, seed)
    shape, tokens, mask = (len(prompts), draws, world.length), found.draws.tokens, found.draws.mask
    if tuple(tokens.shape) != shape or (found.log_z is not None and found.log_z.shape != shape[:2]):
        raise UserError(f"{type(steering).__name__}.steer: tokens {shape} and log_z {shape[:2]} expected, got {tuple(tokens.shape)}")
    number = {tuple(row): i for i, row in enumerate(torch.where(every.mask, every.tokens, -1).tolist())}
    answer = np.array([[number.get(tuple(row), -1) for row in rows] for rows in torch.where(mask, tokens, -1).tolist()])
    said = every.log_prob[torch.arange(len(prompts))[:, None], torch.from_numpy(answer.clip(0))]
    off = float((found.draws.log_q - said).abs()[torch.from_numpy(answer >= 0)].nan_to_num(math.inf).max())
    return _Ran(answer, found.log_z, abs(found.prior_tokens - prior.tokens) + abs(found.reward_calls - prior.calls), off)


def _cells() -> list[Array]:
    """Of each prompt [K, S]: the answers by length, first word, and whether they earn more than the median; rare cells are one."""
    every = sequences(BRANCHING.vocabulary, BRANCHING.length, 0)
    rows = list(zip(every[1].sum(1).tolist(), every[0][:, 0].tolist(), strict=True))
    out = []
    for p, reward in enumerate(BRANCHING.reward):
        kind = [(*row, r > sorted(reward)[len(reward) // 2]) for row, r in zip(rows, reward, strict=True)]
        cell = np.array([[float(k == which) for k in kind] for which in sorted(set(kind))])
        share = np.stack([cell @ BRANCHING.log_target(beta)[p].exp().numpy() for beta in BETAS])
        rare = share.min(0) < RARE
        out.append(np.concatenate([cell[~rare], cell[rare].sum(0, keepdims=True)]))
    return out


def _spread(runs: Sequence[_Ran], cells: Sequence[Array]) -> float:
    """How far the runs' counts in cells differ from each other beyond chance: chi-square's excess in its standard deviations."""
    excess, freedom = 0.0, 0
    for p, cell in enumerate(cells):
        counts = np.array([cell[:, run.answer[p]].sum(1) for run in runs])  # [C, K]
        expected = counts.mean(0)[counts.any(0)]
        excess += float(((counts[:, counts.any(0)] - expected) ** 2 / expected).sum())
        freedom += (len(runs) - 1) * (len(expected) - 1)
    return abs(excess - freedom) / math.sqrt(2 * freedom) if freedom else 0.0


def _apart(weight: Array, inside: Array, wanted: Array) -> float:
    """Largest gap, in standard errors, of means over draws [N] from those wanted [K]: of weight times being in each cell [K, N]; and of
    weight alone. No error is below that of a plain frequency, so that a cell in which no draw fell is not thought to be known exactly.
    """
    value = weight * np.concatenate([inside, np.ones((1, len(weight)))])
    wanted = np.append(wanted, wanted.sum())
    error = np.sqrt(np.maximum(value.var(1), wanted * (1 - wanted)) / len(weight)) + 1e-9
    return float(np.max(np.abs(value.mean(1) - wanted) / error))


def _proper_laws(runs: dict[float, list[_Ran]], cells: Sequence[Array]) -> list[Law]:
    far, blind = 0.0, 0.0
    for beta, some in runs.items():
        for p, cell in enumerate(cells):
            answer = np.concatenate([run.answer[p] for run in some])
            log_z = np.concatenate([run.log_z[p] for run in some if run.log_z is not None])
            unit = float((BRANCHING.log_p0 + BRANCHING.rewards / beta).logsumexp(1)[p])
            right, wrong = (cell @ (BRANCHING.log_p0 + BRANCHING.rewards / b)[p].exp().numpy() for b in (beta, 1.5 * beta))
            weight, inside, scale = np.exp(log_z - unit), cell[:, answer], math.exp(unit)
            far = max(far, _apart(weight, inside, right / scale))
            blind = max(blind, _apart(weight, inside, wrong / scale))
    return [
        Law("exp(log_z) is unbiased for Z, its draws weighted by it for p*", far < FAR, far, "standard errors, over cells of answers"),
        Law("a beta wrong by 1.5 shows", blind > FAR, blind, "standard errors"),
    ]


def _limit_law(steering: AbstractSteering, cells: Sequence[Array]) -> Law:
    far, tv = 0.0, 0.0
    for turn, beta in enumerate(BETAS):
        run = _steered(steering, beta, CLOSE, 2 * CALLS + turn)
        for p, cell in enumerate(cells):
            wanted, inside = cell @ BRANCHING.log_target(beta)[p].exp().numpy(), cell[:, run.answer[p]]
            far = max(far, _apart(np.ones(CLOSE), inside, wanted))
            tv = max(tv, 0.5 * float(np.abs(inside.mean(1) - wanted).sum()))
    told = f"standard errors over {CLOSE} draws; TV over cells {tv:.3f}"
    return Law("draws follow the target at the effort of `converged`", far < FAR, far, told)


def check_steering(steering: AbstractSteering) -> tuple[Law, ...]:
    """Whether draws are whole, seeded, independent of each other and counted; log_z is proper; and, of a `Converging` one, p* the limit."""
    cells, near = _cells(), BETAS[0]
    runs = {near: [_steered(steering, near, STEERED, seed) for seed in range(CALLS)]}
    again = _steered(steering, near, STEERED, 0)
    if again.log_z is not None:
        runs[BETAS[1]] = [_steered(steering, BETAS[1], STEERED, CALLS + seed) for seed in range(CALLS)]
    every = [run for some in runs.values() for run in some]
    strange = float(sum((run.answer < 0).sum() for run in every))
    off, miscounted = max(run.off for run in every), max(run.miscounted for run in every)
    first, *others = runs[near]
    unseeded = float((first.answer != again.answer).sum() + sum((first.answer == run.answer).all() for run in others))
    laws = [
        Law("draws are answers", strange == 0, strange, "draws that no answer is"),
        Law("log_q is the prior's", off < 1e-4, off, "nats, largest gap of a token"),
        Law("the same seed gives the same draws, another others", unseeded == 0, unseeded, "draws, or calls, for which that fails"),
        Law("tokens and reward calls are counted", miscounted == 0, miscounted, "tokens and calls apart"),
    ]
    if strange:
        return tuple(laws)
    spread = _spread(runs[near], cells)
    laws.append(Law("draws of one call are independent", spread < FAR, spread, "standard deviations of chi-square between calls"))
    if again.log_z is not None:
        laws += _proper_laws(runs, cells)
    if isinstance(steering, Converging):
        laws.append(_limit_law(steering.converged(), cells))
    return tuple(laws)


def check_sampler(sampler: Sampler) -> tuple[Law, ...]:
    """Whether `pick`, `log_ratio` and `cost` of a sampler describe one law. log_ratio is summed exactly; pick's frequencies are drawn.

    Decodings, blends and steerings have laws of their own: `check_decoding`, `check_blend`, `check_steering`.
    """
    if isinstance(sampler, AbstractDecoding):
        return check_decoding(sampler)
    if isinstance(sampler, AbstractBlend):
        return check_blend(sampler)
    if isinstance(sampler, AbstractSteering):
        return check_steering(sampler)
    world = World(((2, 3, 4, 1),), ((1.0, -0.5, 2.0, 1.0),), draws=1, length=3)  # two answers tie in reward
    ceiling, reward, law_of_reward = 2.3, np.array(world.reward[0]), world.law(0)
    share = np.array(world.counts[0]) / sum(world.counts[0])
    off, far, price, stable, blind = 0.0, 0.0, 0.0, True, 0.0
    for turn, beta in enumerate(BETAS):
        law = share * np.exp(sampler.log_ratio(reward, law_of_reward, beta, ceiling))
        wrong = share * np.exp(sampler.log_ratio(reward, law_of_reward, 1.1 * beta, ceiling))
        off = max(off, abs(float(law.sum()) - 1.0))
        found, used = _picked_law(sampler, world, beta, ceiling, 10 * turn)
        again, _ = _picked_law(sampler, world, beta, ceiling, 10 * turn)
        stable = stable and bool((found == again).all())
        error = np.sqrt(np.maximum(law * (1 - law), 0) / PICKS + 1 / PICKS**2)
        far = max(far, float(np.max(np.abs(found - law) / error)))
        blind = max(blind, float(np.max(np.abs(found - wrong) / error))) if not np.allclose(law, wrong, rtol=1e-9) else math.inf
        price = max(price, abs(used / sampler.cost(law_of_reward, beta, ceiling) - 1))
    return (
        Law("log_ratio is the log of a normalised density ratio", off < EXACT, off, "|sum p0 exp(log_ratio) - 1|"),
        Law("pick draws from the law of log_ratio", far < FAR, far, f"standard errors over {PICKS} picks"),
        Law("a beta wrong by 1.1 shows", blind > FAR, blind, "standard errors; inf where beta is not read"),
        Law("cost is the prior draws used", price < 0.04, price, "relative"),
        Law("the same seed gives the same picks", stable, 0.0 if stable else 1.0, "1: it does not"),
    )
