"""The columns of a board, and measures as values with a printable name.

`kl_prior.rao_blackwell(draws=64)` is the function `rao_blackwell` of `klbench/estimators/kl_prior.py` at 64 draws a prompt; a bare
column name stands for its default (`klbench.estimators.named.of` finds the function). `Measure.parse` and `str` are inverses, keywords
print sorted, hyphen equals underscore, an unknown word raises.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

from klbench.errors import UserError, unknown
from klbench.estimate import Estimate


@dataclass(frozen=True)
class Column:
    """title: heading on a board.  unit.  better: "low", "high" or "" for neither.  posterior: holds Z or p*, so a status guards it."""

    title: str
    unit: str
    better: str
    posterior: bool
    formula: str


COLUMNS: Final[dict[str, Column]] = {
    "reward": Column("reward", "reward", "high", False, "E_q[r]"),
    "gold": Column("gold", "reward", "high", False, "E_q[r'], r' a second, held-out reward"),
    "kl_prior": Column("KL to prior", "nats", "", False, "KL(q‖p0)"),
    "reverse_kl": Column("reverse KL", "nats", "low", True, "KL(q‖p*) = KL(q‖p0) − E_q[r]/β + log Z"),
    "forward_kl": Column("forward KL", "nats", "low", True, "KL(p*‖q)"),
    "tv": Column("TV", "", "low", True, "½ Σ|q − p*|"),
    "js": Column("JS", "nats", "low", True, "½ KL(q‖m) + ½ KL(p*‖m), m = ½(q + p*)"),
    "chi2": Column("log(1+χ²)", "nats", "low", True, "log(1 + χ²(p*‖q)), a bound"),
    "own_kl": Column("own KL", "nats", "low", True, "KL(q‖the method's own optimum)"),
    "wasted_nats": Column("wasted nats", "nats", "low", True, "min over λ ≥ 0 of KL(q‖p0·e^{λr}/Z_λ) = KL(q‖p0) − KL*(E_q[r])"),
    "beta_implied": Column("implied β", "reward/nat", "", True, "1/λ̂: the β at which q is closest to a posterior"),
    "kl_efficiency": Column("KL efficiency", "", "high", True, "KL*(E_q[r]) / KL(q‖p0)"),
    "forgetting": Column("forgetting", "nats", "", False, "KL(p0‖q)"),
    "entropy": Column("entropy", "nats", "", False, "−E_q[log q]"),
    "entropy_target": Column("entropy of p*", "nats", "", True, "−E_p*[log p*]"),
    "distinct_1": Column("distinct-1", "", "", False, "E[different 1-grams] / E[1-grams] in 16 draws of a prompt"),
    "distinct_2": Column("distinct-2", "", "", False, "E[different 2-grams] / E[2-grams] in 16 draws of a prompt"),
    "distinct_3": Column("distinct-3", "", "", False, "E[different 3-grams] / E[3-grams] in 16 draws of a prompt"),
    "distinct_4": Column("distinct-4", "", "", False, "E[different 4-grams] / E[4-grams] in 16 draws of a prompt"),
    "distinct_2_target": Column("distinct-2 of p*", "", "", True, "distinct-2 of the bank's draws that exact rejection accepts"),
    "unique": Column("unique", "", "", False, "different draws / draws, in 16 draws of a prompt"),
    "unique_target": Column("unique of p*", "", "", True, "unique share of the bank's draws that exact rejection accepts"),
    "unique_valid": Column("unique at cap", "", "", False, "different draws of the largest reward / draws, in 16 draws of a prompt"),
    "unique_valid_target": Column("unique at cap of p*", "", "", True, "the same of the bank's draws that exact rejection accepts"),
    "self_bleu": Column("self-BLEU", "", "", False, "BLEU-4 (words) of each of 16 draws against the other 15"),
    "reward_target": Column("reward of p*", "reward", "", True, "E_p*[r], from the bank"),
    "kl_prior_target": Column("KL of p* to prior", "nats", "", True, "KL(p*‖p0), from the bank"),
    "moments_target": Column("moment of p*", "", "", True, "E_p*[φ], from the bank"),
    "moments": Column("moment", "", "", False, "E_q[φ], φ the constrained feature"),
    "log_z": Column("log Z", "nats", "", True, "log E_p0[e^{r/β}], mean over prompts"),
    "reach": Column("reach", "draws", "", True, "N0·Z·exp(−r_max/β): prior draws that rejection would accept, least over prompts"),
    "ess": Column("ESS", "draws", "", True, "(Σw)²/Σw² of p*/q at q's own draws; certifies nothing"),
    "khat": Column("k̂", "", "", True, "tail index of the same weights; certifies nothing"),
}

OPEN: Final = ("audit.", "cost.", "lm_eval.")  # columns whose names tasks and other tools give

# Least and most that a column can be. A divergence estimated as -0.001 is 0.
BOUNDS: Final[dict[str, tuple[float, float]]] = {
    **{name: (-math.inf, math.inf) for name in ("reward", "gold", "moments", "reward_target", "moments_target", "log_z", "khat")},
    **{name: (0.0, 1.0) for name in COLUMNS if name.startswith(("distinct_", "unique"))},
    **{name: (0.0, 1.0) for name in ("tv", "self_bleu", "kl_efficiency")},
    "js": (0.0, math.log(2)),
}


def bounded(column: str, figure: Estimate) -> Estimate:
    """The figure inside the bounds of its column, its value inside its interval.

    The bounds are 0 and infinity unless BOUNDS says otherwise; of a column that a task or another tool named nobody knows any.
    """
    least, most = BOUNDS.get(column, (-math.inf if column.startswith(OPEN) else 0.0, math.inf))
    if figure.value is not None and figure.low is not None and figure.high is not None:
        if least <= figure.low <= figure.value <= figure.high <= most:
            return figure
    clip = lambda x: None if x is None else min(max(x, least), most)  # noqa: E731
    value, low, high = map(clip, (figure.value, figure.low, figure.high))
    if value is not None:
        low, high = (None if low is None else min(low, value)), (None if high is None else max(high, value))
    if (value, low, high) == (figure.value, figure.low, figure.high):
        return figure
    return replace(figure, value=value, low=low, high=high)


@dataclass(frozen=True)
class Measure:
    """A column, one of its estimators ("" for the default) and options such as `draws`."""

    column: str
    estimator: str = ""
    options: tuple[tuple[str, int | float | str], ...] = field(default=())

    OPTIONS: ClassVar = ("draws", "interval", "n")

    def __post_init__(self) -> None:
        for name in ("column", "estimator"):
            object.__setattr__(self, name, _one_spelling(getattr(self, name)))
        object.__setattr__(self, "options", tuple((_one_spelling(name), value) for name, value in self.options))
        if self.column not in COLUMNS and not self.column.startswith(OPEN):
            raise unknown("column", self.column, COLUMNS)
        for name, _ in self.options:
            if name not in self.OPTIONS:
                raise unknown(f"option of {self.column}", name, self.OPTIONS)
        if list(self.options) != sorted(self.options):
            object.__setattr__(self, "options", tuple(sorted(self.options)))

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={v}" for k, v in self.options)
        return self.column + (f".{self.estimator}" if self.estimator else "") + (f"({inside})" if inside else "")

    @classmethod
    def parse(cls, text: str) -> Measure:
        """The inverse of `str`; a hyphen in a name is an underscore. Raises UserError on anything else."""
        match = re.fullmatch(r"\s*((?:audit|cost|lm[_-]eval)\.[\w.-]+|[\w-]+?)(?:\.([\w-]+))?(?:\((.*)\))?\s*", text)
        if not match:
            raise UserError(f"measure {text!r}: column.estimator(name=value, ...) expected")
        column, estimator, inside = match.group(1), match.group(2) or "", match.group(3) or ""
        try:
            call = ast.parse(f"f({inside})", mode="eval").body
            assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
            options = tuple((str(k.arg), ast.literal_eval(k.value)) for k in call.keywords)
            assert len(dict(options)) == len(options) and all(isinstance(v, int | float | str) for _, v in options)
        except (SyntaxError, ValueError, AssertionError):
            raise UserError(f"measure {text!r}: name=value pairs expected in the brackets") from None
        return cls(column, estimator, options)


def _one_spelling(name: str) -> str:
    """In names, hyphen equals underscore; what comes after `lm_eval.` is lm-eval's own name of a task and a metric, kept as written."""
    first, dot, rest = name.partition(".")
    first = first.replace("-", "_")
    return first + dot + (rest if first == "lm_eval" else rest.replace("-", "_"))
