"""What depends on the finished mini prior; maintainers only. Run after `train.py`, in this order:

python finish.py prompts     drop prompts whose reward the prior makes certain or absent (cap or floor share outside the band)
python finish.py lambdas     tasks/bias/lambda.json, on draws that feed nothing else
python finish.py banks       tasks/*/banks/mini.npz, long enough for a reach of 330 at every prompt
python finish.py card        base rates into the tasks' READMEs, the model card into ../README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from klbench import bank as banks
from klbench import streams, task
from klbench.models import open_prior
from klbench.policies.causal_lm import CausalLM
from klbench.target import evaluate
from klbench.weights import log_mean_exp

ROOT = Path(__file__).resolve().parents[4]
HERE = Path(__file__).resolve().parent
FAMILIES = ("bias", "factuality", "toxicity")
LEAST_CAP = 0.06  # of prior draws at the cap of a prompt
MOST_CAP = 0.93
REACH = 330.0
START, END = "<!-- base rates: start -->", "<!-- base rates: end -->"


def cap_shares(prior: CausalLM, name: str, split: str) -> tuple[list[str], np.ndarray]:
    """Share of 512 prior draws at the cap of each prompt; for bias the rarer pronoun's, whichever way lambda will point."""
    loaded = task.load(name)
    prompts = loaded.prompts(split)
    draws = prior.sample(prompts, 512, loaded.max_new_tokens, streams.seed(0, f"finish/{name}/{split}"))
    texts = prior.decode(draws.tokens, draws.mask)
    feature = loaded.features()
    if feature is not None:
        phi = evaluate(feature[0], prompts, texts)
        return prompts, np.minimum((phi > 0).mean(1), (phi < 0).mean(1))
    target = loaded.target(prior, loaded.beta)
    reward = target.rewards(prompts, texts)
    return prompts, (reward >= target.ceiling(prompts)[:, None] - 1e-9).mean(1)


def prompts(prior: CausalLM) -> None:
    for name in FAMILIES:
        for split in task.SPLITS:
            path = ROOT / "tasks" / name / f"{split}.jsonl"
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            texts, shares = cap_shares(prior, name, split)
            keep = {p for p, s in zip(texts, shares, strict=True) if LEAST_CAP <= s <= MOST_CAP}
            gone = [(p, round(float(s), 3)) for p, s in zip(texts, shares, strict=True) if p not in keep]
            print(f"{name}/{split}: {len(keep)} of {len(rows)} prompts kept; dropped: {gone}")
            path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows if r["prompt"] in keep), encoding="utf-8")


