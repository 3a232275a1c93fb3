"""Training data from a file: what is read, what is refused, and that a policy learns what the file says and not what the task does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_train import Letters, T, asked, prior  # noqa: F401  # prior: a fixture

from klbench.errors import UserError
from klbench.offline import SURE, Offline
from klbench.policies.causal_lm import CausalLM
from klbench.train import train


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


PAIRS = [{"prompt": p, "chosen": " b", "rejected": " a"} for p in ("a", "b c")]
LABELS = [{"prompt": "a", "completion": c, "label": c == " b"} for c in (" a", " b", " c")]
PLAIN = [{"prompt": "a", "completion": c} for c in (" a", " b", " c")]


@pytest.mark.parametrize("rows, kind, values", [(PAIRS, "pairs", (SURE, -SURE)), (LABELS, "success", (0.0,)), (PLAIN, "reward", None)])
def test_each_kind_is_read(tmp_path, rows, kind, values):
    found = Offline.read(written(tmp_path / "d.jsonl", *rows), kind, {})
    assert found.kind == kind and (found.values is None if values is None else found.values[0][0] == values)
    assert found.width(8) == (2 if kind == "pairs" else 3)


@pytest.mark.parametrize(
    "rows, feedback, says",
    [
        ([], "pairs", "no row"),
        ([["a"]], "pairs", "line 1: an object of texts"),
        ([{"prompt": "a", "chosen": "b"}], "pairs", "line 1: keys prompt and completion"),
        ([*PAIRS, *PLAIN], "pairs", "line 3: a row of reward among rows of pairs"),
        (PAIRS, "success", "line 1: rows of pairs, and the objective is told success"),
        ([{"prompt": "a", "completion": "b", "label": 1}], "success", "label 1: true or false"),
        ([{"prompt": "held", "completion": "b"}], "reward", "prompt 'held' belongs to the score split"),
        (PLAIN[:1], "reward", "one completion of prompt 'a'"),
        ([{"prompt": "a", "completion": ""}], "reward", "none of them empty"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path, rows, feedback, says):
    with pytest.raises(UserError, match=says):
        Offline.read(written(tmp_path / "d.jsonl", *rows), feedback, {"held": "score"})


def test_a_missing_file_and_a_truncated_row_are_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        Offline.read(tmp_path / "none.jsonl", "pairs", {})
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "chos')
    with pytest.raises(UserError, match="line 1: not JSON"):
        Offline.read(path, "pairs", {})


def test_every_completion_comes_once_an_epoch_and_is_cut_where_draws_are(tmp_path, prior):  # noqa: F811
    rows = [{"prompt": "a", "completion": c} for c in (" a", " b", " c", " a b", " a b c a b c")]
    found = Offline.read(written(tmp_path / "d.jsonl", *rows), "reward", {})
    seen = []
    for step in range(5):
        draws, told = found.drawn(prior, [0], 2, T, 3, step)
        again, _ = found.drawn(prior, [0], 2, T, 3, step)
        assert told is None and draws.tokens.shape[2] <= T and torch.equal(draws.tokens, again.tokens)
        assert torch.equal(draws.log_q, prior.log_prob(["a"], draws.tokens, draws.mask))
        seen += prior.decode(draws.tokens, draws.mask)[0]
    assert sorted(seen) == sorted(2 * ["a", "b", "c", "ab", "abc"])


@pytest.mark.parametrize("objective, rows", [("dpo", PAIRS), ("npo", LABELS), ("conditional_training", LABELS)])
def test_a_policy_learns_what_the_file_says(tmp_path, prior, objective, rows):  # noqa: F811
    """The task's reward likes a, the file likes b."""
    data = written(tmp_path / "d.jsonl", *rows)
    policy, _ = train(asked(objective, steps=30, data=str(data)), Letters(), prior, tmp_path / "p")
    said = lambda q, text: float(q.log_prob(["a"], *q.spelled(["a"], [[text]], end=True)).sum())  # noqa: E731
    if objective == "conditional_training":
        policy = policy.prompted("good", policy.system, ())
    assert said(policy, " b") - said(policy, " a") > said(prior, " b") - said(prior, " a")


def test_flipped_pairs_teach_the_opposite(tmp_path, prior):  # noqa: F811
    flipped = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in PAIRS]
    policy, _ = train(asked("dpo", steps=30, data=str(written(tmp_path / "d.jsonl", *flipped))), Letters(), prior, tmp_path / "p")
    said = lambda q, text: float(q.log_prob(["a"], *q.spelled(["a"], [[text]], end=True)).sum())  # noqa: E731
    assert said(policy, " b") - said(policy, " a") < said(prior, " b") - said(prior, " a")


def test_an_objective_that_draws_for_itself_takes_no_file(tmp_path, prior):  # noqa: F811
    with pytest.raises(UserError, match="rloo trains on draws of its own: train.data is not for it"):
        train(asked("rloo", data=str(written(tmp_path / "d.jsonl", *PLAIN))), Letters(), prior, tmp_path / "p")


def test_spelled_continuations_end_and_say_what_they_were(prior: CausalLM):  # noqa: F811
    tokens, mask = prior.spelled(["a", "b c"], [[" a", " b c"], [" c", " c c"]], end=True)
    assert mask.sum(2).tolist() == [[2, 3], [2, 3]] and (tokens[:, 0, 1] == prior.eos).all()
    assert prior.decode(tokens, mask) == [["a", "bc"], ["c", "cc"]]
    with pytest.raises(UserError, match="has no tokens"):
        prior.spelled(["a"], [[""]])
