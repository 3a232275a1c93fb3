"""Runs have addresses, records say which key is bad, files are whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from klbench import record
from klbench.errors import UserError
from klbench.estimate import Estimate
from klbench.record import Filed, FrontierPoint, Record, Run, Sample, Score, Train, digest, write_atomically

ASKED: dict[str, Any] = {
    "task": "toxicity/threat", "task_version": 1, "method": "best_of_n:4", "kind": "sampler", "prior": "mini", "beta": 0.25, "seed": 3,
    "max_new_tokens": 8, "score": Score(draws=32),
}  # fmt: skip


def a_record(**change: Any) -> Record:
    fields: dict[str, Any] = {
        "run": Run(**ASKED, train=None),
        "status": "certified",
        "columns": {
            "reverse_kl": Estimate(0.5, 0.4, 0.6, 0.05, 64, 20.0),
            "forward_kl": Estimate(math.inf, math.inf, math.inf, status="exact"),
        },
        "prompt_ids": ["p0", "p1"],
        "prompts": {"free": [0.25, -1.5]},
        "frontier": [FrontierPoint(lam=1, reward=0.5, kl=0.25, low=0.2, high=0.3, reach=99)],
        "samples": [Sample(prompt="The né", completion="\n“x”", reward=1.0, log_p0=-3.0, log_q=None)],
        "cost": {"samples": 64, "machine": {"seconds": 1.5}},
    }
    return Record(**{**fields, **change})


def test_a_run_is_addressed_by_what_was_asked() -> None:
    run = Run(**ASKED)
    stem, last = run.id.rsplit("-", 1)
    assert stem == "toxicity_threat-best_of_n_4-b0.25-s3"
    plain = json.dumps(run.model_dump(mode="json"), sort_keys=True, ensure_ascii=False).encode()
    assert last == hashlib.sha256(plain).hexdigest()[:8]
    assert Run(**ASKED).id == run.id


@pytest.mark.parametrize(
    "change",
    [{"beta": 0.2500001}, {"seed": 4}, {"task_version": 2}, {"max_new_tokens": 9}, {"score": Score(draws=33)}, {"train": Train()},
     {"hashes": {"bank": "a"}}, {"prior": "other"}, {"kind": "policy"}, {"method": "best_of_n:5"}],
)  # fmt: skip
def test_whatever_is_asked_moves_the_address(change: dict[str, Any]) -> None:
    assert Run(**{**ASKED, **change}).id != Run(**ASKED).id


@pytest.mark.parametrize(
    "change", [{"beta": 0.0}, {"beta": math.inf}, {"beta": math.nan}, {"seed": -1}, {"kind": "tuner"}, {"max_new_tokens": 0}, {"sede": 1}]
)
def test_a_run_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Run(**{**ASKED, **change})


@pytest.mark.parametrize(
    "model, change",
    [(Train, {"samples": 1}), (Train, {"dtype": "half"}), (Train, {"lr": -1}), (Score, {"draws": 15}), (Score, {"bank": 15})],
)
def test_settings_below_what_an_estimator_needs_are_refused(model: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model(**change)


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    there, path = a_record(), tmp_path / "a.json"
    write_atomically(path, there.to_json().encode())
    back = Record.read(path)
    assert back == there and back.to_json() == there.to_json()
    text = path.read_text()
    assert text.endswith("}\n") and "“x”" in text and '"value": "inf"' in text
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_only_the_machine_may_differ_between_equal_runs() -> None:
    other = a_record(cost={"samples": 64, "machine": {"seconds": 9.0}})
    assert other != a_record() and other.comparable() == a_record().comparable()
    assert a_record(cost={"samples": 65}).comparable() != a_record().comparable()
    assert other.cost["machine"] == {"seconds": 9.0}  # asking changes nothing


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_not_written(bad: float) -> None:
    with pytest.raises(ValueError):
        a_record(prompts={"free": [bad, 0.0]}).to_json()


def spoilt(path: list[str | int], value: Any) -> str:
    data = json.loads(a_record().to_json())
    at = data
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    "text, says",
    [
        (spoilt(["run", "beta"], -1), "run.beta"),
        (spoilt(["run", "colour"], 1), "run.colour"),
        (spoilt(["columns", "reverse_kl", "status"], "fine"), "columns.reverse_kl"),
        (spoilt(["columns", "reverse_kl"], 5), "columns.reverse_kl"),
        (spoilt(["columns", "reverse_kl", "vlaue"], 5), "columns.reverse_kl.vlaue"),
        (spoilt(["columns", "reverse_kl", "low"], math.nan), "columns.reverse_kl"),
        (spoilt(["prompts", "free"], [0.1, math.nan]), "prompts.free.1"),
        (spoilt(["samples"], [{"prompt": "", "completion": "", "reward": math.inf, "log_p0": 0, "log_q": 0}]), "samples.0.reward"),
        (spoilt(["frontier", 0, "kl"], math.nan), "frontier.0.kl"),
        (spoilt(["cost", "machine"], {"seconds": [math.inf]}), "cost"),
        (spoilt(["schema_version"], 2), "schema_version"),
        (spoilt(["prompts", "free"], ["a"]), "prompts.free.0"),
        ('{"run": ', "the file"),
        ("", "the file"),
        ("[1]", "the file"),
    ],
)
def test_a_bad_record_names_file_and_key(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        Record.read(path)
    assert str(error.value).startswith(f"{path}: {says}: ")


SMALL = [1e-4, 9.9e-5, 1.5e-05, -2e-5, 3e-06, -4.25e-7, 1e-9, 1.5e-10, 1e-300, 10.00001, 0.0, -0.0, 1e15, 1e16, 1.7e308, 0.1, 123456.0]


def told(change: dict[str, Any]) -> Record:
    texts = '1e-5",\n 0.00001\n\\ "cost": \u2028 \x7f \t <é>'
    sample = Sample(prompt=texts, completion="", reward=1e-5, log_p0=-1e-6, log_q=None)
    curve = [{"step": 1e-5, "b": 2.0}, {"b": 3.0, "a": 1e-6}]
    fields = {"prompts": {"free": SMALL[:2], "a": SMALL}, "samples": [sample], "curve": curve, "notes": [texts, ""]}
    return a_record(**{**fields, **change})


@pytest.mark.parametrize(
    "change",
    [
        {}, {"truths": {"reverse_kl": math.inf, "tv": 0.1}}, {"cost": {"z": {"b": 1, "a": [{"d": 1e-5, "c": {}}]}, "a": []}}, {"curve": []},
        {"run": Run(**ASKED, train=Train(search=(0.5,)), hashes={"b": "1", "a": "2"})}, {"cost": {}}, {"columns": {}},
    ],
)  # fmt: skip
def test_a_file_is_hashed_as_its_record_is(change: dict[str, Any], tmp_path: Path) -> None:
    there, path = told(change), tmp_path / "a.json"
    path.write_text(there.to_json(), encoding="utf-8")
    filed = Filed.read(path)
    assert filed.record == there and filed == Filed.of(filed.record) and filed.id == there.run.id
    assert json.loads(filed.columns) == json.loads(there.to_json())["columns"] and list(json.loads(filed.columns)) == sorted(there.columns)


def test_the_hash_of_a_record_stays(tmp_path: Path) -> None:
    """That of small and large numbers, of texts in need of escapes: another version of pydantic must not move it."""
    found = Filed.of(told({"truths": {"tv": 0.1, "reverse_kl": math.inf}}))
    assert found.sha256 == "60666264d4b4889c6ae57de03b62950a07b0c4c4027998d8a9e3993499a7aeef"
    data = found.record.comparable()
    for part in data["columns"]["reverse_kl"], data["run"]["score"]:
        assert json.dumps(part, sort_keys=True, separators=(",", ":")) == record.one_line(dict(sorted(part.items())))


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: json.dumps(json.loads(text)),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), indent=1, ensure_ascii=False) + "\n",
        lambda text: text.replace('"kl": 0.25', '"kl": 0.250'),
        lambda text: text.replace('"lam": 1.0', '"lam": 1'),
        lambda text: text.replace('"b": 2.0,\n   "step": 1e-05', '"step": 1e-05,\n   "b": 2.0'),
        lambda text: text.replace('"step": 1e-05', '"step": 0.00001'),
        lambda text: text.replace('"samples": 64', '"samples":  64'),
        lambda text: text.replace("<é>", "<\\u00e9>"),
        lambda text: text.replace('"seed": 3', '"seed": 4,\n  "seed": 3'),
        lambda text: text.rstrip("\n"),
    ],
)
def test_a_file_laid_out_in_another_way_says_the_same(edit: Any, tmp_path: Path) -> None:
    path, text = tmp_path / "a.json", told({}).to_json()
    path.write_text(edit(text), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    assert Filed.read(path) == Filed.of(told({}))


def test_a_digit_moves_the_hash_and_the_machine_does_not(tmp_path: Path) -> None:
    path, text = tmp_path / "a.json", told({}).to_json()
    hashes = []
    for edited in (text, text.replace('"seconds": 1.5', '"seconds": 99.25'), text.replace('"kl": 0.25', '"kl": 0.26')):
        path.write_text(edited, encoding="utf-8")
        hashes.append(Filed.read(path).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_record_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record at .*gone.json"):
        Record.read(tmp_path / "gone.json")
    with pytest.raises(UserError, match="cannot be read"):
        Record.read(tmp_path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="b.json: cannot be read"):
        Record.read(tmp_path / "b.json")


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    wanted = hashlib.sha256('{"a": [2, "é"], "b": 1}'.encode()).hexdigest()
    assert digest({"b": 1, "a": [2, "é"]}) == digest({"a": [2, "é"], "b": 1}) == wanted
    assert digest([1, 2]) != digest([2, 1])


def test_the_old_file_outlives_a_write_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.bin"
    write_atomically(path, b"old")
    assert path.read_bytes() == b"old" and path.stat().st_mode & 0o777 == 0o644

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["a.bin"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
