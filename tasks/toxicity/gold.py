"""The second toxicity judge (`gold`): a bidirectional LSTM over word vectors, its outputs max-pooled; P(toxic) is the first of six labels.

    words     ids w_1..w_100: the last 100 known words of the text, with id 0 in front where there are fewer
    step      [i f g o] = x_t W + h_{t-1} U + b,   x_t = E[w_t];   c_t = s(f) c_{t-1} + s(i) tanh g;   h_t = s(o) tanh c_t
    p(toxic)  s(a v + a0),   v = relu(m V + v0),   m = max over t of [h_t of w_1..w_100, h_t of w_100..w_1]

s is the logistic function. The network was trained without a mask: id 0 has a vector like any word, so its steps change both states and
count in the maximum. They are kept here. In front of a text they meet no word, so that the states after k of them are worked out once
for every k; from the right they come last and are run for each text.

A word is what stands between blanks once the text is lower-cased and FILTERS are blanked (the tokenizer of keras); others than the
19,999 known words are dropped. Weights of toxic-comment-classifier 0.3.0 (MIT), read once by `extract.py gold`; word vectors in half
precision, arithmetic in single.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import chain, repeat
from typing import TYPE_CHECKING, Final, final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

LENGTH: Final = 100  # words the network reads
FILTERS: Final = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n'
BLANKED: Final = str.maketrans(FILTERS, " " * len(FILTERS))
ROWS: Final = 128  # texts in one pass: always as many, so that a text's score hangs neither on its company nor on its place


@final
class LSTMJudge:
    """P(toxic) of texts. Loads its weights, and torch, when first called."""

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        words = json.loads(files(__package__).joinpath("gold_vocabulary.json").read_text(encoding="utf-8"))
        return {word: rank for rank, word in enumerate(words, start=1)}

    @functools.cached_property
    def _weights(self) -> dict[str, Tensor]:
        from safetensors.torch import load

        weights = load(files(__package__).joinpath("gold.safetensors").read_bytes())
        return {name: value.float() for name, value in weights.items()}

    @functools.cached_property
    def _steps(self) -> dict[str, Tensor]:
        """[20000, 200] a direction: x W + b of every word, row 0 that of the padding."""
        w = self._weights
        return {side: w["embedding"] @ w[f"{side}.kernel"] + w[f"{side}.bias"] for side in ("forward", "backward")}

    @functools.cached_property
    def _padded(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(h, c, running maximum of h), each [ROWS, 50], of the forward direction after k = 0..100 padding steps."""
        state = self._rest()
        states = [state]
        for _ in range(LENGTH):
            state = _run(repeat(self._steps["forward"][0], 1), self._weights["forward.recurrent"], state)
            states.append(state)
        return states

    def _rest(self) -> tuple[Tensor, Tensor, Tensor]:
        zero = self._weights["forward.recurrent"].new_zeros(ROWS, self._weights["forward.recurrent"].shape[0])
        return zero, zero, zero - float("inf")

    def ids(self, text: str) -> tuple[int, ...]:
        """Known words by frequency rank, 1..19999; the last 100 of them."""
        words = text.lower().translate(BLANKED).split(" ")
        return tuple(self._index[word] for word in words if word in self._index)[-LENGTH:]

    def probability(self, texts: list[str]) -> NDArray[np.float64]:
        """[n] P(toxic) of n texts. Texts of the same known words are scored once.

        On one thread, whatever torch is set to: the steps are too small to share, and two threads that wait for each other on busy
        cores were a hundred times slower.
        """
        import torch

        keys = [self.ids(text) for text in texts]
        distinct = sorted(set(keys), key=lambda key: (len(key), key))  # short texts share the steps that they are spared
        scores: dict[tuple[int, ...], float] = {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                for start in range(0, len(distinct), ROWS):
                    block = distinct[start : start + ROWS]
                    scores.update(zip(block, self._score(block).double().tolist(), strict=True))
        finally:
            torch.set_num_threads(threads)
        return np.array([scores[key] for key in keys], dtype=np.float64)

    def _score(self, block: list[tuple[int, ...]]) -> Tensor:
        """[n] P(toxic) of n <= ROWS texts, the longest of them last."""
        import torch

        w, width = self._weights, len(block[-1])
        grid = np.zeros((ROWS, width), np.int64)
        for row, key in enumerate(block):
            grid[row, width - len(key) :] = key
        words = torch.from_numpy(grid)
        spared = LENGTH - width

        def steps(side: str, order: Iterable[int]) -> Iterator[Tensor]:
            return (self._steps[side][words[:, t]] for t in order)

        _, _, forward = _run(steps("forward", range(width)), w["forward.recurrent"], self._padded[spared])
        padding = repeat(self._steps["backward"][0], spared)
        _, _, backward = _run(chain(steps("backward", reversed(range(width))), padding), w["backward.recurrent"], self._rest())
        hidden = (torch.cat([forward, backward], 1) @ w["hidden.kernel"] + w["hidden.bias"]).relu()
        # Summed row by row: a thin matrix product may add up the rows of one block in different orders.
        margin = (hidden * w["label.kernel"][:, 0]).sum(1) + w["label.bias"][0]
        return margin.sigmoid()[: len(block)]


def _run(steps: Iterable[Tensor], recurrent: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(h, c, maximum of every h so far), [B, 50] each, after steps that bring x W + b, [B, 200] or one row for all."""
    h, c, peak = state
    for step in steps:
        i, f, g, o = (step + h @ recurrent).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        peak = peak.maximum(h)
    return h, c, peak
