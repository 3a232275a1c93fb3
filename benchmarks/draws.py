"""What other ways of spending the same draws would save: more of them where a prompt is noisy, and common random numbers.

    python benchmarks/draws.py [--run runs/quick] [--repeats 24] [--draws 64]

For the policies of a finished run.

- Allocation: the variance of the mean over prompts of KL(q||p0) - E_q r/beta with draws in proportion to each prompt's standard deviation
  (Neyman), over that with the same number each: (mean sd)^2 / mean sd^2, after the control variates; the best there can be, with the
  deviations known.
- Common random numbers: the variance of the difference between two policies of a task when both fall from the same uniforms, over that with
  uniforms of their own; by repeated draws, and before control variates.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from klbench import models, streams, task
from klbench.record import Record

NOT_TRAINED = "sampler"


def allocation(run: Path, record: Record) -> float:
    """Variance under Neyman's allocation over that under an equal one."""
    with np.load(run / "samples" / f"{record.run.id}.npz") as held:
        kl, reward, *controls = (held[f"own_{name}"].astype(float) for name in ("kl", "reward", "A", "B"))
    value = kl if "moments" in record.columns and record.columns["moments"].value is not None else kl - reward / record.run.beta
    centred = value - value.mean(1, keepdims=True)
    X = np.stack([c - c.mean(1, keepdims=True) for c in controls], -1)
    slope = np.linalg.lstsq(X.reshape(-1, len(controls)), centred.reshape(-1), rcond=None)[0]
    variance = (centred - X @ slope).var(1)
    return float(np.sqrt(variance).mean() ** 2 / variance.mean())


def common(run: Path, records: list[Record], repeats: int, draws: int) -> list[float]:
    """For each pair of policies, the variance of their difference with common uniforms over that with separate ones."""
    prior = models.open_prior(records[0].run.prior)
    given = task.load(records[0].run.task)
    prompts = given.prompts("score")
    target = given.target(prior, records[0].run.beta)
    found = {}
    for record in records:
        policy = models.open_policy(record.run.id, str(run / "policies" / record.run.id), prior)
        means = []
        for k in range(repeats):
            fallen = policy.sample(prompts, draws, record.run.max_new_tokens, streams.seed(k, "benchmarks/draws"))
            log_p0 = prior.log_prob(prompts, fallen.tokens, fallen.mask)
            kl = (fallen.log_q - log_p0).sum(2).double().numpy()
            tilt = target.tilt(target.rewards(prompts, policy.decode(fallen.tokens, fallen.mask)))
            means.append(float((kl - tilt).mean()))
        found[record.run.id] = np.array(means)
    ratios = []
    for a, b in itertools.combinations(found.values(), 2):
        ratios.append(float((a - b).var(ddof=1) / (a.var(ddof=1) + b.var(ddof=1))))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quick"))
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--policies", type=int, default=4, help="of each task")
    args = parser.parse_args()
    by_task: dict[str, list[Record]] = defaultdict(list)
    for path in sorted((args.run / "records").glob("*.json")):
        record = Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
        if record.run.kind != NOT_TRAINED:
            by_task[record.run.task].append(record)
    print(f"{'task':12} {'allocation, variance over equal':>34} {'common uniforms, variance over separate':>42}")
    for name, records in by_task.items():
        a = [allocation(args.run, record) for record in records]
        c = common(args.run, records[: args.policies], args.repeats, args.draws)
        said = [f"{np.median(x):.2f} ({min(x):.2f} to {max(x):.2f}, {len(x)})" for x in (a, c)]
        print(f"{name:12} {said[0]:>34} {said[1]:>42}", flush=True)


if __name__ == "__main__":
    main()
