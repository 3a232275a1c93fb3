"""Models of which every figure is an exact sum: token laws on a small graph of states, a reward of the last one, policies near and far.

    q(x) = prod_t q_t(x_t | s_t)        s_{t+1} = moves_t[s_t, x_t]        r(x) = reward[s_T]        q_t: [P, S_t, V] log-probabilities

A tree (one state a prefix) has every law over V^T outputs; a chain (last token and state of a small automaton) has outputs of 64 tokens. On
either, with d_t the law of s_t under q, sums over states replace sums over outputs:

    KL(q||p)   = sum_t sum_s d_t(s) KL(q_t(.|s) || p_t(.|s))            entropy, E_q r = sum_s d_T(s) reward(s) likewise
    h_T = exp(lambda r),  h_t(s) = sum_v p0_t(v|s) h_{t+1}(s'),  Z = h_0       p*_t(v|s) = p0_t(v|s) h_{t+1}(s') / h_t(s): on the graph too
    sum p*^2 / q    the same forward recursion as d, with p*_t^2 / q_t in place of q_t
    KL*(R)     = max_lambda lambda R - E_c log Z(c; lambda)             from the law of s_T under the prior alone

TV and JS need the outputs themselves: on trees alone. Shapes [P prompts, ...]; nats; float64; numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Final, NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp

from klbench import streams
from klbench.errors import unknown
from klbench.estimate import Array
from klbench.rows import Rows

PROMPTS: Final = 4
NEAR: Final = 0.03  # KL(q||p*) that policies are made to have, nats
MID: Final = 1.0
FAR: Final = (1.5, 1.0, 2.0)
PER_POLICY: Final = 5  # fields of a policy in `World.tables`

Law = tuple[Array, ...]  # [P, S_t, V] log-probabilities of the next token, t = 0 .. T-1
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Graph:
    """States [S_t] at t = 0 .. T and where tokens lead: moves[t] [S_t, V]. over[t] [S_t]: ended, token 0 follows and costs nothing.

    start [P]: the state a prompt begins in.  states: S_T.
    """

    moves: tuple[Ints, ...]
    over: tuple[NDArray[np.bool_], ...]
    start: Ints
    states: int
    outputs: bool = False  # a final state is one output

    @property
    def tokens(self) -> int:
        return int(self.moves[0].shape[1])

    def step(self, t: int, mass: Array) -> Array:
        """[P, S_{t+1}] from the mass [P, S_t, V] that leaves each state by each token."""
        size = self.moves[t + 1].shape[0] if t + 1 < len(self.moves) else self.states
        at = self.moves[t] + size * np.arange(len(mass))[:, None, None]
        return np.asarray(np.bincount(at.ravel(), mass.ravel(), len(mass) * size).reshape(len(mass), size), dtype=np.float64)

    def first(self) -> Array:
        """[P, S_0] law of the first state."""
        mass = np.zeros((len(self.start), self.moves[0].shape[0]))
        mass[np.arange(len(mass)), self.start] = 1.0
        return mass

    def law(self, logits: Sequence[Array]) -> Law:
        """Normalised, with nothing but token 0 after the end."""
        out = []
        for raw, over in zip(logits, self.over, strict=True):
            log_q = raw - logsumexp(raw, axis=2, keepdims=True)
            log_q[:, over] = -np.inf
            log_q[:, over, 0] = 0.0
            out.append(log_q)
        return tuple(out)

    def flow(self, law: Law) -> list[Array]:
        """[P, S_t] law of the state, t = 0 .. T."""
        mass = [self.first()]
        for t, log_q in enumerate(law):
            mass.append(self.step(t, mass[-1][:, :, None] * np.exp(log_q)))
        return mass

    def mean(self, law: Law, terms: Sequence[Array]) -> Array:
        """[P] E_q sum_t term_t(s_t, x_t), terms [P, S_t, V]; 0 where a token has no mass, whatever the term."""
        mass = self.flow(law)
        total = np.zeros(len(self.start))
        for d, log_q, term in zip(mass, law, terms, strict=False):
            weight = d[:, :, None] * np.exp(log_q)
            with np.errstate(invalid="ignore"):
                total += np.where(weight > 0, weight * term, 0.0).sum((1, 2))
        return total

    def tilted(self, prior: Law, tilt: Array) -> Law:
        """prior times exp(tilt [P, S_T]), normalised: the posterior, token by token."""
        h, out = tilt, []
        for t in reversed(range(len(prior))):
            raw = prior[t] + h[:, self.moves[t]]
            h = logsumexp(raw, axis=2)
            with np.errstate(invalid="ignore"):
                out.append(np.where(np.isneginf(raw), -np.inf, raw - h[:, :, None]))
        return tuple(reversed(out))

    def kl(self, q: Law, p: Law) -> Array:
        """[P] KL(q||p)."""
        return self.mean(q, [_minus(a, b) for a, b in zip(q, p, strict=True)])

    def log_chi2(self, p: Law, q: Law) -> Array:
        """[P] log(1 + chi2(p||q)) = log sum p^2/q, state by state in logarithms: a collapsed q may be e^-700 where p is not."""
        mass = np.where(self.first() > 0, 0.0, -np.inf)
        for t, (a, b) in enumerate(zip(p, q, strict=True)):
            none = np.isneginf(a)
            terms = mass[:, :, None] + np.where(none, -np.inf, 2 * a - np.where(none, 0.0, b))
            top = terms.max((1, 2))
            with np.errstate(divide="ignore"):
                mass = np.log(self.step(t, np.exp(terms - top[:, None, None]))) + top[:, None]
        return np.asarray(logsumexp(mass, axis=1))

    def log_prob(self, law: Law) -> Array:
        """[P, S_T] of outputs; only where each final state is one output."""
        total = np.zeros((len(self.start), 1))
        for t, log_q in enumerate(law):
            new = np.full((len(total), self.moves[t + 1].shape[0] if t + 1 < len(law) else self.states), -np.inf)
            new[:, self.moves[t].ravel()] = (total[:, :, None] + log_q).reshape(len(total), -1)
            total = new
        return total


def _minus(a: Array, b: Array) -> Array:
    """a - b, 0 where a is -inf."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(a), 0.0, a - b)


