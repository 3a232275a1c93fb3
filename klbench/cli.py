"""The command line: words to a run. Each command imports what it needs when it is called, so that `--help` starts at once.

Exit codes: 0 done · 1 something failed or is broken · 2 bad input, one line on stderr · 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from klbench import __version__
from klbench.commands import check, history, new, reward, tasks, train_reward, validate
from klbench.commands.export import export
from klbench.commands.leaderboard import leaderboard
from klbench.errors import UserError, unknown
from klbench.terminal import cell, command_line, complain, console, debugging, records_of, table

if TYPE_CHECKING:
    from klbench.policies.causal_lm import CausalLM
    from klbench.record import Train

app = typer.Typer(
    name="klbench",
    help="How far is a fine-tuned language model from the posterior that its reward and its KL penalty define?",
    rich_markup_mode=None,  # plain help: no boxes in a pipe, and no import of rich
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(leaderboard, name="leaderboard")
app.command()(export)
app.add_typer(new.app, name="new")
app.add_typer(tasks.app, name="tasks")
app.command()(validate.validate)
app.command("train-reward")(train_reward.train_reward)
app.command()(reward.reward)
app.command(epilog=check.EPILOG)(check.check)
app.command()(history.history)

KINDS: Final = ("tasks", "objectives", "samplers", "rewards", "priors", "suites", "claims")

Prior = Annotated[str, typer.Option(help="name (mini), directory or hub name of the prior")]
Include = Annotated[list[Path] | None, typer.Option(help="directory with tasks, objectives and samplers of your own; may be repeated")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps  [default: cuda where there is any]")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value, as train.steps=80 or beta=0.1; may be repeated")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"klbench {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="name or YAML file of a suite")] = "quick",
    out: Annotated[Path | None, typer.Option(help="directory of the run  [default: runs/SUITE]")] = None,
    task: Annotated[list[str] | None, typer.Option(help="this task alone; may be repeated")] = None,
    objective: Annotated[list[str] | None, typer.Option(help="this objective alone, or all; may be repeated")] = None,
    set_: Settings = None,
    seed: Annotated[int | None, typer.Option(min=0, help="count training seeds from here")] = None,
    device: Device = None,
    executor: Annotated[str, typer.Option(help="where cells run: local")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="processes  [default: the cores]")] = None,
    include: Include = None,
) -> None:
    """Train and score a grid, print the board, write DIR/index.html. Run again, it goes on where it stopped."""
    from rich.console import Console

    from klbench import executors
    from klbench import run as grid
    from klbench.progress import Progress

    execute = executors.load(executor)
    included = tuple(include or ())
    chosen = grid.suite_of(suite, set_ or (), tasks=task or (), objectives=objective or (), seed=seed, include=included)
    where = out or Path("runs") / chosen.name
    with Progress(Console(stderr=True)) as progress:
        outcome = grid.run_suite(
            chosen, where, executor=execute, console=console(), command=command_line(), workers=workers, device=device,
            include=included, on_event=progress,
        )  # fmt: skip
    if outcome.board is not None:
        print(f"{where / 'index.html'}")
    if outcome.failures:
        if debugging():
            print("\n".join(failure.trace for failure in outcome.failures if failure.trace), file=sys.stderr)
        count = len(outcome.failures)
        complain(f"{count} of {count + len(outcome.records)} cells failed; the same command tries them again")
        raise typer.Exit(1)


@app.command()
def score(
    prior: Prior,
    policy: Annotated[
        list[str],
        typer.Option(
            help="[name=]directory, hub name, base+adapter, best_of_n:16, rejection, temperature:0.7 and the like; may be repeated"
        ),
    ],
    task: Annotated[str | None, typer.Option(help="prompts and reward of this task")] = None,
    prompts: Annotated[Path | None, typer.Option(help='file with a prompt a line, or .jsonl with "prompt" or "text"')] = None,
    reward: Annotated[str | None, typer.Option(help="name (see ls rewards), directory, hf:NAME, evaluate:NAME or module:function")] = None,
    reward_max: Annotated[float | None, typer.Option(help="ceiling of the reward; without it nothing can be certified")] = None,
    beta: Annotated[float | None, typer.Option(help="KL penalty  [default: the task's]")] = None,
    samples: Annotated[int | None, typer.Option(min=16, help="draws a prompt, of the prior and of each policy")] = None,
    precision: Annotated[float | None, typer.Option(help="draw on until each reverse_kl interval is at most so many nats wide")] = None,
    budget: Annotated[int | None, typer.Option(min=16, help="draws a prompt at which --precision ends  [default: 16 x samples]")] = None,
    interval: Annotated[str, typer.Option(help="jackknife, or betting: exact for log Z at any number of draws")] = "jackknife",
    measure: Annotated[list[str] | None, typer.Option(help="a named estimator to add, as kl_prior.k3; may be repeated")] = None,
    pool: Annotated[bool, typer.Option("--pool/--no-pool", help="estimate each policy with the draws of all")] = True,
    bank: Annotated[Path | None, typer.Option(help="directory that keeps prior draws: extended, never redrawn")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="prompts go through the models' chat template")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="length at which a continuation is cut")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the draws")] = 0,
    device: Device = None,
    include: Include = None,
    json: Annotated[Path | None, typer.Option(help="write the result here too")] = None,
) -> None:
    """Score given checkpoints and samplers: their distance to the posterior of (prior, reward, beta)."""
    if (task is None) == (prompts is None):
        raise UserError("score needs either --task or --prompts with --reward")
    if (prompts is None) != (reward is None):
        raise UserError("--prompts and --reward go together" + ("; a task has a reward of its own" if task else ""))
    if prompts is not None and beta is None:
        raise UserError("--prompts needs --beta")
    if task is not None and reward_max is not None:
        raise UserError("--reward-max belongs to --reward; a task declares its own")
    if json is not None and not json.absolute().parent.is_dir():
        raise UserError(f"--json {json}: no directory {json.parent}")

    from klbench import rewards

    asked: dict[str, Any] = {
        "prior": prior, "policies": _policies(policy), "task": task, "beta": beta, "reward_max": reward_max, "samples": samples,
        "prompts": None if prompts is None else _prompts(prompts),
        "reward": None if reward is None else rewards.load(reward, include or (), device or "cpu"),
        "max_new_tokens": max_new_tokens, "seed": seed, "device": device, "precision": precision, "budget": budget, "interval": interval,
        "measures": measure, "pool": pool, "bank": bank, "chat": chat, "include": tuple(include) if include else None,
    }  # fmt: skip

    from klbench import api
    from klbench.progress import status

    with status() as say:
        result = api.score(**{name: value for name, value in asked.items() if value is not None}, report=say)
    if sys.stdout.isatty():
        table(["policy", "rank", "reverse_kl", "interval", "status", "wasted_nats", "reward", "kl_prior", "entropy"], _summary(result))
    rows = records_of(result.to_frame())
    table(list(rows[0]) if rows else [], ([cell(v) for v in row.values()] for row in rows), heading=True)
    for name, scored in result.items():
        for note in scored.notes:
            complain(f"{name}: {note}")
        if scored.bracket is not None:
            low, high = scored.bracket
            where = f"above {cell(low)}" if high is None else f"between {cell(low)} and {cell(high)}"
            complain(f"{name}: reverse_kl is uncertified; whatever log Z is, it lies {where}")
    if result.stopped:
        complain(result.stopped)
    if json is not None:
        result.to_json(json)


@app.command()
def train(
    prior: Prior,
    task: Annotated[str, typer.Option(help="name of the task")],
    objective: Annotated[str, typer.Option(help="name of the objective")],
    out: Annotated[Path, typer.Option(help="directory for the weights")],
    beta: Annotated[float | None, typer.Option(help="KL penalty  [default: the task's]")] = None,
    set_: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="of the training draws")] = 0,
    device: Device = None,
    include: Include = None,
) -> None:
    """Train one policy, without a board."""
    settings = _train_settings(set_ or [])

    from klbench import api

    asked: dict[str, Any] = {
        "prior": prior, "task": task, "objective": objective, "out": out, "beta": beta, "train": settings, "seed": seed,
        "device": device, "include": tuple(include or ()),
    }  # fmt: skip
    api.train(**{name: value for name, value in asked.items() if value is not None})
    if os.environ.get("RANK", "0") == "0":  # of several processes one
        print(out)


@app.command()
def accuracy(
    target: Annotated[list[str] | None, typer.Argument(help="targets by name  [default: all]")] = None,
    replications: Annotated[int | None, typer.Option(min=2, help="of each cell  [default: 300; with --quick 30]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer targets and replications: a minute")] = False,
    seed: Annotated[int, typer.Option(min=0, help="of all draws")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="processes  [default: the cores]")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of accuracy.json, accuracy.csv and index.html")] = None,
    docs: Annotated[Path | None, typer.Option(help="markdown file of the summary")] = None,
) -> None:
    """Remake the table of estimator error and coverage against exact sums. Exit 1 where a criterion fails."""
    from rich.console import Console

    from klbench import accuracy as measured
    from klbench.accuracy.report import show
    from klbench.progress import Progress

    asked = [*(target or ()), *(["--quick"] if quick else []), *(["--replications", str(replications)] if replications else [])]
    command = " ".join(["klbench accuracy", *asked, *(["--seed", str(seed)] if seed else [])])  # what is published names no path of ours
    with Progress(Console(stderr=True)) as progress:
        table = measured.run(
            replications, seed, target or None, quick=quick, workers=workers, out=out, docs=docs, command=command, on_event=progress
        )
    show(table, console())
    if any(criterion.holds is False for criterion in table.criteria):
        raise typer.Exit(1)


@app.command()
def claims(
    claim: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="claims by id, as C06  [default: all]")] = None,
    tier: Annotated[str, typer.Option(help="exact (sums over every outcome) or quick (the mini prior)")] = "exact",
    workers: Annotated[int | None, typer.Option(min=1, help="processes  [default: the cores]")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of claims.json and index.html")] = None,
) -> None:
    """Rerun the literature's statements, each with a verdict. Exit 1 where a verdict is not the expected one."""
    from rich.console import Console

    from klbench import claims as rerun
    from klbench.claims import report
    from klbench.progress import Progress

    asked = " ".join(["klbench claims", *(claim or ()), *(["--tier", tier] if tier != "exact" else [])])
    with Progress(Console(stderr=True)) as progress:
        lines = rerun.run(claim or (), tier, workers, on_event=progress)
    report.show(lines, console())
    if out is not None:
        report.write(lines, out, asked)
    if not all(line.sound for line in lines):
        raise typer.Exit(1)


