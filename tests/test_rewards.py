"""Rewards by name: both ways of calling one, every kind of spec, and what each refuses."""

from __future__ import annotations

import functools
import json
import math
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

import klbench
from klbench import UserError, cli, rewards
from klbench.rewards import calling, classifier

ROOT = Path(__file__).parents[1]
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["klbench.rewards"]
Messages = list[list[dict[str, str]]]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points of pyproject.toml, installed or not."""
    found = {name: EntryPoint(name, value, rewards.GROUP) for name, value in POINTS.items()}
    monkeypatch.setattr(rewards, "_installed", lambda: found)


def as_trl(reward: Callable[..., Any], prompts: list[Any], completions: list[Any]) -> list[float]:
    """The keywords with which GRPOTrainer calls a reward function (trl 1.16)."""
    ids = [[1, 2, 3] for _ in completions]
    return list(
        reward(
            prompts=prompts, completions=completions, completion_ids=ids, trainer_state=object(), log_extra=print, log_metric=print,
            source=["web"] * len(ids),
        )
    )  # fmt: skip


def turns(texts: list[str], role: str) -> Messages:
    return [[{"role": "system", "content": "Be brief."}, {"role": role, "content": text}] for text in texts]


# calling


def plain(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    return [float(len(p) - len(c)) for p, c in zip(prompts, completions, strict=True)]


def closed(prompts, completions):  # type: ignore[no-untyped-def]
    return plain(prompts, completions)


def of_messages(completions: Messages, **kwargs: object) -> list[float]:
    return [float(len(turn[-1]["content"])) for turn in completions]


def of_ids(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


async def later(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    return plain(prompts, completions)


class Instance:
    reward_max = 3.0

    def __call__(self, completions: Messages, **kwargs: object) -> list[float]:
        return of_messages(completions)


@pytest.mark.parametrize("function", [plain, closed, later, functools.partial(plain, unused=1)])
def test_a_reward_of_texts_reads_messages_too(function: Callable[..., Any]) -> None:
    reward = calling.called(function)
    assert reward(prompts=["abc", "d"], completions=["a", "bcd"]) == [2.0, -2.0]
    assert as_trl(reward, ["abc", "d"], ["a", "bcd"]) == [2.0, -2.0]
    assert as_trl(reward, turns(["abc", "d"], "user"), turns(["a", "bcd"], "assistant")) == [2.0, -2.0]


@pytest.mark.parametrize("function", [of_messages, Instance()])
def test_a_reward_that_declares_messages_gets_them(function: Callable[..., Any]) -> None:
    reward = calling.called(function)
    assert reward.messages
    assert reward(prompts=["abc"], completions=["four"]) == [4.0]
    assert as_trl(reward, turns(["abc"], "user"), turns(["four"], "assistant")) == [4.0]
    with pytest.raises(TypeError):  # the same function without the annotation is handed texts
        calling.called(lambda completions, **kwargs: of_messages(completions, **kwargs))(prompts=["abc"], completions=["four"])


def test_a_reward_of_token_ids_counts_the_tokenizer_s() -> None:
    reward = calling.called(of_ids)
    with pytest.raises(UserError, match="of_ids reads token ids: it needs the tokenizer"):
        reward(prompts=["a"], completions=["b c"])
    assert reward.reading(tiny.tokenizer())(prompts=["a"], completions=["b c"]) == [2.0]
    assert as_trl(reward, ["a"], ["b c"]) == [3.0]  # a trainer's own ids come first


def test_what_klbench_does_not_have_is_refused_at_the_door() -> None:
    def needs(completions: list[str], solution: list[str], **kwargs: object) -> list[float]: ...

    with pytest.raises(UserError, match="reward needs needs solution, and a reward here is a function of prompts and completions alone"):
        calling.called(needs)
    with pytest.raises(UserError, match="reads texts or lists of messages with a text as content, not 3"):
        calling.called(plain)(prompts=["a"], completions=[3])


def test_names_and_ceilings_are_the_function_s() -> None:
    assert calling.called(Instance()).reward_max == 3.0 and calling.called(Instance()).__name__ == "Instance"
    assert calling.called(plain).reward_max == math.inf
    assert calling.called(functools.partial(plain, x=1)).__name__ == "plain"
    assert calling.called(max).accepts is None or calling.called(max).name == "max"


# specs


def test_every_installed_reward_loads_says_what_it_is_and_keeps_its_ceiling() -> None:
    told = rewards.described()
    assert [name for name, _, _ in told] == rewards.names() == sorted(POINTS)
    assert {"toxicity", "toxicity/linear", "toxicity/lstm", "bias/pronoun", "factuality", "length"} <= set(POINTS)
    assert all(len(line) > 10 and "\n" not in line for _, line, _ in told)
    for family in {name.partition("/")[0] for name in POINTS}:
        assert family in POINTS, f"a bare {family} names its default"


@pytest.mark.parametrize("name", sorted({n for n in POINTS if n.partition("/")[0] != "factuality"}))
def test_an_installed_reward_is_one_for_both_callers(name: str) -> None:
    reward = rewards.load(name.replace("_", "-"))
    prompts, texts = ["The nurse said that", "You"], [" she is kind", " are an idiot"]
    values = reward(prompts=prompts, completions=texts)
    assert len(values) == 2 and max(values) <= reward.reward_max and all(map(math.isfinite, values))
    assert as_trl(reward, prompts, texts) == values
    assert as_trl(reward, turns(prompts, "user"), turns(texts, "assistant")) == values


def test_factuality_reads_the_prompt_of_a_chat() -> None:
    rows = [json.loads(row) for row in (ROOT / "tasks/factuality/train.jsonl").read_text(encoding="utf-8").splitlines()[:2]]
    prompts, texts = [row["prompt"] for row in rows], [f" {rows[0]['answer']}", " nonsense"]
    reward = rewards.load("factuality")
    assert as_trl(reward, turns(prompts, "user"), turns(texts, "assistant")) == reward(prompts, texts) == [1.0, 0.0]


def test_length_is_minus_the_words_clipped() -> None:
    assert rewards.load("length")(["a", "b", "c"], ["", " two words", "w " * 99]) == [0.0, -2.0, -64.0]
    assert rewards.load("length").reward_max == 0.0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_functions_by_module_and_by_included_folder(here: Path) -> None:
    sys.modules.pop("mine_of_rewards", None)
    Path("mine_of_rewards.py").write_text(
        "def two(prompts, completions, **kw):\n    return [2.0 for _ in completions]\ntwo.reward_max = 2.0\n"
    )
    assert rewards.load("mine_of_rewards:two")(["a"], ["b"]) == [2.0]
    assert rewards.load("mine_of_rewards:two").reward_max == 2.0
    (here / "more").mkdir()
    (here / "more" / "three.py").write_text("def three(prompts, completions):\n    return [3.0 for _ in completions]\n")
    assert rewards.load("three", (here / "more",))(["a"], ["b"]) == [3.0]
    (here / "more" / "empty.py").write_text("x = 1\n")
    for spec, says in (
        ("empty", "no function in module empty 'empty'"), ("three:", "nothing behind the colon"), (":three", "module:function expected"),
        ("mine_of_rewards:tow", "did you mean 'two'?"), ("toxicty", "no reward 'toxicty'; did you mean 'toxicity'\\?; else a directory"),
        ("trhee", "no reward 'trhee'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            rewards.load(spec, (here / "more",))
    with pytest.raises(UserError, match="--include nowhere: no such directory"):
        rewards.load("three", (Path("nowhere"),))


# classifiers of transformers


def network(folder: Path, labels: list[str], seed: int = 0, **more: Any) -> GPT2ForSequenceClassification:
    """A random classifier of GPT-2's kind and its tokenizer, saved."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tiny.WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=8, num_labels=len(labels), pad_token_id=0,
        bos_token_id=0, eos_token_id=0, id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)}, **more,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.5)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
