"""The board's pooled figures: each policy of a table estimated with the draws of the table's nearest policies as strata.

A record is a policy's own estimate (bank and own draws) and never changes when a policy joins. This stage reads the draws that the records
left in `samples/`, lets the pool's members say what they have not yet said (every policy on the members' draws, the members on every
policy's), and writes `pool/<table>.json` (figures) and `pool/<table>.npz` (what was said: enough to compute them again).

Members are the trained policies nearest to the posterior at the end of their training, by KL(q||p0) - E_q r/beta on the *train* split: the
score draws that are averaged here have no part in the choice. At most eight, so that the cost is linear in policies (DESIGN.md section 3).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch

from klbench import archive, models
from klbench import bank as banks
from klbench import task as tasks
from klbench.board import comparable, role
from klbench.errors import UserError
from klbench.policies import causal_lm
from klbench.record import Pooled, Record, pool_hash, write_atomically
from klbench.rows import Rows
from klbench.sheet import Law, Sheet
from klbench.target import Draws
from klbench.train import Report

LAST: Final = 5  # training steps at the end of a curve that say how near a policy came
SAID: Final = ("log_q", "A", "B")  # what a pooled figure needs of rows that the samples of their own policy do not hold


@final
@dataclass(frozen=True)
class PoolCell:
    """One table of a run: records that may be compared, and the ids of the pool's members among them."""

    records: tuple[Record, ...]
    members: tuple[str, ...]
    out: Path
    include: tuple[Path, ...]
    device: str

    @property
    def id(self) -> str:
        first = self.records[0].run
        return f"pool-{first.task.replace('/', '_')}-{comparable(self.records[0])[:8]}"

    @property
    def hash(self) -> str:
        """Of the draws that go in: a pool that has it is up to date."""
        return pool_hash(self.members, self.records)


def members_of(records: Sequence[Record], most: int) -> tuple[str, ...]:
    """Ids of at most `most` trained policies of one table, the nearest at the end of their training first."""
    near: list[tuple[float, str]] = []
    for record in records:
        last = [row for row in record.curve if "kl_prior" in row and "reward" in row][-LAST:]
        if record.run.kind == "objective" and last:
            near.append((float(np.mean([row["kl_prior"] - row["reward"] / record.run.beta for row in last])), record.run.id))
    return tuple(name for _, name in sorted(near)[:most])


def work(cell: PoolCell, report: Report) -> None:
    """Does one table, in a worker; its two files are on the disk when this returns."""
    torch.set_num_threads(1)  # figures must not depend on how many cores a machine has
    run = cell.records[0].run
    task, prior = tasks.load(run.task, cell.include), models.open_prior(run.prior, cell.device)
    target = task.target(prior, run.beta)
    prompts = cell.records[0].prompt_ids
    bank = banks.open_bank(task, prior, target, cell.out / "banks", run.score.prior_draws).first(len(prompts))
    sheet = Sheet(prior, target, prompts, bank, run.score.bank, run.max_new_tokens)
    trained = {r.run.id: r.run.kind == "objective" for r in cell.records}
    for record in cell.records:
        sheet.laws[record.run.id] = stored(cell.out / "samples" / f"{record.run.id}.npz", sheet, record.run.id)
    load = lambda i: causal_lm.load(cell.out / "policies" / i, i, cell.device)  # noqa: E731
    for i in cell.members:
        sheet.laws[i].policy = load(i)
    columns, per_prompt = {}, {}
    for step, record in enumerate(cell.records):
        report({"phase": "score", "step": step, "of": len(cell.records)})
        i, law = record.run.id, sheet.laws[record.run.id]
        if i not in cell.members:
            law.policy = load(i) if trained[i] else models.open_policy(record.run.method, record.run.method, prior)
        found, arrays, _ = sheet.pool(i, cell.members).columns(1.0 / target.beta)
        if role(record) != "target":
            columns[i] = found
            per_prompt[i] = {name: [float(x) for x in values] for name, values in arrays.items()}
        if i not in cell.members:
            law.policy = None  # one model at a time beside the members
    write_atomically(cell.out / "pool" / f"{cell.id}.npz", said_file(sheet, cell))
    Pooled(cell.members, cell.hash, columns, per_prompt).write(cell.out / "pool" / f"{cell.id}.json")


def stored(path: Path, sheet: Sheet, name: str) -> Law:
    """A policy's draws as its samples file holds them, with what it said of them and of the bank. Raises UserError that names the file."""
    parts = archive.arrays(path)
    try:
        tokens = torch.from_numpy(parts["tokens"].astype(np.int64))
        mask = torch.from_numpy(np.arange(tokens.shape[2]) < parts["length"][:, :, None])
        own, on_bank = (
            Rows(**{key: parts[f"{label}_{key}"].astype(np.float64) for key in Rows.__dataclass_fields__}) for label in ("own", "bank")
        )
        texts = json.loads(parts["text"].tobytes())["texts"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: not the samples of a run: {' '.join(str(error).split())[:200]}") from None
    sheet.laws[""].said[name] = on_bank
    return Law(None, 0, Draws(tokens, mask, torch.zeros(0)), texts, own.reward, own.log_p0, said={name: own})


def said_file(sheet: Sheet, cell: PoolCell) -> bytes:
    """Compressed npz: `<policy>/<law>/<field>` of what was said across policies."""
    out, parts = io.BytesIO(), dict[str, Any]()
    for law in (r.run.id for r in cell.records):
        for name, rows in sheet.laws[law].said.items():
            if name != law:
                parts |= {f"{name}/{law}/{key}": getattr(rows, key).astype(np.float32) for key in SAID}
    np.savez_compressed(out, **parts)
    return out.getvalue()
