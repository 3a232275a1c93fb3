"""Run: what was asked. Record: what came out. Both are checked on reading and written atomically."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    with_config,
)
from pydantic_core import to_json

from klbench.errors import UserError
from klbench.estimate import Estimate

SCHEMA: Final = 1
NOT_FINITE: Final = "NaN and infinite numbers are not JSON compliant"

with_config(ConfigDict(extra="forbid"))(Estimate)  # pydantic checks its fields itself: a Python validator takes twice as long
EstimateField = Annotated[Estimate, PlainSerializer(lambda e: e.to_json(), return_type=dict[str, Any])]


def _number(x: float) -> float:
    if math.isnan(x):
        raise ValueError("a truth is NaN")
    return x


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(NOT_FINITE)
    for part in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        _finite(part)
    return data


Truth = Annotated[  # infinite ones are the words "inf" and "-inf" in JSON, as in an estimate
    float,
    Field(allow_inf_nan=True),
    AfterValidator(_number),
    PlainSerializer(lambda x: x if math.isfinite(x) else f"{x:g}", return_type=float | str),
]


class Strict(BaseModel):
    """A frozen model in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")  # left to `to_json`, which refuses them


class Grown(Strict):
    """A strict model with LATER, fields that came after the first records: one at its default is not written, so that ids and hashes of
    older runs stand. Apart from Strict because a serializer in Python costs a record with fifty small parts a third of its hash."""

    LATER: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        for name in self.LATER:
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True):
                data.pop(name, None)
        return data