@dataclass(frozen=True)
class Drawn:
    """Draws of the prior (law 0) and of K policies side by side, n in all, with what every law says of each.

    starts [K + 2]: law j drew columns starts[j] : starts[j + 1].  fields [2 + 5 K, P, n], in the order of `World.tables`: log p0, length in
    tokens, then a policy's log q, sum_t H(q_t), sum_t H(q_t, p0_t), sum_t KL(p0_t||q_t) and
    sum_t k3_t.  reward [P, n].
    """

    starts: tuple[int, ...]
    fields: Array
    reward: Array

    def at(self, law: int) -> slice:
        return slice(self.starts[law], self.starts[law + 1])

    def density(self, law: int, of: Sequence[int]) -> Array:
        """[P, n] log q_j of the draws of the laws `of`, in their order."""
        row = self.fields[0 if law == 0 else PER_POLICY * (law - 1) + 2]
        return np.concatenate([row[:, self.at(j)] for j in of], 1)

    def rows(self, policy: int, of: int) -> Rows:
        """What a policy (1, 2, ..) and the prior say of the draws of the law `of`."""
        at, first = self.at(of), PER_POLICY * (policy - 1) + 2
        log_p0 = self.fields[0][:, at]
        log_q, entropy, cross, lost = (self.fields[first + i][:, at] for i in range(4))
        return Rows(log_q, log_p0, self.reward[:, at], -log_q - entropy, -log_p0 - cross, cross - entropy, entropy, lost)

    def k3(self, policy: int) -> Array:
        """[P, N] sum_t p0/q - 1 - log p0/q over the tokens of the policy's own draws."""
        return self.fields[PER_POLICY * policy + 1][:, self.at(policy)]


