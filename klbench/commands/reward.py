"""`klbench reward`: rewards evaluated as likelihoods."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from klbench.errors import UserError


def reward(
    task: Annotated[list[str], typer.Argument(metavar="TASK", help="tasks whose rewards are evaluated")],
    reward: Annotated[
        list[str] | None,
        typer.Option(help="one beside the task's own: a name, hf:NAME, evaluate:PATH, module:function or a directory; may be repeated"),
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help='.jsonl of preferences: "prompt", "chosen", "rejected"')] = None,
    policies: Annotated[Path | None, typer.Option(help="directory of a run, whose policies join the over-optimisation curve")] = None,
    prior: Annotated[str | None, typer.Option(help="name, directory or hub name  [default: the task's]")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of rewards.json, rewards.csv and index.html  [default: runs/rewards]")] = None,
    samples: Annotated[int | None, typer.Option(min=64, help="prior draws a prompt  [default: the bank that ships, else 512]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of halves and bootstraps; draws do not depend on it")] = 0,
    include: Annotated[list[Path] | None, typer.Option(help="directory with tasks and rewards of your own; may be repeated")] = None,
    json: Annotated[Path | None, typer.Option(help="write the figures here too")] = None,
) -> None:
    """Does a reward deserve to be a likelihood? How it ranks, how calibrated and how sharp it is, and where following it goes too far."""
    if json is not None and not json.absolute().parent.is_dir():
        raise UserError(f"--json {json}: no directory {json.parent}")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a directory expected")

    from klbench import reward_eval
    from klbench.progress import status
    from klbench.record import write_atomically
    from klbench.reward_eval import report

    where = out or Path("runs") / "rewards"
    words = ["klbench", "reward", *task]
    for option, values in (("--reward", reward or []), ("--pairs", [pairs]), ("--policies", [policies]), ("--prior", [prior])):
        words += [word for value in values if value is not None for word in (option, str(value))]
    words += ["--samples", str(samples)] if samples is not None else []
    words += ["--seed", str(seed)] if seed else []
    with status() as say:
        board = reward_eval.evaluate(
            task, reward or (), pairs=pairs, prior=prior, samples=samples, seed=seed, policies=policies, include=tuple(include or ()),
            command=shlex.join(words), report=say,
        )  # fmt: skip
        report.write(board, where)
    report.show(board)
    if json is not None:
        write_atomically(json, board.to_json().encode())
    print(where / "index.html")