def lambdas(prior: CausalLM) -> None:
    from klbench_tasks.bias.task import Bias, fit_lambda

    every = [p for split in task.SPLITS for p in Bias().prompts(split)]
    fitted = fit_lambda(prior, every, Bias.max_new_tokens, draws=4096)
    path = ROOT / "tasks/bias/lambda.json"
    path.write_text(json.dumps({prior.weights_hash(): fitted}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(fitted)} lambdas, largest standard error {max(r['stderr'] for r in fitted.values()):.3f}")


def make_banks(prior: CausalLM, families: tuple[str, ...]) -> None:
    for name in families:
        loaded = task.load(name)
        target = loaded.target(prior, loaded.beta)
        texts = loaded.prompts("score")
        draws = 2048
        while True:
            bank = banks.draw(loaded, prior, target, draws)
            tops = target.ceiling(texts)
            reach = draws * np.exp(log_mean_exp(target.tilt(bank.reward)) - tops / target.beta)
            if reach.min() >= REACH:
                break
            draws = int(-(-draws * REACH * 1.1 / reach.min() // banks.CHUNK) * banks.CHUNK)
        path = ROOT / "tasks" / name / "banks" / "mini.npz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bank.to_bytes())
        size = path.stat().st_size / 2**20
        print(f"{name}: {draws} draws of {len(texts)} prompts, least reach {reach.min():.0f}, {size:.1f} MiB, {bank.hash[:12]}")


def card(prior: CausalLM) -> None:
    lines = []
    for name in FAMILIES:
        loaded = task.load(name)
        path = banks.shipped(loaded, "mini")
        assert path is not None
        bank, target, texts = (
            banks.Bank.from_bytes(path.read_bytes(), str(path)),
            loaded.target(prior, loaded.beta),
            loaded.prompts("score"),
        )
        tops = target.ceiling(texts)[:, None]
        tilt = target.tilt(bank.reward)
        log_z = log_mean_exp(tilt)
        reach = bank.reward.shape[1] * np.exp(log_z - tops[:, 0] / target.beta)
        cap = (bank.reward >= tops - 1e-6).mean(1)
        figures = {
            "score prompts": f"{len(texts)}",
            "bank draws a prompt": f"{bank.reward.shape[1]}",
            "suggested β": f"{loaded.beta:g}",
            "prior's mean reward": f"{bank.reward.mean():.3f}",
            "standard deviation within a prompt": f"{bank.reward.std(1).mean():.3f}",
            "draws at the cap, mean and least over prompts": f"{cap.mean():.2f}, {cap.min():.3f}",
            "reach A at β, least and median over prompts": f"{reach.min():.0f}, {np.median(reach):.0f}",
            "prior's own reverse KL, log Z − E[r]/β": f"{float((log_z - tilt.mean(1)).mean()):.3f} nats",
        }
        if bank.feature is not None:
            said = np.abs(bank.feature).mean(1)
            figures["a pronoun is said, she given one (least to largest)"] = (
                f"{said.mean():.2f}, {((bank.feature > 0).mean(1) / said).min():.2f} to {((bank.feature > 0).mean(1) / said).max():.2f}"
            )
            share = np.exp(tilt - log_z[:, None]) / tilt.shape[1]
            moment, share2 = (share * bank.feature).sum(1), share**2
            error = np.sqrt((share2 * (bank.feature - moment[:, None]) ** 2).sum(1))
            figures["E_p*[φ] on the bank, mean over prompts and its standard error"] = (
                f"{moment.mean():.4f}, {np.sqrt((error**2).sum()) / len(moment):.4f}"
            )
            figures["largest |E_p*[φ]| of a prompt, and a prompt's standard error"] = f"{np.abs(moment).max():.3f}, {error.mean():.3f}"
        table = "| base rate on `mini` | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in figures.items())
        text = f"Written by `python klbench/priors/mini/provenance/finish.py card` from `banks/mini.npz`.\n\n{table}"
        readme = ROOT / "tasks" / name / "README.md"
        old = readme.read_text(encoding="utf-8")
        before, rest = old.split(START)
        readme.write_text(before + START + "\n" + text + END + rest.split(END)[1], encoding="utf-8")
        lines.append((name, figures, samples(prior, name)))
    (HERE.parent / "README.md").write_text(model_card(prior, lines), encoding="utf-8")


def samples(prior: CausalLM, name: str) -> list[str]:
    """The first draw of the first twenty score prompts, at seed 0: nobody chose them."""
    loaded = task.load(name)
    some = loaded.prompts("score")[:20]
    draws = prior.sample(some, -(-20 // len(some)), loaded.max_new_tokens, streams.seed(0, "card"))
    texts = prior.decode(draws.tokens, draws.mask)
    return [f"{p} |{t}" for p, row in zip(some, texts, strict=True) for t in row][:20]


def model_card(prior: CausalLM, tasks: list[tuple[str, dict[str, str], list[str]]]) -> str:
    bits = json.loads((HERE.parent / "bits_per_byte.json").read_text())
    facts = json.loads((HERE.parent / "training.json").read_text())
    parameters = sum(p.numel() for p in prior.model.parameters())
    rows = "".join(f"| {k} | {v['mini']:.2f} | {v['smollm2']:.2f} | {v['ratio']:.2f} | {v['draws']} |\n" for k, v in bits.items())
    config = prior.model.config
    size = f"{parameters / 1e6:.2f} M parameters, {config.num_hidden_layers} layers of width {config.hidden_size}, {len(prior.tokenizer)} tokens"
    out = f"""# mini: the prior that ships with klbench

A Llama-like causal language model of {size}, Apache-2.0.
`AutoModelForCausalLM.from_pretrained(klbench.prior_path("mini"))` loads it. It exists so that the `quick` suite
runs in minutes without a network.

**What it is.** A student of SmolLM2-135M-Instruct (Apache-2.0) at temperature 0.75 over its 48 likeliest tokens, on the
prompts of klbench's own three tasks and on nothing else, up to the end of a sentence or
{facts["tokens_a_draw"]} of the teacher's tokens.

**What it cannot do.** Anything else. It writes no fluent open text, knows nothing outside those prompts, and its toxic,
biased and false continuations are its teacher's. Fluent text is for the prior of the `standard` suite.

**Data and training.** {facts["prompts"]} prompts, {facts["draws"]:,} draws and {facts["tokens"]:,} tokens drawn from the teacher
({facts["prefixes"]:,} distinct prefixes, each with its next-token law; `provenance/teacher.py`), {facts["teacher_minutes"]} minutes on two
cores. {facts["steps"]:,} steps of {facts["draws_a_step"]} draws on soft labels (`provenance/train.py`), {facts["train_minutes"]} minutes on two
cores, both beside other work.

**Bits per byte** of held-out draws of the teacher (one distinct draw in twenty, by hash; the prompts are those of the
training), beside SmolLM2's own at temperature 1 on the same text. `provenance/train.py evaluate` writes the figures.

| | mini | SmolLM2 | ratio | draws |
|---|---|---|---|---|
{rows}
**Base rates and uncurated samples** (`provenance/finish.py card`): the first draw of the first prompts of the score
split, seed 0. The toxicity samples are offensive.
"""
    for name, figures, drawn in tasks:
        out += f"\n## {name}\n\n" + "".join(f"- {k}: {v}\n" for k, v in figures.items()) + "\n```\n" + "\n".join(drawn) + "\n```\n"
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["prompts", "lambdas", "banks", "card"])
    parser.add_argument("families", nargs="*", default=FAMILIES, help="tasks whose banks to draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    mini = open_prior("mini")
    if args.stage == "banks":
        make_banks(mini, tuple(args.families))
    else:
        {"prompts": prompts, "lambdas": lambdas, "card": card}[args.stage](mini)
