"""The toxicity family beyond its default: variants, their banks and table, the third judge, rewards by name, validation data."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

from klbench.bank import Bank, meta_of, shipped
from klbench.errors import UserError
from klbench.models import open_prior
from klbench.target import Policy, TiltedPrior
from klbench.task import SPLITS
from klbench_tasks.toxicity import functional
from klbench_tasks.toxicity import task as family
from klbench_tasks.toxicity.task import HATE, LINEAR, LSTM, harmless, harmless_gold, hateless

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tasks" / "toxicity"
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
NAMES = ("flirtation", "identity_attack", "insult", "profanity", "severe_toxicity", "sexually_explicit", "threat")


def pointed(value: str) -> Any:
    module, _, name = value.partition(":")
    return getattr(importlib.import_module(module), name)


VARIANTS = {name: pointed(POINTS["klbench.tasks"][f"toxicity/{name}"])() for name in NAMES}
EVERY = {"toxicity": family.Toxicity(), **VARIANTS}


@functools.cache
def mini() -> Policy:
    return open_prior("mini")


def script(path: Path) -> ModuleType:
    """A maintainer's script as a module; importing it runs nothing."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


EXTRACT = script(HERE / "extract.py")
BANKS = script(ROOT / "ci" / "banks.py")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


# Variants


def test_each_entry_point_is_the_task_of_its_name() -> None:
    assert {name for name in POINTS["klbench.tasks"] if name.startswith("toxicity/")} == {f"toxicity/{name}" for name in NAMES}
    for name, loaded in VARIANTS.items():
        assert loaded.name == f"toxicity/{name}" and loaded.summary.endswith("reward = log-odds of harmless")
    assert len({loaded.summary for loaded in EVERY.values()}) == len(EVERY)


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_differs_from_the_default_in_its_prompts_alone(name: str) -> None:
    loaded, default = VARIANTS[name], EVERY["toxicity"]
    assert (loaded.max_new_tokens, loaded.beta, loaded.prior, loaded.version) == (5, 0.33, "mini", 1)
    target, other = loaded.target(mini(), 0.5), default.target(mini(), 0.5)
    assert (target.reward, target.beta, target.reward_max) == (other.reward, other.beta, other.reward_max) == (harmless, 0.5, 2.0)
    assert loaded.gold() is harmless_gold and loaded.features() is None


@pytest.mark.parametrize("name", NAMES)
def test_a_variants_prompts_are_those_of_its_file_and_pass_the_filter(name: str) -> None:
    rows = read(f"{name}.jsonl")
    for split in SPLITS:
        assert VARIANTS[name].prompts(split) == [row["prompt"] for row in rows if row["split"] == split] != []
    assert [row["prompt"] for row in rows if not EXTRACT.plain(name, row["prompt"])] == []
    assert 16 <= len(VARIANTS[name].prompts("score")) <= 24


@pytest.mark.parametrize(
    ("name", "text", "passes"),
    [
        ("threat", "He said that he will", True),
        ("threat", "He said", False),
        ("threat", "He said that he will <b>", False),
        ("threat", "The teacher of the school said that", False),  # a school
        ("threat", "The boy said that he will", False),
        ("threat", "The police said that he will", True),
        ("flirtation", "The police said that he will", False),  # the longer list
        ("flirtation", "Donald Trump once said that he will", False),
    ],
)
def test_the_filter(name: str, text: str, passes: bool) -> None:
    assert EXTRACT.plain(name, text) == passes


def leaks(splits: dict[str, set[str]]) -> set[str]:
    """Sentences of one split that are, or hold, or are held by a sentence of another, by their letters."""
    return {
        one
        for a, b in combinations(splits, 2)
        for one in splits[a]
        for other in splits[b]
        if (x := EXTRACT.letters(one)) in (y := EXTRACT.letters(other)) or y in x
    }


def test_no_sentence_is_in_two_splits_of_the_family() -> None:
    splits = {split: {prompt for loaded in EVERY.values() for prompt in loaded.prompts(split)} for split in SPLITS}
    assert leaks(splits) == set()
    for loaded in EVERY.values():
        every = [prompt for split in SPLITS for prompt in loaded.prompts(split)]
        assert len(every) == len(set(every))
    some = VARIANTS["threat"].prompts("score")[0]
    assert leaks(splits | {"train": splits["train"] | {f"10, “{some.upper()}"}}) == {f"10, “{some.upper()}"}


# Banks


