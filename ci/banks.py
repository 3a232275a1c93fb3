"""Banks that ship with tasks, and the table of base rates in the README of their families; maintainers only.

    python ci/banks.py TASK... [--prior NAME] [--draws N]     draws tasks/FAMILY/banks/[VARIANT-]PRIOR.npz, then writes the table
    python ci/banks.py TASK... [--prior NAME] --table         writes the table alone, from the banks that are there

A bank begins with `--draws` prior draws a prompt of the score split and grows until its least reach is REACH, a tenth above the 300 that
DESIGN.md asks for: A = N0 · Z · exp(-r_max / beta), what rejection would have accepted. The prior is each task's own unless named. The
table has a row for every task of the family that ships a bank, and stands in the README between START and END.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from klbench import bank as banks
from klbench import task
from klbench.bank import Bank
from klbench.estimators.diversity import at_cap
from klbench.models import open_prior
from klbench.target import Policy, TiltedPrior
from klbench.task import AbstractTask
from klbench.weights import log_mean_exp

ROOT = Path(__file__).resolve().parents[1]
REACH = 330.0
START, END = "<!-- variants: start -->", "<!-- variants: end -->"
COLUMNS = (
    "task", "prompts: train, dev, score", "draws a prompt", "β", "mean reward", "sd within a prompt", "at the cap: mean, least",
    "reach at β: least, median", "log Z − E[r]/β",
)  # fmt: skip


def reach(bank: Bank, target: TiltedPrior, texts: list[str]) -> np.ndarray:
    """[P] draws of a bank that rejection would accept."""
    return np.asarray(bank.reward.shape[1] * np.exp(log_mean_exp(target.tilt(bank.reward)) - target.ceiling(texts) / target.beta))


def long_enough(loaded: AbstractTask, prior: Policy, draws: int) -> Bank:
    """A bank of at least so many draws whose least reach is REACH. Raises SystemExit where the reward is out of the prior's reach."""
    target, texts, bank = loaded.target(prior, loaded.beta), loaded.prompts("score"), None
    while True:
        bank = banks.draw(loaded, prior, target, draws, begun=bank)
        found = reach(bank, target, texts)
        if found.min() >= REACH:
            return bank
        if found.min() < 1:
            raise SystemExit(f"{loaded.name}: {bank.reward.shape[1]} draws reach {found.min():.2g} after {texts[int(found.argmin())]!r}")
        draws = int(-(-bank.reward.shape[1] * REACH * 1.1 / found.min() // banks.CHUNK) * banks.CHUNK)


def write_bank(loaded: AbstractTask, prior: Policy, draws: int) -> None:
    bank = long_enough(loaded, prior, draws)
    family, _, variant = loaded.name.partition("/")
    path = ROOT / "tasks" / family / "banks" / (f"{variant}-{prior.name}.npz" if variant else f"{prior.name}.npz")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bank.to_bytes())
    found = reach(bank, loaded.target(prior, loaded.beta), loaded.prompts("score"))
    prompts, drawn = bank.reward.shape
    print(
        f"{path.relative_to(ROOT)}: {drawn} draws of {prompts} prompts, least reach {found.min():.0f}, {path.stat().st_size / 1e3:.0f} kB"
    )


def row(loaded: AbstractTask, prior: Policy, bank: Bank) -> str:
    target, texts = loaded.target(prior, loaded.beta), loaded.prompts("score")
    tilt, found = target.tilt(bank.reward), reach(bank, target, texts)
    top = at_cap(bank.reward, target.ceiling(texts))
    cap = np.zeros(len(texts)) if top is None else top.mean(1)  # without a ceiling nothing is at it
    cells = (
        f"`{loaded.name}`",
        ", ".join(str(len(loaded.prompts(split))) for split in task.SPLITS),
        f"{bank.reward.shape[1]}",
        f"{loaded.beta:g}",
        f"{bank.reward.mean():.3f}",
        f"{bank.reward.std(1).mean():.3f}",
        f"{cap.mean():.2f}, {cap.min():.2f}",
        f"{found.min():.0f}, {np.median(found):.0f}",
        f"{float((log_mean_exp(tilt) - tilt.mean(1)).mean()):.3f}",
    )
    return f"| {' | '.join(cells)} |"


def table(family: str, prior: Policy) -> str:
    """Markdown: base rates of every task of a family that ships a bank of this prior, the default first."""
    loaded = {found.name: found for name in task.names() if name.partition("/")[0] == family for found in [task.load(name)]}
    rows = []
    for one in loaded.values():
        path = banks.shipped(one, prior.name)
        if path is not None:
            rows.append(row(one, prior, Bank.from_bytes(path.read_bytes(), str(path))))
    head = f"Written by `python ci/banks.py {family} --table` from `banks/*{prior.name}.npz`: means over prompts, the last column in nats."
    return "\n".join((head, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows, ""))


def with_table(readme: str, family: str, prior: Policy) -> str:
    """The README with its table made anew. Raises SystemExit where it has no place for one."""
    if readme.count(START) != 1 or readme.count(END) != 1:
        raise SystemExit(f"tasks/{family}/README.md has no lines {START} and {END}")
    return readme.partition(START)[0] + f"{START}\n{table(family, prior)}{END}" + readme.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="TASK")
    parser.add_argument("--prior", help="a shipped prior; each task's own where not given")
    parser.add_argument("--draws", type=int, default=2048, help="prior draws a prompt, at the least")
    parser.add_argument("--table", action="store_true", help="draw nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    priors: dict[str, Policy] = {}
    families: dict[str, Policy] = {}
    for name in args.tasks:
        loaded = task.load(name)
        named = args.prior or loaded.prior
        if named not in priors:
            priors[named] = open_prior(named)
        if not args.table:
            write_bank(loaded, priors[named], args.draws)
        families[loaded.name.partition("/")[0]] = priors[named]
    for family, prior in families.items():
        readme = ROOT / "tasks" / family / "README.md"
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), family, prior), encoding="utf-8")


if __name__ == "__main__":
    main()
