"""The accuracy table: truths against enumeration, rivals by hand, a harness that exposes wrong estimators, criteria that can fail."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binom

from klbench import accuracy
from klbench.accuracy import cells, criteria, report, rivals, worlds
from klbench.accuracy.cells import Key, Row, Setting, Tally, joined, replications, row_of
from klbench.accuracy.criteria import Criterion
from klbench.accuracy.report import Table
from klbench.accuracy.rivals import Figures, Sample
from klbench.accuracy.worlds import Graph, World, chain, containing, counting, mixed, noise, tree
from klbench.errors import UserError
from klbench.estimate import STATUSES, Array, Estimate
from klbench.pool import Pool
from klbench.rows import Rows

BETA = 0.4
WORD = (1, 2)


def made(graph: Graph, reward: Array, seed: int = 0) -> World:
    """Two policies and a prior at random on a graph."""
    rng = np.random.default_rng(seed)
    prior = graph.law([rng.normal(size=(len(graph.start), *move.shape)) for move in graph.moves])
    world = World("tiny", graph, prior, reward, np.full(len(graph.start), 1.0), BETA)
    found = {name: mixed(graph, world.target, power, noise(rng, prior), 0.7) for name, power in (("a", 1.0), ("b", 2.5))}
    return replace(world, policies=found)


def on_tree(ends: bool) -> World:
    return made(tree(3, 3, 2, ends), np.random.default_rng(5).random((2, 27)))


def on_chain(ends: bool) -> World:
    reward = np.tile(np.repeat([0.0, 0.3, 1.0], 3), (2, 1))
    return made(chain(containing(3, WORD), 4, 2, ends), reward)


MAKERS = (("tree", on_tree), ("chain", on_chain))
WORLDS = {f"{name}, {'ends' if ends else 'full'}": (make, ends) for name, make in MAKERS for ends in (False, True)}


def sequences(world: World) -> Iterator[tuple[int, tuple[int, ...], list[tuple[int, int, int]], int]]:
    """(prompt, tokens, [(t, state, token)], last state) of every output of a prompt, the tokens after an end left out of the walk."""
    graph = world.graph
    for p in range(len(graph.start)):
        for tokens in itertools.product(range(graph.tokens), repeat=len(graph.moves)):
            state, walk = int(graph.start[p]), []
            for t, token in enumerate(tokens):
                if graph.over[t][state] and token:
                    break  # nothing but the filler follows the end
                if not graph.over[t][state]:
                    walk.append((t, state, token))
                state = int(graph.moves[t][state, token])
            else:
                yield p, tokens, walk, state


def enumerated(world: World, policy: str) -> dict[str, float]:
    """Every column by a plain loop over outputs."""
    prompts = len(world.graph.start)
    rows: list[list[tuple[float, float, float]]] = [[] for _ in range(prompts)]
    for p, _, walk, state in sequences(world):
        lq, l0 = (sum(float(law[t][p, s, v]) for t, s, v in walk) for law in (world.policies[policy], world.prior))
        rows[p].append((lq, l0, float(world.reward[p, state])))
    out: dict[str, list[float]] = {}

    def log_z(p: int, lam: float) -> float:
        return math.log(sum(math.exp(l0 + lam * r) for _, l0, r in rows[p]))

    for p in range(prompts):
        z = log_z(p, 1 / BETA)
        q = np.array([math.exp(lq) for lq, _, _ in rows[p]])
        star = np.array([math.exp(l0 + r / BETA - z) for _, l0, r in rows[p]])
        lq, l0, r = (np.array(x) for x in zip(*rows[p], strict=True))
        half = (q + star) / 2
        found = {
            "log_z": z,
            "reverse_kl": float((q * np.log(q / star)).sum()),
            "forward_kl": float((star * np.log(star / q)).sum()),
            "chi2": math.log(float((star**2 / q).sum())),
            "kl_prior": float((q * (lq - l0)).sum()),
            "forgetting": float((np.exp(l0) * (l0 - lq)).sum()),
            "reward": float((q * r).sum()),
            "entropy": -float((q * lq).sum()),
            "tv": 0.5 * float(np.abs(q - star).sum()),
            "js": 0.5 * float((q * np.log(q / half) + star * np.log(star / half)).sum()),
        }
        for name, value in found.items():
            out.setdefault(name, []).append(value)
    means = {name: float(np.mean(values)) for name, values in out.items()}
    grid = np.linspace(0, 30, 3001)
    waste = [means["kl_prior"] - lam * means["reward"] + np.mean([log_z(p, lam) for p in range(prompts)]) for lam in grid]
    means["wasted_nats"] = float(min(waste))
    means["beta_implied"] = 1 / float(grid[int(np.argmin(waste))])
    means["kl_efficiency"] = 1 - means["wasted_nats"] / means["kl_prior"]
    return means


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("policy", ["a", "b"])
def test_truths_are_sums_over_every_output(name: str, policy: str) -> None:
    make, ends = WORLDS[name]
    world = make(ends)
    wanted, found = enumerated(world, policy), world.truth(policy)
    assert set(found) == set(wanted) - (set() if world.graph.outputs else {"tv", "js"})
    for column, value in found.items():
        near = {"wasted_nats": 1e-4, "kl_efficiency": 1e-3, "beta_implied": 0.01}.get(column, 1e-10)  # the loop's minimum is on a grid
        assert value == pytest.approx(wanted[column], abs=near), column


def test_a_policy_that_is_the_target_or_the_prior() -> None:
    world = on_chain(False)
    world = replace(world, policies={"target": world.target, "prior": world.prior})
    at, start = world.truth("target"), world.truth("prior")
    for column in ("reverse_kl", "forward_kl", "chi2", "wasted_nats"):
        assert at[column] == pytest.approx(0.0, abs=1e-10)
    assert at["beta_implied"] == pytest.approx(BETA) and at["kl_efficiency"] == pytest.approx(1.0)
    assert start["kl_prior"] == pytest.approx(0.0, abs=1e-12) and "beta_implied" not in start


@pytest.mark.parametrize("name", WORLDS)
def test_what_draws_carry_is_the_sum_over_their_own_tokens(name: str) -> None:
    make, ends = WORLDS[name]
    world = make(ends)
    q, p0 = world.policies["b"], world.prior
    rng = np.random.default_rng(1)
    draws = 40
    drawn = world.draw(rng, [draws, 8, draws])
    walks = [world.walk(np.random.default_rng(1), 0, draws)]
    taken, state = walks[0]
    rows, V = drawn.rows(2, 0), world.graph.tokens
    for p, i in itertools.product(range(2), range(draws)):
        want = dict.fromkeys(("log_q", "log_p0", "entropy", "cross", "length"), 0.0)
        for t, row in enumerate(taken):
            s, v = divmod(int(row[p, i]), V)
            s -= p * world.graph.moves[t].shape[0]
            if world.graph.over[t][s]:
                continue
            law, base = np.exp(q[t][p, s]), p0[t][p, s]
            want["log_q"] += q[t][p, s, v]
            want["log_p0"] += base[v]
            want["entropy"] -= float((law * q[t][p, s]).sum())
            want["cross"] -= float((law * base).sum())
            want["length"] += 1
        assert rows.log_q[p, i] == pytest.approx(want["log_q"])
        assert rows.log_p0[p, i] == pytest.approx(want["log_p0"])
        assert rows.A[p, i] == pytest.approx(-want["log_q"] - want["entropy"])
        assert rows.B[p, i] == pytest.approx(-want["log_p0"] - want["cross"])
        assert rows.kl[p, i] == pytest.approx(want["cross"] - want["entropy"])
        assert drawn.fields[1][p, i] == want["length"]
        assert rows.reward[p, i] == world.reward[p, state[p, i]]


def test_draws_follow_their_law_and_have_the_means_that_they_should() -> None:
    world, n = on_chain(True), 40_000
    drawn = world.draw(np.random.default_rng(3), [16, n, 16])
    rows, truth = drawn.rows(1, 1), world.truth("a")
    of_kl = (rows.log_q - rows.log_p0, rows.kl, drawn.k3(1))
    for column, values in (*(("kl_prior", x) for x in of_kl), ("entropy", rows.entropy), ("reward", rows.reward)):
        assert abs(values.mean() - truth[column]) < 5 * values.std() / math.sqrt(values.size), column
    for values in (rows.A, rows.B):
        assert abs(values.mean()) < 5 * values.std() / math.sqrt(values.size)
    assert np.allclose(drawn.density(1, (0, 2)), np.concatenate([drawn.rows(1, 0).log_q, drawn.rows(1, 2).log_q], 1))
    more = world.rewards(np.random.default_rng(4), n)
    assert abs(np.log(np.exp(more / BETA).mean(1)).mean() - truth["log_z"]) < 0.02


def test_automata_by_hand() -> None:
    def run(automaton: Any, tokens: list[int]) -> int:
        state = 0
        for token in tokens:
            state = int(automaton[state, token])
        return state

    word = containing(3, (1, 1, 2))
    assert [run(word, x) for x in ([1], [1, 1], [1, 1, 1], [1, 1, 1, 2], [1, 2, 1], [1, 1, 2, 0, 0])] == [1, 2, 2, 3, 1, 3]
    assert [run(counting(4, (1, 3), 2), x) for x in ([0, 2], [1], [3, 1], [1, 1, 1])] == [0, 1, 2, 2]


def test_policies_are_as_far_as_they_are_meant_to_be() -> None:
    world = worlds.world("word 32")
    truth = {name: world.truth(name) for name in ("near", "mid", "far", "under")}
    assert truth["near"]["reverse_kl"] == pytest.approx(worlds.NEAR, rel=0.02)
    assert truth["mid"]["reverse_kl"] == pytest.approx(worlds.MID, rel=0.02)
    assert truth["far"]["entropy"] < 0.9 * truth["near"]["entropy"]
    assert truth["under"]["kl_prior"] < 0.2 * truth["near"]["kl_prior"]


def test_adversaries_hide_a_mode_that_their_policy_never_saw() -> None:
    hidden = []
    for number in range(20):
        world = worlds.adversary(0, number)
        at_top = world.reward[0] == 1.0
        share = np.exp(world.graph.log_prob(world.target)[0][at_top]).sum()
        own = np.exp(world.graph.log_prob(world.policies["far"])[0][at_top]).sum()
        hidden.append((share, own))
    assert np.median([a for a, _ in hidden]) > 3 * np.median([b for _, b in hidden])


# --- rivals by hand ---


def given(seed: int = 0, draws: int = 32) -> Sample:
    """A sample of the tree's policy `a`."""
    world = on_tree(False)
    drawn = world.draw(np.random.default_rng(seed), [draws, draws, 16])
    rest = world.rewards(np.random.default_rng(seed + 1), 24)
    return cells.sample(world, drawn, rest, 1)