@final
@dataclass(frozen=True)
class World:
    """A prior, a reward [P, S_T] with its ceiling [P], beta, and policies by name, in the order in which draws number them from 1."""

    name: str
    graph: Graph
    prior: Law
    reward: Array
    reward_max: Array
    beta: float
    policies: dict[str, Law] = field(default_factory=dict)

    def only(self, policies: Sequence[str]) -> World:
        """With these policies alone, in this order."""
        return replace(self, policies={name: self.policies[name] for name in policies})

    @cached_property
    def target(self) -> Law:
        return self.graph.tilted(self.prior, self.reward / self.beta)

    @cached_property
    def last(self) -> Array:
        """[P, S_T] law of the final state under the prior: all that log Z depends on."""
        return self.graph.flow(self.prior)[-1]

    def log_z(self, inverse_beta: float) -> Array:
        """[P] log E_p0 exp(inverse_beta r)."""
        return np.asarray(logsumexp(inverse_beta * self.reward, axis=1, b=self.last))

    def least_kl(self, reward: float) -> tuple[float, float]:
        """(lambda, KL*(reward)): the least KL to the prior at mean reward `reward`, one lambda >= 0 for all prompts.

        Infinite where no tilted prior has that reward to rounding: then the policy never misses the best outputs.
        """

        def short(lam: float) -> float:
            tilt = lam * self.reward
            share = self.last * np.exp(tilt - tilt.max(1, keepdims=True))
            return float(((share * self.reward).sum(1) / share.sum(1)).mean()) - reward

        if short(0.0) >= 0:
            return 0.0, 0.0
        high = 1.0
        while short(high) < 0:
            high *= 2
            if high > 1e6:
                return math.inf, math.inf
        lam = float(brentq(short, 0.0, high, xtol=1e-13, rtol=1e-13))
        return lam, lam * reward - float(self.log_z(lam).mean())

    def truth(self, policy: str) -> dict[str, float]:
        """Exact columns, means over prompts. Absent: what is infinite, what is 0/0, and on chains tv and js."""
        q, graph = self.policies[policy], self.graph
        kl = float(graph.kl(q, self.prior).mean())
        reward = float((graph.flow(q)[-1] * self.reward).sum(1).mean())
        lam, least = self.least_kl(reward)
        out = {
            "reverse_kl": float(graph.kl(q, self.target).mean()),
            "log_z": float(self.log_z(1 / self.beta).mean()),
            "forward_kl": float(graph.kl(self.target, q).mean()),
            "chi2": float(graph.log_chi2(self.target, q).mean()),
            "kl_prior": kl,
            "reward": reward,
            "entropy": -float(graph.mean(q, q).mean()),
            "forgetting": float(graph.kl(self.prior, q).mean()),
        }
        if 0 < lam < math.inf:
            out["beta_implied"] = 1 / lam
        if kl > 0 and lam < math.inf:
            out["wasted_nats"], out["kl_efficiency"] = kl - least, least / kl
        if graph.outputs:
            eq, es = np.exp(graph.log_prob(q)), np.exp(graph.log_prob(self.target))
            out["tv"] = float(0.5 * np.abs(eq - es).sum(1).mean())
            out["js"] = float(0.5 * (_against(eq, es) + _against(es, eq)).mean())
        return out

    def reach(self, draws: int) -> Array:
        """[P] the true A of so many prior draws."""
        return np.asarray(draws * np.exp(self.log_z(1 / self.beta) - self.reward_max / self.beta))

    @cached_property
    def laws(self) -> tuple[Law, ...]:
        return (self.prior, *self.policies.values())

    @cached_property
    def tables(self) -> list[Array]:
        """[P S_t V, F] for each t: what token v after state s adds to each field of `Drawn`."""
        out = []
        for t, log_p0 in enumerate(self.prior):
            shape = log_p0.shape
            columns = [np.where(np.isneginf(log_p0), 0.0, log_p0), np.broadcast_to(1.0 - self.graph.over[t][None, :, None], shape)]
            for policy in self.policies.values():
                log_q = policy[t]
                p = np.exp(log_q)
                ratio = -_minus(log_q, log_p0)
                entropy = -(p * np.where(p > 0, log_q, 0.0)).sum(2, keepdims=True)
                cross = entropy - (p * ratio).sum(2, keepdims=True)
                k3 = np.exp(np.minimum(ratio, 700.0)) - 1 - ratio
                p0 = np.exp(log_p0)
                lost = (p0 * _minus(log_p0, log_q)).sum(2, keepdims=True)
                columns += [np.where(p > 0, log_q, 0.0), *(np.broadcast_to(x, shape) for x in (entropy, cross, lost)), k3]
            out.append(np.stack(columns, 3).reshape(-1, len(columns)))
        return out

    @cached_property
    def _cdfs(self) -> list[list[Array]]:
        """[P S_t, V] of each law and t; above 1 from where the rest is rounding, so that no token without mass is drawn."""
        out = []
        for law in self.laws:
            steps = [np.exp(log_q).cumsum(2).reshape(-1, log_q.shape[2]) for log_q in law]
            out.append([np.where(c >= 1 - 1e-12, 2.0, c) for c in steps])
        return out

    def walk(self, rng: np.random.Generator, law: int, draws: int) -> tuple[list[Ints], Ints]:
        """Draws of one law: [P, draws] row of `tables` taken at each t, and the final states."""
        prompts = len(self.graph.start)
        state = np.repeat(self.graph.start[:, None], draws, 1)
        base, taken = np.arange(prompts)[:, None], []
        for t, move in enumerate(self.graph.moves):
            row = state + base * move.shape[0]
            token = (self._cdfs[law][t][row] <= rng.random((prompts, draws))[:, :, None]).sum(2)
            taken.append(row * move.shape[1] + token)
            state = move[state, token]
        return taken, state

    def draw(self, rng: np.random.Generator, sizes: Sequence[int]) -> Drawn:
        """sizes[j] independent draws a prompt of law j, 0 the prior."""
        walks = [self.walk(rng, j, size) for j, size in enumerate(sizes)]
        final_state = np.concatenate([state for _, state in walks], 1)
        total = np.zeros((final_state.size, self.tables[0].shape[1]))
        for t, table in enumerate(self.tables):
            total += table[np.concatenate([taken[t] for taken, _ in walks], 1).ravel()]
        fields = np.ascontiguousarray(total.T).reshape(-1, *final_state.shape)
        return Drawn((0, *np.cumsum(sizes).tolist()), fields, np.take_along_axis(self.reward, final_state, 1))

    def rewards(self, rng: np.random.Generator, draws: int) -> Array:
        """[P, draws] rewards of further prior draws: what the unscored rest of a bank keeps."""
        return np.take_along_axis(self.reward, self.walk(rng, 0, draws)[1], 1)