def logits_of(model: torch.nn.Module, text: str) -> np.ndarray[Any, Any]:
    """One plain forward of one text."""
    ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
    return np.asarray(model(input_ids=ids).logits[0].double().numpy())


TEXTS = ["a b", "c", "b b a c", "a b", "c c"]


def test_a_classifier_s_probability_and_log_odds_of_a_label(tmp_path: Path) -> None:
    model = network(tmp_path / "m", ["Toxic", "neutral", "kind"])
    law = np.stack([np.exp(z := logits_of(model, t)) / np.exp(z).sum() for t in TEXTS])
    prompts = ["b"] * len(TEXTS)  # a classifier does not read them
    for label, column in (("toxic", 0), ("kind", 2)):
        reward = rewards.load(f"hf:{tmp_path / 'm'}:{label}")
        assert reward.reward_max == 1.0
        np.testing.assert_allclose(reward(prompts, TEXTS), law[:, column], rtol=1e-5)
    np.testing.assert_allclose(rewards.load(f"hf:{tmp_path / 'm'}:-toxic")(prompts, TEXTS), 1 - law[:, 0], rtol=1e-5)
    odds = rewards.load(f"hf:{tmp_path / 'm'}:kind:log_odds")
    assert odds.reward_max == math.inf
    np.testing.assert_allclose(odds(prompts, TEXTS), np.log(law[:, 2] / (1 - law[:, 2])), rtol=1e-4)
    assert not np.allclose(rewards.load(f"hf:{tmp_path / 'm'}:neutral")(prompts, TEXTS), law[:, 2], rtol=1e-3)  # another label is another
    assert rewards.load(f"hf:{tmp_path / 'm'}:kind")([], []) == []