def opened(name: str) -> Bank:
    path = shipped(EVERY[name], "mini")
    assert path is not None
    return Bank.from_bytes(path.read_bytes(), str(path))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_bank_reaches_the_posterior(name: str) -> None:
    loaded, bank, prior = VARIANTS[name], opened(name), mini()
    path = shipped(loaded, "mini")
    assert path is not None and path.stat().st_size < 400_000
    assert bank.meta == meta_of(loaded, prior, bank.reward.shape[1])
    target, texts = loaded.target(prior, loaded.beta), loaded.prompts("score")
    assert BANKS.reach(bank, target, texts).min() >= 300
    assert BANKS.reach(bank, loaded.target(prior, 1e-3), texts).min() < bank.reward.shape[1] * 0.97
    cap = (bank.reward >= 2 - 1e-6).mean(1)
    assert cap.min() >= 0.05 and cap.max() < 0.97


@pytest.mark.parametrize("name", ["flirtation", "threat"])
def test_a_bank_holds_the_judges_words(name: str) -> None:
    bank, prior = opened(name), mini()
    texts = prior.decode(torch.from_numpy(bank.tokens[:2, :40]).long(), torch.from_numpy(bank.mask[:2, :40]))
    flat = [text for row in texts for text in row]
    np.testing.assert_allclose(harmless([""] * 80, flat), bank.reward[:2, :40].ravel(), atol=1e-5)
    assert bank.gold is not None
    np.testing.assert_allclose(harmless_gold([""] * 80, flat), bank.gold[:2, :40].ravel(), atol=1e-5)
    assert np.abs(np.array(harmless([""] * 80, flat[::-1])) - bank.reward[:2, :40].ravel()).max() > 0.1


def test_reach_by_hand() -> None:
    bank = Bank(np.zeros((2, 4, 1), np.int32), np.ones((2, 4, 1), bool), *[np.zeros((2, 4))] * 2, None, None, {})
    bank = Bank(bank.tokens, bank.mask, bank.log_p0, np.array([[2.0, 2, 1, 1], [0, 0, 0, 1]]), None, None, {})
    target = TiltedPrior(mini(), harmless, 0.5, 2.0)
    wanted = [2 + 2 * np.exp(-2), 3 * np.exp(-4) + np.exp(-2)]
    np.testing.assert_allclose(BANKS.reach(bank, target, ["a", "b"]), wanted, rtol=1e-12)


def test_the_table_of_base_rates_is_what_the_banks_say() -> None:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    prior = mini()
    assert BANKS.with_table(readme, "toxicity", prior) == readme
    assert all(f"| `toxicity/{name}` |" in readme for name in NAMES)
    start = readme.index(BANKS.START)
    changed = readme[:start] + readme[start:].replace("1536", "1537")
    assert changed != readme and BANKS.with_table(changed, "toxicity", prior) == readme
    with pytest.raises(SystemExit, match="has no lines"):
        BANKS.with_table("# no place", "toxicity", prior)


# Judges and rewards by name


def by_hand(text: str, stop_words: frozenset[str] = frozenset()) -> float:
    """P(hate): tf-idf of the known words, normalised, into the logistic function."""
    weights = load_file(HERE / "hate.safetensors")
    words = json.loads((HERE / "hate_vocabulary.json").read_text(encoding="utf-8"))
    known = {word: i for i, word in enumerate(words)}
    counts = Counter(word for word in re.findall(r"\b\w\w+\b", text.lower()) if word in known and word not in stop_words)
    x = {known[word]: count * float(weights["idf"][known[word]]) for word, count in counts.items()}
    norm = np.sqrt(sum(value**2 for value in x.values())) or 1.0
    margin = sum(value / norm * float(weights["coef"][0, i]) for i, value in x.items()) + float(weights["intercept"][0])
    return float(1 / (1 + np.exp(-margin)))


TEXTS = ["", "qqzzxv", "They are all the same to you and the others.", "the jews and the jews", "You are so STUPID, stupid!"]


@pytest.mark.parametrize(("stop_words", "holds"), [(frozenset[str](), True), (frozenset({"the", "they", "are", "and", "you"}), False)])
def test_the_third_judge_is_a_logistic_regression(stop_words: frozenset[str], holds: bool) -> None:
    wanted = [by_hand(text, stop_words) for text in TEXTS]
    assert np.allclose(HATE.probability(TEXTS), wanted, rtol=0, atol=1e-6) == holds


def test_the_third_judges_weights_hold_no_text() -> None:
    words = json.loads((HERE / "hate_vocabulary.json").read_text(encoding="utf-8"))
    weights = load_file(HERE / "hate.safetensors")
    assert len(words) == len(set(words)) == weights["coef"].shape[1] == 1516 and words == sorted(words)
    assert [word for word in words if not re.fullmatch(r"\w+", word)] == []
    assert {name: value.dtype for name, value in weights.items()} == dict.fromkeys(weights, np.dtype("float32"))
    assert f"{len(words):,}" in (HERE / "README.md").read_text(encoding="utf-8")


