"""What a sound task keeps, measured: run by the tests on every task here, and by `klbench validate` on anybody's.

    check_task(task) -> a Finding a check: ok, a warning, or broken, each with what was measured

A task that ships with klbench is held to more than a user's (DESIGN.md section 3): 5 % of prior draws at the cap of each prompt and a reach
of 300 there, which for a user's are warnings, with reach 30. Where every outcome of the prior can be listed its rates are exact sums and
neither is asked. Draws are those of the bank that ships, else fresh ones at a fixed seed.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

import numpy as np
import torch

from klbench import bank as banks
from klbench import exact, models, streams
from klbench import task as tasks
from klbench.audit import Chosen, Drawn
from klbench.bank import Bank
from klbench.errors import UserError
from klbench.estimate import CERTIFIED, Array
from klbench.harness import tasks as harness
from klbench.included import folder_of
from klbench.policies.causal_lm import CausalLM
from klbench.target import Policy, Reward, TiltedPrior, evaluate
from klbench.task import AbstractTask

SECTIONS: Final = ("What is measured", "Prompts and splits", "Source and licence", "Known weaknesses")
NUMBER: Final = r"[-−]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?"
START, END = "<!-- base rates: start -->", "<!-- base rates: end -->"
LEAST_CAP: Final = 0.05  # of prior draws at the cap of a prompt: then D_inf(p* || p0) <= log 20 at any beta
SHIPPED_REACH: Final = 300.0
DRAWS: Final = 512  # prior draws a prompt where no bank ships: as many as a run makes
MOST_DRAWS: Final = 32_768  # in all
LOOKED_AT: Final = 64  # draws a prompt on which rewards are called again
SAME: Final = 1e-6  # of two values of one completion in other company: a record keeps single precision
ODD: Final = ("", " ", "\n", " é\t“”", " na\u00efve \u202e\u0000 \U0001f600", " word" * 300)  # what a policy may write


@final
@dataclass(frozen=True)
class Finding:
    """One check. name: as the table has it.  verdict: how it went.  detail: what was measured, or what is wrong."""

    name: str
    verdict: Literal["ok", "warning", "broken"]
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the task may be used as it is: a warning is one to think about."""
        return self.verdict != "broken"