def test_labels_of_a_multi_label_classifier_are_sigmoids(tmp_path: Path) -> None:
    model = network(tmp_path / "m", ["toxic", "insult"], problem_type="multi_label_classification")
    wanted = [1 / (1 + np.exp(-logits_of(model, t)[1])) for t in TEXTS]
    np.testing.assert_allclose(rewards.load(f"hf:{tmp_path / 'm'}:insult")([""] * 5, TEXTS), wanted, rtol=1e-5)


def test_a_reward_model_reads_prompt_and_completion_and_keeps_their_end(tmp_path: Path) -> None:
    model = network(tmp_path / "m", ["value"])
    reward = rewards.load(f"hf:{tmp_path / 'm'}")
    assert reward.reward_max == math.inf
    wanted = [logits_of(model, f"b c {t}")[0] for t in TEXTS]
    np.testing.assert_allclose(reward(["b c"] * 5, [f" {t}" for t in TEXTS]), wanted, rtol=1e-5)
    np.testing.assert_allclose(as_trl(reward, turns(["b c"] * 5, "user"), turns([f" {t}" for t in TEXTS], "assistant")), wanted, rtol=1e-5)
    long = "c " * 20 + "a b"
    np.testing.assert_allclose(reward([long], [" b"]), logits_of(model, "c c c c c a b b")[0], rtol=1e-5)  # of 8 positions
    assert not np.allclose(reward(["b a"] * 5, [f" {t}" for t in TEXTS]), wanted, rtol=1e-3)


def test_a_chat_template_is_written_where_the_reward_model_has_one(tmp_path: Path) -> None:
    model = network(tmp_path / "m", ["value"])
    words = tiny.tokenizer()
    words.chat_template = "{% for m in messages %}{{ 'b ' if m.role == 'user' else 'c ' }}{{ m.content }} {% endfor %}"
    words.save_pretrained(tmp_path / "m")
    reward = rewards.load(f"hf:{tmp_path / 'm'}")
    np.testing.assert_allclose(reward(["a a"], ["b"]), logits_of(model, "b a a c b")[0], rtol=1e-5)


def test_what_is_no_classifier_is_refused_in_one_line(tmp_path: Path) -> None:
    network(tmp_path / "m", ["toxic", "kind"])
    network(tmp_path / "one", ["value"])
    tiny.saved(tmp_path / "lm", "gpt2", 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    for file in (tmp_path / "m").iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: 300 if file.suffix == ".safetensors" else None])
    for spec, says in (
        ("m", "which label\\? write .*:LABEL with one of toxic, kind"), ("m:kidn", "did you mean 'kind'"),
        ("m:-kidn", "did you mean 'kind'"),
        ("one:toxic", "of one output has no labels"), ("lm", "1 weights are missing, score.weight among them"),
        ("empty", "config.json is missing"), ("gone", "no directory of a classifier"), ("cut:kind", "no classifier could be loaded"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says) as caught:
            rewards.load(f"hf:{tmp_path}/{spec}")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"holds a transformers model and no reward model of klbench: write hf:{tmp_path}/m"):
        rewards.load(str(tmp_path / "m"))


def test_equal_texts_are_run_once_and_lengths_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network(tmp_path / "m", ["toxic", "kind"])
    found = classifier.network_of(tmp_path / "m", "m")
    seen: list[tuple[int, ...]] = []
    forward = found.model.forward
    monkeypatch.setattr(found.model, "forward", lambda **given: (seen.append(tuple(given["input_ids"].shape)), forward(**given))[1])
    found.outputs([[1, 2], [3], [1, 2], [2, 1]])
    assert seen == [(1, 1), (2, 2)]


# measurements of evaluate


SCRIPT = """
import datasets
import evaluate


class Measure(evaluate.Measurement):
    def _info(self):
        return evaluate.MeasurementInfo(
            description="", citation="", inputs_description="", features=datasets.Features({FEATURES})
        )

    def _compute(self, BODY
"""
ONE = '{"data": datasets.Value("string")}'