@app.command()
def ls(kind: Annotated[str, typer.Argument(help=" | ".join(KINDS))], include: Include = None) -> None:
    """What is there."""
    if kind not in KINDS:
        raise unknown("kind of thing to list", kind, KINDS)

    from klbench.included import standing

    mine = tuple(include or ())
    standing(mine)
    if kind == "suites":
        from klbench import suite

        table(["suite", "what it is for"], ([name, suite.load(name).summary] for name in suite.names()))
    elif kind == "priors":
        table(["prior", "parameters' file"], ([name, str(path)] for name, path in _priors()))
    elif kind == "tasks":
        from klbench import task

        table(["task", "what it measures"], ([name, task.load(name, mine).summary] for name in task.names(mine)))
    elif kind == "objectives":
        from klbench import method

        found = ((name, method.objective(name, mine)) for name in method.names("objectives", mine))
        table(["objective", "optimum", "trained on", "paper"], ([name, o.optimum, method.needed(o), o.source] for name, o in found))
    elif kind == "samplers":
        from klbench import method

        made = ((name, method.sampler(name, mine)) for name in method.names("samplers", mine))
        table(["sampler", "law", "needs", "paper"], ([name, *method.described(s), s.source] for name, s in made))
    elif kind == "rewards":
        from klbench import rewards

        table(["reward", "what it is", "reward_max"], ([*row[:2], cell(row[2])] for row in rewards.described()))
    else:
        from klbench import claims

        every = (c for tier in claims.TIERS for c in claims.catalogue(tier).values())
        rows = ([c.id, c.tier, c.expected, c.statement, c.source] for c in every)
        table(["claim", "tier", "expected", "statement", "paper"], rows)


