"""Training reward models: the fits are stationary points, the split leaks nothing, and a folder is read whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import klbench
from klbench import UserError, cli, rewards, streams, task
from klbench.policies import causal_lm
from klbench.rewards import hashed, hidden_states, trained, training
from klbench.rewards.training import Rows, drawn_rows, logistic, parted, read_rows

GOOD, BAD = "kind warm gentle fine".split(), "cruel cold vile foul".split()


def labelled(path: Path, n: int = 60) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join([str(rng.choice(GOOD if i % 2 else BAD)), "words", str(i % 7)]), "label": i % 2, "prompt": f"p{i % 20}"}
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def compared(path: Path, n: int = 60) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"p{i % 20}", "chosen": f"a {rng.choice(GOOD)} {i % 5}", "rejected": f"a {rng.choice(BAD)} {i % 3}"} for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# the fits


def sigma(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize("wrong_by, holds", [(1.0, True), (1.1, False)])
def test_a_fit_of_labels_is_stationary(wrong_by: float, holds: bool) -> None:
    rng = np.random.default_rng(1)
    x, y, counts = rng.normal(size=(40, 3)), rng.uniform(size=40), rng.integers(0, 3, size=40).astype(float)
    w, b = logistic(x, counts, 2.0, labels=y)
    miss = counts * (sigma(x @ w + b) - y)
    slope = np.concatenate([2.0 * wrong_by * miss @ x + w, [miss.sum()]])  # of C sum_i loss_i + |w|^2 / 2
    assert (np.abs(slope).max() < 1e-3) == holds


@pytest.mark.parametrize("wrong_by, holds", [(1.0, True), (1.1, False)])
def test_a_fit_of_comparisons_is_stationary_and_has_no_intercept(wrong_by: float, holds: bool) -> None:
    rng = np.random.default_rng(2)
    chosen, rejected, counts = rng.normal(size=(40, 3)) + 0.3, rng.normal(size=(40, 3)), rng.integers(0, 3, size=40).astype(float)
    w, b = logistic(chosen, counts, 2.0, other=rejected)
    d = chosen - rejected
    assert b == 0.0
    assert (np.abs(-2.0 * wrong_by * (counts * sigma(-d @ w)) @ d + w).max() < 1e-3) == holds


def test_one_dimension_by_hand() -> None:
    """12 wins and 4 losses by one unit: w solves w = C (12 s(-w) - 4 s(w)); without a penalty log 3."""
    x = np.array([[1.0]] * 12 + [[0.0]] * 4)
    other = 1 - x
    w, _ = logistic(x, np.ones(16), 1.0, other=other)
    assert w[0] == pytest.approx(12 * sigma(-w[0]) - 4 * sigma(w[0]), abs=1e-4)
    assert logistic(x, np.ones(16), 1e6, other=other)[0][0] == pytest.approx(math.log(3), abs=1e-3)


def test_the_penalty_is_on_columns_of_unit_spread() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(50, 2)), (rng.uniform(size=50) < 0.4).astype(float)
    w, b = logistic(x, np.ones(50), 0.5, labels=y, scaled=True)
    stretched, c = logistic(x * [1.0, 100.0], np.ones(50), 0.5, labels=y, scaled=True)
    np.testing.assert_allclose(stretched * [1.0, 100.0], w, rtol=1e-3)
    assert b == pytest.approx(c, abs=1e-4)
    assert not np.allclose(logistic(x * [1.0, 100.0], np.ones(50), 0.5, labels=y)[0] * [1.0, 100.0], w, rtol=1e-2)


def test_nothing_to_tell_apart_is_refused() -> None:
    with pytest.raises(UserError, match="nothing tells good from bad"):
        logistic(np.ones((4, 2)), np.ones(4), 1.0, labels=np.ones(4))
    with pytest.raises(UserError, match="nothing tells good from bad"):
        logistic(np.ones((4, 2)), np.ones(4), 1.0, other=np.ones((4, 2)))


# data


def test_the_split_keeps_the_rows_of_a_prompt_together() -> None:
    rows = Rows([f"p{i % 10}" for i in range(50)], [f"t{i}" for i in range(50)], np.ones(50))
    fit, test = parted(rows, 0.2, 0)
    assert len(fit.texts) == 40 and len(test.texts) == 10 and not set(fit.prompts) & set(test.prompts)
    assert parted(rows, 0.2, 0)[1].prompts == test.prompts != parted(rows, 0.2, 1)[1].prompts
    bare = Rows([""] * 6, ["a", "b", "a", "b", "c", "c"], np.ones(6))  # without prompts equal texts stay together
    fit, test = parted(bare, 0.34, 0)
    assert len(test.texts) == 2 and not set(fit.texts) & set(test.texts)


def test_a_bootstrap_counts_prompts() -> None:
    groups = ["a", "a", "b", "c"]
    assert training._counts(groups, 0, 1, 0).tolist() == [1, 1, 1, 1]
    found = [training._counts(groups, m, 8, 0) for m in range(8)]
    assert all(c[0] == c[1] and c[1] + c[2] + c[3] == 3 for c in found) and len({tuple(c) for c in found}) > 3


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no row in it"), ('{"text": "a", "label": 1}\n{"text"', "line 2: not JSON"), ("[1]", "line 1: an object expected"),
        ('{"text": "a", "label": 2}', "line 1: 'label' must be a number from 0 to 1"), ('{"text": 3, "label": 1}', "'text' is not"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a"}', "line 2: .* 'rejected' is not"),
        ('{"text": "a", "label": 1, "prompt": 4}', "line 1: 'prompt' must be a text"),
    ],
)  # fmt: skip
def test_rows_that_are_none_are_refused_with_their_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=says):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="no data at"):
        read_rows(tmp_path / "gone.jsonl")


class Drawn:
    """A prior that remembers what it was asked for; draw n of a prompt says n."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], int, int]] = []

    name = "drawn"

    def sample(self, prompts: list[str], draws: int, length: int, seed: int) -> Any:
        self.asked.append((list(prompts), draws, seed))
        tokens = torch.arange(draws)[None, :, None].expand(len(prompts), draws, 1)
        return type("Draws", (), {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)})()

    def decode(self, tokens: torch.Tensor, mask: torch.Tensor) -> list[list[str]]:
        return [[f"draw {int(t)}" for t in row[:, 0]] for row in tokens]


