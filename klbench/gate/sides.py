"""The two sides of a comparison: records read from a run directory, a published board, a record file or a baseline file, and paired.

Policies are paired by task, method, beta and seed label. What they were asked is compared, never hashed as a whole: a change of a learning
rate is what a gate is for, a change of the prompts is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from klbench.errors import UserError
from klbench.gate.settings import Gate
from klbench.record import SCHEMA, OtherSchemaError, Record, write_atomically

BASELINE: Final = "klbench_baseline"  # the key that marks a baseline file
NAMES: Final = {
    "prior": "prior (weights or tokenizer)",
    "prompts": "prompts",
    "target": "reward or target",
    "task": "task's code (reward or target)",
}
REWARDS: Final = ("target", "task")  # what another reward changes


@final
@dataclass(frozen=True)
class Cell:
    """A method on one task at one beta: what is compared. One record a training seed."""

    task: str
    method: str
    beta: float

    def __str__(self) -> str:
        return f"{self.task} {self.method}" + (f" β {self.beta:g}" if self.beta else "")


@final
@dataclass(frozen=True)
class Pair:
    """The records of a cell on both sides, seed by seed."""

    cell: Cell
    baseline: tuple[Record, ...]
    candidate: tuple[Record, ...]

    @property
    def seeds(self) -> str:
        """`0`, `0, 1, 2`, or `0 against 1` where the labels are different ones."""
        a, b = ([str(r.run.seed) for r in side] for side in (self.baseline, self.candidate))
        return ", ".join(a) if a == b else f"{', '.join(a)} against {', '.join(b)}"


@final
@dataclass(frozen=True)
class Difference:
    """Why something cannot be compared: what it is, and how the sides differ in it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def read(path: Path) -> list[Record]:
    """The records at a place: a run directory, a board's, a record, a baseline, or the board.json of a directory with records.

    Raises UserError where there is nothing of the kind, OtherSchemaError where a record has another schema version. [] for a directory
    that has no record yet.
    """
    if path.is_dir():
        files = sorted((path / "records").glob("*.json"))
        if not files and not (path / "manifest.json").is_file():
            raise UserError(f"{path}: no records/ and no manifest.json in it; a run directory expected")
        return [_whole(file, Record.read(file)) for file in files]
    data = _json(_bytes(path), path)
    if BASELINE in data:
        return _baseline(data, path)
    if "tables" in data:
        if not (path.parent / "records").is_dir():
            raise UserError(f"{path}: a board's table without its records/; give the run directory, or a baseline made with --update")
        return read(path.parent)
    return [_whole(path, Record.of(data, str(path)))]


def parse(raw: bytes, path: Path) -> list[Record]:
    """The records of a baseline file's bytes; `path` is what an error names. Raises as `read`."""
    data = _json(raw, path)
    if BASELINE not in data:
        raise UserError(f"{path}: no baseline file; `klbench check --update` writes one")
    return _baseline(data, path)