@app.command()
def doctor() -> None:
    """Is this machine sound? Exit 1 when something is broken."""
    findings = list(_examine())
    table(["", "thing", "finding"], (["ok" if ok else "BROKEN", thing, finding] for ok, thing, finding in findings))
    if not all(ok for ok, _, _ in findings):
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; whatever goes wrong is one line on stderr (all of it with KLBENCH_DEBUG=1)."""
    try:
        code = typer.main.get_command(app).main(
            args=None if arguments is None else list(arguments), prog_name="klbench", standalone_mode=False
        )
        code = code if isinstance(code, int) else 0
    except UserError as error:
        complain(str(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:  # a path that cannot be read or written
        if debugging():
            traceback.print_exc()
        complain(f"{error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer, whichever copy of click it carries
            complain(_usage(error))
            return 2
        if debugging():
            traceback.print_exc()
        else:
            complain(f"unexpected {type(error).__name__}: {error} (KLBENCH_DEBUG=1 shows where)")
        return 1
    if code in (130, 143):
        complain("stopped; the same command goes on where this one was")
    return code


def _usage(error: Any) -> str:
    """A usage error on one line, with the nearest command or option."""
    context = getattr(error, "ctx", None)
    wrong = getattr(error, "option_name", None)
    if wrong is not None and type(error).__name__ == "NoSuchOption" and context is not None:
        known = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
        return str(unknown("option", wrong, [*known, "--help"]))
    text = str(error.format_message())
    commands = getattr(getattr(context, "command", None), "commands", None)
    if commands and text.startswith("No such command"):
        return str(unknown("command", text.split("'")[1], commands))
    return text


def _summary(result: Any) -> Iterable[list[str]]:
    """A row a policy, of what a reader asks first."""
    for name, scored in result.items():
        figure = scored.columns["reverse_kl"]
        ends = "" if figure.low is None else f"{cell(figure.low)} … {'?' if figure.high is None else cell(figure.high)}"
        rank = "" if scored.rank is None else "–".join(map(str, sorted(set(scored.rank))))
        rest = (cell(e.value) if (e := scored.columns.get(c)) else "" for c in ("wasted_nats", "reward", "kl_prior", "entropy"))
        yield [name, rank, cell(figure.value), ends, figure.status, *rest]


def _policies(given: list[str]) -> dict[str, str]:
    """`mine=path` or a bare path, hub name or sampler, which is then named by its last part. Raises UserError on a name given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, _, spec = ("", "", text) if Path(text).exists() else text.rpartition("=") if "=" not in text else text.partition("=")
        name = name or Path(spec).name or spec
        if not spec:
            raise UserError(f"--policy {text!r}: nothing after the =")
        if name in found:
            raise UserError(f"--policy {text!r}: {name!r} is taken by {found[name]!r}; write NAME={spec}")
        found[name] = spec
    return found