class Toy:
    """A task whose reward is the share n/8 of draw n, constant for its first two."""

    name, max_new_tokens, beta = "toy", 1, 1.0

    def prompts(self, split: str) -> list[str]:
        return {"train": ["one", "two"]}[split]  # another split is an error

    def gold(self) -> Any:
        return lambda prompts, completions: [max(int(c.split()[1]), 1) / 8 for c in completions]


def test_draws_are_the_train_split_s_on_a_stream_of_their_own() -> None:
    prior = Drawn()
    rows = drawn_rows(Toy(), prior, "binary", 6, 3)  # type: ignore[arg-type]
    assert prior.asked == [(["one", "two"], 6, streams.seed(3, "reward/draws/toy"))]
    assert rows.labels is not None and rows.labels.tolist() == [x / 8 for x in (1, 1, 2, 3, 4, 5)] * 2
    assert streams.seed(3, "reward/draws/toy") not in {streams.seed(s, f"bank/toy/{j}") for s in range(4) for j in range(99)}
    pairs = drawn_rows(Toy(), prior, "bradley_terry", 6, 3)  # type: ignore[arg-type]
    assert pairs.rejected == ["draw 2", "draw 4"] * 2 and pairs.texts == ["draw 3", "draw 5"] * 2  # the tie of draws 0 and 1 is left out


