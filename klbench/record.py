"""Run: what was asked. Record: what came out. Both are checked on reading and written atomically."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from klbench.errors import UserError
from klbench.estimate import Estimate

SCHEMA: Final = 1

EstimateField = Annotated[
    Estimate,
    BeforeValidator(Estimate.from_json),
    PlainSerializer(lambda e: e.to_json(), return_type=dict[str, Any]),
]


def _number(x: float) -> float:
    if math.isnan(x):
        raise ValueError("a truth is NaN")
    return x


Truth = Annotated[  # infinite ones are the words "inf" and "-inf" in JSON, as in an estimate
    float, AfterValidator(_number), PlainSerializer(lambda x: x if math.isfinite(x) else f"{x:g}", return_type=float | str)
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

    lam: float
    reward: float
    kl: float
    low: float
    high: float
    reach: float


class Sample(Strict):
    """A draw for the page. Log-probabilities in nats a sequence; None where the policy has none."""

    prompt: str
    completion: str
    reward: float
    log_p0: float
    log_q: float | None


class Record(Grown):
    """What came out of a run. Never changes when another policy joins the board.

    columns: DESIGN.md section 3.  prompts: per-prompt values, aligned with prompt_ids; `free` is KL(q||p0) - E_q[r]/beta, whose
    paired difference between two policies is that of their reverse_kl.  cost.machine alone may differ between equal runs.
    truths: exact values of columns, sums over every outcome, where the score settings ask for them.
    """

    LATER: ClassVar[tuple[str, ...]] = ("truths",)

    schema_version: Literal[1] = SCHEMA
    run: Run
    status: str
    columns: dict[str, EstimateField]
    prompt_ids: list[str]
    prompts: dict[str, list[float]]
    frontier: list[FrontierPoint]
    samples: list[Sample]
    curve: list[dict[str, float]] = Field(default_factory=list)
    cost: dict[str, Any]
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
        """Raises UserError that names the file and the first bad key."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"no record at {path}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            if where == "schema_version":
                given = str(first["input"])[:40]
                raise UserError(f"{path}: {where}: a record of schema {given}; this klbench reads schema {SCHEMA}") from None
            raise UserError(f"{path}: {where}: {first['msg']}") from None
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None


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


def write_atomically(path: Path, data: bytes) -> None:
    """Either the old file or the whole new one is there, whatever kills the process in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