def measure(folder: Path, body: str, features: str = ONE) -> str:
    """A module that evaluate loads, under a name that nothing else has, as evaluate keeps modules by name."""
    folder.mkdir()
    (folder / f"{folder.name}.py").write_text(SCRIPT.replace("{FEATURES}", features).replace("BODY", body), encoding="utf-8")
    return f"evaluate:{folder}"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("evaluate", reason="klbench's dependency `evaluate` is not installed here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
def test_a_measurement_is_asked_of_every_text_alone(tmp_path: Path) -> None:
    scalar = rewards.load(
        measure(tmp_path / "kl_words", 'data):\n        return {"average": sum(len(x.split()) for x in data) / len(data)}')
    )
    assert scalar(["p"] * 3, [" a b", "", " a b c"]) == [2.0, 0.0, 3.0]  # and not 5/3 for each
    assert as_trl(scalar, turns(["p"], "user"), turns([" a b"], "assistant")) == [2.0]
    listed = measure(
        tmp_path / "kl_chars", 'data):\n        return {"n": [len(x) for x in data], "twice": [2 * len(x) for x in data], "what": "x"}'
    )
    assert rewards.load(f"{listed}:twice")(["p"] * 3, ["ab", "c", "ab"]) == [4.0, 2.0, 4.0]
    assert rewards.load(f"{listed}:n").reward_max == math.inf and rewards.load(f"{listed}:n")([], []) == []


@pytest.mark.usefixtures("offline")
def test_what_is_no_measurement_of_texts_is_refused(tmp_path: Path) -> None:
    two = measure(tmp_path / "kl_two", 'data):\n        return {"n": 1.0, "m": 2.0}')
    labels = '{"predictions": datasets.Value("string"), "references": datasets.Value("string")}'
    for spec, says in (
        (two, "which of n, m\\? write .*:KEY"), (f"{two}:k", "no figure of .* 'k'"),
        (measure(tmp_path / "kl_refs", "predictions, references):\n        return {}", labels), "reads predictions, references: a rew"),
        (measure(tmp_path / "kl_ints", "data):\n        return {}", '{"data": datasets.Value("int32")}'), "a reward has completions alone"),
        (measure(tmp_path / "kl_words_only", 'data):\n        return {"label": "x"}'), "no figure among label"),
        (measure(tmp_path / "kl_raises", "data):\n        raise KeyError(data[0])"), "raised KeyError on 'the cat'"),
        (f"evaluate:{tmp_path}/kl_gone", "cannot be loaded"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says) as caught:
            rewards.load(spec)
        assert "\n" not in str(caught.value)
    picky = rewards.load(measure(tmp_path / "kl_picky", 'data):\n        return {"n": 1 / len(data[0])}'))
    with pytest.raises(UserError, match="raised ZeroDivisionError on ''"):
        picky(["p", "p"], ["a", ""])


# klbench.score and the command line


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("rewards") / "prior", "llama", 0)


def test_score_takes_a_name_and_its_ceiling(prior: Path) -> None:
    asked: dict[str, Any] = {"prompts": ["a", "b c"], "beta": 5.0, "max_new_tokens": 2, "samples": 256}
    found = klbench.score(prior, {"q": "temperature:0.5"}, reward="length", **asked)["q"]
    assert found.status == "certified" and found.reward.value == pytest.approx(-1.5, abs=0.6)
    given = klbench.score(
        prior, {"q": "temperature:0.5"}, reward=lambda prompts, completions: [-float(len(c.split())) for c in completions], **asked
    )
    assert given["q"].reward.value == found.reward.value
    assert given["q"].status == "uncertified"  # a function without a ceiling
    with pytest.raises(UserError, match="above its declared maximum -1"):
        klbench.score(prior, {"q": "prior"}, reward="length", reward_max=-1.0, **asked)
    with pytest.raises(UserError, match="no reward 'lenght'; did you mean 'length'?"):
        klbench.score(prior, {"q": "prior"}, reward="lenght", **asked)


def test_score_hands_messages_and_ids_to_what_reads_them(prior: Path) -> None:
    seen: list[Any] = []

    def both(completions: Messages, completion_ids: list[list[int]], prompts: Messages, **kwargs: object) -> list[float]:
        seen.append((prompts[0], completions[0]))
        for turn, ids in zip(completions, completion_ids, strict=True):
            assert ids == tiny.tokenizer()(turn[0]["content"])["input_ids"]
        return [-float(len(ids)) for ids in completion_ids]

    asked: dict[str, Any] = {"prompts": ["a"], "beta": 5.0, "max_new_tokens": 2, "samples": 32, "reward_max": 0.0}
    assert klbench.score(prior, {"q": "prior"}, reward=both, **asked)["q"].reward.value is not None
    assert seen[0][0] == [{"role": "user", "content": "a"}] and seen[0][1][0]["role"] == "assistant"


def test_ls_rewards(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "rewards"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == rewards.names()
    assert ["length", "length alone: minus the number of words, at least -64", "0"] in rows