def is_baseline(path: Path) -> bool:
    """Whether the file is a baseline, of any schema. Raises UserError for one that is no JSON."""
    return BASELINE in _json(_bytes(path), path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no file or directory {path}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _json(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a record, a baseline or a board expected")
    return data


def _baseline(data: dict[str, Any], path: Path) -> list[Record]:
    if data[BASELINE] != SCHEMA:
        raise OtherSchemaError(f"{path}: a baseline of schema {str(data[BASELINE])[:40]}; this klbench reads schema {SCHEMA}")
    if not isinstance(data.get("records"), list):
        raise UserError(f"{path}: records: a list expected")
    return [_whole(path, Record.of(one, f"{path}: records.{i}")) for i, one in enumerate(data["records"])]


def _whole(path: Path, record: Record) -> Record:
    for name, values in record.prompts.items():
        if len(values) != len(record.prompt_ids):
            raise UserError(f"{path}: prompts.{name[:60]}: {len(record.prompt_ids)} numbers expected, one a prompt, got {len(values)}")
    return record


def pairs(baseline: Sequence[Record], candidate: Sequence[Record], gate: Gate) -> tuple[list[Pair], list[Difference], list[Cell]]:
    """Cells that can be compared, differences for those that cannot, cells that only the candidate has.

    Seeds are paired by label; where no label is shared the sides are two sets of seeds of one method, in order. Raises UserError when one
    side has two records of one task, method, beta and seed.
    """
    a, b = _cells(baseline, "baseline"), _cells(candidate, "candidate")
    found: list[Pair] = []
    differences: list[Difference] = []
    for cell, was in a.items():
        now = b.get(cell)
        if now is None:
            differences.append(_absent(cell, b))
            continue
        shared = sorted(was.keys() & now.keys())
        if shared and was.keys() - now.keys():
            gone = ", ".join(map(str, sorted(was.keys() - now.keys())))
            differences.append(Difference(str(cell), f"seed {gone} is in the baseline and not in the candidate"))
            continue
        seeds = [(s, s) for s in shared] or list(zip(sorted(was), sorted(now), strict=False))
        pair = Pair(cell, tuple(was[s] for s, _ in seeds), tuple(now[s] for _, s in seeds))
        unlike = [Difference(str(cell), what) for what in _unlike(pair, gate)]
        differences += unlike
        if not unlike:
            found.append(pair)
    return found, differences, [cell for cell in b if cell not in a and not any(_near(cell, other) for other in a if other not in b)]


def _cells(records: Iterable[Record], side: str) -> dict[Cell, dict[int, Record]]:
    out: dict[Cell, dict[int, Record]] = {}
    for record in sorted(records, key=lambda r: (r.run.task, r.run.method, r.run.beta, r.run.seed)):
        run = record.run
        seeds = out.setdefault(Cell(run.task, run.method, run.beta), {})
        if run.seed in seeds:
            raise UserError(f"the {side} has two records of {run.task}, {run.method}, beta {run.beta:g} and seed {run.seed}")
        seeds[run.seed] = record
    return out


def _near(one: Cell, other: Cell) -> bool:
    return (one.task, one.method) == (other.task, other.method)


def _absent(cell: Cell, there: Iterable[Cell]) -> Difference:
    near = [c for c in there if _near(c, cell)]
    if near:
        return Difference(
            str(cell), f"its β is {cell.beta:g} in the baseline and {', '.join(f'{c.beta:g}' for c in near)} in the candidate"
        )
    if not any(c.task == cell.task for c in there):
        return Difference(str(cell), f"the candidate has no record of the task {cell.task}")
    return Difference(str(cell), "the candidate has no record of it")


def _unlike(pair: Pair, gate: Gate) -> Iterable[str]:
    """What must be equal before two policies can be compared, prompt by prompt."""
    a, b = pair.baseline[0], pair.candidate[0]
    for key, was, now in (
        ("task version", a.run.task_version, b.run.task_version),
        ("prior", a.run.prior, b.run.prior),
        ("max_new_tokens", a.run.max_new_tokens, b.run.max_new_tokens),
    ):
        if was != now:
            yield f"its {key} is {was} in the baseline and {now} in the candidate"
    for key, name in NAMES.items():
        before, after = a.run.hashes.get(key), b.run.hashes.get(key)
        if before != after and not (key in REWARDS and gate.rewards_differ):
            yield f"its {name} differs: hash {_short(before)} in the baseline, {_short(after)} in the candidate"
    if a.prompt_ids != b.prompt_ids:
        gone, new = (len(set(x) - set(y)) for x, y in ((a.prompt_ids, b.prompt_ids), (b.prompt_ids, a.prompt_ids)))
        how = f"{gone} are gone and {new} are new" if gone or new else "in another order"
        yield f"its prompts are not the same: {len(a.prompt_ids)} in the baseline, {len(b.prompt_ids)} in the candidate, {how}"
    for side, records in (("baseline", pair.baseline), ("candidate", pair.candidate)):
        if any(
            (r.run.hashes.get("prompts"), r.prompt_ids) != (records[0].run.hashes.get("prompts"), records[0].prompt_ids) for r in records
        ):
            yield f"the {side}'s seeds were scored on different prompts"


def _short(value: str | None) -> str:
    return "none" if value is None else value[:8]


def write(path: Path, records: Sequence[Record]) -> None:
    """A baseline file: the records without what no comparison reads (samples, curves, frontiers, machine). Sorted, atomically written."""
    slim = [
        r.model_copy(update={"samples": [], "curve": [], "frontier": [], "cost": {k: v for k, v in r.cost.items() if k != "machine"}})
        for r in sorted(records, key=lambda r: r.run.id)
    ]
    rows = ",\n".join(json.dumps(r.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, allow_nan=False) for r in slim)
    try:
        write_atomically(path, f'{{"{BASELINE}": {SCHEMA}, "records": [\n{rows}\n]}}\n'.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
