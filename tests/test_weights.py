"""Log-weights by hand, and preference pairs beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from klbench import weights
from klbench.preferences import bradley_terry, pairs


def test_log_mean_exp_by_hand() -> None:
    x = np.log([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]])
    np.testing.assert_allclose(weights.log_mean_exp(x), np.log([3.0, 0.5]))
    np.testing.assert_allclose(weights.log_mean_exp(x[None] + 5000), np.log([[3.0, 0.5]]) + 5000)
    np.testing.assert_allclose(weights.log_mean_exp(x - 5000), np.log([3.0, 0.5]) - 5000)


def test_log_mean_exp_of_nothing_but_zeros() -> None:
    x = np.array([[-math.inf, -math.inf], [0.0, -math.inf]])
    assert weights.log_mean_exp(x).tolist() == [-math.inf, -math.log(2)]


def test_ess_by_hand() -> None:
    w = np.array([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(weights.ess(w), [4.0, 1.0, 1.6, 0.0])
    np.testing.assert_allclose(weights.ess(7 * w), weights.ess(w))


def test_khat_is_zero_where_there_is_no_tail() -> None:
    for w in (np.zeros(100), np.full(100, 3.0), np.arange(16.0)):  # the last has 3 tail draws, five are needed
        assert weights.khat(w) == 0.0


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_finds_the_shape_of_a_pareto_law(shape: float) -> None:
    u = (np.arange(20000) + 0.5) / 20000
    w = (1 - u) ** -shape  # quantiles of a law whose tail index is `shape`: no randomness
    assert weights.khat(w) == pytest.approx(shape, abs=0.05)
    assert weights.khat(w[::-1] * 1e-9) == pytest.approx(weights.khat(w), abs=1e-9)  # order and scale do not matter
    assert abs(weights.khat(w**2) - shape) > 0.15  # the law must be able to fail


def literal_khat(w: list[float]) -> float:
    """Zhang and Stephens 2009, in loops, over the excess above the largest weight that is left out."""
    size = int(min(len(w) / 5, 3 * math.sqrt(len(w))))
    *_, threshold = sorted(w)[: len(w) - size]
    x = [v - threshold for v in sorted(w)[len(w) - size :]]
    m = 30 + int(math.sqrt(size))
    quartile = x[int(size / 4 + 0.5) - 1]
    b = [1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * quartile) for j in range(1, m + 1)]

    def shape(theta: float) -> float:
        return sum(math.log(1 - theta * v) for v in x) / size

    score = [size * (math.log(-theta / shape(theta)) - shape(theta) - 1) for theta in b]
    share = [math.exp(v - max(score)) for v in score]
    theta = sum(t * v for t, v in zip(b, share, strict=True)) / sum(share)
    return (size * shape(theta) + 0.5 * 10) / (size + 10)  # Vehtari et al. 2024: ten draws' worth of k = 0.5


@pytest.mark.parametrize("draws", [25, 60, 300])
def test_khat_is_the_literal_one(draws: int) -> None:
    w = np.random.default_rng(draws).pareto(2.0, draws)
    assert weights.khat(w) == pytest.approx(literal_khat(w.tolist()), rel=1e-9)


def test_pairs_and_their_probabilities_by_hand() -> None:
    i, j = pairs(3)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    reward = torch.tensor([[0.0, math.log(3.0), math.log(3.0)], [2.0, 2.0, -1e4]], dtype=torch.float64)
    wanted = torch.tensor([[0.25, 0.25, 0.5], [0.5, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(bradley_terry(reward), wanted)
    torch.testing.assert_close(bradley_terry(reward + 7.0), wanted)
    assert bradley_terry(reward[:, :1]).shape == (2, 0)
