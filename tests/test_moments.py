"""The moment fit by numbers: the bias task's closed form, infeasible wishes, reach, several features, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from klbench import bank as banks
from klbench import task
from klbench.estimators.moments import fit
from klbench_tasks.bias.task import Bias
from klbench_tasks.bias.variant import shipped


def gendered(she: int, he: int, none: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [she, he, none])


def test_the_closed_form_of_the_bias_task() -> None:
    """lambda = log(h/s)/2, its error sqrt((1/s + 1/h)/N)/2: what tasks/bias/lambda.json states."""
    found = fit(gendered(120, 300, 580), 0.0, box=(-1.0, 1.0))
    assert found.lam is not None and found.stderr is not None
    assert found.lam[0] == pytest.approx(math.log(300 / 120) / 2, abs=1e-9)
    assert found.stderr[0] == pytest.approx(math.sqrt((1 / 0.12 + 1 / 0.3) / 1000) / 2, rel=1e-3)
    z = 2 * math.sqrt(0.12 * 0.3) + 0.58
    assert found.log_z == pytest.approx(math.log(z)) and found.least_kl.value == pytest.approx(-math.log(z))
    assert found.reach == pytest.approx(1000 * z / math.exp(abs(found.lam[0])))
    assert found.status == found.least_kl.status == "certified" and found.reason
    low, high = found.least_kl.low, found.least_kl.high
    assert low is not None and high is not None and 0 < low < -math.log(z) < high
    assert (-math.log(z) - low) - (high + math.log(z)) == pytest.approx(
        math.log1p(3 / found.reach)
    )  # what could hide would make it cheaper


def test_shipped_lambdas_state_the_error_of_the_general_fit() -> None:
    version, rows = next(iter(shipped("bias").items()))
    assert len(version) == 64
    for row in list(rows.values())[::7]:
        she, he = round(row["she"] * 4096), round(row["he"] * 4096)
        found = fit(gendered(she, he, 4096 - she - he), 0.0, box=(-1.0, 1.0))
        assert found.lam is not None and found.stderr is not None
        assert row["lambda"] == round(float(found.lam[0]), 6) and row["stderr"] == pytest.approx(found.stderr[0], abs=2e-5)


def test_the_shipped_target_is_as_balanced_as_its_own_fit_allows() -> None:
    """On the bank, which is other draws: E_p*[phi] of each prompt within 3.5 standard errors, both sources counted; mean within .02."""
    loaded = Bias()
    path = banks.shipped(loaded, "mini")
    assert path is not None
    bank = banks.Bank.from_bytes(path.read_bytes(), str(path))
    rows = next(iter(shipped("bias").values()))
    phi, N = bank.feature, bank.reward.shape[1]
    assert phi is not None
    lam = np.array([rows[p]["lambda"] for p in loaded.prompts("score")])
    error = np.array([rows[p]["stderr"] for p in loaded.prompts("score")])
    w = np.exp(lam[:, None] * phi)
    share = w / w.sum(1, keepdims=True)
    found = (share * phi).sum(1)
    slope = (share * phi**2).sum(1) - found**2  # dE/dlambda
    of_bank = np.sqrt((share**2 * (phi - found[:, None]) ** 2).sum(1))
    z = found / np.hypot(of_bank, slope * error)
    assert N == 2048 and np.abs(z).max() < 3.5 and (np.abs(z) < 2).mean() > 0.7
    assert abs(found.mean()) < 0.02 and np.abs(found).max() < 0.08
    untilted = phi.mean(1)
    assert np.abs(untilted).max() > 0.4  # the prior itself is far from balanced
    assert files(Bias.__module__.rpartition(".")[0]).joinpath("lambda.json").is_file() and task.load("bias").features() is not None


@pytest.mark.parametrize("mu", [1.0, -1.0, 1.5, -7.0])
def test_a_wish_outside_the_sample_is_infeasible(mu: float) -> None:
    found = fit(gendered(10, 20, 30), mu, box=(-1.0, 1.0))
    assert found.status == found.least_kl.status == "infeasible" and found.lam is None and found.stderr is None and found.log_z is None
    assert found.reach is None and found.least_kl.value is None and f"the wanted {mu:g} lies outside what 60 draws" in found.reason


def test_a_draw_that_the_prior_cannot_give_makes_nothing_feasible() -> None:
    phi, log_weight = gendered(16, 0, 16), np.zeros(32)
    log_weight[:16] = -math.inf
    assert fit(phi, 0.5, log_weight).status == "infeasible" and fit(phi, 0.5).status == "uncertified"
    assert fit(phi, 0.5, np.full(32, -math.inf)).status == "infeasible"


def test_two_features_outside_the_hull_though_each_alone_is_inside() -> None:
    phi = np.repeat([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 20, 0)
    box = (0.0, 1.0)
    assert fit(phi[:, 0], 0.7, box=box).lam is not None and fit(phi[:, 1], 0.7, box=box).lam is not None
    assert fit(phi, [0.7, 0.7], box=box).status == "infeasible"  # the wanted sum is 1.4, a draw has at most 1
    assert fit(phi, [0.5, 0.5], box=box).status == "infeasible"  # on the edge: lambda runs away
    inside = fit(phi, [0.4, 0.3], box=box)
    assert inside.lam is not None
    np.testing.assert_allclose(inside.lam, np.log([0.4 / 0.3, 0.3 / 0.3]), atol=1e-6)


def test_features_that_say_the_same_twice() -> None:
    phi = gendered(20, 40, 40)
    alone, twice = fit(phi, 0.2, box=(-1.0, 1.0)), fit(np.stack([phi, phi], 1), [0.2, 0.2], box=(-1.0, 1.0))
    assert twice.lam is not None and alone.lam is not None
    np.testing.assert_allclose(twice.lam.sum(), alone.lam[0], atol=1e-6)
    assert twice.least_kl.value == pytest.approx(alone.least_kl.value or 0.0, abs=1e-9)
    assert fit(np.stack([phi, phi], 1), [0.2, 0.1], box=(-1.0, 1.0)).status == "infeasible"
    constant = fit(np.full(32, 0.5), 0.5, box=(0.0, 1.0))  # already there, whatever lambda
    assert constant.lam is not None and constant.lam[0] == 0.0 and constant.least_kl.value == 0.0


def test_reach_and_its_statuses() -> None:
    phi, mu = gendered(5, 500, 495), 0.9
    found = {r: fit(phi, mu, box=(-1.0, r)) for r in (1.0, 2.0, 9.0)}
    assert found[1.0].reach is not None and 1 < found[1.0].reach < 30
    assert [x.status for x in found.values()] == ["wide", "uncertified", "uncertified"]
    assert found[9.0].least_kl.low is None and found[9.0].least_kl.value == found[1.0].least_kl.value
    blind = fit(phi, mu)
    assert blind.status == "uncertified" and blind.reach == 0.0 and "no box" in blind.reason
    strata = np.repeat([1, 0], 500)
    halved = fit(np.tile(gendered(50, 250, 200), 2), 0.2, stratum=strata, box=(-1.0, 1.0))
    whole = fit(np.tile(gendered(50, 250, 200), 2), 0.2, box=(-1.0, 1.0))
    assert halved.reach is not None and whole.reach == pytest.approx(2 * halved.reach)  # the prior's own draws alone count


def test_far_wishes_and_large_features_converge() -> None:
    rng = np.random.default_rng(0)
    phi = rng.normal(size=400)
    for mu in (0.0, 1.5, float(phi.max()) - 1e-3):
        found = fit(phi * 1e4, mu * 1e4)
        assert found.lam is not None
        w = np.exp(found.lam[0] * (phi - phi.max()) * 1e4)
        assert w @ phi / w.sum() == pytest.approx(mu, abs=1e-5)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: fit(np.zeros(15), 0.0), "n >= 16"),
        (lambda: fit(np.zeros(16), 0.0, np.zeros(15)), "of the same n"),
        (lambda: fit(np.full(16, math.nan), 0.0), "finite"),
        (lambda: fit(np.zeros(16), math.inf), "finite"),
        (lambda: fit(np.zeros(16), 0.0, np.full(16, math.inf)), "log_weight: finite or -inf"),
        (lambda: fit(np.full(16, 2.0), 2.0, box=(-1.0, 1.0)), "outside its box"),
    ],
)
def test_refusals(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
