"""Rewards to Bradley-Terry comparisons, for objectives that learn from pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klbench.estimate import Array


def pairs(draws: int) -> tuple[Tensor, Tensor]:
    """All i < j of K draws: two index vectors [K(K-1)/2]."""
    i, j = torch.triu_indices(draws, draws, 1)
    return i, j


def bradley_terry(reward: Tensor) -> Tensor:
    """[P, pairs] probability sigma(r_i - r_j) that draw i beats draw j, for every pair of a prompt's draws; reward [P, K].

    Losses that are linear in the label take this probability in place of a drawn label: the same expected gradient, less noise.
    """
    i, j = pairs(reward.shape[1])
    return torch.sigmoid(reward[:, i] - reward[:, j])


def bisected(short: Callable[[Array], NDArray[np.bool_]], low: Array, high: Array, steps: int) -> Array:
    """Where `short` turns from true to false between low and high, elementwise: the win rate that a log-ratio has to reach."""
    for _ in range(steps):
        middle = (low + high) / 2
        below = short(middle)
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray((low + high) / 2)
