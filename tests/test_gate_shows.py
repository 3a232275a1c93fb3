"""What the gate is for, shown with trained policies: what breaks a method blocks, another seed does not, what is no like is not compared.

A policy of the `tiny` prior by an objective and a task that stand in files, as a team's own do; each change is one of theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import klbench
from klbench import run as grid
from klbench.gate import sides
from klbench.gate.compare import Verdict, check
from klbench.gate.settings import Gate, Metric
from klbench.record import Record
from klbench.score import cell

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
GATE = Gate(metrics={"reverse_kl": Metric(direction="min", margin=0.2), "gold": Metric(direction="max", margin=0.2)})
REWARDS = Gate(metrics={"gold": Metric(direction="max", margin=0.05)}, rewards_differ=True)

OBJECTIVE = """
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from klbench.batch import Batch
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class Ours(AbstractObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "arXiv:2402.14740"

    def loss(self, batch: Batch, beta: float) -> Tensor:
        log_q = batch.total(batch.log_q)
        gain = batch.reward - beta * (log_q - batch.total(batch.log_p0)).detach()
        return -((gain - gain.mean(1, keepdim=True)) * log_q).mean()

    def stated(self, log_q: Tensor, log_p0: Tensor, reward: Tensor, beta: float, draws: int) -> Tensor:
        return -(log_q.exp() * (reward - beta * (log_q - log_p0))).sum()
"""

TASK = """
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from klbench.target import Policy, Reward, TiltedPrior
from klbench.task import AbstractTask

SHUFFLED = 0.0


def warm(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    return [float(sum(w in ("sun", "warm", "calm") for w in c.split()) >= 2) for c in completions]


def trained(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    wrong = [zlib.crc32(f"{p}|{c}".encode()) % 1000 < 1000 * SHUFFLED for p, c in zip(prompts, completions, strict=True)]
    return [abs(label - turned) for label, turned in zip(warm(prompts, completions), wrong, strict=True)]


@final
@dataclass(frozen=True)
class Warm(AbstractTask):
    name: ClassVar[str] = "warm"
    version: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 4
    beta: ClassVar[float] = 0.3

    prior: ClassVar[str] = "tiny"
    summary: ClassVar[str] = "two warm words"

    def prompts(self, split: str) -> list[str]:
        lines = Path(__file__).with_name(f"{split}.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, trained, beta, 1.0)

    def gold(self) -> Reward:
        return warm

    def features(self) -> None:
        return None
"""


def objective(at: Path, was: str = "", now: str = "") -> None:
    assert was in OBJECTIVE
    (at / "ours.py").write_text(OBJECTIVE.replace(was, now) if was else OBJECTIVE)


def task(at: Path, shuffled: float = 0.0) -> None:
    folder = at / "warm"
    folder.mkdir(exist_ok=True)
    for split, lines in (("train", slice(0, 200)), ("dev", slice(200, 210)), ("score", slice(210, 226))):
        found = (ROOT / "tasks/exact/train.jsonl").read_text().splitlines()[lines]
        (folder / f"{split}.jsonl").write_text("\n".join(found) + "\n")
    (folder / "task.py").write_text(TASK.replace("SHUFFLED = 0.0", f"SHUFFLED = {shuffled}"))


Trainer = Callable[..., list[Record]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Trains and scores what a change leaves of the suite; the records of its directory, as `klbench check` reads them."""

    def train(
        settings: Sequence[str] = (), seed: int = 0, edit: Callable[[Path], None] | None = None, of: str = "exact/dense"
    ) -> list[Record]:
        at = tmp_path_factory.mktemp("repository")
        objective(at)
        task(at)
        if edit is not None:
            edit(at)
        base = [
            "samplers=[]", "objectives=[ours]", "train.steps=40", "train.samples=32", "train.lr=0.003", "score.truth=false", "methods={}",
        ]  # fmt: skip
        suite = grid.suite_of("gate", [*base, *settings], tasks=[of], seed=seed, include=(at,))
        for run in grid.resolve(suite, (at,)):
            if run.kind == "objective":
                cell(run, at / "run", lambda event: None, (at,), "cpu")
        (at / "run" / "manifest.json").write_text("{}")
        return sides.read(at / "run")

    return train


@pytest.fixture(scope="module")
def baseline(trained: Trainer) -> list[Record]:
    return trained()


def told(verdict: Verdict, code: int, *words: str) -> None:
    assert verdict.code == code, verdict.sentence
    assert "\n" not in verdict.sentence and all(word in verdict.sentence for word in words), verdict.sentence


def test_another_seed_passes(trained: Trainer, baseline: list[Record]) -> None:
    told(check(baseline, trained(seed=1), GATE), 0, "no regression found")


@pytest.mark.parametrize(
    ("was", "now"),
    [("batch.reward - beta *", "batch.reward + beta *"), ("batch.reward - beta *", "batch.reward - 0.5 * beta *")],
    ids=["flipped sign of the KL term", "half the beta, undeclared"],
)
def test_a_broken_objective_blocks(trained: Trainer, baseline: list[Record], was: str, now: str) -> None:
    broken = trained(edit=lambda at: objective(at, was, now))
    told(check(baseline, broken, GATE), 1, "reverse_kl of ours on exact/dense rose by", "after Holm")


def test_a_learning_rate_of_zero_blocks(trained: Trainer, baseline: list[Record]) -> None:
    told(check(baseline, trained(["train.lr=0"]), GATE), 1, "reverse_kl of ours on exact/dense rose by")


def test_half_the_beta_declared_is_another_posterior(trained: Trainer, baseline: list[Record]) -> None:
    told(check(baseline, trained(["beta=0.15", "train.steps=1"]), GATE), 4, "its β is 0.3 in the baseline and 0.15 in the candidate")


def test_fewer_prompts_are_no_like(trained: Trainer, baseline: list[Record]) -> None:
    told(check(baseline, trained(["score.prompts=4", "train.steps=1"]), GATE), 4, "6 in the baseline, 4 in the candidate, 2 are gone")


def test_another_tokenizer_is_no_like(trained: Trainer, baseline: list[Record], tmp_path: Path) -> None:
    other = tmp_path / "tiny"
    shutil.copytree(klbench.prior_path("tiny"), other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["sun"], vocabulary["rain"] = vocabulary["rain"], vocabulary["sun"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    moved = trained([f"prior={other}", "train.steps=1"])
    told(check(baseline, moved, GATE), 4, "its prior is tiny in the baseline and")
    found = check(baseline, moved, GATE)
    assert any("prior (weights or tokenizer) differs" in str(d) for d in found.differences)


def test_a_reward_with_a_fifth_of_its_labels_shuffled_blocks_on_gold(trained: Trainer) -> None:
    clean, shuffled = trained(of="warm"), trained(of="warm", edit=lambda at: task(at, 0.2))
    told(check(clean, shuffled, GATE), 4, "its task's code (reward or target) differs")  # the hash tells
    told(check(clean, shuffled, REWARDS), 1, "gold of ours on warm fell by")
    told(check(clean, trained(of="warm", seed=1), REWARDS), 0)