@final
@dataclass(frozen=True, eq=False)
class Case:
    """A task with what its checks read. prompts [P]; texts [P][N]: prior draws.  shipped: held to klbench's own standard.

    reward [P, N0]: of prior draws, or where `listed` of every outcome; mass [P, N0]: what each of them stands for.
    """

    task: AbstractTask
    prior: Policy
    target: TiltedPrior
    prompts: list[str]
    texts: list[list[str]]
    reward: Array
    mass: Array
    bank: Bank | None
    listed: bool

    @property
    def shipped(self) -> bool:
        return is_shipped(self.task)

    @property
    def at_cap(self) -> Array:
        """[P] the prior's mass at the ceiling of each prompt."""
        top = self.target.ceiling(self.prompts)[:, None]
        return np.asarray((self.mass * (self.reward >= top - SAME * np.maximum(1, np.abs(top)))).sum(1))

    @property
    def reach(self) -> Array:
        """[P] prior draws, of those that a run has, that rejection sampling would accept at the suggested beta."""
        top = self.target.ceiling(self.prompts)[:, None]
        share = (self.mass * np.exp((self.reward - top) / self.target.beta)).sum(1)
        return np.asarray(share * (DRAWS if self.bank is None else self.reward.shape[1]))

    @classmethod
    def of(cls, task: AbstractTask, prior: Policy) -> Case:
        """Raises UserError for a reward that is refused on the prior's draws."""
        target, prompts, length = task.target(prior, task.beta), task.prompts("score"), task.max_new_tokens
        try:
            every = exact.Outcomes.of(prior, target, prompts, length)
        except UserError:
            every = None
        if every is not None:
            some = np.linspace(0, len(every.texts) - 1, LOOKED_AT).astype(int)
            texts = [[every.texts[i] for i in some] for _ in prompts]
            return cls(task, prior, target, prompts, texts, every.reward, np.exp(every.log_p0), None, True)
        bank = shipped_bank(task, prior)
        if bank is None:
            prompts = prompts[: MOST_DRAWS // LOOKED_AT]
            many = max(LOOKED_AT, min(DRAWS, MOST_DRAWS // len(prompts)))
            drawn = prior.sample(prompts, many, length, streams.seed(0, "validate/draws"))
            texts = prior.decode(drawn.tokens, drawn.mask)
            reward = target.rewards(prompts, texts)
        else:
            cut = slice(0, LOOKED_AT)
            texts = prior.decode(torch.from_numpy(bank.tokens[:, cut]).long(), torch.from_numpy(bank.mask[:, cut]))
            reward = bank.reward
        mass = np.full(reward.shape, 1 / reward.shape[1])
        return cls(task, prior, target, prompts, [row[:LOOKED_AT] for row in texts], reward, mass, bank, False)


def check_task(task: AbstractTask, prior: Policy | None = None) -> list[Finding]:
    """Every finding on a task, in the order in which to mend them. prior: the task's own where none is given.

    A check that cannot be made because an earlier one is broken is left out. Raises UserError when the prior cannot be opened.
    """
    found = [*_tried("declared", lambda: _declared(task)), *_tried("splits", lambda: _splits(task))]
    found += [
        *_tried("licence", lambda: _licence(task)),
        *_tried("readme", lambda: _readme(task)),
        *_tried("import", lambda: _import(task)),
    ]
    if not all(finding.ok for finding in found[:2]):
        return found
    prior = _opened(task.prior) if prior is None else prior
    found += _tried("prompts", lambda: _prompts(task, prior))
    if not found[-1].ok:
        return found
    kept: list[Case] = []

    def drawn() -> Iterator[Finding]:
        kept.append(Case.of(task, prior))
        yield from _reward(kept[0])

    told = _tried("reward", drawn)
    found += told
    if all(finding.ok for finding in told):  # of a reward that is not one, nothing else can be said
        for name, check in CHECKS.items():
            found += _tried(name, functools.partial(check, kept[0]))
    return found


def is_shipped(task: AbstractTask) -> bool:
    """Whether the task is one of klbench's own."""
    return type(task).__module__.startswith("klbench_tasks.")


def home(task: AbstractTask) -> Path:
    """The folder of a task's family."""
    return Path(inspect.getfile(type(task))).parent


def shipped_bank(task: AbstractTask, prior: Policy) -> Bank | None:
    """The bank beside a task for this prior; None where there is none that a run would take. UserError where it is not this task's."""
    path = banks.shipped(task, prior.name)
    if path is None:
        return None
    bank, wanted = Bank.from_bytes(path.read_bytes(), str(path)), banks.meta_of(task, prior, 0)
    wrong = sorted(key for key in wanted.keys() | bank.meta.keys() if key != "draws" and bank.meta.get(key) != wanted.get(key))
    if wrong == ["code"]:
        return None
    if wrong:
        raise UserError(f"banks/{path.name} was drawn for another {', '.join(wrong)}: draw it again")
    return bank


def base_rates(case: Case) -> dict[str, tuple[float, ...]]:
    """The rows of a README's table of base rates; the first figure of a row is the one that it is known by."""
    mean = (case.mass * case.reward).sum(1)
    rows: dict[str, tuple[float, ...]] = {"prior's mean reward": (float(mean.mean()),)}
    if np.isfinite(case.target.ceiling(case.prompts)).all():
        rows["draws at the cap, least and mean over prompts"] = (float(case.at_cap.min()), float(case.at_cap.mean()))
        if not case.listed:
            rows["reach A at β, least and median over prompts"] = (float(case.reach.min()), float(np.median(case.reach)))
    return rows


def write_base_rates(task: AbstractTask, prior: Policy | None = None) -> Path:
    """Puts the table of base rates between its marks in a user task's README, or at its end. Raises UserError for klbench's own."""
    if is_shipped(task):
        raise UserError(f"task {task.name}: its table is made by the script that made its bank")
    case, path = Case.of(task, _opened(task.prior) if prior is None else prior), home(task) / "README.md"
    rows = "".join(f"| {name} | {', '.join(map(_rounded, values))} |\n" for name, values in base_rates(case).items())
    start, end = (mark.replace("rates:", f"rates of {task.name}:") if "/" in task.name else mark for mark in (START, END))
    head = f"Written by `klbench validate --rates`, from {case.reward.shape[1]} prior draws a prompt.\n\n"
    fixed = f"| score prompts | {len(case.prompts)} |\n| suggested β | {task.beta:g} |\n"
    table = f"{start}\n{head}| base rate of `{task.name}` on `{case.prior.name}` | |\n|---|---|\n{fixed}{rows}{end}"
    try:
        text = path.read_text(encoding="utf-8")
        if start in text and end in text:
            text = text.partition(start)[0] + table + text.partition(end)[2]
        else:
            text = text.rstrip("\n") + f"\n\n{table}\n"
        path.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    return path


# The checks


def _declared(task: AbstractTask) -> Iterator[Finding]:
    """Name, version, summary, length and beta."""
    wrong = []
    if not tasks.NAME.fullmatch(task.name):
        wrong.append(f"name {task.name!r} is not `family` or `family/variant` in small letters")
    if not (isinstance(task.version, int) and task.version >= 1):
        wrong.append(f"version {task.version!r} is no whole number from 1")
    if not task.summary.strip() or "\n" in task.summary:
        wrong.append("summary is to be one line")
    if not (isinstance(task.max_new_tokens, int) and task.max_new_tokens >= 1):
        wrong.append(f"max_new_tokens {task.max_new_tokens!r} is no whole number from 1")
    if not (math.isfinite(task.beta) and task.beta > 0):
        wrong.append(f"beta {task.beta!r} is not above 0")
    columns = [audit.column for audit in task.audits()]
    wrong += [f"two audits are called {name}" for name in sorted({c for c in columns if columns.count(c) > 1})]
    yield _said("declared", wrong, f"version {task.version}, β {task.beta:g}, {task.max_new_tokens} new tokens, prior {task.prior}")


def _splits(task: AbstractTask) -> Iterator[Finding]:
    """No prompt twice, in a split or in two, however its blanks and capitals are written."""
    seen: dict[str, tuple[str, str]] = {}
    wrong, sizes = [], []
    for split in tasks.SPLITS:
        prompts = task.prompts(split)
        sizes.append(f"{split} {len(prompts)}")
        if not prompts:
            wrong.append(f"split {split} is empty")
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                wrong.append(f"split {split} holds {prompt!r}, which is no prompt")
                continue
            plain = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
            if plain in seen:
                where, other = seen[plain]
                as_other = "" if prompt == other else f" as {other!r}"
                twice = f"twice in split {split}" if where == split else f"in split {where}{as_other} and again in {split}"
                wrong.append(f"prompt {prompt!r} is {twice}")
            seen.setdefault(plain, (split, prompt))
        if prompts != task.prompts(split):
            wrong.append(f"split {split} is another the second time")
    yield _said("splits", wrong, f"{', '.join(sizes)}, disjoint")


def _licence(task: AbstractTask) -> Iterator[Finding]:
    """A licence text beside the data, each named in the README."""
    folder = home(task)
    files = sorted(p.name for p in folder.glob("LICENSE*") if p.is_file())
    wrong = [f"{name} is empty" for name in files if not (folder / name).read_text(encoding="utf-8", errors="replace").strip()]
    said = _section(folder, "Source and licence")
    wrong += [f"{name} is not named in README.md under 'Source and licence'" for name in files if name not in said]
    own = is_shipped(task) and "klbench's own, Apache-2.0" in said
    if not files and not own:
        wrong.append("no LICENSE file beside the data: its licence text, as LICENSE-<source>")
    yield _said("licence", wrong, ", ".join(files) or "klbench's own, Apache-2.0")


def _readme(task: AbstractTask) -> Iterator[Finding]:
    """Present, with what a reader has to know."""
    folder = home(task)
    if not (folder / "README.md").is_file():
        yield Finding("readme", "broken", "no README.md")
        return
    wrong = [f"README.md has nothing under '## {name}'" for name in SECTIONS if not _section(folder, name).strip()]
    yield _said("readme", wrong, ", ".join(SECTIONS))


@functools.cache
def _loads_torch(module: str, folder: Path | None) -> str:
    """What a fresh interpreter says of importing a task's module: "yes", "no", or its last line on stderr."""
    take = f"tasks.in_folder(Path({str(folder)!r}))" if folder else f"importlib.import_module({module!r})"
    code = f"import importlib, sys; from pathlib import Path; from klbench import task as tasks; {take}; print('torch' in sys.modules)"
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=here)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return {"True": "yes", "False": "no"}[done.stdout.split()[-1]]


def _import(task: AbstractTask) -> Iterator[Finding]:
    """A list of tasks must not wait for torch."""
    module = type(task).__module__
    answer = _loads_torch(module, folder_of(module))
    wrong = {"no": [], "yes": ["importing it imports torch: import torch inside what needs it"]}.get(answer, [f"importing it: {answer}"])
    yield _said("import", wrong, "without torch")


def _prompts(task: AbstractTask, prior: Policy) -> Iterator[Finding]:
    """Every prompt has tokens that the prior knows, and room behind them."""
    if not isinstance(prior, CausalLM):
        yield Finding("prompts", "ok", f"{prior.name} reads them itself")
        return
    context, unknown, longest, wrong = prior.passes.context, prior.tokenizer.unk_token_id, 0, []
    for split in tasks.SPLITS:
        for prompt in task.prompts(split):
            ids = prior.encode(prompt)
            longest = max(longest, len(ids))
            if context is not None and len(ids) + task.max_new_tokens - 1 > context:  # the last token is never read
                wrong.append(f"{split} prompt {prompt[:60]!r} has {len(ids)} tokens: with {task.max_new_tokens} new ones over {context}")
            if unknown is not None and unknown in ids and unknown not in prior.stops:
                wrong.append(f"{split} prompt {prompt[:60]!r} has characters that the tokenizer of {prior.name} does not know")
    yield _said("prompts", wrong, f"{longest} tokens at most and {task.max_new_tokens} new ones, of {context}")


def _reward(case: Case) -> Iterator[Finding]:
    """One value a completion, whatever stands beside it: finite, not above the ceiling; and more than one value."""
    prompts = [p for p, row in zip(case.prompts, case.texts, strict=True) for _ in (*row, *ODD)]
    texts = [text for row in case.texts for text in (*row, *ODD)]
    wrong = list(_values("reward", case.target.reward, prompts, texts))
    case.target.rewards(case.prompts, [[*row, *ODD] for row in case.texts])  # finite, and at most the ceiling: or it says where not
    tops, lows = case.reward.max(1), case.reward.min(1)
    ceiling = case.target.ceiling(case.prompts)
    most = "no ceiling" if np.isinf(ceiling).all() else f"ceiling {ceiling.min():g}" + (f" to {ceiling.max():g}" if np.ptp(ceiling) else "")
    yield _said("reward", wrong, f"the same twice, in another order and batch; seen {lows.min():.3g} to {tops.max():.3g}, {most}")
    if wrong:
        return
    flat = [p for p, low, top in zip(case.prompts, lows, tops, strict=True) if low == top]
    if flat and not case.listed:
        what = f"one value on all draws of {len(flat)} of {len(case.prompts)} prompts, as {flat[0][:60]!r}: nothing to learn there"
        yield Finding("reward range", "broken" if case.shipped or len(flat) == len(case.prompts) else "warning", what)
    if not np.isfinite(ceiling).all():
        yield Finding("reward range", "warning", "no declared ceiling: no figure that holds log Z can be certified")


def _values(name: str, reward: Reward, prompts: list[str], texts: list[str]) -> Iterator[str]:
    """What is wrong with how a function of (prompts, completions) answers."""
    first, again = (_asked(reward, prompts, texts) for _ in range(2))
    if not np.array_equal(first, again, equal_nan=True):
        i = int(np.flatnonzero(first != again)[0])
        yield f"{name} gives {texts[i]!r} {first[i]:.6g}, then {again[i]:.6g}"
        return
    back = _asked(reward, prompts[::-1], texts[::-1])[::-1]
    some = np.linspace(0, len(texts) - 1, min(len(texts), 70)).astype(int)
    small = np.concatenate(
        [_asked(reward, [prompts[i] for i in part], [texts[i] for i in part]) for part in np.array_split(some, 10) if len(part)]
    )
    for what, at, other in (("in another order", np.arange(len(texts)), back), ("in a batch of its own", some, small)):
        off = np.abs(other - first[at]) > SAME * np.maximum(1, np.abs(first[at]))
        if off.any():
            i = int(np.flatnonzero(off)[0])
            yield f"{name} gives {texts[at[i]]!r} {first[at[i]]:.6g}, and {what} {other[i]:.6g}"


def _asked(reward: Reward, prompts: Sequence[str], texts: Sequence[str]) -> Array:
    given = reward(prompts=list(prompts), completions=list(texts))
    if len(given) != len(texts):
        raise UserError(f"{len(given)} values for {len(texts)} completions")
    return np.array([math.nan if x is None else float(x) for x in given], dtype=np.float64)


def _others(case: Case) -> Iterator[Finding]:
    """The held-out reward and the constrained feature, held to the same."""
    feature = case.task.features()
    for name, reward in (("gold", case.task.gold()), ("feature", None if feature is None else feature[0])):
        if reward is None:
            continue
        texts = [[*row[:8], *ODD] for row in case.texts]
        values = evaluate(reward, case.prompts, texts)
        flat = [p for p, row in zip(case.prompts, texts, strict=True) for _ in row], [text for row in texts for text in row]
        yield _said(name, list(_values(name, reward, *flat)), f"the same twice; seen {values.min():.3g} to {values.max():.3g}")


def _cap(case: Case) -> Iterator[Finding]:
    """Where draws reach the cap, log Z can be certified."""
    if not np.isfinite(case.target.ceiling(case.prompts)).all():
        return
    cap, mean = case.at_cap, (case.mass * case.reward).sum(1)
    detail = f"mean reward {mean.mean():.3g} ({mean.min():.3g} to {mean.max():.3g}); at the cap {cap.mean():.3g}, least {cap.min():.3g}"
    if case.listed:
        yield Finding("base rate", "ok", f"{detail}; all {case.reward.shape[1]:,} outcomes summed")
        return
    low = int((cap < LEAST_CAP).sum())
    few = f"{low} of {len(cap)} prompts have under {LEAST_CAP:.0%} of prior draws at the cap, as {case.prompts[int(cap.argmin())][:60]!r}"
    yield Finding("base rate", _verdict(not low, case), detail if not low else f"{few}; {detail}")


def _reach(case: Case) -> Iterator[Finding]:
    if case.listed:
        yield Finding("reach", "ok", "not needed: every outcome is listed")
        return
    if not np.isfinite(case.target.ceiling(case.prompts)).all():
        return
    least = SHIPPED_REACH if case.shipped else CERTIFIED
    detail = (
        f"least {case.reach.min():.0f}, median {np.median(case.reach):.0f} of {DRAWS if case.bank is None else case.reward.shape[1]} draws"
    )
    low = case.reach.min() < least
    why = f"; {least:.0f} wanted at every prompt: a larger β, a lower ceiling, or more draws"
    yield Finding("reach", _verdict(not low, case), f"{detail} at β {case.target.beta:g}" + (why if low else ""))


def _bank(case: Case) -> Iterator[Finding]:
    """The bank that ships holds this task's rewards of this prior's draws."""
    if case.bank is None:
        path, needed = banks.shipped(case.task, case.prior.name), case.shipped and not case.listed
        if path is not None:
            yield Finding("bank", "warning", f"banks/{path.name} was drawn for other files of this task: a run draws its own")
            return
        yield Finding("bank", "broken" if needed else "ok", "none ships: a run draws its own" if not case.listed else "none is needed")
        return
    now = case.target.rewards(case.prompts, case.texts)
    kept = case.bank.reward[:, : now.shape[1]]
    off = np.abs(now - kept) > 1e-5 * np.maximum(1, np.abs(kept))
    wrong = [f"its rewards are not the task's: {int(off.sum())} of {off.size} differ; draw it again"] if off.any() else []
    yield _said("bank", wrong, f"{case.bank.reward.shape[1]} draws of {len(case.prompts)} prompts, rewards as they are now")


def _rates_written(case: Case) -> Iterator[Finding]:
    """The README's table says what is so."""
    path = home(case.task) / "README.md"
    if not path.is_file():
        return
    block = "\n".join(
        re.findall(r"<!-- (?:base rates|variants)\b.*?: start -->(.*?)<!-- .*?: end -->", path.read_text(encoding="utf-8"), re.S)
    )
    own = [line for line in block.splitlines() if line.startswith(f"| `{case.task.name}` |")]  # a table with a row a task
    lines = own or block.splitlines()
    how = "draw the bank's table again" if case.shipped else "klbench validate --rates writes it"
    if not block.strip():
        yield Finding("base rates", _verdict(False, case), f"README.md has no table of them: {how}")
        return
    stale = []
    for (name, values), word in zip(base_rates(case).items(), ("mean reward", "at the cap", "reach"), strict=False):
        said = "\n".join([line for line in lines if word in line] or lines)
        if not any(_matches(values[0], _printed(number)) for number in re.findall(NUMBER, said)):
            stale.append(f"{name.partition(',')[0]} {_rounded(values[0])}")
    text = f"README.md does not say what is so: {', '.join(stale)} ({how})"
    yield Finding("base rates", _verdict(not stale, case), text if stale else "as README.md has them")


def _rounded(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _printed(word: str) -> tuple[float, float]:
    """A number as it is printed: its value and half of its last place."""
    plain = word.replace(",", "").replace("−", "-")
    digits, _, power = plain.partition("e")
    place = len(digits.partition(".")[2])
    return float(plain), 0.5 * 10.0 ** (int(power or 0) - place)


def _matches(value: float, printed: tuple[float, float]) -> bool:
    """Whether a printed number is this value, rounded to no less than an eighth of it (0.02 says .0171; 0 says nothing)."""
    number, half = printed
    return abs(number - value) <= half * (1 + 1e-9) and (half <= abs(value) / 8 or half <= 0.0005)


def _audits(case: Case) -> Iterator[Finding]:
    """Each audit is made once of the prior."""
    said, wrong = [], []
    for audit in case.task.audits():
        try:
            if isinstance(audit, Drawn) and not audit.prompts:
                figure = audit.of(case.prompts, case.texts)
            elif isinstance(audit, Drawn):
                figure = audit.measure(case.prior, case.task.max_new_tokens, 0, streams.seed(0, f"validate/{audit.name}"))
            else:
                assert isinstance(audit, Chosen) and isinstance(case.prior, CausalLM)
                figure = audit.measure(case.prior, case.prior)
        except Exception as error:
            wrong.append(f"{audit.column}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        if figure.value is None or not math.isfinite(figure.value):
            wrong.append(f"{audit.column} is {figure.value}: {figure.reason}")
        else:
            said.append(f"{audit.name} {figure.value:.3g}")
    if said or wrong:
        yield _said("audits", wrong, ", ".join(said))


def _lm_eval(case: Case) -> Iterator[Finding]:
    """Its tasks for lm-eval can be written. A task that has no name to be loaded by is passed over."""
    folder = folder_of(type(case.task).__module__)
    include = [] if folder is None else [folder.parent]
    if case.task.name not in tasks.names(include):
        return
    with tempfile.TemporaryDirectory() as there:
        (path,) = harness.export(Path(there), [case.task.name], include)
        rows = path.with_suffix(".jsonl").read_text(encoding="utf-8").count("\n")
        kind = "multiple choice" if "multiple_choice" in path.read_text(encoding="utf-8") else "drawn"
    yield Finding("lm-eval", "ok", f"{path.stem}: {kind}, {rows} documents")


CHECKS: Final[dict[str, Callable[[Case], Iterator[Finding]]]] = {
    "gold": _others, "base rate": _cap, "reach": _reach, "bank": _bank, "base rates": _rates_written, "audits": _audits,
    "lm-eval": _lm_eval,
}  # fmt: skip


def _tried(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of a check, of which an exception is one too."""
    found: list[Finding] = []
    try:
        found += check()
    except UserError as error:
        found.append(Finding(name, "broken", str(error)))
    except Exception as error:  # whatever a task's own code raises is an answer about that code
        found.append(Finding(name, "broken", f"{type(error).__name__}: {' '.join(str(error).split())}"))
    return found


def _said(name: str, wrong: Sequence[str], right: str) -> Finding:
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return Finding(name, "broken", wrong[0] + more) if wrong else Finding(name, "ok", right)


def _verdict(holds: bool, case: Case) -> Literal["ok", "warning", "broken"]:
    return "ok" if holds else "broken" if case.shipped else "warning"


def _section(folder: Path, name: str) -> str:
    """What README.md says under a heading, up to the next of its rank; "" without one."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.search(rf"^## {re.escape(name)}\s*\n(.*?)(?=^## |\Z)", text, re.S | re.M | re.I)
    return match[1] if match else ""


@functools.cache
def _opened(name: str) -> Policy:
    """A prior by name, once a process."""
    return models.open_prior(name)
