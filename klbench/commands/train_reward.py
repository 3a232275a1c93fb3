"""`klbench train-reward`: a reward model from labels, comparisons, or a task's draws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klbench.terminal import cell, table


def train_reward(
    out: Annotated[Path, typer.Option(help="directory for the reward model")],
    data: Annotated[Path | None, typer.Option(help='.jsonl of {"text", "label", "prompt"?} or of {"prompt", "chosen", "rejected"}')] = None,
    task: Annotated[str | None, typer.Option(help="or draws for this task's train prompts, labelled by its gold reward")] = None,
    prior: Annotated[str, typer.Option(help="whose draws: name, directory or hub name")] = "mini",
    model: Annotated[str, typer.Option(help="hashed, states:PRIOR or hf:PATH")] = "hashed",
    loss: Annotated[str | None, typer.Option(help="binary or bradley_terry  [default: what the data is; of a task binary]")] = None,
    members: Annotated[int, typer.Option(min=1, help="of an ensemble")] = 1,
    conservative: Annotated[float, typer.Option(min=0, help="standard deviations over members to take off")] = 0.0,
    clip: Annotated[float, typer.Option(help="log-odds beyond which the reward is flat: its reward_max")] = 4.0,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="share of the prompts kept for the figures")] = 0.2,
    samples: Annotated[int, typer.Option(min=2, help="draws a prompt, of a task")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="of a transformer")] = 3,
    lr: Annotated[float, typer.Option(help="of a transformer")] = 3e-4,
    seed: Annotated[int, typer.Option(min=0, help="of draws, split, bootstrap and order")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps")] = "cpu",
    include: Annotated[list[Path] | None, typer.Option(help="directory with tasks of your own; may be repeated")] = None,
) -> None:
    """Train a reward model; what it gets right on held-out prompts is printed and kept beside it."""
    from klbench.progress import status
    from klbench.rewards import training

    with status() as say:
        made = training.train_reward(
            out, data, task=task, prior=prior, model=model, loss=loss, members=members, conservative=conservative, clip=clip,
            held_out=held_out, samples=samples, epochs=epochs, lr=lr, seed=seed, device=device, include=tuple(include or ()), report=say,
        )  # fmt: skip
    rows = ([name, *map(cell, (e.value, e.low, e.high)), str(e.n), e.reason] for name, e in made.manifest.held_out.items())
    table(["held out", "value", "low", "high", "n", "of"], rows, heading=True)
    print(out)
