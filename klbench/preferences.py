"""Rewards to Bradley-Terry comparisons, for objectives that learn from pairs."""

from __future__ import annotations

import torch
from torch import Tensor


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