def test_disco_by_hand() -> None:
    sample = given()
    own, found = sample.own, rivals.disco(sample)
    want: dict[str, list[float]] = {}
    for p in range(2):
        w = [math.exp(a + r / BETA - b) for a, b, r in zip(own.log_p0[p], own.log_q[p], own.reward[p], strict=True)]
        z = sum(w) / len(w)
        t = [x / z for x in w]
        one = {
            "log_z": math.log(z),
            "forward_kl": sum(x / z * math.log(x) for x in w) / len(w) - math.log(z),
            "reverse_kl": math.log(z) - sum(math.log(x) for x in w) / len(w),
            "tv": sum(abs(1 - x) for x in t) / len(t) / 2,
            "js": sum(x * math.log(2 * x / (1 + x)) - math.log((1 + x) / 2) for x in t) / len(t) / 2,
            "kl_prior": float((own.log_q[p] - own.log_p0[p]).mean()),
        }
        for name, value in one.items():
            want.setdefault(name, []).append(value)
    assert set(found) == set(want)
    for name, values in want.items():
        assert found[name].value == pytest.approx(float(np.mean(values)), abs=1e-12), name
        assert found[name].low is None and found[name].high is None


def test_trl_by_hand() -> None:
    sample = given()
    grpo, rloo = rivals.trl_grpo(sample), rivals.trl_rloo(sample)
    assert rloo["kl_prior"].value == pytest.approx(float((sample.own.log_q - sample.own.log_p0).mean()))
    assert rloo["kl_prior"].value == pytest.approx(rivals.disco(sample)["kl_prior"].value)
    assert grpo["kl_prior"].value == pytest.approx(float(sample.k3.mean())) and (sample.k3 >= 0).all()
    assert rloo["entropy"].value == pytest.approx(-float(sample.own.log_q.mean()))
    one = np.array([[0.5, -0.3]])  # log q/p0 of the two tokens of one output
    assert np.exp(-one) + one - 1 == pytest.approx(np.array([[math.exp(-0.5) - 0.5, math.exp(0.3) - 1.3]]))