def _against(a: Array, b: Array) -> Array:
    """[P] sum a log(2 a / (a + b))."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, a * np.log(2 * a / (a + b)), 0.0).sum(1)


# --- graphs ---


def tree(V: int, T: int, prompts: int = PROMPTS, ends: bool = False) -> Graph:
    """Every prefix a state, outputs numbered in base V. `ends`: token 0 is the end, and what follows it is no token."""
    moves = tuple(np.arange(V ** (t + 1)).reshape(-1, V) for t in range(T))
    over = [np.zeros(V**t, bool) for t in range(T)]
    for t in range(1, T if ends else 0):
        over[t] = np.repeat(over[t - 1], V) | (np.arange(V**t) % V == 0)
    return Graph(moves, tuple(over), np.zeros(prompts, np.int64), V**T, True)


def chain(automaton: Ints, T: int, prompts: int = PROMPTS, ends: bool = False) -> Graph:
    """States (a, last token) numbered a V + v; automaton [A, V] moves a. Prompt p begins at a = 0 after token p + 1."""
    A, V = automaton.shape
    state = np.arange(A * V)
    over = (state % V == 0) & ends
    move = automaton[state // V] * V + np.arange(V)
    move = np.where(over[:, None], state[:, None], move)
    return Graph((move,) * T, (over,) * T, np.arange(1, prompts + 1), A * V)


def digits(V: int, T: int) -> Ints:
    """[V^T, T] tokens of the outputs of a tree."""
    return np.stack([(np.arange(V**T) // V ** (T - 1 - t)) % V for t in range(T)], 1)


def counting(V: int, tokens: Sequence[int], cap: int) -> Ints:
    """[cap + 1, V] automaton: how many of `tokens` came, counted up to cap."""
    seen = np.isin(np.arange(V), tokens)
    return np.minimum(np.arange(cap + 1)[:, None] + seen, cap)


def containing(V: int, word: Sequence[int]) -> Ints:
    """[L + 1, V] automaton: length of the longest prefix of `word` that what came ends with; L once the word was there."""
    L = len(word)
    out = np.full((L + 1, V), L)
    for a in range(L):
        for v in range(V):
            came = [*word[:a], v]
            out[a, v] = max(k for k in range(a + 2) if list(word[:k]) == came[len(came) - k :])
    return out


# --- policies ---


def noise(rng: np.random.Generator, law: Law) -> Law:
    """Standard normal logits of the law's shape; one set for all t where all t have the same states, as a model's weights are."""
    if len({x.shape for x in law}) == 1:
        return (rng.normal(size=law[0].shape),) * len(law)
    return tuple(rng.normal(size=x.shape) for x in law)


def mixed(graph: Graph, law: Law, power: float, logits: Law, scale: float) -> Law:
    """law^power exp(scale logits), normalised token by token."""
    return graph.law([np.where(np.isneginf(a), -1e300, power * a) + scale * b for a, b in zip(law, logits, strict=True)])


def _reaching(make: Callable[[float], Law], graph: Graph, target: Law, wanted: float, low: float, high: float) -> float:
    """x in [low, high] at which the mean KL of make(x) to the target is `wanted`; an end where it is not reached."""

    def gap(x: float) -> float:
        return float(graph.kl(make(x), target).mean()) - wanted

    if gap(low) >= 0:
        return low
    return high if gap(high) <= 0 else float(brentq(gap, low, high, rtol=1e-3, xtol=1e-4))


def with_policies(world: World, rng: np.random.Generator, seen: Array | None = None) -> World:
    """near, mid: p* with noise.  far, far2, far3: collapsed, p*^power with noise, half of their KL from either.  under: barely trained,
    the posterior of 0.15 of the reward with noise.

    seen [P, S_T]: the reward that collapsed policies followed, where that is not the true one (a hidden mode).
    """
    graph, star = world.graph, world.target
    base = star if seen is None else graph.tilted(world.prior, seen / world.beta)
    found: dict[str, Law] = {}
    for name, wanted in (("near", NEAR), ("mid", MID)):
        shaken = partial(mixed, graph, star, 1.0, noise(rng, star))
        found[name] = shaken(_reaching(shaken, graph, star, wanted, 0.0, 8.0))
    for i, wanted in enumerate(FAR):
        logits = noise(rng, star)
        scale = _reaching(partial(mixed, graph, base, 1.0, logits), graph, star, wanted / 2, 0.0, 1.0)
        sharp = partial(mixed, graph, base, logits=logits, scale=scale)
        found[f"far{i + 1}" if i else "far"] = sharp(_reaching(sharp, graph, star, wanted, 1.0, 30.0))
    barely = graph.tilted(world.prior, 0.15 * world.reward / world.beta)
    found["under"] = mixed(graph, barely, 1.0, noise(rng, star), 0.1)
    return replace(world, policies=found)


# --- rewards of outputs, [P, S] ---


def dense(rng: np.random.Generator, V: int, T: int) -> Array:
    """A score a position and token and one a pair of neighbours, summed; 0 at the worst output, 1 at the best."""
    x = digits(V, T)
    single, pair = rng.normal(size=(PROMPTS, T, V)), 0.5 * rng.normal(size=(PROMPTS, T, V, V))
    total = sum(single[:, t, x[:, t]] for t in range(T)) + sum(pair[:, t, x[:, t - 1], x[:, t]] for t in range(1, T))
    assert isinstance(total, np.ndarray)
    low, high = total.min(1, keepdims=True), total.max(1, keepdims=True)
    return np.asarray((total - low) / (high - low))


def subset(rng: np.random.Generator, last: Array, mass: float) -> NDArray[np.bool_]:
    """[P, S] outputs taken at random until their prior mass is `mass`, to the outputs' own size."""
    out = np.zeros(last.shape, bool)
    for p, law in enumerate(last):
        order = rng.permutation(len(law))
        order = order[(law[order] > 0) & (law[order] < 0.2 * mass)]
        total = law[order].cumsum()
        out[p, order[: int(np.searchsorted(total, mass)) + 1]] = True
    return out