class Train(Grown):
    """How a policy is trained. lr: Adam's, falling linearly to a tenth; prompts x samples draws a step.

    search: multiples of lr, each trained for the same steps; the policy nearest on the dev split is kept (klbench/probe.py).
    curve: how often reverse_kl and wasted_nats are measured on the way.  data: file of completions or pairs in place of prior draws
    (klbench/offline.py); "" for none.  lora_rank: each linear layer W learns W + B A of this rank and the rest stands still; 0 trains all.
    """

    LATER: ClassVar[tuple[str, ...]] = ("search", "curve", "data", "lora_rank")

    steps: int = Field(40, ge=0)
    prompts: int = Field(16, ge=1)
    samples: int = Field(8, ge=2)
    lr: float = Field(1e-4, ge=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = Field(20, ge=1)
    search: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    curve: int = Field(0, ge=0)
    data: str = ""
    lora_rank: int = Field(0, ge=0)


class Score(Grown):
    """How a policy is scored, draws a prompt: `draws` of its own, `bank` prior draws scored under it; `prompts` 0 means all.

    prior_draws: length of the bank where none ships. truth: every figure is also summed over all outcomes, which must be few enough to list
    (klbench/exact.py). lm_eval: tasks of lm-eval that a policy is tried on, lm_eval_limit documents of each at most (klbench/harness).
    """

    LATER: ClassVar[tuple[str, ...]] = ("truth", "prior_draws", "lm_eval", "lm_eval_limit")

    draws: int = Field(128, ge=16)
    bank: int = Field(128, ge=16)
    prompts: int = Field(0, ge=0)
    prior_draws: int = Field(512, ge=16)
    truth: bool = False
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int | None = Field(None, ge=1)


class Run(Strict):
    """What was asked: one policy of one task. `id` is a readable name with the hash of everything here."""

    task: str
    task_version: int
    method: str
    kind: Literal["objective", "sampler", "policy"]
    prior: str
    beta: float = Field(gt=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0)
    max_new_tokens: int = Field(ge=1)
    train: Train | None = None
    score: Score
    hashes: dict[str, str] = Field(default_factory=dict)  # prior: its weights; bank: prior draws and their rewards; prompts; target

    @property
    def id(self) -> str:
        """`bias-rloo-b1-s0-1a2b3c4d`: safe as a file name; the last part is the SHA-256 of the run."""
        plain = "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in (self.task, self.method))
        return f"{plain}-b{self.beta:g}-s{self.seed}-{digest(self.model_dump(mode='json'))[:8]}"


class FrontierPoint(Strict):
    """One point of the optimal frontier: the posterior at lambda = 1/beta. low, high: 95 % band of kl; reach: least over prompts."""

    model_config = ConfigDict(allow_inf_nan=False)

    high: float  # in the order of their names, as a file has them
    kl: float
    lam: float
    low: float
    reach: float
    reward: float


class Sample(Strict):
    """A draw for the page. Log-probabilities in nats a sequence; None where the policy has none."""

    model_config = ConfigDict(allow_inf_nan=False)

    completion: str  # in the order of their names, as a file has them
    log_p0: float
    log_q: float | None
    prompt: str
    reward: float


class Record(Grown):
    """What came out of a run. Never changes when another policy joins the board.

    columns: DESIGN.md section 3.  prompts: per-prompt values, aligned with prompt_ids; `free` is KL(q||p0) - E_q[r]/beta, whose
    paired difference between two policies is that of their reverse_kl.  cost.machine alone may differ between equal runs.
    truths: exact values of columns, sums over every outcome, where the score settings ask for them.
    """

    LATER: ClassVar[tuple[str, ...]] = ("truths",)
    model_config = ConfigDict(allow_inf_nan=False)

    schema_version: Literal[1] = SCHEMA
    run: Run
    status: str
    columns: dict[str, EstimateField]
    prompt_ids: list[str]
    prompts: dict[str, list[float]]
    frontier: list[FrontierPoint]
    samples: list[Sample]
    curve: list[dict[str, float]] = Field(default_factory=list)
    cost: Annotated[dict[str, Any], AfterValidator(_finite)]
    notes: list[str] = Field(default_factory=list)
    hashes: dict[str, str] = Field(default_factory=dict)  # samples: their file; weights: the policy's
    truths: dict[str, Truth] = Field(default_factory=dict)

    def comparable(self) -> dict[str, Any]:
        """Everything that equal runs must agree on."""
        data = self.model_dump(mode="json")
        data["cost"].pop("machine", None)
        return data

    def to_json(self) -> str:
        """JSON with sorted keys, one trailing newline; non-finite numbers are refused (estimates write "inf")."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, allow_nan=False, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises UserError that names the file and the first bad key; OtherSchemaError for another version's."""
        return cls.parse(_bytes(path), path)

    @classmethod
    def parse(cls, raw: bytes, path: Path) -> Record:
        """From what a file holds; `path` is what an error names. Raises UserError with the first bad key."""
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as why:
                raise UserError(f"{path}: cannot be read: {why}") from None
            raise _told(error, str(path)) from None

    @classmethod
    def of(cls, data: object, where: str) -> Record:
        """From plain data, as `read`."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _told(error, where) from None


class OtherSchemaError(UserError):
    """A record of another version of the schema."""


def _told(error: ValidationError, where: str) -> UserError:
    """The first bad key of a record, with the place it came from."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    if key == "schema_version":
        return OtherSchemaError(f"{where}: {key}: a record of schema {str(first['input'])[:40]}; this klbench reads schema {SCHEMA}")
    why = NOT_FINITE if first["type"] == "finite_number" else first["msg"]
    return UserError(f"{where}: {key}: {why}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no record at {path}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


@final
@dataclass(frozen=True)
class Filed:
    """A record with what is hashed of it. columns: its columns as JSON with sorted keys.  sha256: of `comparable()`."""

    record: Record
    id: str
    sha256: str
    columns: str

    @classmethod
    def of(cls, record: Record) -> Filed:
        data = record.comparable()
        parts = {key: _json(data[key]) for key in sorted(data)}
        return cls._hashed(record, parts["columns"], ", ".join(f"{_json(key)}: {part}" for key, part in parts.items()))

    @classmethod
    def read(cls, path: Path) -> Filed:
        """The same as `of(Record.read(path))`, at half the cost where the file is what `Record.to_json` writes, to the last byte: then
        what is hashed is its text without line ends, and no number has to be written again. Raises UserError."""
        raw = _bytes(path)
        record = Record.parse(raw, path)
        if raw != _written(record):
            return cls.of(record)
        head, _, rest = raw.partition(b',\n "cost": ')  # keys are sorted, and a line starts where no text goes on
        cost = _json({key: value for key, value in record.cost.items() if key != "machine"})
        columns = _on_one_line(head.removeprefix(b'{\n "columns": '))
        rest = rest[rest.index(b',\n "curve": ') : -len("\n}\n")]
        return cls._hashed(record, columns, f'"columns": {columns}, "cost": {cost}{_on_one_line(rest)}')

    def lean(self, frontier: bool) -> Filed:
        """Without what a board does not read: draws, most of the curve, per-prompt values that no rank needs, the frontier unless asked."""
        given = self.record
        left = {
            "samples": [],
            "prompts": {key: given.prompts[key] for key in ("free", "free_stderr", "reward_max") if key in given.prompts},
            "curve": [point for point in given.curve if "reverse_kl" in point],
            "frontier": given.frontier if frontier else [],
        }
        return replace(self, record=given.model_copy(update=left))

    @classmethod
    def _hashed(cls, record: Record, columns: str, inside: str) -> Filed:
        return cls(record, record.run.id, hashlib.sha256(f"{{{inside}}}".encode()).hexdigest(), columns)


def _json(data: Any) -> str:
    """As `digest` hashes it."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False)


def _on_one_line(layout: bytes) -> str:
    """JSON of one line from JSON with a line an item: indentation goes, and a line end is a space behind a comma and else nothing."""
    text = np.frombuffer(layout, dtype=np.uint8)
    ends, keep = np.flatnonzero(text == ord("\n")), np.ones(len(text), dtype=bool)
    at = ends + 1
    while len(at := at[text[at] == ord(" ")]):
        keep[at] = False
        at = at + 1
    behind = text[ends - 1] == ord(",")
    keep[ends[~behind]] = False
    line = text.copy()
    line[ends[behind]] = ord(" ")
    return line[keep].tobytes().decode()


def _written(record: Record) -> bytes:
    """What `Record.to_json` writes, by pydantic's encoder, which is five times as fast. Where the two write a number in another way (1e16)
    this is not it: there to be compared with a file."""
    run = record.run
    data = {
        **_fields(record),
        "columns": {name: _fields(figure) for name, figure in sorted(record.columns.items())},
        "cost": _by_key(record.cost),
        "curve": _curve(record.curve),
        "hashes": _by_key(record.hashes),
        "prompts": _by_key(record.prompts),
        "run": {**_fields(run), "hashes": _by_key(run.hashes), "score": _fields(run.score), "train": run.train and _fields(run.train)},
    }
    text = to_json(data, indent=1, inf_nan_mode="constants") + b"\n"
    if b"Infinity" in text:
        text = INFINITE.sub(rb' "\1inf"\2', text)
    return SMALL.sub(_small, EXPONENT.sub(rb"e-0\1\2", text))


# A number ends its line, where a text has a quote. Patterns start with a fixed text, which `re` finds ten times as fast as anything else.
INFINITE: Final = re.compile(rb" (-?)Infinity(,?\n)")  # a word in an estimate, refused elsewhere
EXPONENT: Final = re.compile(rb"e-(\d)(,?\n)")  # 1e-6, which Python writes 1e-06
SMALL: Final = re.compile(rb"0\.0000\d+(?=,?\n)")  # 0.00001, which Python writes 1e-05


def _curve(points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    keys = sorted(points[0]) if points else []
    return [point if list(point) == keys else dict(sorted(point.items())) for point in points]


def _small(found: re.Match[bytes]) -> bytes:
    inside = found.string[found.start() - 1 : found.start()] not in b" -"  # of 10.00001
    return found[0] if inside else repr(float(found[0])).encode()


def _fields(part: Any) -> dict[str, Any]:
    """By name; what came after the first records and says nothing new is left out, as in `Grown`."""
    values = vars(part)
    names, later = _names(part.__class__)
    data = {name: values[name] for name in names}
    for name, default in later:
        if data[name] == default:
            del data[name]
    return data


@cache
def _names(kind: Any) -> tuple[list[str], list[tuple[str, Any]]]:
    """Of the fields of a kind in order, and the later ones with their defaults."""
    if not issubclass(kind, BaseModel):
        return sorted(field.name for field in fields(kind)), []
    later = kind.LATER if issubclass(kind, Grown) else ()
    return sorted(kind.model_fields), [(name, kind.model_fields[name].get_default(call_default_factory=True)) for name in later]


def _by_key(data: dict[str, Any]) -> dict[str, Any]:
    return {key: _by_key(data[key]) if isinstance(data[key], dict) else data[key] for key in sorted(data)}


@final
@dataclass(frozen=True)
class Pooled:
    """A table's pooled figures: by run id the columns and per-prompt arrays that hold Z or p*."""

    members: tuple[str, ...]
    hash: str
    columns: dict[str, dict[str, Estimate]]
    prompts: dict[str, dict[str, list[float]]]

    @classmethod
    def read(cls, path: Path) -> Pooled:
        """Raises UserError that names the file."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            columns = {i: {k: Estimate.from_json(e) for k, e in found.items()} for i, found in data["columns"].items()}
            return cls(tuple(data["members"]), data["hash"], columns, data["prompts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a pool of klbench: {' '.join(str(error).split())[:200]}") from None

    @classmethod
    def all_in(cls, folder: Path) -> list[Pooled]:
        """Those of a run directory."""
        return [cls.read(path) for path in sorted((folder / "pool").glob("*.json"))]

    def fits(self, records: Sequence[Record]) -> bool:
        """Whether it was made from the draws of these records."""
        return self.hash == pool_hash(self.members, records)

    def write(self, path: Path) -> None:
        """JSON with sorted keys, atomically."""
        columns = {i: {k: e.to_json() for k, e in found.items()} for i, found in self.columns.items()}
        data = {"members": list(self.members), "hash": self.hash, "columns": columns, "prompts": self.prompts}
        write_atomically(path, (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


CHECKED: Final = "checked.json"


def checked_in(folder: Path) -> dict[str, str]:
    """Of a board's folder, by run id the digest of each record that `klbench leaderboard check --mark` computed again from its samples.

    {} where nothing was checked. Raises UserError that names the file.
    """
    path = folder / CHECKED
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise UserError(f"{path}: digests by run id expected")
    return data


def pool_hash(members: Sequence[str], records: Sequence[Record]) -> str:
    """SHA-256 of what goes into a pool: its members and the draws of all policies of the table."""
    return digest([list(members), {r.run.id: r.hashes.get("samples") for r in records}])


def digest(data: Any) -> str:
    """SHA-256 of JSON with sorted keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_atomically(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Either the old file or the whole new one is there, whatever kills the process in between; after a loss of power too where it is
    to be `lasting`, which waits for the disk and is not for what can be made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
