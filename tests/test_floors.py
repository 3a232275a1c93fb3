"""The shape of the tree: floors, forbidden imports, banned file names, abstract or final. Every check also meets a text it must reject.

A module stands on a floor and imports from strictly lower ones, never upwards and never sideways, inside functions too
(shared/STYLE.md section 2). Scripts that make what ships (`extract.py`, `provenance/`) run before there is a package: floors do not bind
them, nor does the ban on pickles, because converting a pickle once is what some of them are for.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A fraction is a sub-floor: neighbours on one floor of STYLE.md of which one has to read the other. A folder's floor holds for each of
# its files unless the file has a line of its own, and files of one folder are siblings.
FLOORS: dict[str, float] = {
    "klbench.errors": -1,  # the one exception: everybody may raise it
    "klbench.estimate": 0,
    "klbench.measure": 0.1,
    "klbench.rows": 0.1,
    "klbench.ranks": 0.1,  # paired differences and certain brackets, from per-prompt arrays
    "klbench.archive": 0,  # npz files of strangers
    "klbench.shares": 0,  # work on all cores, by forking
    "klbench.streams": 0,
    "klbench.included": 0,  # code of users by path, for the two contracts
    "klbench.batch": 0,
    "klbench.suites": 0,  # YAML files
    "klbench.templates": 0,  # what `klbench new` writes
    "klbench.truths": 1.5,  # estimates beside exact values, below board
    "klbench.page": 1.5,  # templates and figures of a board's pages, below board
    "klbench.page.timeline": 1.6,  # drawn as figures are
    "klbench.page.axes": 1.4,  # ticks and orders, without matplotlib
    "klbench.page.views": 2.1,  # a board as plain data
    "klbench.page.site": 2.2,  # and as files
    "klbench.record": 1,
    "klbench.target": 1,
    "klbench.weights": 1,
    "klbench.preferences": 1,
    "klbench.normaliser": 2.5,  # log Z of train prompts, for objectives that weigh by it
    "klbench.audit": 1.5,  # figures of a task beside its reward, below task
    "klbench.method": 2,
    "klbench.task": 2,
    "klbench.suite": 2,
    "klbench.standing": 1.9,  # methods over seeds, below board
    "klbench.board": 2,
    "klbench.estimators": 2.9,  # below pool, which joins their per-draw sums with the bank's
    "klbench.estimators.control": 2.85,  # the regression that several of them are
    "klbench.estimators.named": 2.95,  # all of them by name
    "klbench.policies": 2.8,  # below bank, which draws from them
    "klbench.policies.attention": 2.6,  # one query a row
    "klbench.policies.prefixes": 2.6,  # what continuations have in common
    "klbench.policies.static": 2.6,  # one more token of each draw, as a GPU wants it
    "klbench.policies.vllm": 2.85,  # draws of another engine, for training
    "klbench.policies.vocabulary": 2.6,  # sums over a vocabulary, some rows at a time
    "klbench.policies.passes": 2.7,  # rows of ids to logits; causal_lm makes a law of them
    "klbench.rewards": 3,
    "klbench.rewards.calling": 2.85,  # the two ways in which a reward is called
    "klbench.rewards.null": 2.9,
    "klbench.rewards.classifier": 2.9,
    "klbench.rewards.measurement": 2.9,
    "klbench.rewards.hashed": 2.9,
    "klbench.rewards.hidden_states": 2.9,
    "klbench.rewards.trained": 2.95,  # reads what training wrote
    "klbench.rewards.training": 4.6,  # measures with reward_eval
    "klbench.priors": 2.8,  # names and folders
    "klbench.objectives": 3,
    "klbench.samplers": 3,
    "klbench.samplers.smc": 2.8,  # the filter that other steerings run
    "klbench.samplers.twisted_smc": 2.9,  # and the value fit
    "klbench.bank": 3,
    "klbench.pool": 3,
    "klbench.sheet": 3.7,
    "klbench.models": 3.5,  # priors and policies from what users write
    "klbench.exact": 3.2,  # sums over every outcome
    "klbench.offline": 3,  # training data from a file
    "klbench.processes": 0,  # several that train one policy
    "klbench.sharded": 3,  # weights spread over them
    "klbench.gradient": 3.5,  # of a batch in parts
    "klbench.train": 4,
    "klbench.probe": 4.1,  # a few draws on the way
    "klbench.harness": 4,  # lm-eval's figures of a policy, below score
    "klbench.harness.tasks": 3.8,  # klbench's tasks as lm-eval's
    "klbench.harness.earned": 3.8,
    "klbench.score": 4.2,  # a cell is trained, then scored
    "klbench.pooled": 4.3,  # scored policies are pooled
    "klbench.laws": 4,
    "klbench.task_checks": 4,
    "klbench.convergence": 4.05,  # where training ends, by the laws' tables
    "klbench.gate": 4,
    "klbench.gate.sides": 4.1,  # each reads the one above it
    "klbench.gate.compare": 4.2,
    "klbench.gate.calibration": 4.3,
    "klbench.gate.calibrate": 5.3,  # retrains and recomputes
    "klbench.gate.report": 5.2,  # writes to the terminal
    "klbench.history": 4.2,
    "klbench.progress": 4,
    "klbench.executors": 4.4,  # the contract; below run, which hands executors work: they know a callable and nothing of runs
    "klbench.executors.local": 4.5,
    "klbench.executors.ray": 4.5,
    "klbench.run": 5,
    "klbench.accuracy": 5,
    "klbench.accuracy.worlds": 4.1,  # each reads the one above it
    "klbench.accuracy.rivals": 4.1,
    "klbench.accuracy.cells": 4.2,
    "klbench.accuracy.criteria": 4.3,
    "klbench.accuracy.plots": 4.3,
    "klbench.accuracy.report": 4.41,
    "klbench.claims": 4.5,
    "klbench.claims.contract": 4.1,
    "klbench.claims.toys": 4.1,
    "klbench.claims.report": 4.6,
    "klbench.metrics": 5,  # metric modules of the library evaluate
    "klbench.metrics.answering": 4.9,  # what they share
    "klbench.reward_eval": 5,
    "klbench.reward_eval.intervals": 4.1,  # each reads the ones above it
    "klbench.reward_eval.ranking": 4.2,
    "klbench.reward_eval.calibration": 4.2,
    "klbench.reward_eval.functional": 4.2,
    "klbench.reward_eval.association": 4.2,
    "klbench.reward_eval.sharpness": 4.2,
    "klbench.reward_eval.validation": 4.3,
    "klbench.reward_eval.over_optimisation": 4.3,
    "klbench.reward_eval.board": 4.4,
    "klbench.reward_eval.cards": 4.5,
    "klbench.reward_eval.plots": 4.5,
    "klbench.reward_eval.report": 5.2,  # writes to the terminal
    "klbench.api": 5,
    "klbench.terminal": 5.1,
    "klbench.recompute": 5.2,  # a board from its samples
    "klbench.submission": 5.3,  # records of strangers, recomputed before they join a board
    "klbench.export": 5,  # formats of other tools, one a file
    "klbench.export.every_eval_ever": 3,
    "klbench.export.harness": 3,
    "klbench.export.hugging_face": 3,
    "klbench.export.markdown": 3,
    "klbench.commands": 5.5,  # one file a command
    "klbench.cli": 6,
    "klbench": 7,  # the front door names what users import; below it the package itself is read for its version alone
}
TASKS_MAY_READ = 3
TRANSFORMERS_IN = ("klbench.policies", "klbench.priors", "klbench.rewards")
BANNED_NAMES = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py"}
# multiprocessing pickles what it sends down a pipe in any case; this file opens such messages itself, to see what that raises.
UNPICKLES_MESSAGES = "klbench.executors.local"
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Module:
    """A source file by its dotted name; `package` says that it is an `__init__.py`, which relative imports need to know."""

    name: str
    tree: ast.Module
    package: bool = False


@dataclass(frozen=True)
class Import:
    """`name` as written, absolute; `parts` what a `from` takes out of it."""

    line: int
    name: str
    parts: tuple[str, ...] = ()


def build_time(path: Path) -> bool:
    return path.name == "extract.py" or "provenance" in path.parts


def modules(folder: str, name: str) -> list[Module]:
    """Every module of a source folder under the name it is installed by."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if build_time(path.relative_to(ROOT)):
            continue
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        package = parts[-1] == "__init__"
        dotted = ".".join((name, *(parts[:-1] if package else parts)))
        found.append(Module(dotted, ast.parse(path.read_text(encoding="utf-8"), str(path)), package))
    return found