def test_importance_sampling_by_hand() -> None:
    sample = given()
    own, bank = sample.own, sample.bank
    prior, own_is = rivals.prior_is(sample), rivals.self_is(sample)
    every = np.concatenate([bank.reward, sample.rest], 1) / BETA
    # 24 unscored draws and 32 scored ones are too few for the jackknife's correction to vanish: the plain figure is the full fit
    log_z = np.log(np.exp(every).mean(1))
    block = np.arange(every.shape[1]) % 8
    left = np.stack([np.log(np.exp(every[:, block != b]).mean(1)) for b in range(8)])
    assert prior["log_z"].value == pytest.approx(float((8 * log_z - 7 * left.mean(0)).mean()))
    w = np.exp(own.log_p0 + own.reward / BETA - own.log_q)
    at = np.arange(32) % 8
    kept = np.stack([np.log(w[:, at != b].mean(1)) for b in range(8)])
    assert own_is["log_z"].value == pytest.approx(float((8 * np.log(w.mean(1)) - 7 * kept.mean(0)).mean()))
    X = np.stack([np.ones_like(own.A), own.A, own.B], 2)
    f = own.log_q - own.log_p0 - own.reward / BETA
    free = [np.linalg.lstsq(X[p], f[p], rcond=None)[0][0] for p in range(2)]
    assert sample.free.full == pytest.approx(np.array(free), abs=1e-4)  # a ridge apart
    assert prior["reverse_kl"].value == pytest.approx(
        float((8 * sample.free.full - 7 * sample.free.left.mean(0)).mean()) + (prior["log_z"].value or 0.0)
    )


