"""Diversity against slow literal readings of the definitions, on ragged draws, and by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from klbench.estimators.diversity import SET, distinct, self_bleu, unique

Ids = list[list[list[int]]]


def ragged(prompts: int, draws: int, seed: int = 0, words: int = 4) -> Ids:
    rng = np.random.default_rng(seed)
    return [[rng.integers(0, words, rng.integers(0, 7)).tolist() for _ in range(draws)] for _ in range(prompts)]


def literal_distinct(draws: Ids, n: int) -> float:
    """Ratio of sums over the sets of a prompt, mean over prompts; n-grams are written out as strings."""
    ratios = []
    for prompt in draws:
        different = total = 0
        for start in range(0, len(prompt) // 16 * 16, 16):
            seen = set()
            for draw in prompt[start : start + 16]:
                for j in range(len(draw)):
                    if j + n <= len(draw):
                        seen.add(" ".join(str(t) for t in draw[j : j + n]))
                        total += 1
            different += len(seen)
        ratios.append(different / total if total else 0.0)
    return sum(ratios) / len(ratios)


def literal_bleu(hypothesis: list[str], references: list[list[str]]) -> float:
    """BLEU-4 of Papineni et al. 2002 with clipped counts, +1 on both sides above unigrams, the closest length (shorter on ties)."""
    if not hypothesis:
        return 0.0
    log = 0.0
    for n in range(1, 5):
        mine = [tuple(hypothesis[j : j + n]) for j in range(len(hypothesis) - n + 1)]
        hits = 0
        for gram in set(mine):
            most = max(sum(ref[j : j + n] == list(gram) for j in range(len(ref) - n + 1)) for ref in references)
            hits += min(mine.count(gram), most)
        share = hits / len(mine) if n == 1 else (hits + 1) / (len(mine) + 1)
        if share == 0:
            return 0.0
        log += 0.25 * math.log(share)
    best = sorted(references, key=lambda ref: (abs(len(ref) - len(hypothesis)), len(ref)))[0]
    brevity = 1.0 if len(hypothesis) > len(best) else math.exp(1 - len(best) / len(hypothesis))
    return brevity * math.exp(log)


def literal_self_bleu(texts: list[list[str]]) -> float:
    means = []
    for prompt in texts:
        split = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in prompt]
        scores = []
        for start in range(0, len(split) // 16 * 16, 16):
            members = split[start : start + 16]
            scores += [literal_bleu(m, members[:i] + members[i + 1 :]) for i, m in enumerate(members)]
        means.append(sum(scores) / len(scores))
    return sum(means) / len(means)


def value(x: float | None) -> float:
    assert x is not None
    return x


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("draws", [16, 17, 31])
def test_distinct_of_one_set_is_the_literal_ratio(n: int, draws: int) -> None:
    data = ragged(3, draws, seed=n, words=3)
    found = distinct(data, n)
    assert found.value == pytest.approx(literal_distinct(data, n), rel=1e-12)
    assert found.status == "uncertified" and found.low is None and found.n == 3 * draws and 0 < value(found.value) < 1
    assert abs(value(found.value) - literal_distinct(data, n % 4 + 1)) > 1e-3  # another n is another number


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct_of_sets_is_the_jackknife_of_the_literal_ratio(n: int) -> None:
    data, sets = ragged(2, 64, seed=9), 4
    full = [literal_distinct([prompt], n) for prompt in data]
    left = [[literal_distinct([prompt[: 16 * s] + prompt[16 * s + 16 :]], n) for prompt in data] for s in range(sets)]
    est = sets * np.array(full) - (sets - 1) * np.mean(left, 0)
    var = (sets - 1) / sets * ((np.array(left) - np.mean(left, 0)) ** 2).sum(0)
    found = distinct(data, n)
    assert found.value == pytest.approx(est.mean(), rel=1e-12) and found.stderr == pytest.approx(math.sqrt(var.sum()) / 2, rel=1e-9)
    t6 = 2.4469118511449692  # (4 - 1) sets times two prompts
    room = 1.5 / 16 / (2 * sets)  # half of the rule of three: eight sets show little
    assert value(found.high) == pytest.approx(min(1.0, value(found.value) + room + math.hypot(room, t6 * value(found.stderr))), rel=1e-9)


def test_distinct_and_unique_by_hand() -> None:
    data = [[[1, 2, 1, 2], [1, 2]] + [[3]] * 13 + [[]]]  # 1-grams: 3 of 19; 2-grams: 12 21 12 12, so 2 of 4; 3-grams: 121 212
    assert [distinct(data, n).value for n in (1, 2, 3, 4)] == pytest.approx([3 / 19, 0.5, 1.0, 1.0])
    assert unique(data).value == 4 / 16
    assert distinct([[[]] * 16], 1).value == 0.0 and unique([[[]] * 16]).value == 1 / 16


def test_no_gram_crosses_two_draws() -> None:
    assert distinct([[[i] for i in range(16)]], 2).value == 0.0


def test_unique_is_the_literal_share() -> None:
    data = ragged(3, 48, seed=4, words=2)
    literal = np.mean([[len({str(x) for x in prompt[s : s + 16]}) / 16 for s in (0, 16, 32)] for prompt in data])
    found = unique(data)
    assert found.value == pytest.approx(literal) and found.stderr is not None and found.stderr > 0
    assert abs(value(found.value) - np.mean([len({str(x) for x in prompt}) / 48 for prompt in data])) > 0.05  # one set of 48


@pytest.mark.parametrize("draws", [16, 40])
def test_self_bleu_is_the_literal_mean(draws: int) -> None:
    words = ["the", "Nurse", "said", "that,", "she's", "é", "(x)", "the the"]
    texts = [[" ".join(words[t] for t in ids) for ids in prompt] for prompt in ragged(2, draws, seed=5, words=8)]
    found = self_bleu(texts)
    assert found.value == pytest.approx(literal_self_bleu(texts), rel=1e-12) and 0.1 < value(found.value) < 1.0


def test_self_bleu_by_hand() -> None:
    assert self_bleu([["a b c d e"] * 16]).value == pytest.approx(1.0)
    assert self_bleu([[chr(97 + i) * 3 for i in range(16)]]).value == 0.0
    # one "a b" among 15 "a": against "a", 1-grams hit 1 of 2, 2-grams (0 + 1) of (1 + 1), 3- and 4-grams 1 of 1; an "a" is found whole
    assert self_bleu([["a b"] + ["a"] * 15]).value == pytest.approx((0.25**0.25 + 15) / 16)
    # a word said twice counts as often as one other draw says it
    assert self_bleu([["a a"] + ["a"] * 15]).value == pytest.approx((0.25**0.25 + 15) / 16)


@pytest.mark.parametrize("draws", [0, 1, 15])
def test_fewer_draws_than_a_set_have_no_diversity(draws: int) -> None:
    data = ragged(2, draws)
    for found in (distinct(data, 2), unique(data), self_bleu([["x"] * draws] * 2)):
        assert found.value is None and found.status == "uncertified" and found.n == 2 * draws
        assert found.reason == f"a set needs {SET} draws of a prompt"


@pytest.mark.parametrize("counts", [(16, 17), (32, 15), (16, 0), ()])
def test_prompts_with_unlike_numbers_of_draws_are_refused(counts: tuple[int, ...]) -> None:
    data = [[[1, 2]] * n for n in counts]
    says = "as many draws of each prompt expected, got " + (", ".join(map(str, sorted(counts))) or "no prompt")
    for call in (lambda: distinct(data, 2), lambda: unique(data), lambda: self_bleu([["x y"] * n for n in counts])):
        with pytest.raises(ValueError, match=says):
            call()
