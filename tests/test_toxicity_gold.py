"""The recurrent judge: against the equations written out a step at a time, against keras itself, and on texts whose answer is plain."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from klbench_tasks.toxicity import gold
from klbench_tasks.toxicity.gold import LSTMJudge

HERE = Path(gold.__file__).parent
SOURCE = Path(__file__).parents[1] / "tasks" / "toxicity"
WORDS: list[str] = json.loads((HERE / "gold_vocabulary.json").read_text(encoding="utf-8"))
JUDGE = LSTMJudge()

# P(toxic) by keras 3.15.1 from the h5 and the pickle as published, in single precision; the first is in the package's own README too.
KERAS = {
    "You are so dumb and stupid!": 0.98894,
    "": 0.067534,
    "shut up, you pathetic idiot": 0.996546,
    "I will find you and kill you": 0.799099,
    "nobody likes you, loser": 0.459256,
    "she bought bread and apples at the market": 0.025498,
    "The meeting was moved to Thursday.": 0.006754,
    "the " * 99 + "fuck": 0.921629,
    "a a a fuck " + "the " * 60: 0.960573,
    "stupid " + "the " * 100: 0.013111,
}


def logistic(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def literal(ids: list[int], order: str = "ifco", pad: str = "pre", directions: str = "fb", cut: str = "pre") -> float:
    """P(toxic) by 100 steps each way, in double precision, one text and one step at a time; the arguments make the mutants."""
    w = {name: value.astype(np.float64) for name, value in load_file(HERE / "gold.safetensors").items()}
    ids = ids[-100:] if cut == "pre" else ids[:100]
    padding = [0] * (100 - len(ids)) if pad != "none" else []
    sequence = padding + ids if pad == "pre" else ids + padding

    def outputs(side: str, sequence: list[int]) -> np.ndarray:
        h, c, seen = np.zeros(50), np.zeros(50), []
        for word in sequence:
            z = w["embedding"][word] @ w[f"{side}.kernel"] + h @ w[f"{side}.recurrent"] + w[f"{side}.bias"]
            gate = {name: z[50 * k : 50 * (k + 1)] for k, name in enumerate(order)}
            c = logistic(gate["f"]) * c + logistic(gate["i"]) * np.tanh(gate["c"])
            h = logistic(gate["o"]) * np.tanh(c)
            seen.append(h)
        return np.array(seen)

    back = sequence[::-1] if directions == "fb" else sequence
    pooled = np.concatenate([outputs("forward", sequence).max(0), outputs("backward", back).max(0)])
    hidden = np.maximum(pooled @ w["hidden.kernel"] + w["hidden.bias"], 0.0)
    return float(logistic(hidden @ w["label.kernel"] + w["label.bias"])[0])


def one_by_one(judge: LSTMJudge, texts: list[str]) -> np.ndarray:
    return np.concatenate([judge.probability([text]) for text in texts])


def texts_by_rank() -> list[list[int]]:
    """Known words only: none, one, a few, a tie of lengths, 99, 100, and more than the network reads."""
    rng = np.random.default_rng(5)
    drawn = [rng.integers(1, 20000 if n % 2 else 800, n).tolist() for n in (0, 1, 4, 4, 9, 30, 99, 100, 131)]
    rude = [WORDS.index(word) + 1 for word in ("you", "stupid", "idiot")]
    return [*drawn, rude, rude + drawn[-1], drawn[-1] + rude]


@pytest.mark.parametrize(
    "change, holds",
    [
        ({}, True),
        ({"order": "icfo"}, False),
        ({"order": "fico"}, False),
        ({"order": "ifoc"}, False),
        ({"pad": "post"}, False),
        ({"pad": "none"}, False),
        ({"directions": "ff"}, False),
        ({"cut": "post"}, False),
    ],
)
def test_as_written_out(change: dict[str, str], holds: bool) -> None:
    ranks = [ids for ids in texts_by_rank() if ids or change.get("pad") != "none"]  # without padding an empty text has no maximum
    texts = [" ".join(WORDS[rank - 1] for rank in ids) for ids in ranks]
    wanted = np.array([literal(ids, **change) for ids in ranks])
    # In one pass with a text of 100 words the padding is run step by step; alone, a short text takes the states worked out beforehand.
    for found in (JUDGE.probability(texts), one_by_one(JUDGE, texts)):
        assert (np.abs(found - wanted).max() < 1e-4) == holds


def test_texts_of_that_test_are_read_as_meant() -> None:
    for ids in texts_by_rank():
        assert list(JUDGE.ids(" ".join(WORDS[rank - 1] for rank in ids))) == ids[-100:]


def test_as_keras_computes_it() -> None:
    # Half-precision word vectors move a probability by up to 5e-4 (3,004 texts, when they were extracted).
    np.testing.assert_allclose(one_by_one(JUDGE, list(KERAS)), list(KERAS.values()), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", []),
        ("the", ["the"]),
        ('"The,TO-of\tand\nA?"', ["the", "to", "of", "and", "a"]),
        ("weren't", ["weren't"]),  # an apostrophe is kept,
        ("the\rto", []),  # as is every blank but space, tab and line feed
        ("\xa0talk talk", ["\xa0talk", "talk"]),
        ("the qqzzxv of", ["the", "of"]),
        ("qqzzxv  ---  \n", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert [WORDS[rank - 1] for rank in JUDGE.ids(text)] == words


def test_the_commonest_word_is_number_one_and_none_is_the_padding() -> None:
    assert JUDGE.ids("the to of") == (1, 2, 3)
    assert len(WORDS) == len(set(WORDS)) == load_file(HERE / "gold.safetensors")["embedding"].shape[0] - 1


def test_long_texts_lose_their_beginning() -> None:
    end = "the " * 50 + "of " * 50
    assert JUDGE.ids("stupid " * 7 + end) == (1,) * 50 + (3,) * 50
    beginning, bare, inside = JUDGE.probability(["stupid " + end, end, "stupid " + end[4:]])
    assert beginning == bare != inside


def test_empty_and_unknown_texts_score_alike() -> None:
    empty, unknown, one = JUDGE.probability(["", "qqzzxv !!", "qqzzxv the"])
    assert empty == unknown == pytest.approx(literal([]), abs=1e-5)
    assert abs(one - empty) > 1e-3


def test_nothing_in_nothing_out() -> None:
    found = JUDGE.probability([])
    assert found.shape == (0,) and found.dtype == np.float64


def many_texts() -> list[str]:
    """More distinct texts than two passes hold, some twice."""
    rng = np.random.default_rng(3)
    drawn = [" ".join(WORDS[rank] for rank in rng.integers(0, 3000, n)) for n in rng.integers(1, 20, 2 * gold.ROWS + 9)]
    return [*drawn, *drawn[:40], "", *KERAS]


def test_a_score_hangs_neither_on_place_nor_on_company() -> None:
    texts = many_texts()
    found = JUDGE.probability(texts)
    assert found.dtype == np.float64 and len(np.unique(found)) > 2 * gold.ROWS
    order = np.random.default_rng(4).permutation(len(texts))
    assert (JUDGE.probability([texts[i] for i in order]) == found[order]).all()
    few = order[:25]
    assert (one_by_one(JUDGE, [texts[i] for i in few]) == found[few]).all()
    assert (LSTMJudge().probability(texts[::5]) == found[::5]).all()


def test_texts_of_the_same_words_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[tuple[int, ...]] = []
    score = LSTMJudge._score
    monkeypatch.setattr(LSTMJudge, "_score", lambda self, block: [scored.extend(block), score(self, block)][1])
    found = LSTMJudge().probability(["the of", "to", "The, of!", "the qqzzxv of", "to"])
    assert sorted(scored) == [(1, 3), (2,)]
    assert found[0] == found[2] == found[3] != found[1] == found[4]


def test_runs_on_one_thread_and_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    seen: list[int] = []
    score = LSTMJudge._score
    monkeypatch.setattr(LSTMJudge, "_score", lambda self, block: [seen.append(torch.get_num_threads()), score(self, block)][1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        LSTMJudge().probability(["the of"])
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_insults_above_harmless_texts() -> None:
    rude = [
        "shut up, you pathetic idiot",
        "What a load of crap",
        "go to hell you moron",
        "You're a worthless piece of garbage",
        "I hate you",
    ]
    kind = [
        "Thank you for the kind reply, it helped a lot.",
        "The trains were late because of the snow",
        "Copper melts at 1085 degrees.",
        "This article was written by a student of history.",
        "she bought bread and apples at the market",
    ]
    found = JUDGE.probability([*rude, *kind])
    assert ((found > 0) & (found < 1)).all()
    assert found[: len(rude)].min() > 0.5 > 0.1 > found[len(rude) :].max()


def test_import_leaves_torch_out() -> None:
    code = "import sys; from klbench_tasks.toxicity.gold import LSTMJudge; LSTMJudge(); print('torch' in sys.modules)"
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.stdout.split() == ["False"]


def test_weights_are_small_enough_to_ship() -> None:
    assert (HERE / "gold.safetensors").stat().st_size < 2_500_000


def extract() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toxicity_extract", SOURCE / "extract.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("value, opens", [({"the": 1}, True), (os.getcwd, False), (Path("x"), False)])
def test_the_maintainer_script_opens_tokenizers_alone(tmp_path: Path, value: object, opens: bool) -> None:
    file = tmp_path / "tokenizer.pickle"
    file.write_bytes(pickle.dumps(value))
    with file.open("rb") as handle:
        reader = extract().TokenizerUnpickler(handle)
        if opens:
            assert reader.load() == value
        else:
            with pytest.raises(pickle.UnpicklingError, match="has no place in a pickled tokenizer"):
                reader.load()