def test_parts_add_up_with_their_errors() -> None:
    sample = given()
    found, log_z = rivals.parts(sample)["reverse_kl"], sample.alone["log_z"]
    kl, reward = sample.kl_prior, sample.reward
    assert None not in (kl.value, reward.value, log_z.value, kl.stderr, reward.stderr, log_z.stderr)
    assert found.value == pytest.approx((kl.value or 0) - (reward.value or 0) / BETA + (log_z.value or 0))
    assert found.stderr == pytest.approx(math.hypot(kl.stderr or 0, (reward.stderr or 0) / BETA, log_z.stderr or 0))


def test_every_estimator_is_explained_and_gives_known_columns() -> None:
    assert set(report.MEANINGS) == set(rivals.ESTIMATORS)
    sample = given(draws=64)
    for name, estimator in rivals.ESTIMATORS.items():
        found = estimator(sample)
        assert set(found) <= set(report.COLUMNS), name
        assert bool(found) == ("board" not in name)


# --- harness ---


TINY = Setting("tiny", (("near", "far"),), ("near", "far"), draws=16, bank=24)


def tiny(name: str, rng: np.random.Generator) -> World:
    """64 outputs, four prompts, and the policies of every target."""
    graph = tree(4, 3)
    prior = graph.law([rng.normal(size=(4, *move.shape)) for move in graph.moves])
    return worlds.with_policies(World(name, graph, prior, worlds.dense(rng, 4, 3), np.ones(4), 0.15), rng)


@pytest.fixture(autouse=True, scope="module")
def a_small_target() -> Iterator[None]:
    worlds.WORLDS["tiny"] = worlds.Target("for tests", tiny)
    yield
    del worlds.WORLDS["tiny"]


def test_replications_do_not_depend_on_how_they_are_cut() -> None:
    whole = replications(TINY, 0, 0, 3)
    cut = joined([replications(TINY, 0, 0, 1), replications(TINY, 0, 1, 2)])
    assert set(whole) == set(cut) and all(np.array_equal(whole[key], cut[key], equal_nan=True) for key in whole)
    key = Key(TINY.name, "near", "", "klbench", "reverse_kl")
    assert len(set(whole[key][:, 0])) == 3
    assert whole[key][0, 4] == pytest.approx(worlds.NEAR, rel=0.02)
    assert Key(TINY.name, "far", "near+far", "board", "log_z") in whole and Key(TINY.name, "far", "", "board", "log_z") not in whole
    assert not np.array_equal(whole[key], replications(TINY, 1, 0, 3)[key])


def figures(*rows: tuple[float | None, float | None, float | None, str], truth: float = 1.0) -> Row:
    """A row of the table from figures written out."""
    numbers = [[math.nan if x is None else x for x in row[:3]] + [STATUSES.index(row[3]), truth] for row in rows]  # type: ignore[arg-type]
    return row_of(Key("t 1000+1000", "near", "", "klbench", "reverse_kl"), np.array(numbers, dtype=np.float64))


