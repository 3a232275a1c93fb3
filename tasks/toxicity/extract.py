"""Judges and prompts of the toxicity task; maintainers only.

    python extract.py judge --packages DIR     -> judge.safetensors, judge_vocabulary.json from alt-profanity-check's pickles (MIT)
    python extract.py gold  --packages DIR     -> gold.safetensors, gold_vocabulary.json from toxic-comment-classifier's h5 and pickle (MIT)

DIR holds the unpacked wheels, each in a folder of its name: alt_profanity_check (1.9.1) and toxic_comment_classifier (0.3.0). `judge`
needs joblib and scikit-learn 1.9.1, `gold` needs h5py; neither keras nor tensorflow.
"""

import argparse
import collections
import json
import pickle
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def judge(packages: Path) -> None:
    import joblib
    from safetensors.numpy import save_file

    data = packages / "alt_profanity_check/profanity_check/data"
    vectoriser, model = joblib.load(data / "vectorizer.joblib"), joblib.load(data / "model.joblib")
    words = sorted(vectoriser.vocabulary_, key=vectoriser.vocabulary_.get)
    parts = model.calibrated_classifiers_
    column = lambda f: np.array([f(p) for p in parts], np.float64)  # noqa: E731
    save_file(
        {
            "idf": vectoriser.idf_.astype(np.float32),
            "coef": np.concatenate([p.estimator.coef_ for p in parts]).astype(np.float32),
            "intercept": column(lambda p: p.estimator.intercept_[0]),
            "slope": column(lambda p: p.calibrators[0].a_),
            "offset": column(lambda p: p.calibrators[0].b_),
        },
        HERE / "judge.safetensors",
    )
    (HERE / "judge_vocabulary.json").write_text(json.dumps(words, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


class Tokenizer:
    """Stands in for the keras class of this name: the pickle fills its attributes, nothing of it is called."""


class TokenizerUnpickler(pickle.Unpickler):
    """Opens a pickled keras Tokenizer and refuses every name that such a file has no use for."""

    NAMES = {  # noqa: RUF012
        ("keras.src.legacy.preprocessing.text", "Tokenizer"): Tokenizer,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "defaultdict"): collections.defaultdict,
        ("builtins", "int"): int,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a pickled tokenizer")
        return self.NAMES[module, name]


def gold(packages: Path) -> None:
    import h5py
    from safetensors.numpy import save_file

    data = packages / "toxic_comment_classifier/toxic_classifier/model"
    with open(data / "tokenizer.pickle", "rb") as file:
        facts = vars(TokenizerUnpickler(file).load())
    # What gold.py takes for granted. filters: its FILTERS, written out again so that this script needs nothing installed.
    wanted = {"num_words": 20000, "lower": True, "split": " ", "char_level": False, "oov_token": None, "analyzer": None}
    wanted["filters"] = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n'
    if other := {key: facts[key] for key in wanted if facts[key] != wanted[key]}:
        raise SystemExit(f"another tokenizer than gold.py reads: {other}")
    words = sorted((w for w, rank in facts["word_index"].items() if rank < facts["num_words"]), key=facts["word_index"].get)
    if [facts["word_index"][w] for w in words] != list(range(1, facts["num_words"])):
        raise SystemExit("the ranks of the known words are not 1, 2, 3, ...")

    with h5py.File(data / "model.weights.h5") as h5:
        read = lambda layer, k: np.asarray(h5[f"layers/{layer}/vars/{k}"], np.float32)  # noqa: E731
        tensors = {"embedding": read("embedding", 0).astype(np.float16)}  # moves P(toxic) by less than 1e-3
        for side in ("forward", "backward"):
            for k, part in enumerate(("kernel", "recurrent", "bias")):
                tensors[f"{side}.{part}"] = read(f"bidirectional/{side}_layer/cell", k)
        for ours, theirs in (("hidden", "dense"), ("label", "dense_1")):
            for k, part in enumerate(("kernel", "bias")):
                tensors[f"{ours}.{part}"] = read(theirs, k)
    save_file(tensors, HERE / "gold.safetensors")
    (HERE / "gold_vocabulary.json").write_text(json.dumps(words, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    stages = {"judge": judge, "gold": gold}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("--packages", type=Path, required=True)
    arguments = parser.parse_args()
    stages[arguments.stage](arguments.packages)