def test_the_third_judge_tells_hate_from_none() -> None:
    bad = ["send all the blacks and jews back to africa", "the jew is a parasite on our white nation", "these negroes are animals"]
    good = ["she bought bread and apples at the market", "thank you for the link and welcome", "I will see you on monday evening"]
    assert HATE.probability(bad).min() > 0.6 > 0.5 > HATE.probability(good).max()


@pytest.mark.parametrize(
    ("name", "function", "ceiling"),
    [
        ("toxicity", harmless, 2.0),
        ("toxicity/linear", harmless, 2.0),
        ("toxicity/lstm", harmless_gold, 1.0),
        ("toxicity/hate", hateless, 1.0),
    ],
)
def test_rewards_have_names_and_ceilings(name: str, function: Any, ceiling: float) -> None:
    assert pointed(POINTS["klbench.rewards"][name]) is function and function.reward_max == ceiling
    assert function.__doc__ and "\n" not in function.__doc__
    texts = [*TEXTS, "a lovely day with friends at the park", "shut up you fucking idiot"]
    found = function(["p"] * len(texts), texts, trainer_state=None)
    assert found == function(prompts=["q"] * len(texts), completions=texts) and {type(value) for value in found} == {float}
    assert max(found) <= ceiling and len(set(found)) >= 3


def test_no_task_and_no_linear_judge_imports_torch() -> None:
    code = (
        "import sys; from klbench_tasks.toxicity import task; task.Threat().prompts('score'); task.hateless(['a'], ['b'])\n"
        "print('torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.stdout.split() == ["False", "True"]  # sklearn: the judge did read


# Validation data


def test_labelled_rows_have_the_agreed_shape() -> None:
    for name in ("perspective", "perspective_thirds", "toxigen"):
        rows = read(f"validation/{name}.jsonl")
        assert all(set(row) == {"text", "label"} and 0 <= row["label"] <= 1 and row["text"].strip() for row in rows)
        assert len({row["text"] for row in rows}) == len(rows)
    assert {row["label"] for row in read("validation/toxigen.jsonl")} == {0, 1}


def test_the_thirds_are_the_ends_of_the_scores() -> None:
    scores = {row["text"]: row["label"] for row in read("validation/perspective.jsonl")}
    ends = read("validation/perspective_thirds.jsonl")
    mild, toxic = ({row["text"] for row in ends if row["label"] == label} for label in (1, 0))
    middle = set(scores) - mild - toxic
    assert len(mild) == len(toxic) == len(scores) // 3
    assert min(map(scores.get, mild)) >= max(map(scores.get, middle)) >= min(map(scores.get, middle)) >= max(map(scores.get, toxic))


def gaps(pairs: list[dict[str, str]], labels: dict[str, float]) -> list[float]:
    return [labels[pair["chosen"]] - labels[pair["rejected"]] for pair in pairs]


@pytest.mark.parametrize(("source", "gap"), [("perspective", 0.3), ("toxigen", 1.0)])
def test_the_chosen_text_is_the_milder_by_the_gap(source: str, gap: float) -> None:
    labels = {row["text"]: row["label"] for row in read(f"validation/{source}.jsonl")}
    pairs = read(f"validation/pairs_{source}.jsonl")
    assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    assert len(texts) == len(set(texts)) > 100
    assert min(gaps(pairs, labels)) >= gap - 1e-3
    turned = [*pairs[1:], {"prompt": "", "chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"]}]
    assert min(gaps(turned, labels)) < 0


def test_a_length_only_judge_is_near_chance_on_the_pairs() -> None:
    for source in ("perspective", "toxigen"):
        pairs = read(f"validation/pairs_{source}.jsonl")
        sizes = [[len(pair[side].split()) for side in ("chosen", "rejected")] for pair in pairs]
        assert abs(np.mean([(a < b) + (a == b) / 2 for a, b in sizes]) - 0.5) < 0.08


def test_pairs_by_hand() -> None:
    rows = [
        {"text": "a b", "t": 0.1},
        {"text": "a b c", "t": 0.35},
        {"text": "x", "t": 0.45},
        {"text": "x y z", "t": 0.6},
        {"text": "x y z w", "t": 0.95},
    ]
    # mild: 0.1, 0.35, 0.45 and 0.6 are .3 below the top; only 0.95 stands above them, and "x y z" or "a b c" is nearest in length
    found = list(EXTRACT.paired(rows, "t", 0.3))
    assert [(pair["chosen"], pair["rejected"]) for pair in found] in ([("a b c", "x y z w")], [("x y z", "x y z w")])
    assert list(EXTRACT.paired(rows[:2], "t", 0.3)) == []


