"""A linear model over hashed n-grams of a text: no vocabulary to keep, so that the weights are the whole model.

    x = [words of one and two, l2-normalised ; characters of two to four inside words, l2-normalised]        2^15 + 2^16 columns
    margins = W x + b                                                                                        W [M, D], b [M], a row a member

The completion alone is read: in a comparison of two completions the prompt cancels from a linear model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np

from klbench.estimate import Array

WORDS: Final = 2**15
CHARACTERS: Final = 2**16


def features(texts: Sequence[str]) -> Any:
    """[n, D] scipy rows, float64."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(n_features=WORDS, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", norm="l2")
    characters = HashingVectorizer(n_features=CHARACTERS, analyzer="char_wb", ngram_range=(2, 4), norm="l2")
    return hstack([words.transform(texts), characters.transform(texts)], format="csr")


@final
@dataclass(frozen=True, eq=False)
class Hashed:
    """weights [M, D], bias [M]."""

    weights: Array
    bias: Array

    def margins(self, prompts: Sequence[str], completions: Sequence[str]) -> Array:
        """[M, n]; the prompts are not read."""
        return np.asarray((features(completions) @ self.weights.T).T + self.bias[:, None])
