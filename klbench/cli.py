"""The command line: words to a run. Each command imports what it needs when it is called, so that `--help` starts at once.

Exit codes: 0 done · 1 something failed or is broken · 2 bad input, one line on stderr · 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from klbench import __version__
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
leaderboard = typer.Typer(help="Pages from records.", rich_markup_mode=None, no_args_is_help=False)
app.add_typer(leaderboard, name="leaderboard")

KINDS: Final = ("tasks", "objectives", "samplers", "priors", "suites", "claims")

Prior = Annotated[str, typer.Option(help="name (mini), directory or hub name of the prior")]
Include = Annotated[list[Path] | None, typer.Option(help="directory with objectives of your own; may be repeated")]
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
    reward: Annotated[str | None, typer.Option(help="module:function, called as f(prompts, completions)")] = None,
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
    asked: dict[str, Any] = {
        "prior": prior, "policies": _policies(policy), "task": task, "beta": beta, "reward_max": reward_max, "samples": samples,
        "prompts": None if prompts is None else _prompts(prompts), "reward": None if reward is None else _function(reward),
        "max_new_tokens": max_new_tokens, "seed": seed, "device": device, "precision": precision, "budget": budget, "interval": interval,
        "measures": measure, "pool": pool, "bank": bank, "chat": chat,
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
def ls(kind: Annotated[str, typer.Argument(help=" | ".join(KINDS))]) -> None:
    """What is there."""
    if kind not in KINDS:
        raise unknown("kind of thing to list", kind, KINDS)
    if kind == "suites":
        from klbench import suite

        table(["suite", "what it is for"], ([name, suite.load(name).summary] for name in suite.names()))
    elif kind == "priors":
        table(["prior", "parameters' file"], ([name, str(path)] for name, path in _priors()))
    elif kind == "tasks":
        from klbench import task

        table(["task", "what it measures"], ([name, task.load(name).summary] for name in task.names()))
    elif kind == "objectives":
        from klbench import method

        found = ((name, method.objective(name)) for name in method.names("objectives"))
        table(["objective", "optimum", "trained on", "paper"], ([name, o.optimum, method.needed(o), o.source] for name, o in found))
    elif kind == "samplers":
        from klbench import method

        made = ((name, method.sampler(name)) for name in method.names("samplers"))
        table(["sampler", "law", "needs", "paper"], ([name, *method.described(s), s.source] for name, s in made))
    else:
        from klbench import claims

        every = (c for tier in claims.TIERS for c in claims.catalogue(tier).values())
        rows = ([c.id, c.tier, c.expected, c.statement, c.source] for c in every)
        table(["claim", "tier", "expected", "statement", "paper"], rows)


@app.command()
def validate(
    path: Annotated[str, typer.Argument(help="a suite (.yaml), an objective or sampler (.py) or the name of a task")],
    include: Include = None,
) -> None:
    """Is my suite, objective, sampler or task sound? One line says so, or what is wrong with it."""
    if path.endswith((".yaml", ".yml")):
        from klbench import run as grid

        runs = grid.resolve(grid.suite_of(path), tuple(include or ()), hashes=lambda *_: {})
        print(f"{path}: sound: {len({r.task for r in runs})} tasks, {len(runs)} runs")
    elif path.endswith(".py"):
        print(f"{path}: sound: {_check_plugin(Path(path))} laws hold")
    else:
        _check_task(path)
        print(f"{path}: sound: splits disjoint, reward finite and the same twice")


@app.command()
def doctor() -> None:
    """Is this machine sound? Exit 1 when something is broken."""
    findings = list(_examine())
    table(["", "thing", "finding"], (["ok" if ok else "BROKEN", thing, finding] for ok, thing, finding in findings))
    if not all(ok for ok, _, _ in findings):
        raise typer.Exit(1)


@leaderboard.command("build")
def leaderboard_build(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="directory of a run")],
    out: Annotated[Path | None, typer.Option(help="directory for the pages  [default: DIR]")] = None,
) -> None:
    """Build board.json, board.csv and index.html from records."""
    from klbench import run as grid
    from klbench.record import Pooled

    records = grid.records_in(directory)
    grid.publish(out or directory, records, grid.manifest_in(directory), pools=Pooled.all_in(directory))
    print((out or directory) / "index.html")


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
            if not isinstance(text, str):
                raise UserError(f'{path}, line {number}: an object with a "prompt" or "text" string expected')
            found.append(text)
    if not found:
        raise UserError(f"{path}: no prompt in it")
    return found


def _function(spec: str) -> Callable[..., Any]:
    """`module:function`, the working directory first on the path. Raises UserError that says which half is missing."""
    import importlib

    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise UserError(f"--reward {spec!r}: module:function expected")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"--reward {spec}: module {module_name} imports {error.name!r}, which is not installed") from None
        raise unknown("module", module_name, [p.stem for p in Path.cwd().glob("*.py")]) from None
    except Exception as error:
        raise UserError(f"--reward {spec}: importing {module_name} raised {type(error).__name__}: {error}") from None
    if not hasattr(module, name):
        raise unknown(f"function in module {module_name}", name, [n for n, v in vars(module).items() if callable(v) and n[0] != "_"])
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"--reward {spec}: {name} is not a function")
    found: Callable[..., Any] = function
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


def _check_plugin(path: Path) -> int:
    """How many laws were tried. Raises UserError unless the file holds one objective or one sampler, which keeps every law."""
    if not path.is_file():
        raise UserError(f"no file at {path}")
    if not path.stem.isidentifier():
        raise UserError(f"{path}: a file name that is a Python name expected, as the method is called by it")

    from klbench import convergence, laws, method

    try:
        try:
            objective = method.objective(path.stem, (path.parent,))
            held = (*laws.check_objective(objective), *convergence.check_ending(objective))
        except UserError as no_objective:
            if "found 0" not in str(no_objective):
                raise
            held = laws.check_sampler(method.sampler(path.stem, (path.parent,)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever code of a stranger raises is an answer about that code
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    for law in held:
        if not law.holds:
            raise UserError(f"{path}: the law {law.name!r} does not hold: {law.detail} (gap {law.gap:.3g})")
    return len(held)


def _check_task(name: str) -> None:
    """Raises UserError unless the task has three disjoint splits and a reward that is finite and deterministic."""
    from klbench import task

    loaded = task.load(name)
    seen: dict[str, str] = {}
    for split in task.SPLITS:
        prompts = loaded.prompts(split)
        if not prompts:
            raise UserError(f"task {name}: split {split} is empty")
        for prompt in prompts:
            if prompt in seen:
                raise UserError(f"task {name}: prompt {prompt!r} is in split {seen[prompt]} and again in {split}")
            seen[prompt] = split
    if not (loaded.summary and loaded.version >= 1 and loaded.max_new_tokens >= 1):
        raise UserError(f"task {name}: summary, version >= 1 and max_new_tokens >= 1 expected")
    few = loaded.prompts("score")[:4]
    completions = [[" she said so.", " he said so.", ""] for _ in few]
    target = loaded.target(_prior_policy(getattr(loaded, "prior", "mini")), loaded.beta)
    if (target.rewards(few, completions) != target.rewards(few, completions)).any():
        raise UserError(f"task {name}: its reward gives one completion two values")


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
