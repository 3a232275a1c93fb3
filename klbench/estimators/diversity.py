"""Diversity of draws in sets of 16 of one prompt: distinct-n, unique share, self-BLEU. Each is a mean over sets, then over prompts.

distinct_n = E[different n-grams] / E[n-grams] of a set, model tokens, EOS left out, no n-gram across draws; self_bleu = BLEU-4 of each
draw's words against the other 15 (add-1 smoothing above unigrams, closest length for brevity). Errors: jackknife over sets. Fewer
draws than a set: a figure without a value that says so. Prompts with unlike numbers of draws, or none: ValueError.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from klbench.estimate import Array, Estimate, Jackknife, undefined
from klbench.estimators.control import with_few

SET: Final = 16
CAP: Final = 1e-6  # of a ceiling, as float32 keeps rewards
LEAST: Final = 10  # n-grams of a prompt in all

Tokens = Sequence[Sequence[int]]


def _rectangle(draws: Sequence[Sequence[object]]) -> int:
    """P N, of draws [P][N]. Raises ValueError when a prompt has more of them than another, or there is no prompt."""
    counts = sorted({len(prompt) for prompt in draws})
    if len(counts) != 1:
        raise ValueError(f"as many draws of each prompt expected, got {', '.join(map(str, counts)) or 'no prompt'}")
    return len(draws) * counts[0]


def _sets(draws: Sequence[object]) -> list[range]:
    return [range(i, i + SET) for i in range(0, len(draws) - SET + 1, SET)]


def _ratio(top: Array, bottom: Array, n: int) -> Estimate:
    """mean_p (sum_sets top / sum_sets bottom), leave-one-set-out. [P, S]."""
    if top.shape[1] == 0:
        return undefined(f"a set needs {SET} draws of a prompt", n=n)

    def ratio(t: Array, b: Array) -> Array:
        return np.divide(t.sum(1), b.sum(1), out=np.zeros(len(t)), where=b.sum(1) > 0)

    full, sets = ratio(top, bottom), top.shape[1]
    if sets < 2:
        return Estimate(float(full.mean()), n=n, status="uncertified", reason="one set a prompt has no error")
    left = np.stack([ratio(np.delete(top, s, 1), np.delete(bottom, s, 1)) for s in range(sets)])
    share = np.divide(top, bottom, out=np.zeros(top.shape), where=bottom > 0)
    figure = with_few(Jackknife(full, left).mean(n=n), share, 1.0 / SET)  # a draw of another kind moves a set's share by a sixteenth
    value, low, high = (None if x is None else min(1.0, max(0.0, x)) for x in (figure.value, figure.low, figure.high))
    figure = replace(figure, value=value, low=low, high=high)
    if (bottom.sum(1) >= LEAST).all():
        return figure
    why = f"the draws of some prompt hold fewer than {LEAST} n-grams: how many of more would differ is not known"
    return replace(figure, low=None, high=None, population=None, status="uncertified", reason=why)


def distinct(draws: Sequence[Tokens], n: int) -> Estimate:
    """distinct-n of draws [P][N] of token ids (EOS left out)."""
    size = _rectangle(draws)
    top, bottom = [], []
    for prompt in draws:
        seen, total = [], []
        for members in _sets(prompt):
            grams = [tuple(prompt[i][j : j + n]) for i in members for j in range(len(prompt[i]) - n + 1)]
            seen.append(len(set(grams)))
            total.append(len(grams))
        top.append(seen)
        bottom.append(total)
    return _ratio(np.array(top, np.float64), np.array(bottom, np.float64), size)


def at_cap(reward: Array, tops: Array) -> NDArray[np.bool_] | None:
    """[P, N] whether each draw earns all that its prompt can give; None where no ceiling was declared."""
    if not np.isfinite(tops).all():
        return None
    return np.asarray(reward >= (tops - CAP * np.maximum(1.0, np.abs(tops)))[:, None])


def unique(draws: Sequence[Tokens], valid: NDArray[np.bool_] | None = None) -> Estimate:
    """Different draws / draws of a set; valid [P, N]: only draws marked there are counted above the line (quality-gated diversity)."""
    size = _rectangle(draws)
    counted = np.ones((len(draws), size // len(draws)), bool) if valid is None else valid
    top = [[len({tuple(p[i]) for i in members if keep[i]}) for members in _sets(p)] for p, keep in zip(draws, counted, strict=True)]
    seen = np.array(top, np.float64)
    return _ratio(seen, np.full_like(seen, SET), size)


def self_bleu(texts: Sequence[Sequence[str]]) -> Estimate:
    """self-BLEU of completions [P][N]; high is low diversity."""
    size = _rectangle(texts)
    words = re.compile(r"\w+|[^\w\s]")
    cache: dict[str, list[Counter[tuple[str, ...]]]] = {}

    def grams(text: str) -> list[Counter[tuple[str, ...]]]:
        if text not in cache:
            w = words.findall(text.lower())
            cache[text] = [Counter(tuple(w[j : j + n]) for j in range(len(w) - n + 1)) for n in (1, 2, 3, 4)]
        return cache[text]

    scores = [[_set_bleu([grams(p[i]) for i in members]) for members in _sets(p)] for p in texts]
    top = np.array(scores, np.float64)
    return _ratio(top, np.ones_like(top), size)


def _set_bleu(members: list[list[Counter[tuple[str, ...]]]]) -> float:
    """Mean BLEU-4 of each member against the rest; a gram's largest count among the others comes from the two largest over all."""
    lengths = [sum(m[0].values()) for m in members]
    best: list[dict[tuple[str, ...], tuple[int, int, int]]] = []  # gram -> (largest count, its owner, second largest)
    for n in range(4):
        table: dict[tuple[str, ...], tuple[int, int, int]] = {}
        for i, m in enumerate(members):
            for gram, count in m[n].items():
                first, owner, second = table.get(gram, (0, -1, 0))
                table[gram] = (count, i, first) if count > first else (first, owner, max(second, count))
        best.append(table)
    total = 0.0
    for i, m in enumerate(members):
        if not lengths[i]:
            continue
        logs = 0.0
        for n in range(4):
            hits = 0
            for gram, count in m[n].items():
                first, owner, second = best[n][gram]
                hits += min(count, second if owner == i else first)
            of, smooth = sum(m[n].values()), 0 if n == 0 else 1
            share = (hits + smooth) / (of + smooth) if of + smooth else 0.0
            if share == 0.0:
                logs = -math.inf
                break
            logs += math.log(share) / 4
        near = min((abs(x - lengths[i]), x) for j, x in enumerate(lengths) if j != i)[1]
        total += math.exp(logs + min(0.0, 1 - near / lengths[i]))
    return total / len(members)
