"""What `klbench reward` found, as it is written and read: `rewards.json`, checked on reading.

A card is one reward on one task. Its columns, each an estimate (klbench/estimate.py; MEANINGS says what each is):

    pairs.prior  pairs.FILE  best_of_2|4|8  auc|rho.FILE  brier|log_loss|ece|slope|platt.FILE  raw_brier|raw_log_loss|raw_ece|raw_slope.FILE
    functional.macro|best|least|sides|order|gap|is.NAME|group.NAME  length.within|overall  prior.within|overall
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError

from klbench.errors import UserError
from klbench.record import EstimateField, Strict, Truth
from klbench.reward_eval.calibration import Bin
from klbench.reward_eval.over_optimisation import Curve
from klbench.reward_eval.sharpness import Sharpness

SCHEMA: Final = 1
ROLES: Final = ("reward", "gold", "other", "null")

MEANINGS: Final = {
    "pairs.prior": "pairwise accuracy over the prior's draws of one prompt whose gold differs, ties ½, mean over prompts",
    "pairs.FILE": "pairwise accuracy on a file of (prompt, chosen, rejected), ties ½, clustered by prompt",
    "best_of_k": "how often the reward's best of k prior draws is a best one by gold, over all subsets of k",
    "auc.FILE": "P(good above bad) + P(tie)/2 on labelled texts; a label of ½ or more is good",
    "rho.FILE": "Spearman's ρ with labels that are graded",
    "brier.FILE": "mean (p − y)² of p = σ(a·r + b), a and b fitted on the other half of the texts",
    "log_loss.FILE": "mean −y log p − (1 − y) log(1 − p) of the same p",
    "ece.FILE": "Σ n_b/n |mean p − mean y| over 15 bins of equal mass; biased upwards at small n",
    "slope.FILE": "slope of y on logit p: 1 calibrated, below 1 too sure",
    "platt.FILE": "a: log-odds of “good” that one unit of reward is worth; at β = 1/a the tilt r/β is the reward's own evidence",
    "raw_….FILE": "the same of the reward itself, where every value of it lies in [0, 1]",
    "functional.macro": "mean over functionalities of the share of texts on the right side of the threshold",
    "functional.best": "the same at the threshold that suits these very tests: what no threshold can beat",
    "functional.least": "the worst functionality",
    "functional.sides": "twins of which both are on the right side",
    "functional.order": "twins in the right order, ties ½",
    "functional.gap": "widest difference between identity groups in the share of good texts that pass",
    "length.within": "Spearman's ρ with the number of words among draws of one prompt, mean over prompts",
    "length.overall": "the same over all draws",
    "prior.within": "Spearman's ρ with log p0 among draws of one prompt, mean over prompts",
    "prior.overall": "the same over all draws",
}


class Card(Strict):
    """One reward on one task. edge: the largest certified 1/beta, None without a ceiling. threshold: of the functional tests."""

    reward: str
    role: Literal["reward", "gold", "other", "null"]
    columns: dict[str, EstimateField]
    reliability: dict[str, list[Bin]] = Field(default_factory=dict)
    threshold: float | None = None
    sharpness: list[Sharpness] = Field(default_factory=list)
    edge: Truth | None = None
    curves: list[Curve] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class Agreement(Strict):
    """Two rewards on the same texts. texts: "prior", or the name of a labelled file."""

    texts: str
    first: str
    second: str
    within: EstimateField | None
    overall: EstimateField
    kappa: EstimateField


class Table(Strict):
    """All rewards on one task. gold: which row's the gold is. hashes: the bank's, the prior's and of each validation file."""

    task: str
    version: int
    prior: str
    beta: float
    prompts: int
    draws: int
    gold: str
    sizes: dict[str, int]
    cards: list[Card]
    agreement: list[Agreement]
    notes: list[str]
    hashes: dict[str, str]


class Board(Strict):
    """Everything that one command found."""

    schema_version: Literal[1] = SCHEMA
    klbench: str
    command: str
    seed: int
    tables: list[Table]

    def to_json(self) -> str:
        """Sorted keys; the same bytes for the same seed."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, allow_nan=False, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Board:
        """Raises UserError that names the file and the first bad key."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UserError(f"{path}: {where}: {first['msg']}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None

    def to_csv(self) -> str:
        """A line a figure."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        ends = ("low", "high", "population_low", "population_high")
        writer.writerow(("task", "reward", "role", "column", "value", *ends, "n", "status", "reason"))
        for table in self.tables:
            for card in table.cards:
                figures = dict(card.columns)
                for at in card.sharpness:
                    figures |= {f"{name}@beta={at.beta:.4g}": getattr(at, name) for name in ("log_z", "kl", "reward")}
                for curve in card.curves:
                    figures |= {f"{curve.kind}.{fit.form}.{name}": getattr(fit, name) for fit in curve.fits for name in ("a", "b")}
                    figures |= {f"{curve.kind}.{name}@{p.at}": getattr(p, name) for p in curve.points for name in ("kl", "gold")}
                for column, e in figures.items():
                    population = e.population or (None, None)
                    numbers = ("" if x is None else f"{x:.6g}" for x in (e.value, e.low, e.high, *population))
                    writer.writerow((table.task, card.reward, card.role, column, *numbers, e.n, e.status, e.reason))
        return out.getvalue()