def _tree_world(name: str, rng: np.random.Generator, V: int, T: int, beta: float, ends: bool = False) -> World:
    """A random prior on a tree, the reward still 0."""
    graph = tree(V, T, ends=ends)
    logits = [rng.normal(size=(PROMPTS, V**t, V)) for t in range(T)]
    return World(name, graph, graph.law(logits), np.zeros((PROMPTS, V**T)), np.ones(PROMPTS), beta)


def _of(world: World, reward: Array, top: float | Array = 1.0) -> World:
    ceiling = np.broadcast_to(np.asarray(top, dtype=np.float64), (PROMPTS,)).copy()
    return replace(world, reward=reward, reward_max=ceiling)


# --- the targets by name ---

V, T = 8, 5


def _dense(name: str, rng: np.random.Generator, beta: float, v: int = V, t: int = T) -> World:
    return with_policies(_of(_tree_world(name, rng, v, t, beta), dense(rng, v, t)), rng)


def _scarce(name: str, rng: np.random.Generator, beta: float) -> World:
    """0 below the middle of a dense score, 1 from .92 of its range: at beta 0.1 about as hard as ESTIMATORS.md section 3 has it."""
    return with_policies(_of(_tree_world(name, rng, V, T, beta), np.clip((dense(rng, V, T) - 0.5) / 0.42, 0.0, 1.0)), rng)


