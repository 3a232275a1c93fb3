"""Cells of the grid on the shipped prior, small: what a record says can be computed again from what lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from klbench import pool
from klbench import task as tasks
from klbench.pool import Pool, Rows
from klbench.record import Record, Run, Score, Train
from klbench.score import cell, hashes, load_prior

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


def rows(data: dict[str, np.ndarray], label: str) -> Rows:
    names = ("log_q", "log_p0", "reward", "A", "B", "kl", "entropy")
    return Rows(**{name: data[f"{label}_{name}"].astype(np.float64) for name in names})


@pytest.mark.parametrize("method", ["rloo", "best_of_n:4", "ancestral"])
def test_a_record_can_be_computed_again_from_its_samples(out: Path, method: str) -> None:
    from klbench.bank import Bank, shipped

    found = record(out, method)
    with np.load(out / "samples" / f"{found.run.id}.npz", allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    path = shipped(tasks.load("factuality"), "mini")
    assert path is not None
    rest = Bank.from_bytes(path.read_bytes(), str(path)).reward[:3, SCORE.bank :]
    again = Pool(rows(data, "own"), rows(data, "bank"), rest, np.ones(3)).columns(1 / found.run.beta)[0]
    assert again["reverse_kl"].value == found.columns["reverse_kl"].value
    assert again["wasted_nats"].value == found.columns["wasted_nats"].value
    moved = {**data, "own_reward": data["own_reward"][:, ::-1]}  # the rewards of other draws
    spoilt = Pool(rows(moved, "own"), rows(data, "bank"), rest, np.ones(3)).columns(1 / found.run.beta)[0]
    assert spoilt["reverse_kl"].value != found.columns["reverse_kl"].value
    assert pool.kl_prior(rows(data, "own")).mean(n=1).value == found.columns["kl_prior"].value
    texts = json.loads(data["text"].tobytes())
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
    target = tasks.load("bias").target(load_prior("mini"), 1.0)
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
