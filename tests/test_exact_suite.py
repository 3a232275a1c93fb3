"""The exact tier from end to end: the tiny prior, its tasks, and a few cells of the suite whose intervals meet their truths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from klbench import exact, suite, task, truths
from klbench.errors import UserError
from klbench.policies.causal_lm import CausalLM, load
from klbench.priors import prior_path
from klbench.record import Record
from klbench.run import publish, resolve, suite_of
from klbench.score import cell
from klbench_tasks.exact.task import WANTED, WARMTH, Moment, dense, hidden, rare, scarce, sunny, variety

NAMES = ("dense", "scarce", "rare", "hidden", "moment")
FOLDER = Path(__file__).parents[1] / "tasks" / "exact"


@pytest.fixture(scope="module")
def prior() -> CausalLM:
    return load(prior_path("tiny"), "tiny")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The prior


def test_the_prior_is_small_and_as_its_card_says(prior: CausalLM) -> None:
    said = json.loads((prior_path("tiny") / "training.json").read_text())
    tokens, mask = exact.outcomes(9, [prior.eos], 4)
    prompts = [f"{a} {b}" for a in WARMTH for b in WARMTH]
    law = exact.log_law(prior, prompts, tokens, mask)
    entropy = -(np.exp(law) * law).sum(1)
    assert len(tokens) == said["outcomes"] == 4681
    assert entropy.mean() == pytest.approx(said["entropy"], abs=1e-3) and entropy.min() == pytest.approx(said["entropy_least"], abs=1e-3)
    assert sum(x.numel() for x in prior.model.parameters()) == said["parameters"]
    assert sum(p.stat().st_size for p in prior_path("tiny").rglob("*") if p.is_file()) < 200_000


def test_one_word_is_one_token(prior: CausalLM) -> None:
    assert [prior.encode(word) for word in WARMTH] == [[i] for i in [1, 6, 8, 5, 2, 3, 4, 7]]
    tokens, mask = exact.outcomes(9, [prior.eos], 2)
    texts = prior.decode(tokens[None], mask[None])[0]
    assert len(set(texts)) == len(texts) and "sun rain" in texts and "" in texts


# The tasks


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_loads_and_keeps_its_splits_apart(name: str) -> None:
    loaded = task.load(f"exact/{name}")
    assert loaded.name == f"exact/{name}" and loaded.summary and loaded.max_new_tokens == 4
    splits = {split: loaded.prompts(split) for split in task.SPLITS}
    assert {k: len(v) for k, v in splits.items()} == {"train": 256, "dev": 16, "score": 6}
    every = [p for some in splits.values() for p in some]
    assert len(set(every)) == len(every) and all(set(p.split()) <= set(WARMTH) and 2 <= len(p.split()) <= 3 for p in every)


def test_the_family_names_its_default() -> None:
    assert task.load("exact").name == "exact/dense"
    with pytest.raises(UserError, match="did you mean 'exact/hidden'"):
        task.load("exact/hiden")


@pytest.mark.parametrize(
    "text, values",
    [
        ("", (0.375, 0.0, 0.0, 0.1875, 0.0, 0.0)),
        ("sun warm", (0.875, 0.25, 0.0, 0.4375, 0.5, 1.0)),
        ("sun sun warm sun", (1.0, 1.0, 0.0, 0.5, 0.5, 1.0)),
        ("snow cold rain", (0.0, 0.0, 0.0, 0.0, 0.75, -1.0)),
        ("snow wind fog", (0.0, 0.0, 1.0, 0.0, 0.75, 0.0)),
        ("sun snow wind fog", (0.25, 0.0, 1.0, 0.125, 1.0, 1.0)),
        ("wind snow calm sun", (0.375, 0.0, 0.0, 1.0, 1.0, 1.0)),
        ("rain calm sun", (0.625, 0.0625, 0.0, 0.3125, 0.75, 0.0)),
        ("snow fog wind", (0.0, 0.0, 0.0, 0.0, 0.75, 0.0)),
    ],
)
def test_rewards_by_hand(text: str, values: tuple[float, ...]) -> None:
    assert tuple(f([""], [text])[0] for f in (dense, scarce, rare, hidden, variety, sunny)) == values


@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_multiples_of_a_64th_below_their_ceiling(prior: CausalLM, name: str) -> None:
    loaded = task.load(f"exact/{name}")
    target = loaded.target(prior, loaded.beta)
    every = exact.Outcomes.of(prior, target, loaded.prompts("score"), 4)
    tops = target.ceiling(loaded.prompts("score"))
    assert (every.reward.max(1) == tops).all()  # the ceiling is reached
    if name != "moment":
        assert (every.reward * 64 == np.round(every.reward * 64)).all() and every.reward.min() >= 0


def test_lambda_solves_the_moment_at_every_prompt(prior: CausalLM) -> None:
    loaded = Moment()
    for split in task.SPLITS:
        prompts = loaded.prompts(split)[:6]
        target = loaded.target(prior, 1.0)
        every = exact.Outcomes.of(prior, target, prompts, 4)
        p = np.exp(every.log_p0 + every.reward)
        phi = every.values(sunny)
        np.testing.assert_allclose((p * phi).sum(1) / p.sum(1), WANTED, atol=1e-9)


def test_another_prior_has_no_lambda(prior: CausalLM) -> None:
    other = CausalLM("other", prior.model, prior.tokenizer, system="fog")
    with pytest.raises(UserError, match="exact/moment: .* for the prior 'tiny', not for 'other'"):
        Moment().target(other, 1.0)


def test_the_table_of_base_rates_is_exact(prior: CausalLM) -> None:
    rows = [line.split("|") for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    said = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in rows}
    for i, name in enumerate(NAMES[:2]):
        loaded = task.load(f"exact/{name}")
        found = exact.truths(prior, loaded, prior, loaded.target(prior, loaded.beta), loaded.prompts("score"), 4)
        assert float(said["suggested β"][i]) == loaded.beta
        assert float(said["log Z"][i]) == pytest.approx(found["log_z"], abs=2e-4)
        assert float(said["prior's own reverse KL"][i]) == pytest.approx(found["reverse_kl"], abs=2e-4)


# The suite


def test_the_suite_asks_for_truths() -> None:
    found = suite.load("exact")
    assert found.prior == "tiny" and set(found.tasks) == {f"exact/{name}" for name in NAMES}
    assert all(found.score_of(name).truth for name in found.tasks)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """Four cells with fewer draws: a trained policy, samplers that read the bank and that do not, a rare reward."""
    out = tmp_path_factory.mktemp("exact")
    small = ["score.draws=192", "score.bank=192", "score.prior_draws=1024", "train.steps=6", "train.prompts=8", "methods={}"]
    small += [f"tasks.exact/{name}.score={{}}" for name in NAMES]
    wanted = {("exact/dense", "dpg"), ("exact/dense", "rejection"), ("exact/dense", "top_p:0.9"), ("exact/rare", "ancestral")}
    runs = resolve(suite_of("exact", small))
    records = []
    for run in (r for r in runs if (r.task, r.method) in wanted):
        cell(run, out, lambda event: None)
        records.append(Record.read(out / "records" / f"{run.id}.json"))
    assert len(records) == len(wanted)
    return out, records


def test_intervals_of_real_cells_hold_their_truths(scored: tuple[Path, list[Record]]) -> None:
    _, records = scored
    found = [b for r in records for b in truths.beside(r.run.task, r.run.method, r.columns, r.truths)]
    counted = [b for b in truths.once(found) if b.counts]
    assert len(counted) > 60
    missed = [(b.task, b.method, b.column, b.estimate.value, b.estimate.low, b.estimate.high, b.truth) for b in counted if not b.held]
    assert len(counted) - len(missed) >= truths.by_chance(len(counted))[0], missed
    # what the board is ranked and read by; the seed is fixed, so a pass stays a pass
    assert [m for m in missed if m[2] in ("reverse_kl", "log_z", "forward_kl", "tv", "js", "wasted_nats")] == []
    by_construction = [b for b in found if b.estimate.status == "exact"]
    assert by_construction and all(b.held for b in by_construction)


@pytest.mark.parametrize("factor, column", [(-1.0, "kl_prior"), (0.5, "entropy"), (1.3, "log_z"), (1.1, "reward")])
def test_a_wrong_truth_would_be_seen(scored: tuple[Path, list[Record]], factor: float, column: str) -> None:
    record = next(r for r in scored[1] if r.run.method == "dpg")
    (there,) = truths.beside("t", "m", {column: record.columns[column]}, {column: factor * record.truths[column]})
    assert there.held is False


def test_truths_travel_with_the_record_and_onto_the_board(scored: tuple[Path, list[Record]]) -> None:
    out, records = scored
    top = next(r for r in records if r.run.method == "top_p:0.9")
    assert top.truths["forward_kl"] == np.inf and '"forward_kl": "inf"' in top.to_json()
    board = publish(out, records, {})
    assert len(board.truths) > 60
    rows = [row for table in json.loads((out / "board.json").read_text())["tables"] for row in table["rows"]]
    assert all(row["truths"]["log_z"] == pytest.approx(next(r.truths["log_z"] for r in records if r.run.id == row["id"])) for row in rows)
    head = (out / "board.csv").read_text().splitlines()[0].split(",")
    assert {"reverse_kl_truth", "log_z_truth"} <= set(head) and "ess_truth" not in head
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "Estimates beside exact values" in page and truths.verdict(board.truths) in page


def test_a_record_without_truths_is_written_as_before(scored: tuple[Path, list[Record]]) -> None:
    record = scored[1][0].model_copy(update={"truths": {}})
    assert "truths" not in json.loads(record.to_json())
    with pytest.raises(ValueError, match="a truth is NaN"):
        Record.model_validate({**record.model_dump(), "truths": {"tv": float("nan")}})