def _prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or "prompt" or "text" of each line of a .jsonl. Raises UserError with the line's number."""
    import json

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"no prompts file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        found = [line for line in lines if line.strip()]
    else:
        found = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from None
            text = (row.get("prompt", row.get("text")) if isinstance(row, dict) else None) or None
            if isinstance(text, dict):  # as RealToxicityPrompts is published: {"prompt": {"text": ..., "toxicity": ...}}
                text = text.get("text") or None
            if not isinstance(text, str):
                raise UserError(f'{path}, line {number}: an object with a "prompt" or "text" string expected')
            found.append(text)
    if not found:
        raise UserError(f"{path}: no prompt in it")
    return found


def _train_settings(settings: list[str]) -> Train:
    """Train settings from `train.key=value` words. Raises UserError with the nearest key."""
    from klbench import suite
    from klbench.record import Train

    data: dict[str, Any] = {"tasks": {}, "train": {}}
    for setting in settings:
        if setting.startswith("beta="):
            raise UserError(f"--set {setting}: train takes --beta")
        suite.apply(data, setting)
    beyond = sorted(set(data) - {"tasks", "train"})
    if beyond or data["tasks"]:
        raise UserError(f"--set {(beyond or ['tasks'])[0]}: one policy has train settings alone, as train.steps=80")
    return suite.checked(Train, data["train"], "--set")


def _priors() -> list[tuple[str, Path]]:
    """Names and weights of the priors that ship."""
    from importlib.resources import files

    root = Path(str(files("klbench.priors")))
    return [(p.parent.name, p) for p in sorted(root.glob("*/model.safetensors"))]


def _prior_policy(name: str) -> CausalLM:
    from klbench.policies import causal_lm
    from klbench.priors import prior_path

    return causal_lm.load(prior_path(name), name)


def _examine() -> Iterable[tuple[bool, str, str]]:
    """(sound?, thing, finding) for what klbench needs of a machine."""
    import platform
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    yield sys.version_info >= (3, 11), "python", f"{platform.python_version()} on {platform.platform()}"
    yield True, "klbench", __version__
    for package in ("torch", "transformers", "numpy", "scipy", "scikit-learn", "safetensors", "pydantic", "typer", "rich"):
        try:
            yield True, package, version(package)
        except PackageNotFoundError:
            yield False, package, "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield True, "cores", f"{cores} for this process"
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield gib >= 2, "memory", f"{gib:.1f} GiB" + ("" if gib >= 2 else ", 2 needed")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield free >= 0.5, "disk", f"{free:.1f} GiB free here" + ("" if free >= 0.5 else ", 0.5 needed")
    try:
        import torch

        yield True, "torch threads", str(torch.get_num_threads())
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield True, "cuda", ", ".join(gpus) or "none, the processor is used"
    except Exception as error:
        yield False, "torch", f"cannot be imported: {type(error).__name__}: {error}"
        return

    from klbench import task

    yield bool(task.names()), "tasks", ", ".join(task.names()) or "none installed: pip install klbench again"
    try:
        prior = _prior_policy("mini")
        finite = bool(torch.isfinite(prior.sample(["The"], 2, 4, 0).log_q).all())
        yield finite, "prior mini", f"{'loads and draws' if finite else 'draws what it gives no probability'}, {prior.weights_hash()[:16]}"
    except Exception as error:
        yield False, "prior mini", f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
