"""log Z of a collapsed policy: control variates fitted about their known mean, where least squares with an intercept goes astray.

A policy that has all but collapsed makes s A a multiple of s on nearly all rows that were drawn; fitted with an intercept, the slope along
the tiny rest is carried on to the mean, which is known to be 0.
"""

from __future__ import annotations

import numpy as np
from enumerable import Table, draw, rows

from klbench.estimate import Array
from klbench.pool import RIDGE, Pool

V, T, N, BETA = 8, 3, 64, 0.3


def sharpened(prior: Table, power: float) -> Table:
    noise = Table.random(np.random.default_rng(5), 2, V, T, 0.6)
    raw = [power * (a + 0.3 * b) for a, b in zip(prior.steps, noise.steps, strict=True)]
    return Table([x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True) for x in raw])


def with_intercept(pool: Pool) -> tuple[Array, Array]:
    """The mutant's `_design`: second moments about the sample's mean."""
    mean = pool._means(pool._X)
    order, starts, weight = pool._fold
    sums = np.stack([x.transpose(0, 2, 1) @ x for x in np.split(pool._X[:, order], starts[1:], axis=1)])
    gram = np.tensordot(weight, sums, (1, 0)) - mean[..., :, None] * mean[..., None, :]
    return mean, np.linalg.inv(gram + RIDGE * np.eye(pool._X.shape[2]))


def test_a_collapsed_policy_does_not_move_log_z() -> None:
    rng = np.random.default_rng(3)
    prior = Table.random(rng, 2, V, T)
    policy, reward = sharpened(prior, 14.0), rng.random((3, 2, V**T))[2]
    truth = float(np.log(np.exp(prior.log_prob() + reward / BETA).sum(1)).mean())
    errors: dict[str, list[float]] = {"ours": [], "mutant": []}
    held = 0
    for seed in range(40):
        draws = np.random.default_rng(100 + seed)
        own, bank = (rows(policy, prior, reward, draw(draws, law, N)) for law in (policy, prior))
        for name in errors:
            pool = Pool(own, bank, np.zeros((2, 0)), np.ones(2))
            if name == "mutant":
                pool.__dict__["_design"] = with_intercept(pool)
            found = pool.columns(1 / BETA)[0]["log_z"]
            assert found.value is not None
            errors[name].append(found.value - truth)
            if name == "ours":
                held += found.low is not None and found.high is not None and found.low <= truth <= found.high
    error = {name: float(np.sqrt(np.mean(np.square(x)))) for name, x in errors.items()}
    assert error["ours"] < 0.12 and held >= 36
    assert error["mutant"] > 0.3
