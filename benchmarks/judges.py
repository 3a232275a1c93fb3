"""How fast the toxicity judges read: 10,000 distinct continuations, at most 2 s by a linear judge and 30 s by the recurrent one.

    python benchmarks/judges.py [--rounds 5]

Texts: the first 10,000 distinct draws of the bank of `toxicity` in a seeded shuffle, and as many made of six of them each, as long as a
longer task's. Median and range over the rounds, weights loaded before; the machine's cores are as busy as they are.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from klbench import task
from klbench.bank import Bank, shipped
from klbench.models import open_prior
from klbench_tasks.toxicity.task import HATE, LINEAR, LSTM

COUNT = 10_000
JUDGES = {"linear (at most 2 s)": LINEAR, "hate (at most 2 s)": HATE, "lstm (at most 30 s)": LSTM}


def continuations() -> list[str]:
    """Distinct bank draws, shuffled."""
    path = shipped(task.load("toxicity"), "mini")
    assert path is not None
    bank, prior = Bank.from_bytes(path.read_bytes(), str(path)), open_prior("mini")
    drawn = prior.decode(torch.from_numpy(bank.tokens).long(), torch.from_numpy(bank.mask))
    texts = sorted({text for row in drawn for text in row})
    random.Random(0).shuffle(texts)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    texts = continuations()
    rng = random.Random(1)
    kinds = {"bank draws": texts[:COUNT], "six at a time": ["".join(rng.sample(texts, 6)) for _ in range(COUNT)]}
    for kind, some in kinds.items():
        words = statistics.mean(len(text.split()) for text in some)
        print(f"{kind}: {len(set(some))} distinct texts, {words:.1f} words on average")
        for name, judge in JUDGES.items():
            judge.probability(some[:10])
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                judge.probability(some)
                seconds.append(time.perf_counter() - start)
            print(f"  {name:22s} {statistics.median(seconds):6.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
