"""benchmarks/: what they share is exact on hand-worked numbers, the scripts run, and docs/performance.md says what was measured."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("training", "sampling", "scoring", "limit", "growth")


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


pairs = module(ROOT / "benchmarks" / "_pairs.py")
limit = module(ROOT / "benchmarks" / "limit.py")
performance = module(ROOT / "docs" / "make_performance.py")


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_explains_itself(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--rounds" in done.stdout and f"python benchmarks/{script}.py" in done.stdout


def test_works_take_turns_and_the_warm_round_is_not_counted() -> None:
    done: list[str] = []
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0, 30.0, 36.0, 40.0, 47.0, 50.0, 58.0])
    works = {name: lambda name=name: done.append(name) for name in "ab"}
    seconds = pairs.in_turn(works, rounds=2, now=lambda: next(clock))
    assert done == ["a", "b"] * 3
    assert seconds == {"a": [2.0, 7.0], "b": [6.0, 8.0]}


def test_a_ratio_is_that_of_a_round() -> None:
    seconds = {"ours": [1.0, 2.0, 8.0], "theirs": [3.0, 8.0, 8.0]}
    found = pairs.times_as_fast(seconds, "ours", "theirs")
    assert (found.median, found.low, found.high) == (3.0, 1.0, 4.0)
    assert found.median != 8.0 / 2.0, "the ratio of the medians is another number"
    assert found.text() == "3.00 (1.00 to 4.00)"
    assert pairs.times_as_fast(seconds, "theirs", "ours").median == pytest.approx(1 / 3)


def test_a_table_of_contestants() -> None:
    table = pairs.compared("work", {"theirs": [2.0, 4.0], "ours": [1.0, 1.0]}, "theirs", 300, "samples")
    assert table.columns == ("", "s", "samples/s", "times theirs")
    assert table.rows == (
        ("theirs", "3.000 (2.000 to 4.000)", "100", "1.00 (1.00 to 1.00)"),
        ("ours", "1.000 (1.000 to 1.000)", "300", "3.00 (2.00 to 4.00)"),
    )


def test_rounds_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError):
        pairs.times_as_fast({"a": [1.0], "b": [1.0, 2.0]}, "a", "b")


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_the_exponent_of_a_power_law(power: float) -> None:
    sizes = [10, 100, 1000, 5000]
    assert pairs.exponent(sizes, [3.0 * n**power for n in sizes]) == pytest.approx(power, abs=1e-12)


def test_the_exponent_is_a_least_squares_slope() -> None:
    # in logs to base e: points (0, 0), (1, 1), (2, 0): slope 0; (0, 0), (1, 0), (2, 3): slope 3/2
    sizes = [1.0, math.e, math.e**2]
    assert pairs.exponent(sizes, [1.0, math.e, 1.0]) == pytest.approx(0.0, abs=1e-12)
    assert pairs.exponent(sizes, [1.0, 1.0, math.e**3]) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("sign", "reached", "kept"), [("at least", 2.0, True), ("at least", 1.99, False), ("at most", 2.0, True), ("at most", 2.01, False)]
)
def test_a_goal_is_kept_or_not(sign: str, reached: float, kept: bool) -> None:
    assert pairs.Goal("speed", sign, 2.0, reached).kept is kept


def test_a_command_names_no_directory_of_this_machine() -> None:
    words = ["/here/training.py", "--out", "/tmp/x.json", "--disco", "/tmp/disco", "--rounds", "3", "--model", "/tmp/m"]
    assert pairs.command(words) == "python benchmarks/training.py --disco DIR --rounds 3 --model DIR"


def counted(upto: int, seen: list[int]) -> Callable[[Callable[[], None]], None]:
    def loop(pause: Callable[[], None]) -> None:
        for step in range(upto):
            seen.append(step)
            pause()

    return loop


def test_a_loop_is_run_a_step_a_call() -> None:
    seen: list[int] = []
    step = pairs.Stepped(counted(100, seen), threads=1)
    assert seen == []
    step()
    assert seen == [0]
    step()
    step()
    assert seen == [0, 1, 2]
    step.close()
    assert seen == [0, 1, 2]


def test_a_loop_that_ends_or_fails_says_so() -> None:
    step = pairs.Stepped(counted(1, []), threads=1)
    step()
    with pytest.raises(RuntimeError, match="ended before it was stopped"):
        step()

    def broken(pause: Callable[[], None]) -> None:
        raise KeyError("no such weight")

    with pytest.raises(KeyError, match="no such weight"):
        pairs.Stepped(broken, threads=1)()


def test_words_of_the_small_tokenizer_stay_what_they_are() -> None:
    tokenizer = pairs.words(64)
    ids = pairs.single_words(tokenizer)
    assert ids == list(range(4, 64))
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_arithmetic_of_a_pass_counted_by_hand() -> None:
    class Config:
        hidden_size, num_attention_heads, num_key_value_heads, intermediate_size, num_hidden_layers, vocab_size = 4, 2, 1, 5, 3, 7
        head_dim = 2

    # weights a layer: q and o 2 x 4 x 4, k and v 2 x 4 x 2, gate, up and down 3 x 4 x 5: 108. Of a prompt of 2 tokens and 2 draws of 3,
    # 2 + 2 x 2 positions are read. Pairs: the prompt's own 1 + 2; each draw's first token sees 3 positions and its second 4.
    # Logits are asked for at 1 + 2 x 2 positions.
    by_hand = 2 * 6 * 3 * 108 + 4 * (3 + 2 * 7) * 3 * 4 + 2 * 5 * 4 * 7
    assert limit.needed(Config, prompts=1, length=2, draws=2, new=3) == by_hand
    assert limit.needed(Config, prompts=5, length=2, draws=2, new=3) == 5 * by_hand
    assert limit.needed(Config, prompts=1, length=2, draws=2, new=4) > by_hand


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("results")

    def measured(script: str) -> dict[str, Any]:
        out = folder / f"{script}.json"
        done = run(script, "--tiny", "--rounds", "1", "--out", str(out))
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        for table in found["tables"]:
            assert table["title"] in done.stdout
        return found

    yield measured


def test_training_takes_steps_of_all_contestants(smoke: Callable[[str], dict[str, Any]]) -> None:
    found = smoke("training")
    names = [row[0] for row in found["tables"][0]["rows"]]
    assert names == ["TRL RLOO, fp32", "TRL GRPO, fp32", "TRL RLOO, its defaults", "klbench rloo, fp32", "klbench rloo, bf16"]
    assert any("disco is left out" in note for note in found["notes"])
    assert found["tables"][1]["rows"], "the profile is empty"


def test_sampling_draws(smoke: Callable[[str], dict[str, Any]]) -> None:
    (table,) = smoke("sampling")["tables"]
    assert [row[0] for row in table["rows"]] == ["16 rows, fp32", "16 rows, bf16"]


def test_scoring_agrees_with_lm_eval(smoke: Callable[[str], dict[str, Any]]) -> None:
    (goal,) = smoke("scoring")["goals"]
    assert goal["wanted"] == 1e-4 and 0 <= goal["reached"] <= 1e-4


def test_bad_options_are_refused() -> None:
    assert "at least 1" in run("scoring", "--rounds", "0").stderr
    assert "at least the 8 draws" in run("sampling", "--batches", "4").stderr
    assert "one and two are measured" in run("limit", "--threads", "2").stderr


def test_the_page_is_what_the_results_make() -> None:
    found = performance.results(performance.RESULTS)
    assert {data["name"] for data in found} == set(SCRIPTS)
    said = performance.PAGE.read_text(encoding="utf-8")
    assert said == performance.page(found)
    moved = copy.deepcopy(found)
    moved[0]["tables"][0]["rows"][0][1] = "0.001"
    assert said != performance.page(moved)


def test_the_page_names_a_goal_that_is_missed() -> None:
    goal = {"what": "speed", "sign": "at least", "wanted": 2.0, "reached": 1.5, "unit": " times"}
    data = {"name": "training", "model": "", "threads": 1, "goals": [goal]}
    assert "| training, small, one thread: speed | at least 2 | 1.5 times | **no** |" in performance.verdicts([data])
    assert "0 of 1 goals are reached." in performance.verdicts([data])
    kept = {**data, "goals": [{**goal, "reached": 2.0}]}
    assert "All 1 goals are reached." in performance.verdicts([kept])
