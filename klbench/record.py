"""Run: what was asked. Record: what came out. Both are checked on reading and written atomically."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

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
from klbench.estimate import Estimate, finite_or_word

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
    older runs stand. Apart from Strict because a serializer in Python is slow, and a record has fifty small parts."""

    LATER: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        for name, default in _later(type(self)):
            if getattr(self, name) == default:
                data.pop(name, None)
        return data


@cache
def _later(kind: type[Grown]) -> list[tuple[str, Any]]:
    """LATER with defaults."""
    return [(name, kind.model_fields[name].get_default(call_default_factory=True)) for name in kind.LATER]


class Train(Grown):
    """How a policy is trained. lr: Adam's, falling linearly to a tenth; prompts x samples draws a step.

    search: multiples of lr, each trained for the same steps; the policy nearest on the dev split is kept (klbench/probe.py).
    curve: how often reverse_kl and wasted_nats are measured on the way.  data: file of completions or pairs in place of prior draws
    (klbench/offline.py); "" for none.  lora_rank: each linear layer W learns W + B A of this rank and the rest stands still; 0 trains all.
    micro: prompts whose gradient is worked out at once; 0 for as many as fit.  recompute: layers are run again for their gradient, and not
    kept.  shard: weights and Adam's state are spread over the processes. These three move figures by rounding alone.
    """

    LATER: ClassVar[tuple[str, ...]] = ("search", "curve", "data", "lora_rank", "micro", "recompute", "shard", "sampler")

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
    micro: int = Field(0, ge=0)
    recompute: bool = False
    shard: bool = False
    sampler: Literal["", "vllm"] = ""


class Score(Grown):
    """How a policy is scored, draws a prompt: `draws` of its own, `bank` prior draws scored under it; `prompts` 0 means all.

    prior_draws: length of the bank where none ships. truth: every figure is also summed over all outcomes, which must be few enough to list
    (klbench/exact.py). lm_eval: tasks of lm-eval that a policy is tried on, lm_eval_limit documents of each at most (klbench/harness).
    common: policies of a task and seed fall from the same uniforms, so that their differences have less noise (half, docs/decisions.md);
    not for policies that are pooled, whose draws have to be their own.
    """

    LATER: ClassVar[tuple[str, ...]] = ("truth", "prior_draws", "lm_eval", "lm_eval_limit", "common")

    draws: int = Field(128, ge=16)
    bank: int = Field(128, ge=16)
    prompts: int = Field(0, ge=0)
    prior_draws: int = Field(512, ge=16)
    truth: bool = False
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int | None = Field(None, ge=1)
    common: bool = False


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
    """A record with what is hashed of it.

    sha256: of its JSON without cost.machine, which alone may differ between equal runs: UTF-8, keys sorted, no spaces, numbers with the
    fewest digits that read back. How the file is laid out that it came from makes no difference.  columns: the part with the columns.
    """

    record: Record
    id: str
    sha256: str
    columns: str

    @classmethod
    def of(cls, record: Record) -> Filed:
        run, columns = record.run, columns_json(record.columns)
        rest = {
            **_fields(record),
            "cost": _by_key({key: value for key, value in record.cost.items() if key != "machine"}),
            "curve": _curve(record.curve),
            "hashes": _by_key(record.hashes),
            "prompts": dict(sorted(record.prompts.items())),
            "run": {
                **_fields(run),
                "hashes": _by_key(run.hashes),
                "score": _fields(run.score),
                "train": None if run.train is None else _fields(run.train),
            },
        }
        if record.truths:
            rest["truths"] = {name: finite_or_word(value) for name, value in sorted(record.truths.items())}
        del rest["columns"]  # the first of its keys
        return cls(record, run.id, sha256(f'{{"columns":{columns},{one_line(rest)[1:]}'.encode()).hexdigest(), columns)

    @classmethod
    def read(cls, path: Path) -> Filed:
        """Raises UserError, as `Record.read`."""
        return cls.of(Record.read(path))

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


def one_line(data: Any) -> str:
    """JSON without spaces, by pydantic's encoder, which is five times as fast as `json`. Keys stay in their order."""
    return to_json(data, inf_nan_mode="constants").decode()


def columns_json(columns: Mapping[str, Estimate]) -> str:
    """Of figures by name, keys sorted; an infinite number is a word, as in a record."""
    every = sorted(columns.items())
    text = one_line({name: {part: values[part] for part in PARTS} for name, figure in every for values in [vars(figure)]})
    return one_line({name: _by_key(figure.to_json()) for name, figure in every}) if "Infinity" in text else text


PARTS: Final = sorted(field.name for field in fields(Estimate))


def _fields(part: Strict) -> dict[str, Any]:
    """By name; what came after the first records and says nothing new is left out, as in `Grown`."""
    values = vars(part)
    names, later = _names(type(part))
    data = {name: values[name] for name in names}
    for name, default in later:
        if data[name] == default:
            del data[name]
    return data


@cache
def _names(kind: type[Strict]) -> tuple[list[str], list[tuple[str, Any]]]:
    return sorted(kind.model_fields), _later(kind) if issubclass(kind, Grown) else []


def _curve(points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    keys = sorted(points[0]) if points else []
    return [point if list(point) == keys else dict(sorted(point.items())) for point in points]


def _by_key(data: Any) -> Any:
    """With keys sorted, all the way down."""
    if isinstance(data, dict):
        return {key: _by_key(data[key]) for key in sorted(data)}
    return [_by_key(part) for part in data] if isinstance(data, list) else data


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
    return sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


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