def test_a_gold_reward_that_is_no_share_has_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "gold", lambda self: lambda prompts, completions: [2.0 for _ in completions])
    with pytest.raises(UserError, match="toy: its gold reward is no share .*; write --loss bradley_terry"):
        drawn_rows(Toy(), Drawn(), "binary", 6, 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no two of 6 draws a prompt differ in reward"):
        drawn_rows(Toy(), Drawn(), "bradley_terry", 6, 3)  # type: ignore[arg-type]


# whole models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of three on labels."""
    at = tmp_path_factory.mktemp("trained")
    klbench.train_reward(at / "model", labelled(at / "rows.jsonl"), members=3, conservative=0.5, clip=2.0)
    return at / "model"


def test_it_is_saved_read_back_and_remade_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    reward = rewards.load(str(folder))
    assert isinstance(reward, trained.TrainedReward) and reward.reward_max == 2.0
    assert sorted(p.name for p in folder.iterdir()) == ["reward.json", "weights.safetensors"]
    again = klbench.train_reward(tmp_path / "again", folder.parent / "rows.jsonl", members=3, conservative=0.5, clip=2.0)
    assert (tmp_path / "again" / "reward.json").read_bytes() == (folder / "reward.json").read_bytes()
    other = klbench.train_reward(tmp_path / "other", folder.parent / "rows.jsonl", members=3, conservative=0.5, clip=2.0, seed=1)
    assert other.manifest.files != again.manifest.files
    manifest = reward.manifest
    assert (manifest.kind, manifest.loss, manifest.source.train, manifest.source.held_out) == ("hashed", "binary", 48, 12)
    assert manifest.held_out["accuracy"].value == 1.0 and manifest.held_out["auc"].value == 1.0 and manifest.held_out["auc"].low is not None
    assert {"klbench", "numpy", "scikit-learn"} == set(manifest.versions)


def test_its_value_is_the_clipped_mean_less_what_the_members_disagree_on(folder: Path) -> None:
    reward = trained.read(folder)
    texts = ["a kind word", "foul", "", "something else", "kind " * 9]
    z = reward.model.margins([""] * 5, texts)
    assert z.shape == (3, 5)
    np.testing.assert_allclose(reward.disagreement(texts), z.std(0, ddof=1))
    np.testing.assert_allclose(reward([""] * 5, texts), np.clip(z.mean(0) - 0.5 * z.std(0, ddof=1), -2, 2))
    assert reward([""] * 5, texts)[0] > 0 > reward([""] * 5, texts)[1] and reward([], []) == []
    assert reward.disagreement(texts).min() > 0
    assert reward([[{"role": "user", "content": "p"}]], [[{"role": "assistant", "content": "foul"}]]) == reward(["p"], ["foul"])


def test_bradley_terry_prefers_the_chosen(tmp_path: Path) -> None:
    reward = klbench.train_reward(tmp_path / "bt", compared(tmp_path / "pairs.jsonl"))
    assert reward.manifest.loss == "bradley_terry" and set(reward.manifest.held_out) == {"accuracy"}
    assert reward.manifest.held_out["accuracy"].value == 1.0
    assert reward(["p"], ["a gentle 1"])[0] > reward(["p"], ["a vile 1"])[0]
    assert reward.disagreement(["x"]).tolist() == [0.0]


def test_hashed_features_are_unit_halves_and_the_margin_is_linear() -> None:
    x = hashed.features(["some words here", ""]).toarray()
    assert x.shape == (2, hashed.WORDS + hashed.CHARACTERS)
    np.testing.assert_allclose([np.linalg.norm(x[0, : hashed.WORDS]), np.linalg.norm(x[0, hashed.WORDS :])], 1.0)
    assert not x[1].any()
    w = np.random.default_rng(0).normal(size=(2, x.shape[1]))
    found = hashed.Hashed(w, np.array([1.0, 2.0])).margins(["p", "q"], ["some words here", ""])
    np.testing.assert_allclose(found, w @ x.T + [[1.0], [2.0]])


def test_hidden_states_are_those_of_a_plain_forward() -> None:
    model = hidden_states.language_model("tiny")
    prompts = task.load("exact").prompts("train")[:2]
    drawn = model.sample(prompts, 3, 4, 0)
    texts = model.decode(drawn.tokens, drawn.mask)
    flat = [(p, t) for p, row in zip(prompts, texts, strict=True) for t in row] + [(prompts[0], "")]
    found = hidden_states.features(model, [p for p, _ in flat], [t for _, t in flat])
    for (prompt, text), row in zip(flat, found, strict=True):
        tokens, mask = model.spelled([prompt], [[text]], end=True)
        ids = model.encode(prompt) + tokens[0, 0][mask[0, 0]].tolist()
        with torch.no_grad():
            plain = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(row, plain[-1].numpy(), atol=2e-5)
        assert not np.allclose(row, plain[-2].numpy(), atol=1e-2)


def test_a_model_over_states_knows_its_language_model(tmp_path: Path) -> None:
    rows = [{"text": t, "label": i % 2, "prompt": "a"} for i, t in enumerate([" b", " c", " b b", " c c", " b b b", " c c c"] * 4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny.saved(tmp_path / "lm", "llama", 0)
    reward = klbench.train_reward(tmp_path / "states", tmp_path / "rows.jsonl", model=f"states:{tmp_path / 'lm'}", held_out=0)
    assert reward.manifest.held_out == {} and reward.manifest.base_hash == causal_lm.load(tmp_path / "lm").weights_hash()
    assert reward(["a"], [" c"])[0] > reward(["a"], [" b"])[0]
    tiny.saved(tmp_path / "lm", "llama", 1)
    with pytest.raises(UserError, match="and what has that name now is another model"):
        trained.read(tmp_path / "states")


def test_a_transformer_learns_and_is_remade(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": c, "rejected": r} for c, r in [(" b", " c"), (" b b", " c b"), (" b a", " c a"), (" b c", " c c")] * 6
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny.saved(tmp_path / "lm", "llama", 0)
    asked: dict[str, Any] = {"model": f"hf:{tmp_path / 'lm'}", "held_out": 0, "epochs": 12, "lr": 3e-3, "members": 2}
    said: list[str] = []
    reward = klbench.train_reward(tmp_path / "one", tmp_path / "pairs.jsonl", **asked, report=said.append)
    losses = [float(text.rpartition(" ")[2]) for text in said if "epoch" in text]
    assert len(losses) == 24 and losses[11] < 0.5 * losses[0]
    assert reward(["a"], [" b"])[0] > reward(["a"], [" c"])[0] and reward.disagreement([" b"], ["a"])[0] > 0
    again = klbench.train_reward(tmp_path / "two", tmp_path / "pairs.jsonl", **asked)
    assert again.manifest == reward.manifest
    assert {p.suffix for p in (tmp_path / "one").rglob("*") if p.is_file()} <= {".json", ".safetensors", ".jinja", ".txt"}  # no pickle
    single = rewards.load(f"hf:{tmp_path / 'one' / 'member-0'}")
    np.testing.assert_allclose(reward.members([" b"], ["a"])[0], single(["a"], [" b"]))


def test_what_was_asked_wrongly_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    data = labelled(tmp_path / "rows.jsonl")
    asked: list[tuple[dict[str, Any], str]] = [
        ({"model": "hashd"}, "no model 'hashd'; did you mean 'hashed'?"), ({"model": "states"}, "no model 'states'"),
        ({"model": "hashed:mini"}, "no model 'hashed:mini'"), ({"loss": "bt"}, "no loss 'bt'"),
        ({"loss": "bradley_terry"}, "holds labels, which bradley_terry does not learn from"),
        ({"task": "bias"}, "either a file .* or a task"),
        ({"conservative": 1.0}, "one member disagrees with nobody"), ({"clip": 0.0}, "clip above 0"), ({"members": 0}, "members"),
        ({"model": "hf:nowhere"}, "nowhere"), ({"model": "states:nowhere"}, "nowhere"), ({"held_out": 0.999}, "nothing is left to fit"),
    ]  # fmt: skip
    for words, says in asked:
        with pytest.raises(UserError, match=says.replace("?", "\\?")) as caught:
            klbench.train_reward(tmp_path / "new" / "model", data, **words)
        assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p != data] and not (tmp_path / "new" / "model").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="taken exists already"):
        klbench.train_reward(tmp_path / "taken", data)


def test_a_folder_that_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    def copied(name: str, manifest: dict[str, Any] | None = None, weights: bytes | None = None) -> str:
        at = tmp_path / name
        at.mkdir()
        data = json.loads((folder / "reward.json").read_text())
        (at / "reward.json").write_text(json.dumps({**data, **(manifest or {})}))
        (at / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes() if weights is None else weights)
        return str(at)

    assert rewards.load(copied("whole")).reward_max == 2.0
    whole = (folder / "weights.safetensors").read_bytes()
    short = whole[:-8]
    for spec, says in (
        (copied("cut", weights=short), "weights.safetensors is not what was written"),
        (copied("lying", {"files": {"weights.safetensors": hashlib.sha256(short).hexdigest()}}, short), "holds no weights and bias"),
        (copied("fewer", {"members": 2}), "finite weights \\[2, D\\] and bias \\[2\\] expected"),
        (copied("foreign", {"format": "another"}), "its format is not 'klbench reward model 1'"),
        (copied("typed", {"members": "many"}), "reward.json: members: "),
        (copied("more", {"colour": 1}), "reward.json: colour: Extra inputs"),
        (copied("lost", {"files": {"weights.safetensors": "", "other": "0"}}), "other is missing"),
        (copied("stranger", {"files": {}}), "weights.safetensors is none of its files"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says) as caught:
            rewards.load(spec)
        assert "\n" not in str(caught.value)
    (tmp_path / "whole" / "reward.json").write_text("{")
    with pytest.raises(UserError, match="reward.json cannot be read"):
        rewards.load(str(tmp_path / "whole"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no reward model in .*bare: reward.json is missing"):
        rewards.load(str(tmp_path / "bare"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    labelled(Path("rows.jsonl"))
    assert cli.main(["train-reward", "--out", "model", "--data", "rows.jsonl", "--members", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "held out\tvalue\tlow\thigh\tn\tof" and lines[1].startswith("accuracy\t1\t") and lines[-1] == "model"
    assert cli.main(["train-reward", "--out", "model", "--data", "rows.jsonl"]) == 2
    assert capsys.readouterr().err == "klbench: model exists already; name another directory\n"
    assert cli.main(["train-reward", "--out", "none", "--task", "toxicty"]) == 2
    assert "no task 'toxicty'; did you mean 'toxicity'?" in capsys.readouterr().err and not Path("none").exists()
