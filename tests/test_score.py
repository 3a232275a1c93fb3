"""Cells of the grid on the shipped prior, small: what a record says can be computed again from what lies beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from klbench import pooled, streams
from klbench import task as tasks
from klbench.bank import Bank, shipped
from klbench.board import Board
from klbench.errors import UserError
from klbench.estimate import Estimate
from klbench.models import open_policy, open_prior
from klbench.policies import causal_lm
from klbench.pooled import stored
from klbench.record import Pooled, Record, Run, Score, Train
from klbench.rows import Rows
from klbench.score import cell, hashes
from klbench.sheet import Sheet

SCORE = Score(draws=32, bank=48, prompts=3)


def asked(method: str, kind: str = "sampler", task: str = "factuality") -> Run:
    loaded = tasks.load(task)
    train = Train(steps=2, prompts=4, samples=4) if kind == "objective" else None
    return Run(
        task=task, task_version=loaded.version, method=method, kind=kind, prior="mini", beta=loaded.beta, seed=0,
        max_new_tokens=loaded.max_new_tokens, train=train, score=SCORE, hashes=hashes(loaded, "mini", loaded.beta, SCORE),
    )  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for run in (
        asked("rloo", "objective"),
        asked("ipo", "objective"),
        asked("ancestral"),
        asked("best_of_n:4"),
        asked("rejection"),
        asked("rloo", "objective", "bias"),
    ):
        cell(run, folder, lambda event: None)
    return folder


def record(out: Path, method: str, task: str = "factuality") -> Record:
    found = [r for r in map(Record.read, (out / "records").glob("*.json")) if (r.run.method, r.run.task) == (method, task)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("method", ["rloo", "best_of_n:4", "ancestral"])
def test_a_record_can_be_computed_again_from_its_samples(out: Path, method: str) -> None:
    """From the samples file and the shipped bank alone; a sampler's density is a function of the bank."""
    found = record(out, method)
    task, prior = tasks.load("factuality"), open_prior("mini")
    path = shipped(task, "mini")
    assert path is not None
    bank = Bank.from_bytes(path.read_bytes(), str(path)).first(3)
    samples = out / "samples" / f"{found.run.id}.npz"

    def again(change: Callable[[Rows], Rows] = lambda x: x) -> dict[str, Estimate]:
        sheet = Sheet(prior, task.target(prior, found.run.beta), found.prompt_ids, bank, SCORE.bank, task.max_new_tokens)
        law = sheet.laws["x"] = stored(samples, sheet, "x")
        law.policy = open_policy(method, method, prior) if found.run.kind == "sampler" else prior
        law.said["x"] = change(law.said["x"])
        joint = sheet.pool("x")
        return joint.columns(1 / found.run.beta)[0] | {"kl_prior": joint.kl.mean(n=1)}

    same = again()
    assert same["kl_prior"].value == found.columns["kl_prior"].value
    for name in ("reverse_kl", "wasted_nats"):
        assert (same[name].value, same[name].low, same[name].high) == tuple(
            getattr(found.columns[name], x) for x in ("value", "low", "high")
        )
    spoilt = again(lambda x: replace(x, reward=x.reward[:, ::-1]))  # the rewards of other draws
    assert spoilt["reverse_kl"].value != found.columns["reverse_kl"].value
    with np.load(samples, allow_pickle=False) as file:
        texts = json.loads(file["text"].tobytes())
    assert len(texts["texts"]) == 3 and len(texts["texts"][0]) == SCORE.draws


def test_the_prior_is_at_no_distance_from_itself(out: Path) -> None:
    columns = record(out, "ancestral").columns
    assert columns["kl_prior"].value == pytest.approx(0, abs=1e-9) and columns["forgetting"].value == pytest.approx(0, abs=1e-9)
    assert columns["wasted_nats"].value == pytest.approx(0, abs=0.1) and columns["reverse_kl"].value > 0.2  # type: ignore[operator]


def test_rejection_is_exact_and_costs_what_it_says(out: Path) -> None:
    found = record(out, "rejection")
    assert found.status == "exact" and found.columns["reverse_kl"].value == 0.0
    assert found.cost["prior_draws"] > found.cost["score_draws"] == 3 * SCORE.draws


def test_own_optimum_is_scored_where_there_is_one(out: Path) -> None:
    assert "own_kl" in record(out, "ipo").columns and "own_kl" not in record(out, "rloo").columns


def test_moment_target_has_its_moment_and_per_prompt_ceilings(out: Path) -> None:
    found = record(out, "rloo", "bias")
    assert abs(found.columns["moments_target"].value or 0) < 0.06  # of 6,000 draws a prompt, three prompts
    target = tasks.load("bias").target(open_prior("mini"), 1.0)
    assert found.prompts["reward_max"] == pytest.approx(list(target.ceiling(found.prompt_ids)))