def _binary(name: str, rng: np.random.Generator, beta: float, mass: float) -> World:
    world = _tree_world(name, rng, V, T, beta)
    return with_policies(_of(world, subset(rng, world.last, mass).astype(np.float64)), rng)


def _hidden(name: str, rng: np.random.Generator, beta: float, mass: float) -> World:
    """A mode of little prior mass above an ordinary reward; the collapsed policies never saw it."""
    world = _tree_world(name, rng, V, T, beta)
    ordinary = 0.5 * dense(rng, V, T)
    reward = np.where(subset(rng, world.last, mass), 1.0, ordinary)
    return with_policies(_of(world, reward), rng, seen=ordinary)


def _lengths(name: str, rng: np.random.Generator, beta: float) -> World:
    """Outputs of 1 to 6 tokens: an end token, and a reward that likes some lengths."""
    v, t = 6, 6
    world = _tree_world(name, rng, v, t, beta, ends=True)
    x = digits(v, t)
    length = np.where((x == 0).any(1), (x == 0).argmax(1) + 1, t)
    return with_policies(_of(world, 0.6 * dense(rng, v, t) + 0.4 * (length == 3)), rng)


def _penalty(name: str, rng: np.random.Generator, beta: float) -> World:
    """0 or -1: a twentieth of the prior's mass is at the ceiling, 0, the least that DESIGN.md section 3 lets a task have there."""
    world = _tree_world(name, rng, V, T, beta)
    return with_policies(_of(world, -(~subset(rng, world.last, 0.05)).astype(np.float64), 0.0), rng)


def _uneven(name: str, rng: np.random.Generator, beta: float) -> World:
    """Prompts of very different difficulty: half, a fifth, a twentieth and a hundredth of the prior's mass is at the ceiling."""
    world = _tree_world(name, rng, V, T, beta)
    parts = [subset(rng, world.last[p : p + 1], m) for p, m in enumerate((0.5, 0.2, 0.05, 0.01))]
    return with_policies(_of(world, np.concatenate(parts).astype(np.float64)), rng)


