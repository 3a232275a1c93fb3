"""Records of strangers: sound ones join, whatever else is refused in one line with nothing written."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from klbench import archive, cli, submission
from klbench import run as grid
from klbench import task as tasks
from klbench.board import Board
from klbench.errors import UserError
from klbench.record import Record, Run, Score, Train, checked_in
from klbench.score import cell, hashes

SCORE = Score(draws=16, bank=16, prior_draws=256)


def asked(method: str, seed: int = 0) -> Run:
    task = tasks.load("exact")
    train = Train(steps=2, prompts=4, samples=4) if method == "rloo" else None
    return Run(
        task=task.name, task_version=task.version, method=method, kind="objective" if train else "sampler", prior="tiny", beta=task.beta,
        seed=seed, max_new_tokens=task.max_new_tokens, train=train, score=SCORE, hashes=hashes(task, "tiny", task.beta, SCORE),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A board of the prior's row, and a run of a trained policy and a sampler."""
    board, mine = tmp_path_factory.mktemp("board"), tmp_path_factory.mktemp("mine")
    cell(asked("ancestral"), board, lambda event: None)
    for method in ("rloo", "best_of_n:2"):
        cell(asked(method), mine, lambda event: None)
    return {"board": board, "mine": mine}


@pytest.fixture
def board(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without pages, which take seconds and are not what is tested here."""
    monkeypatch.setattr(grid, "publish", publish)
    return Path(shutil.copytree(runs["board"], tmp_path / "board"))


def publish(
    out: Path, records: list[Record], manifest: dict[str, Any], console: object = None, pools: Any = (), checked: Any = None
) -> None:
    (out / "board.json").write_text(Board.of(records, manifest, pools, checked).to_json())


@pytest.fixture
def mine(runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["mine"], tmp_path / "mine"))


def of(directory: Path, method: str) -> Path:
    (found,) = (directory / "records").glob(f"*-{method.replace(':', '_')}-*.json")
    return found


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refused(board: Path, given: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a submission: one line, exit 2, and nothing in the board's directory has changed."""
    before = {p: p.read_bytes() for p in board.rglob("*") if p.is_file()}
    assert cli.main(["leaderboard", "add", str(board), str(given)]) == 2
    assert {p: p.read_bytes() for p in board.rglob("*") if p.is_file()} == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("klbench: ")
    return said


def test_a_run_directory_joins_and_is_scored_again(board: Path, mine: Path) -> None:
    joined = {one.record.run.method: one.how for one in submission.add(board, [mine])}
    assert joined["rloo"] == "recomputed from its samples, scored again to the same figures"
    assert joined["best_of_n:2"] == "recomputed from its samples, scored again to the same figures"
    rows = {row.record.run.method: row.provenance for _, row in Board.read(board).rows}
    assert rows == {"ancestral": "self-reported", "rloo": "recomputed", "best_of_n:2": "recomputed"}
    assert not (board / "policies").exists() and len(list((board / "samples").iterdir())) == 3
    assert submission.add(board, [mine]) == [], "they are there already"


def test_the_manifest_names_what_joined(board: Path, mine: Path) -> None:
    first = Record.read(of(board, "ancestral")).run.id
    (board / "manifest.json").write_text(json.dumps({"suite": {}, "runs": [first]}))
    submission.add(board, [of(mine, "rloo")])
    assert grid.manifest_in(board)["runs"] == [first, of(mine, "rloo").stem]
    assert len(grid.records_in(board)) == 2


def test_a_lone_record_without_samples_is_self_reported(board: Path, mine: Path, tmp_path: Path) -> None:
    lone = tmp_path / "handed" / of(mine, "rloo").name
    lone.parent.mkdir()
    data = json.loads(of(mine, "rloo").read_text())
    del data["hashes"]["samples"]
    lone.write_text(json.dumps(data))
    (one,) = submission.add(board, [lone])
    assert one.how == "self-reported: it came without samples" and checked_in(board) == {}
    assert not (board / "samples" / f"{lone.stem}.npz").exists()


def test_weights_that_are_another_policy_s_are_refused(board: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = mine / "policies" / of(mine, "rloo").stem / "model.safetensors"
    found = load_file(weights)
    save_file({name: value * 3 if value.ndim > 1 else value for name, value in found.items()}, weights, {"format": "pt"})
    said = refused(board, mine, capsys)
    assert of(mine, "rloo").name in said and "its policy scored again gives" in said


def test_another_scoring_may_differ_within_its_error() -> None:
    from klbench.estimate import Estimate

    a = Estimate(1.0, 0.9, 1.1, 0.03)
    assert submission._near(a, Estimate(1.15, 1.0, 1.2, 0.04)) and not submission._near(a, Estimate(1.25, 1.0, 1.3, 0.04))
    assert not submission._near(a, Estimate(1.0, 1.0, 1.0, 0.0, status="exact"))


TAMPERED: dict[str, tuple[Callable[[Any], None], str]] = {
    "a figure": (lambda d: d["columns"]["reward"].update(value=0.99), "columns.reward.value: it says 0.99"),
    "another schema": (lambda d: d.update(schema_version=7), "schema_version: a record of schema 7; this klbench reads schema 1"),
    "no schema at all": (lambda d: d.update(schema_version="<script>" * 9), "this klbench reads schema 1"),
    "an unknown key": (lambda d: d.update(extra=1), "extra"),
    "an unknown column": (lambda d: d["columns"].update(revers_kl=d["columns"]["reward"]), "did you mean 'reverse_kl'"),
    "NaN in an estimate": (lambda d: d["columns"]["reward"].update(value=float("nan")), "NaN"),
    "NaN a prompt": (lambda d: d["prompts"]["free"].__setitem__(0, float("nan")), "not JSON compliant"),
    "infinite cost": (lambda d: d["cost"].update(score_draws=float("inf")), "not JSON compliant"),
    "a list in cost": (lambda d: d["cost"].update(score_draws=["<script>"]), "cost: numbers and words"),
    "a status of its own": (lambda d: d.update(status="<b>best</b>"), "is not that of its reverse_kl"),
    "too few numbers a prompt": (lambda d: d["prompts"].update(free=[0.0]), "one a prompt"),
    "another version of the task": (lambda d: d["run"].update(task_version=9), "score it again"),
    "other prompts": (lambda d: d["prompt_ids"].__setitem__(0, "Once"), "its prompts or their length"),
    "another length": (lambda d: d["run"].update(max_new_tokens=3), "its prompts or their length"),
    "another prior": (lambda d: d["run"]["hashes"].update(prior="0" * 64), "its prior is 0000"),
    "another bank": (lambda d: d["hashes"].update(bank="0" * 64), "hashes.bank"),
    "an unknown task": (lambda d: d["run"].update(task="exact/dens"), "did you mean 'exact/dense'"),
    "HTML for a method": (lambda d: d["run"].update(method="<script>alert(1)</script>"), "letters, digits"),
    "a path for a task": (lambda d: d["run"].update(task="../../../etc/passwd"), "letters, digits"),
    "a method nobody has": (lambda d: d["run"].update(method="best_of_m:2", kind="sampler"), "best_of_m"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_is_not_sound_is_refused(board: Path, mine: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, why = TAMPERED[name]
    path = of(mine, "rloo")
    edit(path, change)
    try:  # a forger names the file as its run asks, and moves the samples along
        run = Run.model_validate(json.loads(path.read_text())["run"])
        moved = path.rename(path.with_name(f"{run.id}.json"))
        samples = mine / "samples" / f"{path.stem}.npz"
        samples.rename(samples.with_name(f"{run.id}.npz"))
    except ValueError:
        moved = path
    assert why in refused(board, moved, capsys)


def test_a_record_under_another_name_is_refused(board: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = of(mine, "rloo")
    assert "so must its file be called" in refused(board, path.rename(path.with_name("mine.json")), capsys)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "{" * 100_000, '{"run": ' * 5_000, "\x00\xff", '"\ud800"'])
def test_what_is_no_record_is_refused(board: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "x.json" in refused(board, path, capsys)


def test_a_huge_record_and_a_link_are_refused(board: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = tmp_path / "huge.json"
    with open(huge, "wb") as file:
        file.truncate(1 << 34)  # no byte of it is read
    assert "17,179,869,184 bytes" in refused(board, huge, capsys)
    link = tmp_path / of(mine, "rloo").name
    link.symlink_to(of(mine, "rloo"))
    assert "no link" in refused(board, link, capsys)
    samples = mine / "samples" / f"{of(mine, 'rloo').stem}.npz"
    elsewhere = samples.rename(tmp_path / "elsewhere.npz")
    samples.symlink_to(elsewhere)
    assert "links are not followed" in refused(board, mine, capsys)
    samples.unlink()
    assert "its samples are not at" in refused(board, mine, capsys)


def packed(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return out.getvalue()


def header(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": shape})
    return out.getvalue()


def object_array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([{"a": print}], dtype=object), allow_pickle=True)
    return out.getvalue()


BOMBS = {
    "a header that claims what is not there": (lambda: packed(tokens=header((1 << 40,)) + bytes(64)), "its header claims"),
    "a pickle": (lambda: packed(tokens=object_array()), "an array of Python objects"),
    "no zip": (lambda: b"PK\x03\x04" + bytes(99), "no npz"),
    "cut short": (lambda: packed(tokens=header((4,)) + bytes(16))[:-30], "no npz"),
    "too many arrays": (lambda: packed(**{f"a{i}": header((1,)) + bytes(4) for i in range(4200)}), "4200 arrays"),
    "nothing of ours": (lambda: packed(tokens=header((4,)) + bytes(16)), "not the samples of a run"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_archive_that_means_harm_is_refused(board: Path, mine: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, why = BOMBS[name]
    (mine / "samples" / f"{of(mine, 'rloo').stem}.npz").write_bytes(make())
    said = refused(board, of(mine, "rloo"), capsys)
    assert why in said and of(mine, "rloo").stem in said


def test_a_bomb_is_measured_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_UNPACKED", 1 << 20)
    bomb = tmp_path / "bomb.npz"
    bomb.write_bytes(packed(tokens=header((1 << 18,), "<f8") + bytes(1 << 21)))
    assert bomb.stat().st_size < 10_000
    with pytest.raises(UserError, match="2,097,.* bytes unpacked, at most 1,048,576"):
        archive.arrays(bomb)
    bomb.write_bytes(packed(tokens=header((4,), "<f8") + bytes(32)))
    assert archive.arrays(bomb)["tokens"].tolist() == [0.0] * 4
    monkeypatch.setattr(archive, "MOST_PACKED", 50)
    with pytest.raises(UserError, match="at most 50"):
        archive.arrays(bomb)


def test_one_bad_record_keeps_all_out(board: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(of(mine, "rloo"), lambda d: d["columns"]["reward"].update(value=0.99))  # the other is sound, and comes first
    refused(board, mine, capsys)
    assert len(grid.records_in(board)) == 1


def test_the_same_run_with_other_figures_is_refused(board: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submission.add(board, [mine])
    edit(of(mine, "rloo"), lambda d: d["notes"].append("mine is better"))
    assert f"the board has {of(mine, 'rloo').stem} with other figures" in refused(board, mine, capsys)


# --- two boards ---


def test_two_boards_merge(board: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(of(board, "ancestral"), mine / "records")  # both have the prior's row
    both = tmp_path / "both"
    assert cli.main(["leaderboard", "merge", str(board), str(mine), "--out", str(both)]) == 0
    assert "3 records" in capsys.readouterr().out
    assert {r.run.method for r in grid.records_in(both)} == {"ancestral", "rloo", "best_of_n:2"}
    assert len(list((both / "samples").iterdir())) == 3 and len(list((both / "banks").glob("*.npz"))) == 1
    assert grid.manifest_in(both)["merged"] == ["", ""]
    assert cli.main(["leaderboard", "merge", str(board), str(mine), "--out", str(both)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_conflict_of_two_boards_is_refused_by_name(board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(board, tmp_path / "other"))
    edit(of(other, "ancestral"), lambda d: d["columns"]["reward"].update(value=0.99))
    assert cli.main(["leaderboard", "merge", str(board), str(other), "--out", str(tmp_path / "both")]) == 2
    assert of(board, "ancestral").stem in capsys.readouterr().err and not (tmp_path / "both").exists()
