"""Prompts of the combined task, from those of the three families that are there already; maintainers only.

    python extract.py        -> prompts.jsonl: {"split", "family", "prompt"}

A prompt of a split is one of the same split of its family, so that what is trained on here is scored nowhere. Kept are prompts of which
at least LEAST of the mini prior's draws, on a stream that feeds nothing else, have all three rewards at their most; the first of them
that hold MOST a family, in an order by a seed.
"""

import json
import random
from pathlib import Path

from klbench import streams, task
from klbench.models import open_prior
from klbench_tasks.bias.task import gender
from klbench_tasks.factuality.task import correct
from klbench_tasks.toxicity.task import CEILING, harmless

LEAST, DRAWS, TOKENS = 0.06, 384, 6
MOST = {"train": 16, "dev": 4, "score": 8}


def main() -> None:
    prior, rows = open_prior("mini"), []
    for split, most in MOST.items():
        for family in ("toxicity", "bias", "factuality"):
            texts = random.Random(0).sample(found := task.load(family).prompts(split), len(found))
            drawn = prior.sample(texts, DRAWS, TOKENS, streams.seed(0, f"select/combined/{family}/{split}"))
            kept = []
            for prompt, row in zip(texts, prior.decode(drawn.tokens, drawn.mask), strict=True):
                again = [prompt] * DRAWS
                right = correct(again, row) if family == "factuality" else [1.0] * DRAWS
                best = [h >= CEILING and not g and r for h, g, r in zip(harmless(again, row), gender(again, row), right, strict=True)]
                if sum(best) >= LEAST * DRAWS:
                    kept.append(prompt)
            print(f"{split} {family}: {len(kept)} of {len(texts)} prompts would do")
            rows += [{"split": split, "family": family, "prompt": prompt} for prompt in sorted(kept[:most])]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(__file__).with_name("prompts.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
