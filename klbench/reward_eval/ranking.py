"""Does a reward put the better text first? Pairs, AUC, and the best of k draws; ties count as a lot would settle them.

    pairwise   mean over pairs of 1[r_w > r_l] + 1[r_w = r_l]/2                             w: the one to prefer
    AUC        P(r(good) > r(bad)) + P(r(good) = r(bad))/2: pairwise over all pairs of a good and a bad text
    prior      pairwise over all pairs of draws of one prompt whose gold differs, mean over prompts; equal golds make no pair
    best of k  P(the reward's best of k draws is a best one by gold), the mean over all C(N, k) subsets of a prompt's N draws:
               sum_i [C(a_i + b_i + 1, k) - C(a_i, k)] / (b_i + 1) / C(N, k),      a_i, b_i: draws whose gold is no better than i's
               and whose reward is less than i's, or equal to it (a tie between t + 1 chosen draws is settled by lot)

The last two are U-statistics: unbiased, where redrawing k of the N is not. Source: Hoeffding 1948; the closed form over ties is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from klbench import estimate
from klbench.estimate import BLOCKS, Array, Estimate, Jackknife
from klbench.reward_eval import intervals
from klbench.reward_eval.intervals import Flags, Index


def pairwise(chosen: Array, rejected: Array, cluster: Index) -> Estimate:
    """From the rewards [n] of both texts of each pair; clusters: pairs of one prompt."""
    values = (chosen > rejected) + (chosen == rejected) / 2
    figure = intervals.share_of(values, cluster)
    ties = int((chosen == rejected).sum())
    if len(values) and ties == len(values):
        return estimate.exactly(0.5, ties, "every pair is a tie")
    return replace(figure, reason=f"{ties} ties of {len(values)} pairs, {int(cluster.max(initial=-1)) + 1} prompts")


def auc(reward: Array, good: Flags, cluster: Index) -> Estimate:
    """From rewards [n] and labels [n] (bool). Error: DeLong's structural components, summed in clusters."""
    yes, no = reward[good], reward[~good]
    if not (len(yes) and len(no)):
        return estimate.undefined("labels of one kind only", n=len(reward))
    above, below = _beaten(yes, no), 1 - _beaten(no, yes)
    value = float(above.mean())
    if np.ptp(reward) == 0:
        return estimate.exactly(0.5, len(reward), "every text has the same reward")
    influence = np.zeros(len(reward))
    influence[good], influence[~good] = (above - value) / len(yes), (below - value) / len(no)
    figure = intervals.share(value, *_less_one(intervals.variance(influence, cluster)), len(reward), min(len(yes), len(no)))
    return replace(figure, reason=f"{len(yes)} good, {len(no)} bad")


def _less_one(found: tuple[float, int]) -> tuple[float, int]:
    return found[0], found[1] - 1


def _beaten(a: Array, b: Array) -> Array:
    """[len(a)] share of b below each of a, ties halved."""
    ordered = np.sort(b)
    return np.asarray((np.searchsorted(ordered, a, "left") + np.searchsorted(ordered, a, "right")) / (2 * len(b)))


def among_draws(reward: Array, gold: Array) -> Estimate:
    """Pairwise accuracy over the prior's draws [P, N] of each prompt. Prompts whose gold never differs make no pair."""
    found = [x for r, g in zip(reward, gold, strict=True) if (x := _concordance(r, g)) is not None]
    if not found:
        return estimate.undefined("gold does not vary among the draws of any prompt", n=reward.size)
    if all(np.ptp(r) == 0 for r in reward):
        return estimate.exactly(0.5, reward.size, "every draw of a prompt has the same reward")
    full, spread = np.array(found).T
    figure = intervals.over_prompts(full, spread, reward.size, reward.shape[1] * len(full) / 2)
    return replace(figure, reason=f"{len(full)} of {len(reward)} prompts have draws that differ in gold")


def _concordance(reward: Array, gold: Array) -> tuple[float, float] | None:
    """(share, variance) of one prompt's draws [N], None without a pair. Error: the projection of a ratio of U-statistics."""
    r, g, weight, _ = _cells(reward, gold)
    higher = g[:, None] > g[None, :]
    right = (r[:, None] > r[None, :]) + (r[:, None] == r[None, :]) / 2
    won = np.where(higher, right, 0.0) + np.where(higher.T, 1 - right, 0.0)
    pairs, won = (higher | higher.T).astype(np.float64) @ weight, won @ weight  # of a draw of each cell
    total = float(weight @ pairs)
    if not total:
        return None
    value, draws = float(weight @ won) / total, len(reward)
    z = 2 * (won - value * pairs) / total  # influence of one draw
    return value, draws / (draws - 1) * float(weight @ z**2)


def best_of(reward: Array, gold: Array, sizes: Sequence[int]) -> dict[int, Estimate]:
    """By k, from the prior's draws [P, N], N > k. Error: 8-block jackknife."""
    block = estimate.blocks_of(reward.shape[1])
    keeps = [np.ones(len(block), bool), *(block != b for b in range(BLOCKS))]
    found = np.stack([_best_of(r, g, sizes, keeps) for r, g in zip(reward, gold, strict=True)])  # [P, k, 1 + B]
    out = {}
    for i, k in enumerate(sizes):
        full, left = found[:, i, 0], found[:, i, 1:].T
        out[k] = intervals.over_prompts(full, Jackknife(full, left).variances, reward.size, reward.size / k)
    return out


def _best_of(reward: Array, gold: Array, sizes: Sequence[int], keeps: Sequence[Flags]) -> Array:
    """[k, subsets of draws kept] of one prompt's draws [N]."""
    r, g, _, cell = _cells(reward, gold)
    weight = np.stack([np.bincount(cell[keep], minlength=len(r)) for keep in keeps], 1).astype(np.float64)  # draws of each cell
    none_better = g[None, :] <= g[:, None]  # [i, j]: j's gold is no better than i's
    a = (none_better & (r[None, :] < r[:, None])).astype(np.float64) @ weight
    b = (none_better & (r[None, :] == r[:, None])).astype(np.float64) @ weight - 1  # without the draw itself
    draws = weight.sum(0)
    chance = [np.where(weight > 0, (_chosen(a + b + 1, draws, k) - _chosen(a, draws, k)) / np.maximum(b + 1, 1), 0.0) for k in sizes]
    return np.stack([(weight * c).sum(0) for c in chance])


def _chosen(m: Array, draws: Array, k: int) -> Array:
    """C(m, k) / C(draws, k), elementwise."""
    out = np.ones(m.shape)
    for step in range(k):
        out = out * np.maximum(m - step, 0) / (draws - step)
    return out


def _cells(reward: Array, gold: Array) -> tuple[Array, Array, Array, Index]:
    """(reward, gold, draws) of each distinct pair of values, and the cell of each draw."""
    cells, at, weight = np.unique(np.stack([reward, gold], 1), axis=0, return_inverse=True, return_counts=True)
    return cells[:, 0], cells[:, 1], weight.astype(np.float64), np.asarray(at).reshape(-1)