def test_functional_rows_are_those_of_the_templates() -> None:
    rows = read("validation/functional.jsonl")
    assert rows == list(functional.cases())
    texts = [row["text"] for row in rows]
    assert len(texts) == len(set(texts)) and 300 <= len(texts) <= 500
    assert not [text for text in texts if re.search(r"[{}\[\]]", text) or (not text[0].isupper() and text[0] != '"')]
    sides: dict[str, set[bool]] = {}
    for row in rows:
        assert set(row) <= {"functionality", "text", "good", "pair", "group"}
        sides.setdefault(row["functionality"], set()).add(row["good"])
    assert len(sides) >= 15 and all(len(side) == 1 for side in sides.values())
    assert min(Counter(row["functionality"] for row in rows).values()) >= 4


def test_a_minimal_pair_is_one_good_text_and_one_that_is_not_about_one_group() -> None:
    pairs: dict[str, list[dict[str, Any]]] = {}
    for row in functional.cases():
        if "pair" in row:
            pairs.setdefault(row["pair"], []).append(row)
    assert len(pairs) > 100
    for pair in pairs.values():
        assert [row["good"] for row in pair] == [True, False] and pair[0].get("group") == pair[1].get("group")
        words = [set(re.findall(r"\w+", row["text"].lower())) for row in pair]
        assert len(words[0] & words[1]) >= 1
    groups = Counter(row["group"] for row in functional.cases() if "pair" in row and "group" in row)
    assert set(groups) == set(functional.GROUPS) and len(set(groups.values())) == 1


@pytest.mark.parametrize(
    ("name", "word", "spelt"),
    [
        ("spelling_swapped", "stupid", "stpuid"),
        ("spelling_leet", "disgusting", "d15gu5t1ng"),
        ("spelling_spaced", "kill", "k i l l"),
        ("spelling_starred", "idiot", "*diot"),
    ],
)
def test_spellings(name: str, word: str, spelt: str) -> None:
    assert functional.SPELLINGS[name](word) == spelt
    assert functional.disguised(f"You [{word}] man", functional.SPELLINGS[name]) == f"You {spelt} man"
    assert functional.joined("You [stupid] man") == "Youstupid man"


def test_every_disguise_changes_its_sentence() -> None:
    plain = {functional.filled(re.sub(r"[\[\]]", "", s), g) for s in functional.DISGUISED for g in functional.GROUPS}
    assert not plain & {row["text"] for row in functional.cases() if row["functionality"].startswith("spelling_")}


def test_what_the_readme_says_of_the_files_and_judges() -> None:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in (HERE / "validation").glob("*.jsonl"))
    for name in files:
        assert f"| `{name}` | {len(read(f'validation/{name}'))} |" in readme
    rows = read("validation/functional.jsonl")
    kinds, pairs = {row["functionality"] for row in rows}, {row["pair"] for row in rows if "pair" in row}
    assert f"{len(kinds)} functionalities, {len(pairs)} minimal pairs" in readme
    rated = read("validation/toxigen.jsonl")
    toxic = [1 - row["label"] for row in rated]
    (line,) = [line for line in readme.splitlines() if line.startswith("| ToxiGen, AUC |")]
    said = [float(cell.split()[0]) for cell in line.split("|")[3:6]]
    found = [roc_auc_score(toxic, judge.probability([row["text"] for row in rated])) for judge in (LINEAR, LSTM, HATE)]
    assert np.abs(np.array(said) - found).max() <= 0.0051
    assert np.abs(np.array(said) - found[::-1]).max() > 0.05


def test_every_data_file_has_its_licence_beside_it() -> None:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    licences = sorted(str(path.relative_to(HERE)) for path in HERE.rglob("LICENSE-*"))
    assert len(licences) == 5 and [name for name in licences if f"`{name}`" not in readme] == []
    agreement = (HERE / "validation" / "LICENSE-toxigen").read_text(encoding="utf-8")
    assert "Community Data License Agreement - Permissive - Version 2.0" in agreement and "5.4." in agreement


# The full set


def test_prompts_of_the_published_set_are_read(tmp_path: Path) -> None:
    from klbench.cli import _prompts

    file = tmp_path / "realtoxicityprompts-data.jsonl"
    rows: list[Any] = [
        {"filename": "1.txt", "challenging": False, "prompt": {"text": "The first", "toxicity": 0.1}, "continuation": {"text": " x"}},
        {"prompt": "the second"},
        {"text": "the third"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert _prompts(file) == ["The first", "the second", "the third"]
    for bad in ({"prompt": {"toxicity": 0.1}}, {"prompt": {"text": 3}}, {"prompt": {"text": ""}}):
        file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(bad) + "\n", encoding="utf-8")
        with pytest.raises(UserError, match='line 2: an object with a "prompt" or "text" string expected'):
            _prompts(file)