KLBENCH = modules("klbench", "klbench")
TASKS = modules("tasks", "klbench_tasks")


def imports(module: Module) -> Iterator[Import]:
    """Every import at any depth, relative ones resolved, and `import_module("...")` of a literal."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.name.split(".")
                up = here[: len(here) - node.level + module.package]
                base = ".".join([*up, base] if base else up)
            yield Import(node.lineno, base, tuple(alias.name for alias in node.names))
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(node.lineno, first.value)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def floor_of(name: str) -> float | None:
    """Floor of a module or of the nearest folder above it that has one; the package itself lends its floor to nobody."""
    while name not in FLOORS:
        name = name.rpartition(".")[0]
        if name in ("", "klbench"):
            return None
    return FLOORS[name]


def read_of(taken: Import, known: frozenset[str]) -> Iterator[str]:
    """The klbench modules that an import reads. `from klbench import x` is the module x, or the front door unless x is the version."""
    if not within(taken.name, "klbench"):
        return
    rest = []
    for part in taken.parts:
        inner = f"{taken.name}.{part}"
        if inner in known:
            yield inner
        else:
            rest.append(part)
    if taken.parts and not rest:
        return
    if taken.name == "klbench" and rest and set(rest) <= {"__version__"}:
        return
    yield taken.name


def floors(module: Module, known: frozenset[str]) -> list[str]:
    own = floor_of(module.name)
    if own is None:
        return [f"{module.name} has no floor: give it one in FLOORS"]
    faults = []
    for taken in imports(module):
        for name in read_of(taken, known):
            other = floor_of(name)
            if other is None:
                faults.append(f"{module.name}:{taken.line} imports {name}, which has no floor")
            elif other >= own:
                way = "sideways" if other == own else "up"
                faults.append(f"{module.name} (floor {own:g}) line {taken.line} imports {way}: {name} (floor {other:g})")
    return faults


def no_task_in_klbench(module: Module) -> list[str]:
    return [
        f"{module.name}:{i.line} imports {i.name}: tasks come by entry point"
        for i in imports(module)
        if within(i.name, "klbench_tasks", "tasks")
    ]


def tasks_read_low_floors(module: Module, known: frozenset[str]) -> list[str]:
    faults = []
    for taken in imports(module):
        if within(taken.name, "tasks"):
            faults.append(f"{module.name}:{taken.line} imports {taken.name}: its installed name is klbench_tasks")
        for name in read_of(taken, known):
            floor = floor_of(name)
            if floor is None or floor > TASKS_MAY_READ:
                faults.append(f"{module.name}:{taken.line} imports {name}: a task may read floors up to {TASKS_MAY_READ}")
    return faults


def transformers_at_home(module: Module) -> list[str]:
    if within(module.name, *TRANSFORMERS_IN):
        return []
    return [f"{module.name}:{i.line} imports {i.name}" for i in imports(module) if within(i.name, "transformers")]


def no_pickle(module: Module) -> list[str]:
    allowed = {"pickle"} if module.name == UNPICKLES_MESSAGES else set()
    banned = UNPICKLERS - allowed
    faults = [f"{module.name}:{i.line} imports {i.name}" for i in imports(module) if i.name.split(".")[0] in banned]
    faults += [f"{module.name}:{i.line} takes load from torch" for i in imports(module) if i.name == "torch" and "load" in i.parts]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "pickle.load", "pickle.Unpickler"):
            faults.append(f"{module.name}:{node.lineno} uses {ast.unparse(node)}: files are safetensors, JSON or npz")
        if (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        ):
            faults.append(f"{module.name}:{node.value.lineno} allows pickles")
    return faults


OPEN_BASES = {"ABC", "Protocol", "BaseModel", "Enum", "StrEnum", "IntEnum", "NamedTuple", "TypedDict"}
EXCEPTIONS = ("Error", "Exception", "Warning", "Exit", "Interrupt")


def bare(node: ast.expr) -> str:
    """The last word of a base or decorator: `abc.ABC` is ABC, `Generic[T]` Generic, `dataclass(frozen=True)` dataclass."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def classes(trees: Iterable[Module]) -> dict[str, ast.ClassDef]:
    return {node.name: node for module in trees for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)}


