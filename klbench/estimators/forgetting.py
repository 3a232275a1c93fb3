"""Forgetting: KL(p0||q) in nats a sequence, from the bank's prior draws as the policy scores them [P, N >= 16].

    k1              mean(log p0 - log q)
    rao_blackwell   mean(sum_t KL(p0_t||q_t)), each inner sum over the vocabulary exact
    regressed       rao_blackwell's term, regressed on the difference of the two, which has mean 0 under p0: the column's default

k1 sees the outcomes that were drawn: of 1,000 draws, none may show the one in 2,000 that the policy has given up, and its interval then
is narrow and far below the truth. The inner sums see every next token of every prefix that was drawn. All are inf, exactly, where the
policy has no mass on what they see. A and B of `Rows` have mean 0 under q and not under p0: they are no control variates here.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from klbench.estimate import Array, Jackknife
from klbench.estimators import control
from klbench.rows import Rows

ROUNDING: Final = 1e-6  # of rows kept in float32: where a policy has no token laws the difference is 0 but for that, and no column


def k1(bank: Rows) -> Jackknife:
    """mean(log p0 - log q) over draws of the prior."""
    return control.plain(bank.log_p0 - bank.log_q)


def rao_blackwell(bank: Rows) -> Jackknife:
    """mean(sum_t KL(p0_t||q_t))."""
    return control.plain(_lost(bank))


def regressed(bank: Rows) -> Jackknife:
    """rao_blackwell's term less what log p0 - log q - sum_t KL(p0_t||q_t) explains of it, refitted in each block."""
    with np.errstate(invalid="ignore"):
        apart = bank.log_p0 - bank.log_q - bank.lost
        rounding = np.abs(apart) < ROUNDING * (1.0 + np.abs(bank.log_p0) + np.abs(bank.log_q))
    return control.regressed(_lost(bank), np.where(rounding, 0.0, apart))


def _lost(bank: Rows) -> Array:
    """[P, N]; inf where the policy has no mass on the draw either."""
    return np.where(np.isneginf(bank.log_q), np.inf, bank.lost)
