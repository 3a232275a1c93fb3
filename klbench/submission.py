"""Records of strangers: looked at before anything of them is believed or written, then joined with a board.

A submission is a run directory, or one record of it. It must be whole (schema, hashes, the task's version and prompts, the prior, the
bank), its figures those of its stored draws, and where the policy can be had (weights in `policies/<id>/`; a sampler has its name) its
figures those of fresh draws with the run's seed. What comes without samples joins as self-reported.

    fresh and submitted agree     to six digits, or, on another processor, within 4 sqrt(se_1^2 + se_2^2)
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from klbench import run as grid
from klbench import task as tasks
from klbench.audit import PREFIX
from klbench.board import Board
from klbench.errors import UserError, unknown
from klbench.estimate import Estimate
from klbench.measure import COLUMNS
from klbench.page import site
from klbench.policies import causal_lm
from klbench.recompute import NotHereError, Recomputer, Verdict, moved, same
from klbench.record import CHECKED, Filed, Record, checked_in, write_atomically
from klbench.score import score_run

LARGEST: Final = 16 << 20  # bytes of a record
WORD: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:,=@+/-]{0,119}")
ERRORS: Final = 4.0  # combined standard errors between two scorings with other draws
SCORED: Final = "scored again"


@final
@dataclass(frozen=True)
class Accepted:
    """A record that may join. how: what vouches for it, for people; files: what travels along, by its place in the board's directory."""

    record: Record
    how: str
    files: dict[str, Path]
    verdict: Verdict