def _generous(name: str, rng: np.random.Generator, beta: float) -> World:
    """A declared ceiling half as high again as the highest reward there is."""
    return with_policies(_of(_tree_world(name, rng, V, T, beta), dense(rng, V, T), 1.5), rng)


def _chain_world(
    name: str, rng: np.random.Generator, automaton: Ints, worth: Sequence[float], steps: int, beta: float, ends: bool = False
) -> World:
    """A random bigram prior over V tokens; reward worth[a] of the automaton's last state a."""
    tokens = automaton.shape[1]
    graph = chain(automaton, steps, ends=ends)
    bigram = rng.normal(size=(PROMPTS, tokens, tokens))
    if ends:
        bigram[:, :, 0] -= 1.0
    law = graph.law([np.tile(bigram, (1, len(automaton), 1))] * steps)
    reward = np.tile(np.repeat(np.asarray(worth, dtype=np.float64), tokens), (PROMPTS, 1))
    return with_policies(_of(World(name, graph, law, reward, np.ones(PROMPTS), beta), reward), rng)


def _count(name: str, rng: np.random.Generator, beta: float, steps: int, ends: bool = False) -> World:
    cap = 12
    return _chain_world(name, rng, counting(10, (3, 7), cap), np.linspace(0, 1, cap + 1).tolist(), steps, beta, ends)


def _word(name: str, rng: np.random.Generator, beta: float, steps: int, word: Sequence[int]) -> World:
    worth = [0.0] * len(word) + [1.0]
    return _chain_world(name, rng, containing(10, word), worth, steps, beta)


def _avoid(name: str, rng: np.random.Generator, beta: float, steps: int) -> World:
    """1, less a third for each unwanted token, down to 0."""
    return _chain_world(name, rng, counting(10, (2,), 3), [1.0, 2 / 3, 1 / 3, 0.0], steps, beta)


class Target(NamedTuple):
    """says: in words.  make: from its name and a stream."""

    says: str
    make: Callable[[str, np.random.Generator], World]


