"""The prompts of the exact tasks, the lambdas of exact/moment and the base rates of the README; maintainers only, seconds, no network.

    python tasks/exact/extract.py

Prompts are two or three words in a seeded order. Those of the score split are the first at which each variant is what its name says (BANDS,
exact masses under the tiny prior); dev and train take what comes next, whatever it is. Every rate in the README is a sum over all outputs.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from klbench import exact, streams, task
from klbench.estimate import Array
from klbench.policies.causal_lm import CausalLM, load
from klbench.priors import prior_path
from klbench_tasks.exact.task import HIDDEN, RARE, WANTED, WARMTH, graded, says, sunny, warmth

HERE = Path(__file__).resolve().parent
SIZES = {"score": 6, "dev": 16, "train": 256}
BANDS = {"dense": (0.05, 0.3), "scarce": (1e-3, 2e-2), "rare": (4e-4, 2.5e-3), "hidden": (2e-4, 9e-4)}  # prior mass at the cap
START, END = "<!-- base rates: start -->", "<!-- base rates: end -->"


def law(prior: CausalLM, prompts: list[str]) -> tuple[list[str], Array]:
    """Every output's text and log p0 [P, S]."""
    tokens, mask = exact.outcomes(9, [prior.eos], 4)
    return prior.decode(tokens[None], mask[None])[0], exact.log_law(prior, prompts, tokens, mask)


def chosen(prior: CausalLM) -> dict[str, list[str]]:
    """Prompts by split."""
    every = [" ".join(words) for k in (2, 3) for words in itertools.product(WARMTH, repeat=k)]
    order = [every[i] for i in np.random.default_rng(streams.seed(0, "exact/prompts")).permutation(len(every))]
    texts, log_p0 = law(prior, order[:128])
    caps = {
        "dense": [graded(t) == 1 for t in texts],
        "scarce": [warmth(t) >= 8 for t in texts],
        "rare": [says(t, RARE) for t in texts],
        "hidden": [says(t, HIDDEN) for t in texts],
    }
    mass = {name: np.exp(log_p0) @ np.array(cap, dtype=float) for name, cap in caps.items()}
    good = np.all([(low <= mass[name]) & (mass[name] <= high) for name, (low, high) in BANDS.items()], axis=0)
    score = [p for p, fits in zip(order, good, strict=False) if fits][: SIZES["score"]]
    left = [p for p in order if p not in score]
    return {"score": score, "dev": left[: SIZES["dev"]], "train": left[SIZES["dev"] : SIZES["dev"] + SIZES["train"]]}


def lambdas(prior: CausalLM, prompts: list[str]) -> dict[str, float]:
    """The root of E_p*[phi] = WANTED at each prompt, by a sum over every output."""
    texts, log_p0 = law(prior, prompts)
    phi = np.array(sunny([""] * len(texts), texts))

    def excess(lam: float, row: Array) -> float:
        tilted = row + lam * phi
        return float(np.exp(tilted - logsumexp(tilted)) @ phi) - WANTED

    return {p: round(brentq(excess, -20, 20, args=(row,)), 12) for p, row in zip(prompts, log_p0, strict=True)}


def rates(prior: CausalLM) -> list[str]:
    """The README's table, exact."""
    names = ("dense", "scarce", "rare", "hidden", "moment", "design")
    rows: dict[str, list[str]] = {}
    for name in names:
        loaded = task.load(f"exact/{name}")
        prompts = loaded.prompts("score")
        target = loaded.target(prior, loaded.beta)
        every = exact.Outcomes.of(prior, target, prompts, loaded.max_new_tokens)
        p0, tops = np.exp(every.log_p0), target.ceiling(prompts)
        log_z = logsumexp(every.log_p0 + target.tilt(every.reward), axis=1)
        accepted = np.exp(log_z - tops / target.beta)
        truth = exact.truths(prior, loaded, prior, target, prompts, loaded.max_new_tokens)
        cap = (p0 * (every.reward >= tops[:, None] - 1e-9)).sum(1)
        rows |= {
            key: [*rows.get(key, []), text]
            for key, text in {
                "suggested β": f"{loaded.beta:g}",
                "prior's mean reward": f"{(p0 * every.reward).sum(1).mean():.4g}",
                "prior's mass at the cap, mean and least over prompts": f"{cap.mean():.2g}, {cap.min():.2g}",
                "prior draws that rejection accepts, of 10,000, mean and least": f"{1e4 * accepted.mean():.3g}, {1e4 * accepted.min():.3g}",
                "log Z": f"{log_z.mean():.4f}",
                "KL(p*‖p0)": f"{truth['kl_prior_target']:.4f}",
                "entropy of p0 and of p*": f"{truth['entropy']:.3f}, {truth['entropy_target']:.3f}",
                "prior's own reverse KL": f"{truth['reverse_kl']:.4f}",
            }.items()
        }
    head = ["| on `tiny`, six score prompts | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    return ["Written by `python tasks/exact/extract.py`: sums over all 4,681 outputs of a prompt.", "", *head] + [
        f"| {key} | " + " | ".join(cells) + " |" for key, cells in rows.items()
    ]


def main() -> None:
    prior = load(prior_path("tiny"), "tiny")
    prompts = chosen(prior)
    for split, some in prompts.items():
        (HERE / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in some), encoding="utf-8")
    found = lambdas(prior, [p for some in prompts.values() for p in some])
    (HERE / "lambda.json").write_text(json.dumps({prior.weights_hash(): found}, indent=1) + "\n", encoding="utf-8")
    path = HERE / "README.md"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[lines.index(START) + 1 : lines.index(END)] = rates(prior)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
