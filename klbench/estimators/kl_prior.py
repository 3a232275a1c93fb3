"""KL(q||p0) in nats a sequence, from a policy's own draws: four estimators of one number, shapes [P, N >= 16].

    k1             mean(log q - log p0)                       unbiased, always there
    k3             mean(e^-d + d - 1), d = log q - log p0     unbiased on paper; p0/q has no variance under a trained q
    rao_blackwell  mean(sum_t KL(q_t || p0_t))                the token's own noise summed out; that of the prefixes stays
    regressed      the calmer of k1 and rao_blackwell (kl - A + B is k1) less what A and B of `Rows` explain

RMSE in units of k1's, median and worst of 12 cells each (tables of V, T = 50, 3; 8, 5; 2, 12; mean of 4 prompts, 300 replications),
and coverage of the 95 % interval, mean and least over cells; `one` and `two` are ordinary least squares on A - B and on A, B:

    draws, policy     rao_blackwell         one                   two                   regressed             k3
    64    near        .40 .56  .956 .94     .37 .44  .957 .93     .37 .45  .958 .92     .37 .45  .961 .94     1.2  2.0  .924 .86
    64    mid         .32 .43  .953 .94     .31 .43  .954 .94     .31 .42  .956 .95     .31 .41  .951 .94     .75  .99  .931 .89
    64    collapsed   .46 .91  .935 .91     .36 7.5  .848 .56     .41 89.  .851 .60     .37 .84  .959 .92     18.  41.  .066 .00
    128   collapsed   .45 .92  .940 .93     .35 3.7  .898 .73     .45 4.3  .874 .56     .31 .86  .958 .93     36.  6e3  .071 .01
    256   near        .41 .60  .949 .93     .35 .43  .949 .93     .35 .43  .951 .93     .35 .43  .951 .94     1.2  1.9  .944 .91
    256   mid         .31 .43  .952 .92     .30 .38  .951 .93     .30 .38  .953 .93     .30 .38  .952 .93     .70  .89  .946 .93
    256   collapsed   .48 .96  .944 .93     .37 2.9  .926 .90     .33 2.7  .906 .75     .29 .76  .956 .93     45.  4e2  .088 .00
    1000  collapsed   .48 .92  .939 .92     .37 .73  .938 .91     .28 .33  .923 .88     .28 .69  .942 .92     1e2  5e2  .108 .03

On 18 kinds of 32-token chains the median is .08 to .10 of k1 for the first four from 64 draws on, the worst .41 to .49 (`two`: 3.1 at 64).
One prompt of a collapsed policy covers .83 at 64 draws and .92 at 1000, as k1 does: what was never drawn leaves no spread.
Source: Amini, Vieira and Cotterell 2025, arXiv:2504.10637; Schulman 2020, "Approximating KL divergence" (k1, k3).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from klbench.estimate import Array, Jackknife
from klbench.estimators import control
from klbench.rows import Rows

CALMER: Final = 0.5  # of the variance
MOST: Final = 300.0  # nats of a k3 term, so that its square is finite too


def k1(own: Rows) -> Jackknife:
    """mean(log q - log p0); inf, exactly, where the prior has no mass on a draw."""
    return control.plain(own.log_q - own.log_p0)


def k3(own: Rows) -> Jackknife:
    """mean(p0/q - log p0/q - 1): every term is >= 0, and a few hold the sum. Terms are capped at e^300; inf where p0 has no mass."""
    d = own.log_q - own.log_p0
    return control.plain(np.exp(np.minimum(-d, MOST)) + d - 1.0)


def rao_blackwell(own: Rows) -> Jackknife:
    """mean(sum_t KL(q_t||p0_t)), each inner sum over the vocabulary exact."""
    return control.plain(_kl(own))


def regressed(own: Rows) -> Jackknife:
    """rao_blackwell's term, or k1's where that clearly varies less, regressed on A and B, refitted in each block: the column's default.

    Both have the same mean and differ by A - B. Near a hard posterior log q/p0 hardly varies while the sum of token KLs does, and the
    regression, which shrinks, would not find its way back to k1 from there. Few draws that differ are no ground to leave rao_blackwell.
    """
    kl, plain = _kl(own), own.log_q - own.log_p0
    sound = np.isfinite(kl).all(1) & np.isfinite(own.A - own.B).all(1)
    kl_, plain_ = (np.where(np.expand_dims(sound, 1), x, 0.0) for x in (kl, plain))
    d = (kl_ - kl_.mean(1, keepdims=True)) ** 2
    rows = np.divide(d.sum(1) ** 2, (d**2).sum(1), out=np.zeros(len(d)), where=d.any(1))
    calmer = sound & np.asarray(plain_.var(1) < CALMER * kl_.var(1)) & (rows >= control.FEW)
    return control.regressed(np.where(np.expand_dims(calmer, 1), plain, kl), own.A, own.B)


def _kl(own: Rows) -> Array:
    """[P, N]; inf where the prior has no mass on the draw either."""
    return np.where(np.isneginf(own.log_p0), np.inf, own.kl)
