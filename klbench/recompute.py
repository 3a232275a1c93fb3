"""A board computed again from what lies beside it: records from their stored draws, board and pages from the records.

    samples/<id>.npz, the bank          every column, per-prompt value, frontier point and example of the record (klbench.score.told)
    texts, by the task                  rewards of own draws and of the bank
    what was said of a draw             kl = log q - log p0 + A - B and entropy = -log q - A, which an edited log-probability breaks; a
                                        sampler's density from the bank
    pool/<table>.npz                    pooled figures (klbench.pooled)
    records, manifest, pools            board.json, board.csv and pages
    SHA-256                             samples, bank, prompts, prior, run id, record in board.json

No weights of a policy are read, so a forger who invents consistent log-probabilities is caught by scoring the weights alone
(klbench.submission). Figures must agree to six digits, as processors round otherwise; what the hashes cover must agree to the last.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from klbench import archive, method, models, streams
from klbench import bank as banks
from klbench import run as grid
from klbench import task as tasks
from klbench.audit import Chosen, Drawn
from klbench.bank import Bank
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.method import AbstractSampler
from klbench.page import site
from klbench.policies.causal_lm import CausalLM
from klbench.pooled import stored
from klbench.priors import SHIPPED
from klbench.record import CHECKED, Filed, Pooled, Record, Run, checked_in, digest, write_atomically
from klbench.rows import Rows
from klbench.score import OWN, figures, hashes, told
from klbench.sheet import Law, Sheet
from klbench.target import TiltedPrior, evaluate
from klbench.task import AbstractTask

RELATIVE: Final = 1e-6  # of a figure computed again
ABSOLUTE: Final = 1e-9
SAID: Final = 1e-3  # nats: float32 sums of hundreds, and two layouts of one model
NOT_STORED: Final = {
    "curve": "training is not done again",
    "cost.train_tokens": "training is not done again",
    "cost.machine": "it is of the machine that ran",
    "notes": "they are of the run",
    "truths": "exact sums need the policy's weights",
}


@final
@dataclass(frozen=True)
class Difference:
    """A cell that is not what was computed. where: a run's id, a task's bank or a file."""

    where: str
    cell: str
    stored: str
    found: str


@final
@dataclass(frozen=True)
class Verdict:
    """What was found of one record. cells: how many were compared; missing: cells by the reason why they could not be."""

    id: str
    digest: str
    differences: tuple[Difference, ...]
    missing: Mapping[str, tuple[str, ...]]
    cells: int

    @property
    def recomputed(self) -> bool:
        """Whether its figures are those of its stored draws."""
        return self.cells > 0 and not self.differences


@final
@dataclass(frozen=True)
class Ground:
    """What the records of one task, prior and beta stand on: the task's law, and its bank with what is wrong with that."""

    task: AbstractTask
    prior: CausalLM
    target: TiltedPrior
    bank: Bank
    place: Path
    differences: tuple[Difference, ...]


class NotHereError(Exception):
    """Why a record cannot be computed again on this machine."""