def kinds(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> set[str]:
    """Names of all bases, those of klbench's own bases included."""
    found: set[str] = set()
    for name in map(bare, node.bases):
        found.add(name)
        if name in known and known[name] is not node:
            found |= kinds(known[name], known)
    return found


def has_abstract_method(node: ast.ClassDef) -> bool:
    return any(bare(d) == "abstractmethod" for f in node.body if isinstance(f, ast.FunctionDef) for d in f.decorator_list)


def abstract_or_final(module: Module, known: dict[str, ast.ClassDef]) -> list[str]:
    """An interface is abstract and open, everything else is a leaf: no class inherits from one that could be constructed."""
    faults = []
    for node in (n for n in ast.walk(module.tree) if isinstance(n, ast.ClassDef)):
        where = f"{module.name}:{node.lineno} class {node.name}"
        bases = kinds(node, known)
        decorators = {bare(d) for d in node.decorator_list}
        model = bool(bases & {"BaseModel"}) or any(b.endswith(EXCEPTIONS) for b in bases)
        if node.name.startswith("Abstract"):
            if not (has_abstract_method(node) and ("ABC" in bases or any(b.startswith("Abstract") for b in bases))):
                faults.append(f"{where} is called abstract: let it be an ABC with an abstract method")
            if "final" in decorators:
                faults.append(f"{where} is abstract and final")
        elif any(b.startswith("Abstract") for b in bases):
            if "final" not in decorators:
                faults.append(f"{where} implements an interface: decorate it @final")
        elif not (bases & OPEN_BASES or model or decorators & {"final", "dataclass"}):
            faults.append(f"{where} is neither abstract, nor data, nor @final")
        for base in map(bare, node.bases):
            parent = known.get(base)
            if parent is None or parent is node or model or base.startswith("Abstract"):
                continue
            if not kinds(parent, known) & {"Protocol", "ABC"}:
                faults.append(f"{where} inherits from {base}, which is no interface: wrap it")
    return faults


def banned_names(paths: Iterable[str]) -> list[str]:
    return [f"{path}: name the file for its idea" for path in paths if Path(path).name in BANNED_NAMES]


KNOWN_MODULES = frozenset(m.name for m in KLBENCH)
KNOWN_CLASSES = classes(KLBENCH)

ON_KLBENCH: dict[str, Callable[[Module], list[str]]] = {
    "floors": lambda m: floors(m, KNOWN_MODULES | set(FLOORS)),
    "no task in klbench": no_task_in_klbench,
    "transformers at home": transformers_at_home,
    "no pickle": no_pickle,
    "abstract or final": lambda m: abstract_or_final(m, KNOWN_CLASSES | classes([m])),
}
ON_TASKS: dict[str, Callable[[Module], list[str]]] = {
    "floors of tasks": lambda m: tasks_read_low_floors(m, KNOWN_MODULES | set(FLOORS)),
    "no pickle in tasks": no_pickle,
    "final in tasks": lambda m: abstract_or_final(m, KNOWN_CLASSES | classes([m])),
}
CHECKS = ON_KLBENCH | ON_TASKS


@pytest.mark.parametrize("check", ON_KLBENCH)
def test_klbench_keeps(check: str) -> None:
    assert len(KLBENCH) > 10, "the walk found next to nothing"
    assert [fault for module in KLBENCH for fault in ON_KLBENCH[check](module)] == []


@pytest.mark.parametrize("check", ON_TASKS)
def test_tasks_keep(check: str) -> None:
    assert len(TASKS) > 3, "the walk found next to nothing"
    assert [fault for module in TASKS for fault in ON_TASKS[check](module)] == []


def test_no_file_has_a_banned_name() -> None:
    paths = [str(p.relative_to(ROOT)) for folder in ("klbench", "tasks", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    assert banned_names(paths) == []


@pytest.mark.parametrize("path", ["klbench/utils.py", "tasks/toxicity/helpers.py", "tests/common.py"])
def test_a_banned_name_is_rejected(path: str) -> None:
    assert banned_names([path, "klbench/weights.py"]) == [f"{path}: name the file for its idea"]


REJECTED = [
    ("floors", "klbench.estimate", "import klbench.record"),
    ("floors", "klbench.weights", "from klbench.target import Policy"),
    ("floors", "klbench.target", "def f():\n    from klbench.method import objective"),
    ("floors", "klbench.record", "from klbench import board"),
    ("floors", "klbench.record", "from klbench import score"),
    ("floors", "klbench.record", "from klbench import Estimate"),
    ("floors", "klbench.record", "import klbench"),
    ("floors", "klbench.objectives.dpo", "from klbench.objectives.ipo import gap"),
    ("floors", "klbench.objectives.dpo", "from .ipo import gap"),
    ("floors", "klbench.objectives.dpo", "from . import ipo"),
    ("floors", "klbench.objectives.dpo", "from klbench.samplers import best_of_n"),
    ("floors", "klbench.estimators.tv", "from klbench.pool import joint"),
    ("floors", "klbench.bank", "from klbench.pool import joint"),
    ("floors", "klbench.executors.ray", "from klbench.run import one"),
    ("floors", "klbench.executors.ray", "from klbench.executors.local import execute"),
    ("floors", "klbench.api", "from klbench.cli import main"),
    ("floors", "klbench.measure", "import importlib\nimportlib.import_module('klbench.board')"),
    ("floors", "klbench.newcomer", "x = 1"),
    ("floors", "klbench.cli", "import klbench.newcomer"),
    ("no task in klbench", "klbench.cli", "def f():\n    import klbench_tasks.bias.task"),
    ("no task in klbench", "klbench.laws", "from tasks.toxicity import task"),
    ("no task in klbench", "klbench.task", "from importlib import import_module\nimport_module('klbench_tasks.bias')"),
    ("transformers at home", "klbench.train", "from transformers import AutoModel"),
    ("transformers at home", "klbench.score", "def f():\n    import transformers.utils"),
    ("no pickle", "klbench.bank", "import pickle"),
    ("no pickle", "klbench.rewards.linear", "def f():\n    from joblib import load"),
    ("no pickle", "klbench.train", "import torch\ntorch.load('x.pt')"),
    ("no pickle", "klbench.train", "from torch import load"),
    ("no pickle", "klbench.bank", "import numpy as np\nnp.load('x.npz', allow_pickle=True)"),
    ("no pickle", "klbench.executors.ray", "import pickle"),
    ("no pickle", "klbench.executors.local", "import pickle\npickle.load(open('x', 'rb'))"),
    ("no pickle in tasks", "klbench_tasks.bias.task", "import cloudpickle"),
    ("abstract or final", "klbench.task", "class Sum:\n    pass"),
    ("abstract or final", "klbench.task", "@dataclass(frozen=True)\nclass Mine(AbstractTask):\n    pass"),
    ("abstract or final", "klbench.task", "class AbstractSum(ABC):\n    def total(self): ..."),
    ("abstract or final", "klbench.task", "class AbstractSum:\n    @abstractmethod\n    def total(self): ..."),
    ("abstract or final", "klbench.estimate", "@dataclass\nclass Mine(Estimate):\n    pass"),
    ("abstract or final", "klbench.estimate", "@final\nclass A:\n    pass\n@final\nclass B(A):\n    pass"),
    ("abstract or final", "klbench.task", "@final\nclass AbstractSum(ABC):\n    @abstractmethod\n    def total(self): ..."),
    ("floors of tasks", "klbench_tasks.bias.task", "from klbench.score import score"),
    ("floors of tasks", "klbench_tasks.bias.task", "def f():\n    from klbench import score"),
    ("floors of tasks", "klbench_tasks.bias.task", "from tasks.toxicity import judge"),
    ("final in tasks", "klbench_tasks.bias.task", "class Bias(AbstractTask):\n    pass"),
]
ACCEPTED = [
    ("floors", "klbench.cli", "def f():\n    from klbench.run import go\n    from klbench import __version__"),
    ("floors", "klbench.pool", "from klbench.estimators import kl_prior\nfrom klbench.errors import UserError"),
    ("floors", "klbench.record", "from klbench import __version__, estimate"),
    ("floors", "klbench.run", "from klbench.executors import local"),
    ("floors", "klbench.executors.local", "from klbench.executors import Failure"),
    ("floors", "klbench.train", "from .policies import causal_lm\nfrom . import batch"),
    ("no task in klbench", "klbench.cli", "import taskset\nfrom klbench.task import load"),
    ("transformers at home", "klbench.policies.causal_lm", "import transformers"),
    ("transformers at home", "klbench.train", "import transformers_extra"),
    ("no pickle", "klbench.train", "import numpy as np\nnp.load('x.npz', allow_pickle=False)"),
    ("no pickle", "klbench.executors.local", "import pickle\npickle.loads(b'')"),
    ("abstract or final", "klbench.task", "@final\n@dataclass(frozen=True)\nclass Mine(AbstractTask):\n    pass"),
    ("abstract or final", "klbench.record", "class Strict(BaseModel):\n    pass\nclass Train(Strict):\n    pass"),
    ("abstract or final", "klbench.errors", "class UserError(ValueError):\n    pass\nclass Refused(UserError):\n    pass"),
    ("abstract or final", "klbench.errors", "class AbstractSum(abc.ABC):\n    @abstractmethod\n    def total(self): ..."),
    ("floors of tasks", "klbench_tasks.bias.task", "from klbench.target import TiltedPrior\nfrom klbench_tasks.bias import pattern"),
]


@pytest.mark.parametrize(("check", "name", "text"), REJECTED)
def test_an_offending_text_is_rejected(check: str, name: str, text: str) -> None:
    assert CHECKS[check](Module(name, ast.parse(text))) != []


@pytest.mark.parametrize(("check", "name", "text"), ACCEPTED)
def test_a_lawful_text_is_accepted(check: str, name: str, text: str) -> None:
    assert CHECKS[check](Module(name, ast.parse(text))) == []


def test_every_check_has_a_text_that_it_rejects() -> None:
    assert {check for check, _, _ in REJECTED} == set(CHECKS)


def test_a_package_file_counts_its_dots_from_itself() -> None:
    tree = ast.parse("from . import ipo")
    assert [i.name for i in imports(Module("klbench.objectives", tree, package=True))] == ["klbench.objectives"]
    assert [i.name for i in imports(Module("klbench.objectives.dpo", tree))] == ["klbench.objectives"]
