"""Forgetting: KL(p0||q) in nats a sequence, from the bank's prior draws as the policy scores them [P, N >= 16].

    k1      mean(log p0 - log q)      inf, exactly, where the policy has no mass on a draw of the prior

A and B have mean 0 under q and not under p0: they are no control variates here.
"""

from __future__ import annotations

from klbench.estimate import Jackknife
from klbench.estimators import control
from klbench.rows import Rows


def k1(bank: Rows) -> Jackknife:
    """mean(log p0 - log q) over draws of the prior: the default of the column `forgetting`."""
    return control.plain(bank.log_p0 - bank.log_q)
