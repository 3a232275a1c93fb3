"""Settings behind an objective's name, and the laws of what they switch on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import model, tokenizer

from klbench import method
from klbench.batch import Batch
from klbench.errors import UserError
from klbench.laws import WORLDS, check_objective, expected_gradient, optimum
from klbench.objectives.dpo import DPO
from klbench.objectives.grpo_guard import GRPOGuard
from klbench.objectives.implicit_prm import ImplicitPRM
from klbench.objectives.rebel import REBEL
from klbench.objectives.sft import SFT
from klbench.objectives.trajectory_balance import TrajectoryBalance
from klbench.objectives.unlikelihood import Unlikelihood
from klbench.policies.causal_lm import wrap
from klbench.samplers.realignment import Realignment


def test_settings_are_fields():
    assert method.objective("rebel:huber=0.7") == REBEL(0.7)
    assert method.objective("dpo:length-normalised=true") == DPO(True)
    assert method.objective("unlikelihood:form=ascent,alpha=0.5") == Unlikelihood("ascent", 0.5)
    assert method.objective("robust-dpo:flip=.2,unbiased=false") == method.objective("robust_dpo:unbiased=false,flip=2e-1")


@pytest.mark.parametrize(
    "spec, says",
    [
        ("rebel:hubr=1", "did you mean 'huber'"),
        ("rebel:huber", "NAME:setting=value"),
        ("rebel:huber=x", "a number expected, got 'x'"),
        ("rebel:huber=-1", "huber is a distance"),
        ("rebel:", "NAME:setting=value"),
        ("unlikelihood:form=acsent", "did you mean 'ascent'"),
        ("dpo:length_normalised=1", "is true or false"),
        ("rloo:clip=1", "rloo has no settings"),
        ("reble:huber=1", "did you mean 'rebel'"),
        ("implicit_prm:flip=0.5", "a rate in"),
        ("sft:prompt_weight=-1", "0 or more"),
        ("trajectory_balance:huber=-1", "a distance"),
    ],
)
def test_a_wrong_setting_is_named(spec, says):
    with pytest.raises(UserError, match=says):
        method.objective(spec)


@pytest.mark.parametrize("spec", ["rebel:huber=0.7", "implicit_prm:flip=0.2", "robust_dpo:unbiased=false"])
def test_laws_hold_with_the_switch_on(spec, broken):
    assert broken(check_objective(method.objective(spec))) == []


def test_flipped_labels_without_the_correction_are_rejected(mutant, broken):
    def told(self, logit):
        return -torch.nn.functional.logsigmoid(logit)

    wrong = mutant(ImplicitPRM, told=told)
    assert broken(check_objective(replace(wrong, flip=0.2))) == [] and told  # stated and drawn loss are wrong together,
    clean, dirty = (expected_gradient(x, WORLDS[0], WORLDS[0].log_p0, 0.5) for x in (ImplicitPRM(), replace(wrong, flip=0.2)))
    assert (clean - dirty).norm() > 0.05 * clean.norm()  # and not what clean labels say;
    torch.testing.assert_close(expected_gradient(ImplicitPRM(0.2), WORLDS[0], WORLDS[0].log_p0, 0.5), clean)  # the corrected one is


def given(log_ratio, reward, lengths):
    """One prompt; the log-ratio of a draw spread evenly over its tokens."""
    T = max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    log_q = torch.tensor(log_ratio).double()[:, None] / torch.tensor(lengths)[:, None] * mask
    return Batch(
        torch.zeros(1, len(lengths), T).long(), mask[None], log_q[None], torch.zeros(1, len(lengths), T).double(),
        torch.tensor([reward]).double(), torch.zeros(1, len(lengths)), prompt=torch.tensor([0]),
    )  # fmt: skip


def test_length_normalised_dpo_by_hand():
    batch = given([2.0, 3.0], [1.0, 0.0], [1, 3])  # u 2 and 3 in all, 2 and 1 a token
    wins = torch.tensor(1.0).double().sigmoid()
    by_hand = lambda h: -(wins * h.sigmoid().log() + (1 - wins) * (-h).sigmoid().log())  # noqa: E731
    torch.testing.assert_close(DPO(True).loss(batch, 0.5), by_hand(torch.tensor(0.5).double()))
    torch.testing.assert_close(DPO().loss(batch, 0.5), by_hand(torch.tensor(-0.5).double()))
    assert DPO(True).optimum == "none" and DPO().optimum == "target"


def test_huber_bounds_the_pull_of_one_reward_and_keeps_the_optimum():
    world, beta = WORLDS[0], 0.7
    best = optimum(TrajectoryBalance(), world, beta)
    log_z = (world.log_p0 + world.rewards / beta).logsumexp(1)
    for objective, vanishes in ((TrajectoryBalance(0.1), True), (TrajectoryBalance(), True)):
        state = objective.init(1, 0) | {"log_z": log_z[:1].clone().requires_grad_(), "seen": torch.ones(1).double()}
        assert bool(expected_gradient(objective, world, best[:1], beta, state).abs().max() < 1e-10) == vanishes
    pull = {}
    for huber in (0.0, 0.1, 100.0):
        batch = given([0.0, 0.0], [0.0, 50.0], [1, 1])
        log_q = batch.log_q.clone().requires_grad_()
        state = {"log_z": torch.zeros(1).double(), "start": torch.zeros(1).double(), "seen": torch.ones(1).double()}
        loss, _ = TrajectoryBalance(huber).loss(replace(batch, log_q=log_q), 1.0, state)
        loss.backward()
        pull[huber] = float(log_q.grad.abs().max())
    assert pull[0.0] == pull[100.0] == pytest.approx(50.0) and pull[0.1] == pytest.approx(0.1)


def test_what_grpo_guard_watches_by_hand():
    batch = given([0.4, -0.4], [1.0, 0.0], [1, 1])
    batch = replace(batch, old_log_q=torch.zeros_like(batch.log_q))
    seen = GRPOGuard().watched(batch)
    e = torch.tensor([0.4, -0.4]).exp().mean()
    assert seen["ratio"] == pytest.approx(float(e)) and seen["clipped_low"] == seen["clipped_high"] == 0.5
    assert seen["ratio_centred"] == pytest.approx(float(torch.tensor([0.8, -0.8]).exp().mean()))


def test_the_prompt_is_learnt_by_its_weight():
    policy = wrap("tiny", model("llama", 4), tokenizer())
    found = policy.prompt_log_prob(["a b c", "c", "b"])
    tokens, mask = policy.spelled(["a"], [[" b c"]])
    torch.testing.assert_close(found.detach()[0], policy.log_prob(["a"], tokens, mask).sum())
    assert found[1] == found[2] == 0 and found.requires_grad
    batch = replace(given([1.0, 2.0], [1.0, 0.0], [1, 1]), prompt_log_q=torch.tensor([-3.0]).double())
    plain = SFT().loss(replace(batch, prompt_log_q=None), 1.0)
    assert SFT(0.5).needs_prompt and not SFT().needs_prompt
    torch.testing.assert_close(SFT(0.5).loss(batch, 1.0), plain + 1.5)


def test_a_negative_share_decodes_away_from_the_policy():
    q, p0 = (torch.tensor(x).double().log() for x in ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2]))
    by_hand = (2 * p0 - q).log_softmax(-1)  # p0^2 / q
    torch.testing.assert_close(Realignment(-1.0).law(q, p0), by_hand)
    assert method.sampler("realignment:-1") == Realignment(-1.0)


def test_curves_keep_what_is_watched(tmp_path):
    from test_train import Letters, asked

    from klbench.train import train

    prior = wrap("tiny", model("llama", 4), tokenizer())
    _, curve = train(asked("grpo_guard", steps=2), Letters(), prior, tmp_path / "p")
    assert all(0 <= row["clipped_low"] <= 1 and row["ratio"] > 0 for row in curve)
    policy, _ = train(asked("sft:prompt_weight=1", steps=20), Letters(), prior, tmp_path / "q")
    plain, _ = train(asked("sft", steps=20), Letters(), prior, tmp_path / "r")
    said = lambda model: float(model.prompt_log_prob(Letters().prompts("train")).detach().sum())  # noqa: E731
    assert said(policy) > said(plain)