NINE: Final = {  # the kinds of ESTIMATORS.md section 2: V tokens, T positions, every output is summed over
    "dense 0.3": Target("a score of positions and neighbours, V 8, T 5, β 0.3", lambda name, rng: _dense(name, rng, 0.3)),
    "dense 0.1": Target("the same at β 0.1", lambda name, rng: _dense(name, rng, 0.1)),
    "scarce 0.1": Target(
        "0 below the middle of such a score, 1 at its top: good outputs are scarce, β 0.1", lambda name, rng: _scarce(name, rng, 0.1)
    ),
    "scarce 0.05": Target("the same at β 0.05", lambda name, rng: _scarce(name, rng, 0.05)),
    "scarce 0.03": Target("the same at β 0.03", lambda name, rng: _scarce(name, rng, 0.03)),
    "rare": Target("1 on a thousandth of the prior's mass, else 0, β 0.1", lambda name, rng: _binary(name, rng, 0.1, 1e-3)),
    "hidden": Target("1 on 3e-4 of the prior's mass, elsewhere half a dense score, β 0.1", lambda name, rng: _hidden(name, rng, 0.1, 3e-4)),
    "common": Target("1 on 0.3 of the prior's mass, else 0, β 0.3", lambda name, rng: _binary(name, rng, 0.3, 0.3)),
    "V50": Target("dense with V 50, T 3, β 0.1", lambda name, rng: _dense(name, rng, 0.1, 50, 3)),
}
OWN: Final = {  # likewise
    "rarer": Target("1 on 1e-4 of the prior's mass, else 0, β 0.1", lambda name, rng: _binary(name, rng, 0.1, 1e-4)),
    "lengths": Target("an end token, outputs of 1 to 6 tokens, a bonus for 3, V 6, β 0.15", lambda name, rng: _lengths(name, rng, 0.15)),
    "penalty": Target("-1 on all but 0.05 of the prior's mass, else 0, β 0.1", lambda name, rng: _penalty(name, rng, 0.1)),
    "uneven": Target("1 on 0.5, 0.2, 0.05, 0.01 of the prior's mass of the four prompts, β 0.2", lambda name, rng: _uneven(name, rng, 0.2)),
    "generous": Target("dense with a ceiling declared at 1.5, β 0.3", lambda name, rng: _generous(name, rng, 0.3)),
}
CHAINS: Final = {  # a random bigram prior over 10 tokens, 32 or 64 of them: summed over by dynamic programming
    "count 32": Target("share of 12 tokens of two kinds that came, 32 tokens, β 0.13", lambda name, rng: _count(name, rng, 0.13, 32)),
    "ends 32": Target("the same with an end token, at most 32 tokens, β 0.1", lambda name, rng: _count(name, rng, 0.1, 32, ends=True)),
    "word 32": Target("1 where a word of 3 tokens came, 32 tokens, β 0.1", lambda name, rng: _word(name, rng, 0.1, 32, (4, 5, 6))),
    "avoid 32": Target("1 less a third for each of one token, 32 tokens, β 0.15", lambda name, rng: _avoid(name, rng, 0.15, 32)),
    "rare 32": Target("1 where a word of 4 tokens came, 32 tokens, β 0.1", lambda name, rng: _word(name, rng, 0.1, 32, (4, 5, 6, 4))),
    "count 64": Target("share of 12 tokens of two kinds that came, 64 tokens, β 0.15", lambda name, rng: _count(name, rng, 0.15, 64)),
    "word 64": Target("1 where a word of 3 tokens came, 64 tokens, β 0.1", lambda name, rng: _word(name, rng, 0.1, 64, (4, 5, 6))),
}
WORLDS: Final = NINE | OWN | CHAINS


def world(name: str, seed: int = 0) -> World:
    """A target by name; the same seed makes the same one. Raises UserError for a name that is none."""
    if name not in WORLDS:
        raise unknown("target", name, WORLDS)
    return WORLDS[name].make(name, np.random.default_rng(streams.seed(seed, f"accuracy/world/{name}")))


def adversary(seed: int, number: int) -> World:
    """A prompt with a hidden mode and one policy, `far`, that collapsed on what is left without it. All at random: the mode's prior mass
    1e-4 to 1e-1, the ordinary reward's height, beta 0.08 to 0.5, how far the policy collapsed.
    """
    rng = np.random.default_rng(streams.seed(seed, f"accuracy/adversary/{number}"))
    v, t = 8, 3
    graph = tree(v, t, 1)
    prior = graph.law([rng.normal(size=(1, v**i, v)) for i in range(t)])
    beta = math.exp(rng.uniform(math.log(0.08), math.log(0.5)))
    bare = World("adversary", graph, prior, np.zeros((1, v**t)), np.ones(1), beta)
    ordinary = rng.uniform(0.2, 0.8) * dense(rng, v, t)[:1]
    mass = math.exp(rng.uniform(math.log(1e-4), math.log(1e-1)))
    reward = np.where(_mode(rng, bare.last, mass), 1.0, ordinary)
    seen = graph.tilted(prior, ordinary / beta)
    law = mixed(graph, seen, rng.uniform(1.0, 6.0), noise(rng, seen), rng.uniform(0.2, 1.0))
    return World("adversary", graph, prior, reward, np.ones(1), beta, {"far": law})


def _mode(rng: np.random.Generator, last: Array, mass: float) -> NDArray[np.bool_]:
    """[1, S] few outputs whose prior mass adds up to about `mass`, the largest that still fit first."""
    left, out = mass, np.zeros(last.shape, bool)
    for i in np.argsort(-last[0] * rng.uniform(0.5, 1.0, last.shape[1])):
        if last[0, i] <= left:
            out[0, i], left = True, left - last[0, i]
    if not out.any():
        out[0, int(last[0].argmin())] = True
    return out
