"""Two answers to a question, each in several spellings, from log-probabilities of given texts.

p = sum of q over the spellings of the first answer / sum over all spellings          logit p = log of the ratio of the two sums
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logsumexp

from klbench.estimate import Array


def logit(log_q: Array) -> Array:
    """[I] log q(first) - log q(second) from [I, K]: the first half of the texts spells the first answer, the rest the second."""
    half = log_q.shape[1] // 2
    return np.asarray(logsumexp(log_q[:, :half], axis=1) - logsumexp(log_q[:, half:], axis=1))


def share(log_q: Array) -> Array:
    """[I] probability of the first answer, given that one of the two comes."""
    return np.asarray(expit(logit(log_q)))
