"""Exports as the tools that read them see them, and text in them that means harm."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from klbench import cli
from klbench.board import Board
from klbench.errors import UserError
from klbench.estimate import Estimate, exactly, undefined
from klbench.export import POLICIES, documents
from klbench.record import Record, Run, Score

HARM = '=HYPERLINK("http://x")|<script>alert(1)</script>\n# `a` [b](http://c) ![d](e)'


def record(method: str = "rloo", seed: int = 0, **columns: Estimate) -> Record:
    found = {
        "reverse_kl": Estimate(0.75, 0.5, 1.0, 0.125, 64),
        "kl_prior": Estimate(2.5, 2.25, 2.75, 0.125, 64),
        "reward": Estimate(-0.5, -0.75, -0.25, 0.125, 64),
        "forward_kl": Estimate(math.inf, math.inf, math.inf, 0.0, 64, status="exact"),
        "wasted_nats": Estimate(0.25, status="uncertified", reason="reach 0.2"),
        "kl_efficiency": undefined("kl_prior's interval holds 0"),
        "entropy": exactly(3.0),
        **columns,
    }
    run = Run(
        task="exact/dense",
        task_version=2,
        method=method,
        kind="objective",
        prior="tiny",
        beta=0.5,
        seed=seed,
        max_new_tokens=4,
        score=Score(),
    )
    return Record(
        run=run, status=found["reverse_kl"].status, columns=found, prompt_ids=["p0", "p1"], prompts={"free": [0.5, 1.0]}, frontier=[],
        samples=[], cost={"machine": {"date": "2026-11-21T16:41:00Z", "seconds_score": 1.5}},
    )  # fmt: skip


@pytest.fixture
def board() -> Board:
    return Board.of([record()], {"git": "abc", "versions": {"klbench": "0.1.0"}})


def only(board: Board, to: str) -> tuple[str, str]:
    (found,) = documents(board, to).items()
    return found


def test_lm_eval_s_results(board: Board) -> None:
    name, text = only(board, "lm-eval")
    assert re.fullmatch(r"exact_dense-rloo-b0.5-s0-[0-9a-f]{8}/results_2026-11-21T16-41-00\.json", name)
    data = json.loads(text)
    task = "klbench_exact_dense"
    assert {"results", "versions", "configs", "n-shot", "n-samples", "higher_is_better", "config", "git_hash", "date"} <= set(data)
    assert all(set(data[key]) == {task} for key in ("results", "versions", "configs", "n-shot", "n-samples", "higher_is_better"))
    found = data["results"][task]
    assert (found["reverse_kl,none"], found["reverse_kl_stderr,none"], found["alias"]) == (0.75, 0.125, task)
    assert found["wasted_nats_stderr,none"] == "N/A" and found["forward_kl,none"] == "inf" and "kl_efficiency,none" not in found
    assert data["higher_is_better"][task] == {
        "reverse_kl": False, "reward": True, "forward_kl": False, "wasted_nats": False, "kl_prior": None, "entropy": None,
    }  # fmt: skip
    assert data["versions"] == {task: 2} and data["n-samples"] == {task: {"original": 2, "effective": 2}} and data["n-shot"] == {task: 0}
    assert data["configs"][task]["metadata"]["figures"]["reverse_kl"]["low"] == 0.5
    assert data["date"] == 1795279260.0 and data["git_hash"] == "abc"


def test_a_model_card_is_read_back_by_the_hub_s_own_reader(board: Board) -> None:
    name, text = only(board, "hf")
    assert name.endswith(".md")
    card = ModelCard(text + "\n# rloo\n")
    found = {result.metric_type: result for result in card.data.eval_results or []}
    assert set(found) == {"reverse_kl", "kl_prior", "reward", "wasted_nats"}, "finite, and with a better and a worse"
    one = found["reverse_kl"]
    assert (one.metric_value, one.task_type, one.dataset_type, one.dataset_split) == (
        0.75,
        "text-generation",
        "klbench/exact_dense",
        "score",
    )
    assert one.metric_args == {"status": "certified", "provenance": "self-reported", "low": 0.5, "high": 1.0, "stderr": 0.125}
    assert found["wasted_nats"].metric_args == {"status": "uncertified", "provenance": "self-reported"}
    name, again = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert len(again) == 4 and name.startswith("exact_dense-rloo")


def test_every_eval_ever_s_log(board: Board) -> None:
    """The keys that its schema 0.3.0 demands; the whole schema was run over an export by hand, as it is not installed here."""
    data = json.loads(only(board, "eee")[1])
    assert {"schema_version", "evaluation_id", "retrieved_timestamp", "source_metadata", "model_info", "eval_library"} <= set(data)
    assert data["retrieved_timestamp"] == "1795279260" and data["eval_library"] == {"name": "klbench", "version": "0.1.0"}
    found = {result["metric_config"]["metric_id"]: result for result in data["evaluation_results"]}
    assert set(found) == {"klbench.reverse_kl", "klbench.reward", "klbench.wasted_nats"}
    assert (
        found["klbench.reverse_kl"]["metric_config"]["lower_is_better"] and not found["klbench.reward"]["metric_config"]["lower_is_better"]
    )
    scored = found["klbench.reverse_kl"]["score_details"]
    assert scored["score"] == 0.75 and scored["uncertainty"]["standard_error"]["value"] == 0.125
    assert scored["uncertainty"]["confidence_interval"] | {"method": ""} == {
        "lower": 0.5, "upper": 1.0, "confidence_level": 0.95, "method": "",
    }  # fmt: skip
    assert "confidence_interval" not in found["klbench.wasted_nats"]["score_details"]["uncertainty"]
    assert all(isinstance(v, str) for v in {**data["model_info"]["additional_details"], **scored["details"]}.values())


def test_markdown_is_one_table_a_task_in_which_names_are_text() -> None:
    text = documents(Board.of([record(), record(HARM, 1)]), "md")[""]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and lines[0].startswith("| rank | method | reverse_kl")
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"\|", lines[0])) for line in lines), "no name adds a cell"
    assert "0.750 (0.500 to 1.000)" in text and "| 0.250 |" in text
    assert not re.search(r"<script|(?<!\\)\]\(|(?<!\\)`|http://", text)


def test_csv_runs_no_formula_and_json_is_the_board_s() -> None:
    board = Board.of([record(), record(HARM, 1)])
    rows = list(csv.DictReader(io.StringIO(documents(board, "csv")[""])))
    assert len(rows) == 2 and all(not row["method"].startswith(("=", "+", "-", "@")) for row in rows)
    assert {float(row["reward"]) for row in rows} == {-0.5}, "a negative number is a number"
    assert json.loads(documents(board, "json")[""])["tables"][0]["rows"][0]["columns"]["reward"]["value"] == -0.5


@pytest.mark.parametrize("to", POLICIES)
def test_names_that_mean_harm_stay_inside_their_file(to: str) -> None:
    name, text = only(Board.of([record("../../x" + HARM)]), to)
    assert ".." not in Path(name).parts and not Path(name).is_absolute() and len(Path(name).parts) <= 2
    if to == "hf":
        assert len(ModelCard(text).data.eval_results or []) == 4
    else:
        json.loads(text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def export(*words: Any) -> int:
        return cli.main(["export", *map(str, words)])

    for one in (record(), record(seed=1)):
        path = tmp_path / "run" / "records" / f"{one.run.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(one.to_json())
    assert export(path, "--to", "lm_eval") == 0
    assert json.loads(capsys.readouterr().out)["config"]["random_seed"] == 1
    assert export(tmp_path / "run", "--to", "lm-eval", "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*/results_*.json"))) == 2 and "2 files" in capsys.readouterr().out
    assert export(tmp_path / "run", "--to", "md", "--out", tmp_path / "table.md") == 0
    assert (tmp_path / "table.md").read_text().startswith("### exact/dense")
    capsys.readouterr()
    for words, why in (
        ((tmp_path / "run", "--to", "hf"), "hf has a file a policy, 2 here"), ((path, "--to", "jsn"), "did you mean 'json'"),
        ((tmp_path / "gone.json", "--to", "md"), "no record at"), ((tmp_path, "--to", "md"), "no records in"),
    ):  # fmt: skip
        assert export(*words) == 2
        assert why in capsys.readouterr().err


def test_an_unknown_format_is_refused_by_name(board: Board) -> None:
    with pytest.raises(UserError, match="no format 'lm_evl'; did you mean 'lm-eval'"):
        documents(board, "lm_evl")
