"""The learning curve and the choice of a learning rate, against sums over every outcome of the tiny prior."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from klbench import bank as banks
from klbench import exact, models, probe, task
from klbench.method import objective
from klbench.policies.causal_lm import CausalLM
from klbench.record import Run, Score, Train
from klbench.score import RATE, trained_policy


@pytest.fixture(scope="module")
def prior() -> CausalLM:
    found = models.open_prior("tiny")
    assert isinstance(found, CausalLM)
    return found


def asked(method: str, **settings: object) -> Run:
    train = Train(**{"steps": 4, "prompts": 4, "samples": 8, "lr": 0.001, "checkpoint_every": 4, **settings})
    return Run(
        task="exact/dense",
        task_version=1,
        method=method,
        kind="objective",
        prior="tiny",
        beta=0.3,
        max_new_tokens=4,
        train=train,
        score=Score(),
    )


def test_the_curve_is_near_the_exact_figures(prior: CausalLM, tmp_path: Path) -> None:
    dense = task.load("exact/dense")
    run, target, prompts = asked("rloo"), dense.target(prior, 0.3), dense.prompts("score")
    bank = banks.open_bank(dense, prior, target, tmp_path, 2048).first(len(prompts))
    sharp = prior.prompted("sharp", None, ())
    found = probe.Curve(run.model_copy(update={"max_new_tokens": dense.max_new_tokens}), prior, target, prompts, bank)(sharp, 3)
    truth = exact.truths(prior, dense, prior, target, prompts, dense.max_new_tokens)
    assert found["reverse_kl"] == pytest.approx(truth["reverse_kl"], abs=0.06)
    assert found["wasted_nats"] == pytest.approx(0.0, abs=0.02)
    assert abs(found["reverse_kl"] - truth["forward_kl"]) > 0.1 or abs(truth["forward_kl"] - truth["reverse_kl"]) < 0.1


def test_a_rate_is_chosen_by_the_method_s_own_optimum(prior: CausalLM) -> None:
    """Best-of-8 of the prior is sft's optimum: to it, the posterior is far, and the other way round."""
    dense = task.load("exact/dense")
    target = dense.target(prior, 0.3)
    run = asked("sft").model_copy(update={"max_new_tokens": dense.max_new_tokens})
    search = probe.Search.of(run, objective("sft"), dense, prior, target)
    rows = probe.drawn(prior, prior, target, search.prompts, dense.max_new_tokens, 0)
    own, p_star = search.tilt(rows), probe.Search.of(run, objective("rloo"), dense, prior, target).tilt(rows)
    assert np.allclose(p_star, rows.reward / 0.3) and not np.allclose(own, p_star)
    assert abs(float(np.exp(own).mean()) - 1) < 0.1  # a density ratio to the prior: its mean under the prior is 1


def test_the_nearest_rate_is_kept_and_named(prior: CausalLM, tmp_path: Path) -> None:
    dense = task.load("exact/dense")
    target, prompts = dense.target(prior, 0.3), dense.prompts("score")
    bank = banks.open_bank(dense, prior, target, tmp_path, 512).first(len(prompts))
    run = asked("rloo", search=(0.01, 2.0)).model_copy(update={"max_new_tokens": dense.max_new_tokens})
    _, curve, notes = trained_policy(run, dense, prior, target, bank, tmp_path, lambda event: None, ())
    folder = tmp_path / "policies" / run.id
    assert notes == ["learning rate 0.002, the nearest of 2 on the dev split"] and float((folder / RATE).read_text()) == 0.002
    assert [p.name for p in folder.parent.iterdir()] == [run.id]
    _, again, notes_again = trained_policy(run, dense, prior, target, bank, tmp_path, lambda event: pytest.fail("trained twice"), ())
    assert again == curve and notes_again == notes
