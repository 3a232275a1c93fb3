"""The loop: it learns, it resumes bit for bit, and what it stores is what it had."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny import continuations, exact, model, tokenizer
from torch import Tensor

from klbench import method, models
from klbench import train as public_train
from klbench.batch import Batch
from klbench.errors import UserError
from klbench.method import AbstractObjective
from klbench.policies.causal_lm import CausalLM, token_laws, wrap
from klbench.record import Run, Score, Train
from klbench.target import Policy, Reward, TiltedPrior
from klbench.task import AbstractTask
from klbench.train import batch_of, train

T, BETA = 3, 0.25


def count_a(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    return [min(1.0, 0.5 * c.count("a")) for c in completions]


@dataclass(frozen=True)
class Letters(AbstractTask):
    name: ClassVar[str] = "letters"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "more a"
    max_new_tokens: ClassVar[int] = T
    beta: ClassVar[float] = BETA

    def prompts(self, split: str) -> list[str]:
        return {"train": ["a", "b c", "c c b"], "dev": ["b"], "score": ["c"]}[split]

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, count_a, beta, 1.0)

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return None


@pytest.fixture
def prior() -> CausalLM:
    return wrap("tiny", model("llama", 4), tokenizer())


def asked(objective: str, steps: int = 6, **settings: object) -> Run:
    fields = {"steps": steps, "prompts": 2, "samples": 4, "lr": 0.01, "checkpoint_every": 2, **settings}
    return Run(
        task="letters", task_version=1, method=objective, kind="objective", prior="tiny", beta=BETA, seed=3, max_new_tokens=T,
        train=Train(**fields), score=Score(),
    )  # fmt: skip


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "objective", ["rloo", "ppo", "dpg", "trajectory_balance", "dpo", "actor_critic", "rb_kl", "hnpg", "conditional_training"]
)
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_killed_run_goes_on_bit_for_bit(objective: str, stop_at: int, prior: CausalLM, tmp_path: Path) -> None:
    run, task = asked(objective), Letters()
    whole, curve = train(run, task, prior, tmp_path / "whole" / "p")

    def kill(event: dict[str, object]) -> None:
        if event["step"] == stop_at:
            raise Killed

    with pytest.raises(Killed):
        train(run, task, prior, tmp_path / "cut" / "p", kill)
    again, curve_again = train(run, task, prior, tmp_path / "cut" / "p")
    assert curve_again == curve
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["p"]  # no work left behind
    stored, curve_stored = train(run, task, prior, tmp_path / "cut" / "p", kill)  # done: nothing is trained again
    assert curve_stored == curve and stored.weights_hash() == whole.weights_hash()


def test_another_seed_is_another_run(prior: CausalLM, tmp_path: Path) -> None:
    first, _ = train(asked("rloo"), Letters(), prior, tmp_path / "a")
    other, _ = train(asked("rloo").model_copy(update={"seed": 4}), Letters(), prior, tmp_path / "b")
    assert first.weights_hash() != other.weights_hash() and prior.weights_hash() not in (first.weights_hash(), other.weights_hash())


def reverse_kl(q: CausalLM, prior: CausalLM) -> float:
    rows, total = continuations(4, T), 0.0
    r = torch.tensor(count_a([], ["".join("?abc"[i] for i in row if i) for row in rows]), dtype=torch.float64)
    for prompt in Letters().prompts("train"):
        lq, l0 = (exact(m.model, m.encode(prompt), rows) for m in (q, prior))
        ls = (l0 + r / BETA).log_softmax(0)
        total += float((lq.exp() * (lq - ls)).sum()) / 3
    return total


@pytest.mark.parametrize("objective", [o for o in method.names("objectives") if method.objective(o).optimum == "target"])
def test_objectives_approach_the_posterior(objective: str, prior: CausalLM, tmp_path: Path) -> None:
    policy, curve = train(asked(objective, 120, samples=16, prompts=3, lr=0.001, checkpoint_every=1000), Letters(), prior, tmp_path / "p")
    assert reverse_kl(policy, prior) < 0.5 * reverse_kl(prior, prior)
    assert len(curve) == 120 and curve[-1]["tokens"] > curve[0]["tokens"]
    still, _ = train(asked(objective, 5, lr=0.0), Letters(), prior, tmp_path / "still")  # the mutant that learns nothing
    assert reverse_kl(still, prior) == pytest.approx(reverse_kl(prior, prior), abs=1e-6)


def test_batches_visit_every_prompt_equally() -> None:
    seen = [i for step in range(6) for i in batch_of(4, 2, seed=1, step=step)]
    assert sorted(seen) == sorted([0, 1, 2, 3] * 3)
    assert seen != [i for step in range(6) for i in batch_of(4, 2, seed=2, step=step)]


def test_a_loss_that_is_not_finite_names_the_step(prior: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from klbench.objectives.rloo import RLOO

    monkeypatch.setattr(RLOO, "loss", lambda self, batch, beta: batch.log_q.sum() * float("nan"))
    with pytest.raises(UserError, match="the loss is nan at step 0"):
        train(asked("rloo"), Letters(), prior, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_public_train_saves_a_loadable_policy_and_guards_its_folder(prior: CausalLM, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="holds no trained policy"):
        public_train(prior, "factuality", "rloo", tmp_path / "full")
    with pytest.raises(UserError, match="did you mean 'rloo'"):
        public_train(prior, "factuality", "rlo", tmp_path / "new")
    assert not (tmp_path / "new").exists() and (tmp_path / "full" / "mine.txt").read_text() == "keep"


def test_curve_is_on_disk(prior: CausalLM, tmp_path: Path) -> None:
    _, curve = train(asked("reinforce"), Letters(), prior, tmp_path / "p")
    lines = [json.loads(line) for line in (tmp_path / "p" / "curve.jsonl").read_text().splitlines()]
    assert lines == curve and "kl_prior" not in curve[0]  # reinforce never asks the prior


# what an objective may ask for


@dataclass(frozen=True)
class Asks(AbstractObjective):
    """Wants everything, and keeps what it was given."""

    seen: list[Batch] = field(default_factory=list)

    optimum: ClassVar[str] = "none"
    source: ClassVar[str] = "none"
    draws: ClassVar[str] = "both"
    needs_kl: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True
    controls: ClassVar[tuple[str, str]] = ("a a", "b")

    def loss(self, batch: Batch, beta: float) -> Tensor:
        self.seen.append(batch)
        return -batch.total(batch.log_q).mean()


def test_the_trainer_gives_what_an_objective_asks_for(prior: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks, run = Asks(), asked("rloo", steps=1)
    monkeypatch.setattr("klbench.method.objective", lambda *_: asks)
    train(run, Letters(), prior, tmp_path / "p")
    batch = asks.seen[0]
    assert batch.prompt is not None and batch.own is not None and batch.top is not None and batch.old_log_q is not None
    assert batch.kl_token is not None and batch.features is not None and batch.other_log_q is not None
    some = [Letters().prompts("train")[i] for i in batch.prompt.tolist()]
    assert batch.own.tolist() == [[False, False, True, True]] * 2 and batch.top.tolist() == [1.0, 1.0]
    first, second = (prior.prompted("q", text, ()) for text in Asks.controls)  # nothing has been learned at step 0
    said = prior.log_prob(some, batch.tokens, batch.mask)
    torch.testing.assert_close(batch.log_p0, said)
    torch.testing.assert_close(batch.log_q.detach(), first.log_prob(some, batch.tokens, batch.mask))
    torch.testing.assert_close(batch.other_log_q.detach(), second.log_prob(some, batch.tokens, batch.mask))
    torch.testing.assert_close(batch.old_log_q, torch.where(batch.own[:, :, None], batch.log_q.detach(), said))
    laws = token_laws(first, prior, some, batch.tokens, batch.mask)
    torch.testing.assert_close(batch.kl_token.detach(), laws.cross - laws.entropy)
    torch.testing.assert_close(batch.features, prior.states(some, batch.tokens, batch.mask)[:, :, :-1])
    assert float((batch.kl_token.detach()[batch.mask]).min()) > 0  # the mutant: the same control for both laws


def test_a_policy_trained_under_a_control_is_saved_with_it(prior: CausalLM, tmp_path: Path) -> None:
    policy, _ = train(asked("conditional_training", steps=2), Letters(), prior, tmp_path / "p")
    opened = models.open_policy("mine", str(tmp_path / "p"), prior)
    assert isinstance(opened, CausalLM) and opened.system == policy.system is not None
    tokens, mask = torch.tensor([[[1, 2, 0]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    torch.testing.assert_close(opened.log_prob(["a"], tokens, mask), policy.log_prob(["a"], tokens, mask))


@dataclass(frozen=True)
class Unbounded(Letters):
    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, count_a, beta)


def test_right_and_wrong_need_a_ceiling(prior: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="conditional_training learns from right and wrong, and the reward of letters has no declared"):
        train(asked("conditional_training"), Unbounded(), prior, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_prior_and_own_draws_need_four(prior: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.samples of at least 4, got 2"):
        train(asked("hnpg", samples=2), Letters(), prior, tmp_path / "p")


def test_the_curve_is_measured_at_even_steps_and_the_last(prior: CausalLM, tmp_path: Path) -> None:
    _, curve = train(
        asked("rloo", steps=7, curve=3), Letters(), prior, tmp_path / "p", measure=lambda policy, step: {"reverse_kl": 1.0 + step}
    )
    assert [row["step"] for row in curve if "reverse_kl" in row] == [3.0, 5.0, 7.0]
    assert curve[-1]["samples"] == 7 * 2 * 4 and curve[-1]["reverse_kl"] == 7.0
    _, without = train(asked("rloo", steps=3), Letters(), prior, tmp_path / "q", measure=lambda policy, step: {"reverse_kl": 0.0})
    assert all("reverse_kl" not in row for row in without)
