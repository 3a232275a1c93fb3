"""Estimators by name: `kl_prior.k3` is the function `k3` of `kl_prior.py`, `kl_prior.k3(draws=64)` the same at 64 draws a prompt.

A bare column is its default, the first of its line in NAMED.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from klbench.errors import UserError, unknown
from klbench.estimate import LEAST_DRAWS, Jackknife
from klbench.estimators import entropy, forgetting, kl_prior
from klbench.measure import Measure
from klbench.rows import Rows

Estimator = Callable[[Rows, Rows], Jackknife]  # of a policy's own draws and of the bank's, to the per-prompt figures


def _of_own(f: Callable[[Rows], Jackknife]) -> Estimator:
    return lambda own, bank: f(own)


def _of_bank(f: Callable[[Rows], Jackknife]) -> Estimator:
    return lambda own, bank: f(bank)


NAMED: Final[dict[str, dict[str, Estimator]]] = {
    "kl_prior": {f.__name__: _of_own(f) for f in (kl_prior.regressed, kl_prior.rao_blackwell, kl_prior.k1, kl_prior.k3)},
    "entropy": {f.__name__: _of_own(f) for f in (entropy.regressed, entropy.rao_blackwell, entropy.monte_carlo)},
    "forgetting": {f.__name__: _of_bank(f) for f in (forgetting.regressed, forgetting.rao_blackwell, forgetting.k1)},
}


def of(measure: Measure) -> Estimator:
    """The estimator that a measure names. Raises UserError for a column without named estimators, an unknown name, and options but draws.

    With `draws=n` it reads the first n draws a prompt of the stratum that it reads, and raises UserError where there are fewer.
    """
    if measure.column not in NAMED:
        raise unknown("column with named estimators", measure.column, NAMED)
    known = NAMED[measure.column]
    name = measure.estimator or next(iter(known))
    if name not in known:
        raise unknown(f"estimator of {measure.column}", name, known)
    options = dict(measure.options)
    draws = options.pop("draws", None)
    if options:
        raise unknown(f"option of {measure.column}.{name}", next(iter(options)), ["draws"])
    if draws is None:
        return known[name]
    if not isinstance(draws, int) or draws < LEAST_DRAWS:
        raise UserError(f"{measure}: draws is a number of draws a prompt, {LEAST_DRAWS} at least")

    def first(rows: Rows) -> Rows:
        if rows.log_q.shape[1] < draws:
            raise UserError(f"{measure}: {draws} draws a prompt asked for, {rows.log_q.shape[1]} are there")
        return rows.part(slice(0, draws))

    on_bank = measure.column == "forgetting"
    return lambda own, bank: known[name](own if on_bank else first(own), first(bank) if on_bank else bank)
