"""A board that can be computed again: every tampering is named, and what was not tampered with is not."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from klbench import cli, pooled, recompute
from klbench import run as grid
from klbench import task as tasks
from klbench.audit import Drawn
from klbench.bank import Bank
from klbench.board import Board
from klbench.errors import UserError
from klbench.record import Record, Run, Score, Train, checked_in
from klbench.score import cell, hashes
from klbench_tasks.exact import task as exact_task

SCORE = Score(draws=32, bank=48, prior_draws=256)
METHODS = ("ancestral", "best_of_n:4", "rloo")


def asked(method: str, seed: int = 0) -> Run:
    task = tasks.load("exact")
    train = Train(steps=2, prompts=4, samples=4) if method == "rloo" else None
    return Run(
        task=task.name, task_version=task.version, method=method, kind="objective" if train else "sampler", prior="tiny", beta=task.beta,
        seed=seed, max_new_tokens=task.max_new_tokens, train=train, score=SCORE, hashes=hashes(task, "tiny", task.beta, SCORE),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sampler whose law is the prior, one with a density of the bank, and a trained policy; built and marked."""
    folder = tmp_path_factory.mktemp("made")
    for method in METHODS:
        cell(asked(method), folder, lambda event: None)
    recompute.mark(folder, recompute.verdicts_of(folder))
    grid.publish(folder, grid.records_in(folder), {}, checked=checked_in(folder))
    return folder


@pytest.fixture
def board(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "board"))


def path_of(board: Path, method: str, kind: str = "records") -> Path:
    found = [p for p in (board / kind).iterdir() if f"-{method.replace(':', '_')}-" in p.name]
    assert len(found) == 1
    return found[0]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def repack(path: Path, change: Callable[[dict[str, NDArray[Any]]], None]) -> None:
    with np.load(path, allow_pickle=False) as file:
        parts = {name: file[name].copy() for name in file.files}
    change(parts)
    out = io.BytesIO()
    np.savez_compressed(out, **parts)  # type: ignore[arg-type]
    path.write_bytes(out.getvalue())


def rehash(board: Path, method: str) -> None:
    """As a forger would who knows of hashes: the record's hash of its samples is that of the file."""
    sha = hashlib.sha256(path_of(board, method, "samples").read_bytes()).hexdigest()
    edit(path_of(board, method), lambda data: data["hashes"].update(samples=sha))


def cells(board: Path, files: bool = False) -> set[tuple[str, str]]:
    """(method or file, cell) of every difference; of board and pages too where `files` says so."""
    found = recompute.check(board, files=files).differences
    names = {path.stem: method for method in METHODS for path in [path_of(board, method)]}
    return {(names.get(d.where, d.where), d.cell) for d in found}


def test_an_untouched_board_is_computed_again_to_the_last_cell(board: Path) -> None:
    before = {p: p.read_bytes() for p in board.rglob("*") if p.is_file()}
    found = recompute.check(board)
    assert found.differences == () and all(v.recomputed and v.cells > 400 for v in found.verdicts)
    assert {p: p.read_bytes() for p in board.rglob("*") if p.is_file()} == before, "a check writes nothing"
    missing = found.missing
    assert missing["training is not done again"] == (("cost.train_tokens", "curve"), 3)
    rows = [row for table in json.loads((board / "board.json").read_text())["tables"] for row in table["rows"]]
    assert [row["provenance"] for row in rows] == ["recomputed"] * 3


@pytest.mark.parametrize("method", METHODS)
def test_one_digit_of_a_record_is_named(board: Path, method: str) -> None:
    def one_digit(data: Any) -> None:
        text = repr(data["columns"]["reward"]["high"])
        at = text.index(".") + 3  # the third decimal
        data["columns"]["reward"]["high"] = float(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])

    edit(path_of(board, method), one_digit)
    assert cells(board) == {(method, "columns.reward.high")}
    if method == "rloo":
        assert len(cells(board, files=True)) > 3
        grid.publish(board, grid.records_in(board), {}, checked=checked_in(board))  # board and pages built from it help nobody
        assert cells(board, files=True) == {(method, "columns.reward.high")}