def test_a_row_by_hand() -> None:
    row = figures(
        (1.5, 0.5, 2.0, "certified"),
        (0.5, 0.2, 0.8, "certified"),  # the whole interval is below the truth
        (1.0, 1.1, 1.3, "wide"),  # above
        (2.0, None, None, "uncertified"),
        (1.2, 1.1, None, "lower"),  # no upper end, and above the truth
        (None, None, None, "uncertified"),
        (math.inf, None, None, "upper"),
    )
    assert (row.replications, row.defined, row.intervals, row.misses) == (7, 5, 4, 3)
    assert row.by_status == {
        "certified": Tally(2, 2, 1, 0), "wide": Tally(1, 1, 0, 1), "uncertified": Tally(2, 0, 0, 0),
        "lower": Tally(1, 1, 0, 1), "upper": Tally(1, 0, 0, 0),
    }  # fmt: skip
    assert row.bias == pytest.approx(0.24) and row.rmse == pytest.approx(math.sqrt((0.25 + 0.25 + 0 + 1 + 0.04) / 5))
    assert row.width == pytest.approx((1.5 + 0.6 + 0.2) / 3) and row.coverage == pytest.approx(0.25)
    assert row.share("certified") == pytest.approx(2 / 7) and row.share("exact") == 0.0
    exact = figures((1.0, 1.0, 1.0, "exact"), (1 + 1e-12, 1 + 1e-12, 1 + 1e-12, "exact"))
    assert exact.misses == 0  # rounding is no miss
    nothing = figures((None, None, None, "uncertified"))
    assert nothing.rmse is None and nothing.coverage is None and nothing.width is None


def _reverse(sample: Sample) -> Figures:
    return {"reverse_kl": sample.alone["reverse_kl"]}


def _without_log_z(sample: Sample) -> Figures:
    """The right value with the interval of KL(q||p0) - E r/beta alone: log Z's error dropped."""
    figure, part = sample.alone["reverse_kl"], sample.free.mean(n=1)
    assert figure.value is not None and part.high is not None and part.low is not None
    half = (part.high - part.low) / 2
    return {"reverse_kl": replace(figure, low=figure.value - half, high=figure.value + half, status="certified")}


def _swapped(sample: Sample) -> Figures:
    """KL(p*||q) in the place of KL(q||p*)."""
    return {"reverse_kl": replace(sample.alone["forward_kl"], status="certified")}


def _self_normalised(sample: Sample) -> Figures:
    """log Z from the policy's own draws, its jackknifed interval believed."""
    return {"reverse_kl": rivals.self_is(sample)["reverse_kl"]}


def _uncorrelated(sample: Sample) -> Figures:
    """E_q r without its variance: the reward's mean is taken for exact."""
    log_z, kl, reward = sample.alone["log_z"], sample.kl_prior, sample.reward
    shift = -(reward.value or 0.0) * sample.inverse_beta + (kl.value or 0.0)
    ends = [None if x is None else x + shift for x in (log_z.value, log_z.low, log_z.high)]
    return {"reverse_kl": replace(log_z, value=ends[0], low=ends[1], high=ends[2], status="certified")}


@pytest.fixture(scope="module")
def trial() -> dict[tuple[str, str], Row]:
    """Rows of the true estimator and of mutants, by policy and name: 60 replications of 48 + 400 draws."""
    setting = Setting("tiny", (), ("mid", "far"), draws=48, bank=400)
    mutants = {
        "true": _reverse,
        "without log Z": _without_log_z,
        "swapped": _swapped,
        "self": _self_normalised,
        "exact reward": _uncorrelated,
    }
    found = replications(setting, 0, 0, 60, mutants)
    return {(key.policy, key.estimator): row_of(key._replace(estimator="klbench"), values) for key, values in found.items()}


def test_the_true_estimator_covers(trial: dict[tuple[str, str], Row]) -> None:
    for policy in ("mid", "far"):
        row = trial[policy, "true"]
        assert row.coverage is not None and row.coverage >= 0.93
        assert row.rmse is not None and row.bias is not None and abs(row.bias) < 3 * row.rmse / math.sqrt(row.replications)


@pytest.mark.parametrize(
    ("policy", "mutant"), [("far", "without log Z"), ("mid", "swapped"), ("far", "self"), ("far", "swapped"), ("mid", "exact reward")]
)
def test_a_mutant_is_exposed(trial: dict[tuple[str, str], Row], policy: str, mutant: str) -> None:
    row = trial[policy, mutant]
    assert row.bias is not None and row.rmse is not None and row.coverage is not None
    biased = abs(row.bias) > 4 * row.rmse / math.sqrt(row.replications)
    assert row.coverage < 0.9 or biased
    if row.coverage < 0.9:
        assert criteria.worst_cell([row]).holds is False and criteria.coverage([row], "certified").holds is False


# --- criteria ---


def row(
    setting: str = "t 1000+1000", policy: str = "near", lineup: str = "", estimator: str = "klbench", column: str = "reverse_kl",
    rmse: float | None = 0.01, misses: int = 10, status: str = "certified", count: int = 300,
) -> Row:  # fmt: skip
    tally = Tally(count, count, misses, 0)
    return Row(Key(setting, policy, lineup, estimator, column), 1.0, count, count, 0.0, rmse, 0.1, {status: tally})