@final
class Recomputer:
    """Computes records of one directory again, and reads each bank once. include: folders with tasks, objectives and samplers."""

    def __init__(self, directory: Path, include: tuple[Path, ...] = ()):
        self.directory, self.include = directory, include
        self._grounds: dict[tuple[Any, ...], Ground] = {}
        self._priors: dict[str, CausalLM] = {}
        self._sheets: dict[tuple[Any, ...], Sheet] = {}
        self._pooled: dict[str, tuple[int, list[Difference], dict[str, tuple[str, ...]]]] | None = None

    def verdict(self, path: Path) -> Verdict:
        """Of the record in a file of the directory. Raises UserError for a file that is no record."""
        filed = Filed.read(path)
        record = filed.record
        run, found, missing = record.run, list[Difference](), dict[str, tuple[str, ...]]()
        if path.stem != run.id:
            found.append(Difference(path.stem, "run", path.stem, run.id))
        cells = 0
        try:
            cells, differences, missing = self._compared(record, path.stem)
            found += differences
        except NotHereError as why:
            missing = {str(why): tuple(sorted(record.columns))}
        except UserError as error:
            found.append(Difference(path.stem, "the record as a whole", "", str(error)))
        if self._pooled is None:
            self._pooled = dict(found for place in sorted((self.directory / "pool").glob("*.json")) for found in self._of_pool(place))
        if run.id in self._pooled:
            more, wrong, unknown = self._pooled[run.id]
            cells, missing = cells + more, missing | unknown
            found += wrong
        return Verdict(path.stem, filed.sha256, tuple(found), missing, cells)

    def _compared(self, record: Record, name: str) -> tuple[int, list[Difference], dict[str, tuple[str, ...]]]:
        run, samples = record.run, self.directory / "samples" / f"{name}.npz"
        if not samples.is_file():
            raise NotHereError(f"no samples/{name}.npz beside the record" if record.hashes.get("samples") else "it came without samples")
        ground = self.ground(record)
        out = [replace(d, where=name) for d in ground.differences]
        out += [Difference(name, f"run.hashes.{key}", was, here) for key, was, here in moved(record, ground.task)]
        out += _hash(name, "samples", record.hashes.get("samples", ""), hashlib.sha256(samples.read_bytes()).hexdigest())
        out += _hash(name, "bank", record.hashes.get("bank", ""), ground.bank.hash)
        prompts = ground.task.prompts("score")[: run.score.prompts or None]
        if record.prompt_ids != prompts:
            return 0, [*out, Difference(name, "prompt_ids", f"{len(record.prompt_ids)} prompts", "those of the task are others")], {}
        sheet = self._sheet(ground, prompts, run)
        law = sheet.laws[OWN] = stored(samples, sheet, OWN)
        shape = (len(prompts), run.score.draws)
        if law.reward.shape != shape or sheet.laws[""].said[OWN].reward.shape != (shape[0], sheet.laws[""].size):
            return 0, [*out, Difference(name, "samples", f"draws {law.reward.shape}", f"the run asks for {shape}")], {}
        law.policy = self._sampler(run, ground)
        out += _draws(name, sheet, law)
        without = self._missing(record, ground.task, law)
        known = run if "own_kl" not in without else run.model_copy(update={"kind": "policy"})
        again = told(known, ground.task, sheet, self.include).model_dump(mode="json")
        was = record.model_dump(mode="json")
        for column in sorted(set(was["columns"]) - set(again["columns"]) - set(without)):
            out.append(Difference(name, f"columns.{column}", _text(was["columns"][column]["value"]), "no such column"))
        for column in sorted(set(again["columns"]) - set(was["columns"]) - set(without)):
            without[column] = "the record came before this column"
        without |= {f"prompts.{name}": "the record came before it" for name in set(again["prompts"]) - set(was["prompts"])}
        both = {column for column in was["columns"] if column in again["columns"] and column not in without}
        spent = {key for key in again["cost"] if f"cost.{key}" not in without}
        again["prompts"] = {name: values for name, values in again["prompts"].items() if name in was["prompts"]}
        for part in (was, again):
            part["columns"] = {key: part["columns"][key] for key in both}
            part["cost"] = {key: part["cost"].get(key) for key in spent}
        cells = 0
        for field in ("status", "columns", "prompts", "frontier", "samples", "cost"):
            for cell, a, b in pairs(was[field], again[field], field):
                cells += 1
                if not same(a, b):
                    out.append(Difference(name, cell, _text(a), _text(b)))
        by_reason: dict[str, list[str]] = {}
        for cell, why in without.items():
            by_reason.setdefault(why, []).append(cell)
        return cells, out, {why: tuple(sorted(found)) for why, found in by_reason.items()}

    def halves(self, record: Record, seed: int) -> tuple[Record, Record]:
        """The record twice, each of a random half of its own draws at every prompt, on the bank that both share.

        Raises NotHereError where samples or bank are not on this machine, UserError for samples of another shape.
        """
        run, samples = record.run, self.directory / "samples" / f"{record.run.id}.npz"
        if not samples.is_file():
            raise NotHereError(f"no samples/{run.id}.npz beside the record")
        ground = self.ground(record)
        sheet = self._sheet(ground, record.prompt_ids, run)
        law = stored(samples, sheet, OWN)
        assert law.draws is not None
        order = np.random.default_rng(streams.seed(seed, f"halves/{run.id}")).permutation(law.size)
        found = []
        for part in (order[: law.size // 2], order[law.size // 2 : 2 * (law.size // 2)]):
            draws = replace(law.draws, tokens=law.draws.tokens[:, part], mask=law.draws.mask[:, part])
            texts = [[row[i] for i in part] for row in law.texts]
            half = replace(law, draws=draws, texts=texts, reward=law.reward[:, part], log_p0=None, said={OWN: law.said[OWN].part(part)})
            half.policy = self._sampler(run, ground)
            half.log_p0 = None if law.log_p0 is None else law.log_p0[:, part]
            sheet.laws[OWN] = half
            columns, per_prompt = figures(sheet, OWN, ground.task)
            values = {name: [float(x) for x in of] for name, of in per_prompt.items()}
            found.append(record.model_copy(update={"columns": columns, "prompts": values}))
        return found[0], found[1]

    def _missing(self, record: Record, task: AbstractTask, law: Law) -> dict[str, str]:
        """Cells that stored draws do not tell, each with the reason."""
        run = record.run
        out = {cell: why for cell, why in NOT_STORED.items() if "." in cell or getattr(record, cell)}
        if isinstance(law.policy, AbstractSampler):
            out |= dict.fromkeys(("cost.prior_draws", "cost.reward_calls"), "prior draws that a sampler spent are not kept")
        else:
            asking = (a for a in task.audits() if isinstance(a, Chosen) or (isinstance(a, Drawn) and a.prompts))
            out |= {a.column: "it asks the policy itself, whose weights are not here" for a in asking}
        out |= {name: "lm-eval asks the policy itself" for name in record.columns if name.startswith("lm_eval.")}
        if run.kind == "objective":
            try:
                if "method" in run.hashes and not any((folder / f"{run.method.partition(':')[0]}.py").is_file() for folder in self.include):
                    raise UserError(run.method)
                method.objective(run.method, self.include)
            except UserError:
                out["own_kl"] = f"the objective {run.method} is not installed here"
        return out

    def _of_pool(self, path: Path) -> Iterator[tuple[str, tuple[int, list[Difference], dict[str, tuple[str, ...]]]]]:
        """Of each policy of a pool: cells compared, differences, what is missing; from all samples and what was said across policies."""
        pool = Pooled.read(path)
        try:
            sheet = self._across(path, pool)
            for i, columns in sorted(pool.columns.items()):
                again, arrays, _ = sheet.pool(i, pool.members).columns(1.0 / sheet.target.beta)
                was = {"columns": {name: figure.to_json() for name, figure in columns.items()}, "prompts": pool.prompts.get(i, {})}
                here = {
                    "columns": {name: figure.to_json() for name, figure in again.items()},
                    "prompts": {name: [float(x) for x in values] for name, values in arrays.items()},
                }
                leaves = list(pairs(was, here, "pool"))
                yield i, (len(leaves), [Difference(i, cell, _text(a), _text(b)) for cell, a, b in leaves if not same(a, b)], {})
        except (NotHereError, UserError, KeyError, ValueError) as why:
            told = str(why) if isinstance(why, NotHereError | UserError) else f"{path.with_suffix('.npz')} does not hold what was said"
            for i, columns in pool.columns.items():
                yield i, (0, [], {f"pooled: {told}": tuple(f"pool.{name}" for name in columns)})

    def _across(self, path: Path, pool: Pooled) -> Sheet:
        """The draws of all policies of a pool, and what its members said of the others' and they of the members'."""
        records = [Record.read(self.directory / "records" / f"{i}.json") for i in sorted({*pool.columns, *pool.members})]
        if not path.with_suffix(".npz").is_file():
            raise NotHereError(f"no {path.with_suffix('.npz').name} beside it")
        run, ground = records[0].run, self.ground(records[0])
        bank = ground.bank.first(len(records[0].prompt_ids))
        sheet = Sheet(ground.prior, ground.target, records[0].prompt_ids, bank, run.score.bank, run.max_new_tokens)
        for record in records:
            i = record.run.id
            law = sheet.laws[i] = stored(self.directory / "samples" / f"{i}.npz", sheet, i)
            law.policy = self._sampler(record.run, ground)
        said = archive.arrays(path.with_suffix(".npz"))
        for name, at in sorted({(key.split("/")[0], key.split("/")[1]) for key in said}):
            own = sheet.laws[at].said[at]
            log_q, A, B = (said[f"{name}/{at}/{key}"].astype(np.float64) for key in ("log_q", "A", "B"))
            with np.errstate(invalid="ignore"):
                rows = Rows.of_ratio(own.log_p0, own.reward, log_q - own.log_p0)
            sheet.laws[at].said[name] = replace(rows, log_q=log_q, A=A, B=B)
        return sheet

    def _sampler(self, run: Run, ground: Ground) -> AbstractSampler | None:
        """The sampler of a run whose density is a function of the bank; None where stored rows are all there is to read."""
        opened = models.open_policy(run.method, run.method, ground.prior, include=self.include) if run.kind == "sampler" else None
        return opened if isinstance(opened, AbstractSampler) else None

    def _sheet(self, ground: Ground, prompts: list[str], run: Run) -> Sheet:
        """A sheet with the bank alone; records that share it find the posterior's own figures on it."""
        key = (id(ground), len(prompts), run.score.bank)
        if key not in self._sheets:
            bank = ground.bank.first(len(prompts))
            self._sheets[key] = Sheet(ground.prior, ground.target, prompts, bank, run.score.bank, run.max_new_tokens)
        return self._sheets[key]

    def ground(self, record: Record) -> Ground:
        """Task, prior and bank of a record. Raises NotHereError where one of them is not on this machine, or is of another version."""
        run = record.run
        key = (run.task, run.task_version, run.prior, run.beta, run.max_new_tokens, record.hashes.get("bank"))
        if key not in self._grounds:
            self._grounds[key] = self._opened(record)
        return self._grounds[key]

    def _opened(self, record: Record) -> Ground:
        run = record.run
        if run.task.replace("-", "_") not in tasks.names(self.include):
            raise NotHereError(f"the task {run.task} is not installed here")
        task = tasks.load(run.task, self.include)
        if run.task_version != task.version:
            raise NotHereError(f"{run.task} is at version {task.version} here, the record's is {run.task_version}")
        if run.prior not in SHIPPED and not Path(run.prior).is_dir():
            raise NotHereError(f"the prior {run.prior} is not on this machine")
        if run.prior not in self._priors:
            opened = models.open_prior(run.prior)
            assert isinstance(opened, CausalLM)
            self._priors[run.prior] = opened
        prior = self._priors[run.prior]
        target = task.target(prior, run.beta)
        kept = self.directory / "banks" / f"{digest(banks.meta_of(task, prior, 0))[:16]}.npz"
        places = [path for path in (banks.shipped(task, prior.name), kept) if path is not None and path.is_file()]
        if not places:
            raise NotHereError(f"no bank of {run.prior} on {run.task}: neither with the task nor in {self.directory / 'banks'}")
        found = [Bank.from_bytes(path.read_bytes(), str(path)) for path in places]
        at = next((i for i, b in enumerate(found) if b.hash == record.hashes.get("bank")), 0)
        bank = found[at]
        again = bank.rewarded(task, prior, target, task.prompts("score"))
        names = ("reward", "gold", "feature")
        wrong = (_first(f"bank.{n}", getattr(bank, n), getattr(again, n), ABSOLUTE) for n in names if getattr(bank, n) is not None)
        return Ground(task, prior, target, bank, places[at], tuple(d for d in wrong if d is not None))


def moved(record: Record, task: AbstractTask) -> Iterator[tuple[str, str, str]]:
    """What a run says that it rests on and that is otherwise here: prompts, prior, the bank's file."""
    run = record.run
    here = hashes(task, run.prior, run.beta, run.score)
    for key in ("prompts", "prior", "bank"):
        if run.hashes.get(key) != here.get(key):
            yield key, str(run.hashes.get(key))[:16], str(here.get(key))[:16]


def _hash(name: str, key: str, was: str, here: str) -> list[Difference]:
    return [] if was == here else [Difference(name, f"hashes.{key}", was[:16] or "none", here[:16])]


def _draws(name: str, sheet: Sheet, law: Law) -> list[Difference]:
    """What is wrong with stored draws: texts not of their tokens, rewards not of their texts, rows that contradict themselves."""
    assert law.draws is not None
    found: list[Difference | None] = []
    texts = sheet.prior.decode(law.draws.tokens, law.draws.mask)
    if texts != law.texts:
        p, n = next((p, n) for p, (a, b) in enumerate(zip(texts, law.texts, strict=True)) for n in range(len(a)) if a[n] != b[n])
        found.append(Difference("", f"samples.texts[{p},{n}]", repr(law.texts[p][n][:60]), repr(texts[p][n][:60])))
    own, on_bank = law.said[OWN], sheet.laws[""].said[OWN]
    n0 = sheet.laws[""].size
    reward = evaluate(sheet.target.reward, sheet.prompts, law.texts).astype(np.float32)
    found.append(_first("samples.own_reward", own.reward, reward, ABSOLUTE))
    found.append(_first("samples.bank_reward", on_bank.reward, sheet.bank.reward[:, :n0], ABSOLUTE))
    found.append(_first("samples.bank_log_p0", on_bank.log_p0, sheet.bank.log_p0[:, :n0], SAID))
    for label, rows, at in (("own", own, sheet.laws[OWN]), ("bank", on_bank, sheet.laws[""])):
        with np.errstate(invalid="ignore"):
            found.append(_first(f"samples.{label}_kl", rows.kl, rows.log_q - rows.log_p0 + rows.A - rows.B, SAID))
            found.append(_first(f"samples.{label}_entropy", rows.entropy, -rows.log_q - rows.A, SAID))
        if isinstance(law.policy, AbstractSampler):
            said: dict[str, Rows] = at.said
            at.said = {}
            again = sheet.rows(OWN, OWN if label == "own" else "")
            found.append(_first(f"samples.{label}_log_q", rows.log_q, again.log_q, SAID))
            at.said = said
    return [replace(d, where=name) for d in found if d is not None]


def _first(cell: str, was: Array, here: Array | NDArray[np.float32], tolerance: float) -> Difference | None:
    """The first entry that is another, and how many there are. Where neither side is finite there is nothing to compare."""
    with np.errstate(invalid="ignore"):
        wrong = ~((np.abs(was - here) <= tolerance + 1e-5 * np.abs(was)) | (was == here) | ~(np.isfinite(was) | np.isfinite(here)))
    if not wrong.any():
        return None
    p, n = (int(i) for i in np.argwhere(wrong)[0])
    more = f" and {int(wrong.sum()) - 1:,} more" if wrong.sum() > 1 else ""
    return Difference("", f"{cell}[{p},{n}]{more}", f"{was[p, n]:.9g}", f"{here[p, n]:.9g}")


# --- nested data ---


def pairs(a: Any, b: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two nestings side by side with their place; where the shapes differ, what stands there; None for what is not there."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from pairs(a.get(key), b.get(key), f"{at}.{key}" if at else str(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from pairs(x, y, f"{at}[{i}]")
    else:
        yield at, a, b


def same(a: Any, b: Any, relative: float = RELATIVE, absolute: float = ABSOLUTE) -> bool:
    """Equal, or numbers that agree within the tolerances."""
    if isinstance(a, bool) or isinstance(b, bool) or not (isinstance(a, int | float) and isinstance(b, int | float)):
        return type(a) is type(b) and bool(a == b)
    return a == b or math.isclose(a, b, rel_tol=relative, abs_tol=absolute)


def _text(x: Any) -> str:
    if isinstance(x, float):
        return repr(x)
    return "nothing" if x is None else (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False, default=str))[:80]


# --- a directory ---


@final
@dataclass(frozen=True)
class Findings:
    """Of a directory. files: cells of board.json, board.csv and pages that are not what the records make."""

    verdicts: tuple[Verdict, ...]
    files: tuple[Difference, ...]

    @property
    def differences(self) -> tuple[Difference, ...]:
        return (*(d for v in self.verdicts for d in v.differences), *self.files)

    @property
    def missing(self) -> dict[str, tuple[tuple[str, ...], int]]:
        """By reason the cells that were not computed again and the number of records that it holds for."""
        cells: dict[str, set[str]] = {}
        count: dict[str, int] = {}
        for verdict in self.verdicts:
            for why, found in verdict.missing.items():
                cells.setdefault(why, set()).update(found)
                count[why] = count.get(why, 0) + 1
        return {why: (tuple(sorted(cells[why])), count[why]) for why in cells}


def verdicts_of(
    directory: Path, report: Callable[[int, int], None] = lambda done, of: None, include: tuple[Path, ...] = ()
) -> tuple[Verdict, ...]:
    """Of every record that stands on the board of a directory. Raises UserError where there is none or one cannot be read."""
    grid.records_in(directory)  # raises
    named = set(map(str, grid.manifest_in(directory).get("runs", [])))
    paths = [path for path in sorted((directory / "records").glob("*.json")) if not named or path.stem in named]
    recomputer, out = Recomputer(directory, include), []
    for done, path in enumerate(paths):
        report(done, len(paths))
        out.append(recomputer.verdict(path))
    return tuple(out)


def check(
    directory: Path, report: Callable[[int, int], None] = lambda done, of: None, include: tuple[Path, ...] = (), files: bool = True
) -> Findings:
    """Computes a board again and writes nothing. files: board.json, board.csv, pages and marks too.

    Raises UserError for a directory without records, or with files that are none.
    """
    verdicts = verdicts_of(directory, report, include)
    if not files:
        return Findings(verdicts, ())
    marked = checked_in(directory)
    wrong = [
        Difference(CHECKED, v.id, "recomputed", "self-reported") for v in verdicts if marked.get(v.id) == v.digest and not v.recomputed
    ]
    return Findings(verdicts, (*wrong, *_files(directory)))


def mark(directory: Path, verdicts: Sequence[Verdict]) -> None:
    """Writes checked.json, from which boards know the rows that were computed again."""
    data = {v.id: v.digest for v in verdicts if v.recomputed}
    write_atomically(directory / CHECKED, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())


def _files(directory: Path) -> list[Difference]:
    """Cells of the published files that differ from those built of the records."""
    out: list[Difference] = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        site.build(directory, fresh)
        for made in sorted(p for p in fresh.rglob("*") if p.is_file()):
            name = str(made.relative_to(fresh))
            there = directory / name
            if not there.is_file():
                out.append(Difference(name, "", "no such file", "the records make one"))
            elif there.read_bytes() != made.read_bytes():
                found = list(_cells(name, there, made))
                out += found or [Difference(name, "", "not what the records make", "`klbench leaderboard build` makes it anew")]
    return out


def _cells(name: str, there: Path, made: Path) -> Iterator[Difference]:
    try:
        a, b = (_nested(path) for path in (there, made))
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    for cell, was, here in pairs(a, b):
        if not same(was, here, 1e-9, 0.0) or (".columns." in cell and was != here):  # columns are copied, the rest is computed
            yield Difference(name, cell, _text(was), _text(here))


def _nested(path: Path) -> Any:
    """A board's file as nested data in which rows are known by their run, so that one row too many moves no other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        lines = list(csv.DictReader(io.StringIO(text)))
        return {line.get("id") or f"{line['task']}/{line['method']}": {k: _figure(v) for k, v in line.items()} for line in lines}
    data = json.loads(text)
    for table in data["tables"]:
        table["rows"] = {row["id"]: row for row in table["rows"]}
    return data


def _figure(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