def test_a_digit_too_small_to_compute_is_caught_by_the_board(board: Path) -> None:
    edit(path_of(board, "rloo"), lambda data: data["columns"]["reward"].update(value=data["columns"]["reward"]["value"] * (1 + 1e-12)))
    found = cells(board, files=True)
    assert any(where == "board.json" and cell.endswith(".columns.reward.value") for where, cell in found)
    assert any(where == "board.json" and cell.endswith(".sha256") for where, cell in found)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a value a prompt": (lambda d: d["prompts"]["free"].__setitem__(2, 0.25), "prompts.free[2]"),
    "a point of the frontier": (lambda d: d["frontier"][3].update(kl=0.5), "frontier[3].kl"),
    "an example": (lambda d: d["samples"][0].update(completion="nicer"), "samples[0].completion"),
    "a status": (lambda d: d.update(status="exact"), "status"),
    "a count": (lambda d: d["cost"].update(score_draws=10**6), "cost.score_draws"),
    "an own column": (lambda d: d["columns"].update(fame={**d["columns"]["reward"]}), "columns.fame"),
    "an interval": (lambda d: d["columns"]["reverse_kl"].update(low=None), "columns.reverse_kl.low"),
    "its bank": (lambda d: d["hashes"].update(bank="0" * 64), "hashes.bank"),
    "its samples": (lambda d: d["hashes"].update(samples="0" * 64), "hashes.samples"),
    "prompts of another": (lambda d: d["prompt_ids"].__setitem__(0, "Once"), "prompt_ids"),
    "its seed": (lambda d: d["run"].update(seed=7), "run"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_part_of_a_record_is_compared(board: Path, name: str) -> None:
    change, cell = CHANGES[name]
    edit(path_of(board, "rloo"), change)
    verdict = recompute.Recomputer(board).verdict(path_of(board, "rloo"))
    assert cell in {d.cell for d in verdict.differences} and not verdict.recomputed


SAMPLES: dict[str, tuple[Callable[[dict[str, NDArray[Any]]], None], str]] = {
    "a reward": (lambda p: p["own_reward"].__setitem__((1, 3), p["own_reward"][1, 3] - 0.25), "samples.own_reward[1,3]"),
    "a log-probability": (lambda p: p["own_log_q"].__setitem__((0, 5), -1.5), "samples.own_kl[0,5]"),
    "one of the bank": (lambda p: p["bank_log_p0"].__setitem__((2, 1), -1.5), "samples.bank_log_p0[2,1]"),
    "an entropy": (lambda p: p["bank_entropy"].__setitem__((2, 2), 9.0), "samples.bank_entropy[2,2]"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_an_edited_samples_file_is_named_by_hash_and_by_draw(board: Path, name: str) -> None:
    change, cell = SAMPLES[name]
    repack(path_of(board, "rloo", "samples"), change)
    found = cells(board)
    assert ("rloo", "hashes.samples") in found and ("rloo", cell) in found
    rehash(board, "rloo")
    assert ("rloo", cell) in cells(board) and ("rloo", "hashes.samples") not in cells(board)


def test_a_text_that_its_tokens_do_not_spell_is_named(board: Path) -> None:
    def reword(parts: dict[str, NDArray[Any]]) -> None:
        said = json.loads(parts["text"].tobytes())
        said["texts"][1][2] += " indeed"
        parts["text"] = np.frombuffer(json.dumps(said).encode(), np.uint8)

    repack(path_of(board, "ancestral", "samples"), reword)
    assert ("ancestral", "samples.texts[1,2]") in cells(board)


def test_a_sampler_s_density_is_computed_from_the_bank(board: Path) -> None:
    def shift(parts: dict[str, NDArray[Any]]) -> None:  # consistent in itself: only the bank knows better
        for key, by in (("own_log_q", 0.5), ("own_kl", 0.5), ("own_entropy", -0.5)):
            parts[key][0, 0] += by

    repack(path_of(board, "best_of_n:4", "samples"), shift)
    assert ("best_of_n:4", "samples.own_log_q[0,0]") in cells(board)
    repack(path_of(board, "rloo", "samples"), shift)
    assert ("rloo", "columns.kl_prior.value") in cells(board), "and a policy's figures are those of its file"


def test_a_swapped_bank_is_named_at_every_record(board: Path) -> None:
    (place,) = (board / "banks").glob("*.npz")
    bank = Bank.from_bytes(place.read_bytes(), "the bank")
    bank.log_p0[0, 0] -= 1.0
    place.write_bytes(bank.to_bytes())
    assert {where for where, cell in cells(board) if cell == "hashes.bank"} == set(METHODS)


def test_a_bank_with_other_rewards_is_named(board: Path) -> None:
    (place,) = (board / "banks").glob("*.npz")
    bank = Bank.from_bytes(place.read_bytes(), "the bank")
    bank.reward[1, 200] -= 0.125
    place.write_bytes(bank.to_bytes())
    assert ("rloo", "bank.reward[1,200]") in cells(board)


def test_a_reward_that_has_changed_is_named(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cells(board) == set()
    task = type(tasks.load("exact"))
    target = task.target

    def other(self: Any, prior: Any, beta: float) -> Any:
        given = target(self, prior, beta)
        reward = lambda prompts, completions, **kw: [x / 2 for x in given.reward(prompts, completions)]  # noqa: E731
        return type(given)(given.prior, reward, given.beta, given.reward_max, given.ceilings)

    monkeypatch.setattr(task, "target", other)
    found = cells(board)
    assert all(any(where == method and cell.startswith("samples.own_reward[") for where, cell in found) for method in METHODS)
    assert all(any(where == method and cell.startswith("bank.reward[") for where, cell in found) for method in METHODS)


@pytest.mark.parametrize(
    ("name", "change", "cell"),
    [
        ("board.json", lambda text: re.sub(r'("rank": \[\s*)1', r"\g<1>7", text, count=1), ".rank[0]"),
        ("board.json", lambda text: text.replace('"status": "', '"status": "un', 1), "status"),
        ("board.csv", lambda text: text.replace(",tiny,", ",huge,", 1), "prior"),
        ("index.html", lambda text: text.replace("</body>", "<p>we won</p></body>"), ""),
    ],
)
def test_edited_files_are_named(board: Path, name: str, change: Callable[[str], str], cell: str) -> None:
    path = board / name
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    assert any(where == name and at.endswith(cell) for where, at in cells(board, files=True))


def test_a_row_with_a_mark_that_it_has_not_earned_is_named(board: Path) -> None:
    record = Record.read(path_of(board, "rloo"))
    path_of(board, "rloo", "samples").unlink()
    found = recompute.check(board)
    assert [(d.where, d.cell, d.found) for d in found.differences] == [("checked.json", record.run.id, "self-reported")]
    (why,) = (why for why in found.missing if "beside the record" in why)
    assert "reverse_kl" in found.missing[why][0]


def test_marks_fall_away_with_the_record(board: Path) -> None:
    edit(path_of(board, "rloo"), lambda data: data["columns"]["reward"].update(value=1.0))
    rows = {row.record.run.method: row.provenance for _, row in Board.read(board).rows}
    assert rows == {"ancestral": "recomputed", "best_of_n:4": "recomputed", "rloo": "self-reported"}
    recompute.mark(board, recompute.verdicts_of(board))
    assert set(checked_in(board)) == {path_of(board, m).stem for m in ("ancestral", "best_of_n:4")}


def test_what_asks_the_policy_itself_is_missing_and_what_reads_its_draws_is_not(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length = lambda prompts, completions, **kw: [float(len(c)) for c in completions]  # noqa: E731
    here = Drawn(name="length", title="length", formula="E_q|x|", value=length)
    there = Drawn(name="elsewhere", title="elsewhere", formula="E_q|x|", value=length, prompts=("Once",))
    monkeypatch.setattr(exact_task.Dense, "audits", lambda self: (here, there))
    verdict = recompute.Recomputer(board).verdict(path_of(board, "rloo"))
    assert "audit.elsewhere" in verdict.missing["it asks the policy itself, whose weights are not here"]
    assert "audit.length" in verdict.missing["the record came before this column"] and verdict.recomputed


def test_what_is_not_here_is_said(board: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"task": "exact/gone"}, "not installed"),
        ({"task_version": 99}, "the record's is 99"),
        ({"prior": "some/where"}, "not on this machine"),
    ]
    for change, why in changes:
        record = Record.read(path_of(board, "rloo"))
        run = Run.model_validate({**record.run.model_dump(), **change})
        path = board / "records" / f"{run.id}.json"
        path.write_text(record.model_copy(update={"run": run}).to_json())
        shutil.copy(path_of(board, "ancestral", "samples"), board / "samples" / f"{run.id}.npz")
        verdict = recompute.Recomputer(board).verdict(path)
        assert not verdict.recomputed and verdict.differences == () and any(why in reason for reason in verdict.missing)
        path.unlink(), (board / "samples" / f"{run.id}.npz").unlink()


def test_pooled_figures_are_computed_from_what_was_said_across_policies(board: Path) -> None:
    records = tuple(grid.records_in(board))
    cell_ = pooled.PoolCell(records, pooled.members_of(records, 1), board, (), "cpu")
    pooled.work(cell_, lambda event: None)
    found = recompute.check(board, files=False)
    assert found.differences == () and not any("pool" in why for why in found.missing)
    assert sum(v.cells for v in found.verdicts) > 1900, "and 1,582 without the pool"
    path = board / "pool" / f"{cell_.id}.json"
    name = path_of(board, "best_of_n:4").stem
    edit(path, lambda data: data["columns"][name]["reverse_kl"].update(value=0.125))
    assert cells(board) == {("best_of_n:4", "pool.columns.reverse_kl.value")}
    repack(path.with_suffix(".npz"), lambda parts: parts[f"{name}/{cell_.members[0]}/log_q"].__isub__(0.5))
    assert ("best_of_n:4", "pool.prompts.free[0]") in cells(board)
    path.with_suffix(".npz").unlink()
    found = recompute.check(board, files=False)
    (why,) = (why for why in found.missing if why.startswith("pooled: no pool-"))
    assert "pool.reverse_kl" in found.missing[why][0] and found.differences == ()


def test_the_command_names_the_cell_and_exits_1(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["leaderboard", "check", str(board)]) == 0
    assert "nothing differs" in capsys.readouterr().out
    edit(path_of(board, "rloo"), lambda data: data["columns"]["reward"].update(value=0.5))
    assert cli.main(["leaderboard", "check", str(board)]) == 1
    out = capsys.readouterr().out
    assert any(line.startswith(f"{path_of(board, 'rloo').stem}\tcolumns.reward.value\t0.5\t") for line in out.splitlines())
    assert cli.main(["leaderboard", "check", str(board), "--mark"]) == 1
    assert len(checked_in(board)) == 2
    assert cli.main(["leaderboard", "check", str(board / "nowhere")]) == 2


def test_numbers_agree_to_six_digits_and_words_to_the_last() -> None:
    assert recompute.same(1.0, 1.0 + 9e-7) and not recompute.same(1.0, 1.0 + 2e-6)
    assert recompute.same("inf", "inf") and not recompute.same("inf", 1e300)
    assert not recompute.same(True, 1) and recompute.same(True, True)
    assert not recompute.same(None, 0.0)
    assert list(recompute.pairs({"a": [1, 2]}, {"a": [1, 2, 3], "b": 4})) == [("a", [1, 2], [1, 2, 3]), ("b", None, 4)]


def test_a_directory_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        recompute.check(tmp_path)