def test_coverage_counts_cells_alike_and_can_fail() -> None:
    good = [row(misses=10), row(policy="mid", misses=20)]
    found = criteria.coverage(good, "certified")
    assert (found.measured, found.holds) == ("0.9500", True)
    found = criteria.coverage([*good, row(policy="far", misses=40)], "certified")
    assert found.holds is False and "far, reverse_kl" in found.where
    assert criteria.coverage(good, "wide").holds is None
    assert criteria.coverage([row(misses=9, count=10)], "certified").holds is None  # too few to speak
    assert criteria.coverage([row(estimator="prior IS", misses=300)], "certified").holds is None  # a rival's own affair
    assert criteria.coverage([row(column="log_z", misses=60)], "certified", "reverse_kl").holds is None


def test_a_cell_may_miss_28_of_300_and_no_more() -> None:
    assert criteria.parts([row(misses=28)])[0].beyond is False
    assert criteria.parts([row(misses=29)])[0].beyond is True
    few = [criteria.parts([row(misses=m, count=100)])[0].beyond for m in range(30)]
    first = few.index(True)
    assert binom.sf(first - 1, 100, 0.05) < binom.sf(28, 300, 0.05) <= binom.sf(first - 2, 100, 0.05)
    assert criteria.worst_cell([row(misses=28)]).holds is True
    many = [row(policy=f"p{i}", misses=29) for i in range(4)]
    assert criteria.worst_cell(many).holds is False
    assert criteria.worst_cell([many[0], *(row(policy=f"q{i}") for i in range(2000))]).holds is True  # one of 2001 is chance
    assert "29 of 300" in criteria.worst_cell(many).where


def ladder(board: float, prior: float, lineup: str = "near+mid+far", **other: Any) -> list[Row]:
    return [row(lineup=lineup, estimator="board", rmse=board, **other), row(estimator="prior IS", rmse=prior, **other)]


def verdicts(rows: list[Row]) -> dict[str, Criterion]:
    return {c.name: c for c in criteria.criteria(rows)}


NAME = "RMSE of reverse_kl over prior importance sampling's, boards"
MEDIANS, RATIOS = "medians over cells, the targets of ESTIMATORS.md", "median of the cells' ratios, every target"


def everywhere(board: float, prior: float, targets: Iterable[str] = criteria.EVERY, **other: Any) -> list[Row]:
    return [row for name in targets for row in ladder(board, prior, setting=f"{name} 1000+1000", **other)]


def test_rmse_against_prior_importance_sampling() -> None:
    good = [*everywhere(0.01, 0.2), *everywhere(0.02, 0.2, policy="mid"), *everywhere(0.05, 0.2, policy="far")]
    near = f"{NAME} with a near policy: {RATIOS}"
    assert verdicts(good)[near].holds is True and verdicts(good)[near].measured == "0.100"
    worse = [*good, *everywhere(0.06, 0.2, policy="under"), *everywhere(0.06, 0.2, policy="x")]
    assert verdicts(worse)[near].holds is False
    small = ladder(0.3, 0.1, setting="rare 64+64")
    assert verdicts(small)[near].measured == "-" and verdicts(small)[near].holds is None


def test_the_worst_board_that_covers_is_the_one_that_is_judged() -> None:
    covering = [*everywhere(0.03, 0.2), *everywhere(0.04, 0.2, lineup="mid+far+under", policy="under")]
    found = verdicts(covering)[f"{NAME} that cover, the worst: {RATIOS}"]
    assert found.holds is False and found.where.startswith("mid+far+under") and found.where.endswith("ratio of medians 0.200")
    assert verdicts(everywhere(0.3, 0.1, lineup="far+far2+far3"))[f"{NAME} that cover, the worst: {RATIOS}"].measured == "-"


def test_medians_are_read_on_the_targets_of_estimators_md() -> None:
    others = [name for name in criteria.EVERY if name not in worlds.NINE]
    rows = [*everywhere(0.01, 0.2, worlds.NINE), *everywhere(0.19, 0.2, others)]
    near = f"{NAME} with a near policy: {MEDIANS}"
    assert verdicts(rows)[near].measured == "0.050" and verdicts(rows)[near].holds is True
    assert verdicts(rows)[f"{NAME} with a near policy: {RATIOS}"].holds is False
    assert verdicts(everywhere(0.01, 0.2, others))[near].measured == "-"