def test_the_frontier_rises_and_is_convex(out: Path) -> None:
    points = record(out, "rloo").frontier
    reward, kl = np.array([p.reward for p in points]), np.array([p.kl for p in points])
    assert len(points) > 10 and (np.diff(reward) > 0).all() and (np.diff(kl) > 0).all()
    assert (np.diff(np.diff(kl) / np.diff(reward)) > -1e-9).all()
    assert all(p.low <= p.kl <= p.high for p in points)


def test_only_the_machine_differs_between_equal_cells(out: Path, tmp_path: Path) -> None:
    run = asked("rloo", "objective")
    cell(run, tmp_path, lambda event: None)
    a, b = (Record.read(folder / "records" / f"{run.id}.json") for folder in (out, tmp_path))
    assert a.comparable() == b.comparable() and a.cost["machine"] != b.cost["machine"]
    assert (out / "samples" / f"{run.id}.npz").read_bytes() == (tmp_path / "samples" / f"{run.id}.npz").read_bytes()


# the table's pool


@pytest.fixture(scope="module")
def table(out: Path) -> tuple[pooled.PoolCell, Pooled]:
    records = tuple(r for r in map(Record.read, sorted((out / "records").glob("*.json"))) if r.run.task == "factuality")
    made = pooled.PoolCell(records, pooled.members_of(records, 8), out, (), "cpu")
    pooled.work(made, lambda event: None)
    return made, Pooled.all_in(out)[0]


def test_members_are_the_trained_policies_nearest_on_the_train_split(out: Path) -> None:
    rloo, ipo = record(out, "rloo"), record(out, "ipo")
    near = lambda r, reward: r.model_copy(update={"curve": [{"kl_prior": 0.5, "reward": reward}]})  # noqa: E731
    few = [near(rloo, 0.1), near(ipo, 0.2), record(out, "ancestral")]
    assert pooled.members_of(few, 8) == (ipo.run.id, rloo.run.id)
    assert pooled.members_of(few, 1) == (ipo.run.id,)
    assert pooled.members_of([near(rloo, 0.3), few[1]], 1) == (rloo.run.id,)
    assert pooled.members_of(few, 0) == () == pooled.members_of([record(out, "ancestral")], 8)


def test_a_pooled_figure_is_that_of_a_sheet_made_afresh(out: Path, table: tuple[pooled.PoolCell, Pooled]) -> None:
    """What the stage read from samples files is what the policies draw and say when they are asked again."""
    cell_, found = table
    task, prior = tasks.load("factuality"), open_prior("mini")
    target = task.target(prior, task.beta)
    path = shipped(task, "mini")
    assert path is not None and found.members == cell_.members and len(found.members) == 2
    bank = Bank.from_bytes(path.read_bytes(), str(path)).first(3)
    sheet = Sheet(prior, target, cell_.records[0].prompt_ids, bank, SCORE.bank, task.max_new_tokens)
    for r in cell_.records:
        if r.run.id in found.members:
            policy = causal_lm.load(out / "policies" / r.run.id, r.run.id)
            sheet.add(r.run.id, policy, SCORE.draws, streams.seed(0, f"score/factuality/{r.run.method}"))
    for name in found.members:
        again = sheet.pool(name, found.members).columns(1 / task.beta)[0]["reverse_kl"]
        assert again.value == pytest.approx(found.columns[name]["reverse_kl"].value, abs=1e-6)
        alone = next(r for r in cell_.records if r.run.id == name).columns["reverse_kl"]
        assert again.value != alone.value and abs(again.value - alone.value) < 4 * (alone.stderr or 0)


def test_the_board_shows_pooled_figures_and_passes_over_those_of_other_draws(table: tuple[pooled.PoolCell, Pooled]) -> None:
    cell_, found = table
    rows = {r.id: r for t in Board.of(cell_.records, None, [found]).tables for r in t.rows}
    plain = {r.id: r for t in Board.of(cell_.records).tables for r in t.rows}
    name = found.members[0]
    assert rows[name].estimate("reverse_kl") == found.columns[name]["reverse_kl"] != plain[name].estimate("reverse_kl")
    assert rows[name].estimate("reward") == plain[name].estimate("reward") and rows[name].record == plain[name].record
    target = next(r.run.id for r in cell_.records if r.run.method == "rejection")
    assert target not in found.columns and rows[target].status == "exact"
    other = [r.model_copy(update={"hashes": {**r.hashes, "samples": "0"}}) if r.run.id == name else r for r in cell_.records]
    assert Board.of(other, None, [found]).tables[0].pool is None and not found.fits(other)
    with pytest.raises(UserError, match="not a pool of klbench"):
        Pooled.read(cell_.out / "records" / f"{name}.json")