def read(path: Path) -> Record:
    """A stranger's record file. Raises UserError, of one line that names the file, for whatever is not one whole, finite record."""
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: a file expected, and no link")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, a record has at most {LARGEST:,}")
    try:
        record = Record.read(path)
        record.to_json()
    except (RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    run = record.run
    for key, word in (("task", run.task), ("method", run.method), ("prior", run.prior)):
        if not WORD.fullmatch(word):
            raise UserError(f"{path}: run.{key} {word[:60]!r}: letters, digits and _.:,=@+/- expected")
    for column in record.columns:
        if column not in COLUMNS and not (column.startswith((PREFIX, "lm_eval.")) and WORD.fullmatch(column)):
            raise UserError(f"{path}: {unknown('column', column[:60], COLUMNS)}")
    for name, values in record.prompts.items():
        if len(values) != len(record.prompt_ids):
            raise UserError(f"{path}: prompts.{name[:60]}: {len(record.prompt_ids)} numbers expected, one a prompt, got {len(values)}")
    if "reverse_kl" not in record.columns or record.status != record.columns["reverse_kl"].status:
        raise UserError(f"{path}: its status {record.status[:40]!r} is not that of its reverse_kl")
    if any(not isinstance(value, int | float | str) for value in _leaves(record.cost)):
        raise UserError(f"{path}: cost: numbers and words expected")
    if path.stem != run.id:
        raise UserError(f"{path}: its run is {run.id}, and so must its file be called")
    return record


def _leaves(data: Any) -> Iterable[Any]:
    return (leaf for value in data.values() for leaf in _leaves(value)) if isinstance(data, dict) else [data]


def records_of(given: Path) -> list[Path]:
    """The record files of a submission: a run directory's, or the one that was handed in. Raises UserError where there is none."""
    if given.is_file():
        return [given]
    found = sorted((given / "records").glob("*.json"))
    if not found:
        raise UserError(f"{given}: no records/*.json in it" if given.is_dir() else f"{given}: no such file or directory")
    return found


def accept(path: Path, record: Record, recomputer: Recomputer) -> Accepted:
    """A record, as `read` gives it, that holds what it says. Raises UserError that names its file and the first thing wrong."""
    run, directory = record.run, recomputer.directory
    task = tasks.load(run.task, recomputer.include)
    if run.task_version != task.version:
        raise UserError(f"{path}: of {run.task} version {run.task_version}; here it is version {task.version}, score it again")
    if record.prompt_ids != task.prompts("score")[: run.score.prompts or None] or run.max_new_tokens != task.max_new_tokens:
        raise UserError(f"{path}: its prompts or their length are not those of {run.task}")
    for key, was, here in moved(record, task):
        raise UserError(f"{path}: its {key} is {was}, here it is {here}")
    samples, files = directory / "samples" / f"{run.id}.npz", dict[str, Path]()
    weights = directory / "policies" / run.id
    for place in (samples, weights, *weights.rglob("*")):
        if place.is_symlink():
            raise UserError(f"{place}: a link, and links are not followed")
    if record.hashes.get("samples") and not samples.is_file():
        raise UserError(f"{path}: its samples are not at {samples}")
    verdict = recomputer.verdict(path)
    for d in verdict.differences:
        more = f" and {len(verdict.differences) - 1} more" if len(verdict.differences) > 1 else ""
        raise UserError(f"{path}: {d.cell}: it says {d.stored or 'nothing'}, computed again it is {d.found}{more}")
    how = "recomputed from its samples" if verdict.recomputed else f"self-reported: {next(iter(verdict.missing), 'no samples')}"
    if verdict.recomputed:
        files[f"samples/{run.id}.npz"] = samples
        bank = recomputer.ground(record).place
        if bank.parent == directory / "banks":
            files[f"banks/{bank.name}"] = bank
    if weights.is_dir() or (run.kind == "sampler" and verdict.recomputed):
        how += f", {_rescored(path, record, recomputer, weights if weights.is_dir() else None)}"
    return Accepted(record, how, files, verdict)


def _rescored(path: Path, record: Record, recomputer: Recomputer, weights: Path | None) -> str:
    """Scores the policy again with the run's seed. Raises UserError that names the first column that another scoring does not give."""
    try:
        ground = recomputer.ground(record)
    except NotHereError as why:
        raise UserError(f"{path}: it comes with weights that cannot be scored: {why}") from None
    policy = None if weights is None else causal_lm.load(weights, weights.name)
    again, _ = score_run(record.run, ground.task, ground.prior, ground.target, policy, ground.bank, record.curve, recomputer.include)
    equal = True
    for column, figure in record.columns.items():
        fresh = again.columns.get(column)
        if fresh is None:
            continue  # lm-eval's columns
        equal &= _equal(figure, fresh)
        if not _equal(figure, fresh) and not _near(figure, fresh):
            raise UserError(f"{path}: columns.{column}: it says {figure.value}, its policy scored again gives {fresh.value}")
    return f"{SCORED} to the same figures" if equal else f"{SCORED} to figures within {ERRORS:g} standard errors"


def _equal(a: Estimate, b: Estimate) -> bool:
    return all(same(getattr(a, name), getattr(b, name)) for name in Estimate.NUMBERS)


def _near(a: Estimate, b: Estimate) -> bool:
    if a.value is None or b.value is None or not (a.stderr and b.stderr):
        return a.status == b.status and same(a.value, b.value)
    return abs(a.value - b.value) <= ERRORS * math.hypot(a.stderr, b.stderr)


def add(directory: Path, given: Sequence[Path], include: tuple[Path, ...] = ()) -> list[Accepted]:
    """Joins submissions with the board of a directory and builds it anew; those that are there already are passed over.

    Raises UserError, before anything is written, for the first submission that is not sound, and for one whose run is there with other
    figures.
    """
    there = {record.run.id: record for record in grid.records_in(directory)}
    manifest = grid.manifest_in(directory)
    accepted: dict[str, Accepted] = {}
    for path in given:
        files = records_of(path)
        recomputer = Recomputer(path if path.is_dir() else path.parent.parent, include)
        for file in files:
            record = read(file)
            name = record.run.id
            known = there.get(name)
            if known is None:
                accepted[name] = accept(file, record, recomputer)
                there[name] = record
            elif known.comparable() != record.comparable():
                raise UserError(f"{file}: the board has {name} with other figures")
    if accepted:
        Board.of(there.values())  # raises
        named = [*manifest.get("runs", []), *accepted] if "runs" in manifest else None
        marks = checked_in(directory) | {name: Filed.of(one.record).sha256 for name, one in accepted.items() if one.verdict.recomputed}
        for one in accepted.values():
            for place, source in one.files.items():
                write_atomically(directory / place, source.read_bytes())
            write_atomically(directory / "records" / f"{one.record.run.id}.json", one.record.to_json().encode())
        _finish(directory, {**manifest, "runs": named} if named else manifest, marks)
    return list(accepted.values())


def merge(one: Path, other: Path, out: Path) -> int:
    """Two boards as one in a new directory; how many records it has.

    Raises UserError, before anything is written, for a run that both have with other figures, and for a directory that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty")
    a, b = ({record.run.id: record for record in grid.records_in(directory)} for directory in (one, other))
    for name in sorted(a.keys() & b.keys()):
        if a[name].comparable() != b[name].comparable():
            raise UserError(f"{one} and {other} both have {name}, with other figures")
    first, second = grid.manifest_in(one), grid.manifest_in(other)
    manifest = {
        "schema_version": grid.SCHEMA,
        "suite": first.get("suite", {}),
        **second,
        **first,
        "command": f"klbench leaderboard merge {one} {other} --out {out}",
        "merged": [first.get("command", ""), second.get("command", "")],
        "git": first.get("git") if first.get("git") == second.get("git") else None,
        "hashes": {**second.get("hashes", {}), **first.get("hashes", {})},
        "runs": sorted(a.keys() | b.keys()),
    }
    for directory, records in ((one, a), (other, b)):
        places = [f"{kind}/{name}.{end}" for name in records for kind, end in (("records", "json"), ("samples", "npz"))]
        places += [f"{kind}/{path.name}" for kind in ("banks", "pool") for path in sorted((directory / kind).glob("*.[jn][sp]*"))]
        for place in places:
            if (directory / place).is_file() and not (out / place).exists():
                (out / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(directory / place, out / place)
    marks = {**checked_in(other), **checked_in(one)}
    _finish(out, manifest, {name: mark for name, mark in marks.items() if name in a or name in b})
    return len(manifest["runs"])


def _finish(directory: Path, manifest: dict[str, Any], marks: dict[str, str]) -> None:
    """Manifest, marks, board and pages of a directory whose records lie there."""
    if manifest:
        text = json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        write_atomically(directory / "manifest.json", text.encode())
    if marks:
        write_atomically(directory / CHECKED, (json.dumps(marks, indent=1, sort_keys=True) + "\n").encode())
    site.build(directory)