@pytest.mark.parametrize("board", [0.001, 0.1])
def test_a_median_over_targets_is_not_judged_on_some_of_them(board: float) -> None:
    """It would judge which targets were left out: whichever side of its bound the figure is on, it is printed alone."""
    near, ratios = f"{NAME} with a near policy: {MEDIANS}", f"{NAME} with a near policy: {RATIOS}"
    first, *rest = worlds.NINE
    part = verdicts(everywhere(board, 0.2, rest))
    assert part[near].holds is None and part[near].measured == f"{board / 0.2:.3f}"
    assert part[near].where.startswith(f"{len(rest)} of its {len(worlds.NINE)} targets, not judged")
    whole = verdicts(everywhere(board, 0.2, [first, *rest]))
    assert whole[near].holds is (board < 0.02) and whole[ratios].holds is None


def test_separate_parts_and_k1() -> None:
    joint = [row(rmse=0.02), row(estimator="parts", rmse=0.03)]
    name = "RMSE of reverse_kl over that of separate parts, klbench: median"
    assert verdicts(joint)[name].holds is True
    assert verdicts([row(rmse=0.03), row(estimator="parts", rmse=0.03)])[name].holds is False
    board = [row(rmse=0.03, estimator="board", lineup="mid+far"), row(estimator="parts, board", rmse=0.02, lineup="mid+far")]
    assert verdicts(board)["RMSE of reverse_kl over that of separate parts, board: median"].holds is False
    long = {"setting": "word 32 1000+1000", "column": "kl_prior"}
    pairs = [row(rmse=0.01, **long), row(estimator="k1", rmse=0.04, **long)]  # type: ignore[arg-type]
    found = verdicts(pairs)
    assert found["RMSE of kl_prior over k1's, 32-token models: median"].measured == "0.250"
    assert found["RMSE of kl_prior over k1's: largest over cells"].holds is True
    worse = [*pairs, row(policy="far", rmse=0.05, **long), row(policy="far", estimator="k1", rmse=0.04, **long)]  # type: ignore[arg-type]
    found = verdicts(worse)
    assert found["RMSE of kl_prior over k1's: largest over cells"].holds is False
    assert found["RMSE of kl_prior over k1's, 32-token models: median"].holds is False


def test_certified_adversaries_may_miss_one_in_twenty() -> None:
    name = "1000 collapsed policies against a hidden mode: certified figures that miss"

    def at(misses: int) -> Criterion:
        tallies = {"certified": Tally(400, 400, misses, 0), "uncertified": Tally(600, 0, 0, 0)}
        one = Row(Key("adversaries 1000+1000", "far", "", "klbench", "reverse_kl"), 1.0, 1000, 1000, 0.0, 0.1, 0.1, tallies)
        assert criteria.parts([one]) == []  # they have a criterion of their own
        return verdicts([one])[name]

    assert at(20).holds is True and at(21).holds is False


# --- what is shown ---


@pytest.fixture(scope="module")
def table() -> Table:
    rows = []
    for setting in (TINY, replace(TINY, draws=1000, bank=1000, lineups=(("near", "mid", "far"),))):
        for key, values in replications(setting, 0, 0, 2).items():
            rows.append(row_of(key, values))
    return Table(tuple(rows), 2, 0, {TINY.name: 1.5}, "klbench accuracy --quick")


def test_json_and_csv_hold_every_row_and_no_nan(table: Table, tmp_path: Path) -> None:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} in JSON")

    table.write(tmp_path)
    found = json.loads((tmp_path / "accuracy.json").read_text(), parse_constant=refuse)
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(found["rows"]) == len(lines) == len(table.rows)
    assert "nan" not in table.to_csv() and found["command"] == "klbench accuracy --quick"
    first = next(i for i, x in enumerate(table.rows) if x.key.estimator == "klbench" and x.key.column == "reverse_kl")
    assert float(lines[first]["rmse"]) == table.rows[first].rmse and lines[first]["setting"] == TINY.name
    assert sum(int(lines[first][status]) for status in STATUSES) == table.replications
    assert {c["name"] for c in found["criteria"]} == {c.name for c in table.criteria}
    again = Table.read(tmp_path)
    assert again == table and again.to_json() == table.to_json() and report.page(again) == report.page(table)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accuracy.json: not an accuracy table"):
        Table.read(tmp_path)
    (tmp_path / "accuracy.json").write_text('{"schema": 0, "fields": []}')
    with pytest.raises(UserError, match="schema 0, expected 1"):
        Table.read(tmp_path)


def test_the_page_stands_alone(table: Table) -> None:
    text = report.page(table)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text) and "<script" not in text and not re.search(r"url\((?!#)", text)
    assert text.count("<svg") >= 1 and "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "klbench accuracy --quick" in text and "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)
    assert text == report.page(table)  # the same bytes


