"""Linear judges: TF-IDF features into k calibrated linear machines, whose mean probability is the score.

    features  x = tf-idf of the text (l2-normalised);  m_k = w_k . x + b_k;  p = mean_k 1 / (1 + exp(a_k m_k + c_k))

`judge`, k = 5: the weights of alt-profanity-check 1.9.1 (MIT), read once from its pickles. `hate`, k = 1, a = -1, c = 0: a logistic
regression on labelled forum posts, fitted once. `extract.py judge` and `extract.py hate` write them as safetensors; scikit-learn rebuilds
the vectoriser from the vocabulary, so that nothing is unpickled here.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import final

import numpy as np
from numpy.typing import NDArray


@final
@dataclass(frozen=True)
class LinearJudge:
    """P(toxic) of texts. Loads its weights when first called.

    name: of NAME.safetensors and NAME_vocabulary.json.  stop_words: left out of the features, as when the weights were fitted.
    """

    name: str = "judge"
    stop_words: str | None = "english"

    @functools.cached_property
    def _parts(self):
        from safetensors.numpy import load
        from sklearn.feature_extraction.text import TfidfVectorizer

        here = files(__package__)
        weights = load(here.joinpath(f"{self.name}.safetensors").read_bytes())
        words = json.loads(here.joinpath(f"{self.name}_vocabulary.json").read_text(encoding="utf-8"))
        vectoriser = TfidfVectorizer(stop_words=self.stop_words, vocabulary=words)
        vectoriser.idf_ = weights["idf"].astype(np.float64)
        return vectoriser, {k: v.astype(np.float64) for k, v in weights.items()}

    def probability(self, texts: list[str]) -> NDArray[np.float64]:
        """[n] P(toxic) of n texts."""
        vectoriser, w = self._parts
        margins = vectoriser.transform(texts) @ w["coef"].T + w["intercept"]
        shares: NDArray[np.float64] = 1.0 / (1.0 + np.exp(w["slope"] * margins + w["offset"]))
        return shares.mean(1)