def test_markdown_has_every_block(table: Table) -> None:
    text = report.markdown(table)
    for block in report.blocks(table):
        assert f"## {block.name}" in text and all(len(line) == len(block.head) for line in block.lines)
    assert "| near | near, mid, far |" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_rows_between_tabs_where_there_is_no_terminal(table: Table) -> None:
    out = io.StringIO()
    report.show(table, Console(file=out, width=40))
    lines = out.getvalue().splitlines()
    assert all("\t" in line for line in lines) and lines[0].split("\t")[:3] == ["table", "-", "criterion"]
    heads = [line for line in lines if line.startswith("table\t")]
    assert len(heads) == len(report.blocks(table))
    assert {len(line.split("\t")) for line in lines if line.startswith("Reverse KL\t")} == {len(report.reverse_block(table).head) + 1}
    shown = io.StringIO()
    report.show(table, Console(file=shown, width=160, force_terminal=True))
    assert "Reverse KL" in shown.getvalue() and "criterion" in shown.getvalue()


NUMBERS = [(0.0004, ".0004"), (-0.125, "−.1250"), (1.234, "1.23"), (0.0, "0"), (1e-6, "0"), (-1e-6, "0"), (38.25, "38.2"), (None, "–")]


@pytest.mark.parametrize(("x", "text"), [*NUMBERS, (1062.4, "1062"), (-math.inf, "−∞")])
def test_numbers(x: float | None, text: str) -> None:
    assert report.number(x) == text


def test_signs() -> None:
    assert (report.number(0.2, True), report.number(-0.2, True), report.number(0.0, True)) == ("+.2000", "−.2000", "0")


def test_a_run_in_this_process_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "QUICK", (TINY,))
    monkeypatch.setattr(accuracy, "COLLAPSED_POLICIES", 3)
    monkeypatch.setattr(accuracy, "CHUNK", 2)
    events: list[dict[str, Any]] = []

    def run(out: Path) -> Table:
        return accuracy.run(3, seed=1, quick=True, workers=0, out=out, docs=out / "accuracy.md", on_event=events.append)

    first = run(tmp_path / "a")
    assert events[0] == {"phase": "plan", "cells": 4, "kept": 0} and sum(e["phase"] == "done" for e in events) == 4
    assert {row.replications for row in first.rows} == {3}
    run(tmp_path / "b")
    names = {"accuracy.json", "accuracy.csv", "index.html", "accuracy.md"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert set(first.reach) == {TINY.name}


def test_a_target_that_is_none_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="no target 'hiden'; did you mean 'hidden'?"):
        accuracy.settings_of(["hiden"], quick=False)
    assert [s.target for s in accuracy.settings_of(["adversaries"], quick=True)] == ["adversaries"]
    assert {s.target for s in accuracy.settings_of(["rare"], quick=False)} == {"rare"}
    with pytest.raises(UserError, match="at least 2 replications"):
        accuracy.run(1)
    with pytest.raises(UserError, match="no target 'x'"):
        worlds.world("x")


def test_settings_are_named_apart_and_large_enough() -> None:
    names = [setting.name for setting in cells.SETTINGS]
    assert len(set(names)) == len(names)
    assert {setting.target for setting in cells.SETTINGS} == set(worlds.NINE) | set(worlds.OWN) | set(worlds.CHAINS)
    for setting in (*cells.SETTINGS, *cells.QUICK):
        assert set(setting.alone) >= {"near", "far"} and min(setting.draws, setting.bank) >= 16


def test_a_pool_that_is_alone_is_the_standalone_figure() -> None:
    sample = given(draws=64)
    found = rivals.klbench(sample)["reverse_kl"]
    want = Pool(sample.own, sample.bank, sample.rest, sample.reward_max).columns(1 / BETA)[0]["reverse_kl"]
    assert found == want and isinstance(found, Estimate) and isinstance(sample.own, Rows)


# --- what is published ---

PUBLISHED = Path(__file__).parents[1] / "leaderboards" / "accuracy"


def test_the_published_files_are_what_their_rows_make() -> None:
    table = Table.read(PUBLISHED)
    assert table.replications >= 300 and not set(table.settings) ^ {s.name for s in accuracy.settings_of(None, quick=False)}
    assert (PUBLISHED / "accuracy.json").read_text() == table.to_json()
    assert (PUBLISHED / "accuracy.csv").read_text() == table.to_csv()
    assert (PUBLISHED / "index.html").read_text() == report.page(table)
    assert (PUBLISHED.parents[1] / "docs" / "accuracy.md").read_text() == report.markdown(table)


def test_the_published_table_reaches_what_it_must() -> None:
    assert [c.name for c in Table.read(PUBLISHED).criteria if c.holds is not True] == []
