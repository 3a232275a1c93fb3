"""The command line: what it refuses, in one line and with exit code 2; what it lists; what it hands on to the Python interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from test_run import OBJECTIVE, SAMPLER, SUITE, ToyTask, record_of

import klbench
from klbench import cli, executors, task
from klbench import run as grid
from klbench.errors import UserError, unknown
from klbench.executors import Failure
from klbench.page import site
from klbench.record import Train, write_atomically

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite file of toy tasks with its plugins in a folder, outside the working directory."""
    home = tmp_path.parent / f"{tmp_path.name}_toys"
    plugins = home / "plugins"
    plugins.mkdir(parents=True)
    for name in ("mine", "yours"):
        (plugins / f"{name}.py").write_text(OBJECTIVE)
    (plugins / "ancestral.py").write_text(SAMPLER)
    (home / "toys.yaml").write_text(yaml.safe_dump(SUITE))

    def load(name: str, include: tuple[Path, ...] = ()) -> ToyTask:
        if name not in ("toy_a", "toy_b"):
            raise unknown("task", name, ["toy_a", "toy_b"])
        return ToyTask(name)

    monkeypatch.setattr(task, "load", load)
    monkeypatch.setattr(task, "names", lambda include=(): ["toy_a", "toy_b"])
    return home


@dataclass
class Api:
    """Stands in for klbench.api: keeps what it was called with."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def score(self, **asked: Any) -> Any:
        self.calls.append(asked)
        rows = [{"policy": name, "reverse_kl": 0.123456, "status": "certified", "gold": None} for name in asked["policies"]]
        sure, doubtful = (SimpleNamespace(notes=note, bracket=ends) for note, ends in (((), None), (("scored as float32",), (0.25, None))))
        return SimpleNamespace(
            to_frame=lambda: rows, to_json=lambda path: Path(path).write_text("{}"), stopped="budget spent",
            items=lambda: zip(asked["policies"], [doubtful, sure], strict=False),
        )  # fmt: skip

    def train(self, **asked: Any) -> None:
        self.calls.append(asked)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    stand_in, module = Api(), ModuleType("klbench.api")
    vars(module).update(score=stand_in.score, train=stand_in.train)
    monkeypatch.setitem(sys.modules, "klbench.api", module)
    monkeypatch.setattr(klbench, "api", module, raising=False)
    return stand_in


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("klbench: ") and err.count("\n") == 1, err
    return err.removeprefix("klbench: ").strip()


# words


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"klbench {klbench.__version__}\n"
    for words in ([], ["--help"], ["-h"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert all(f"  {c} " in text for c in ("run", "score", "train", "ls", "validate", "doctor", "leaderboard")) and "│" not in text


def test_help_needs_neither_torch_nor_numpy_nor_rich() -> None:
    code = "import sys, klbench.cli; klbench.cli.main(['run', '--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert "'klbench.cli'" in loaded and "--objective" in done.stdout
    assert not [name for name in ("torch", "numpy", "scipy", "yaml", "rich.console") if f"'{name}'" in loaded]


def test_what_later_issues_bring_is_not_there_yet() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    every = "accuracy check claims doctor export history leaderboard ls new reward run score tasks train train-reward validate"
    assert sorted(commands) == every.split()


@pytest.mark.parametrize(
    "words, says",
    [
        (["rnu"], "no command 'rnu'; did you mean 'run'?"),
        (["leaderboard", "biuld", "x"], "no command 'biuld'; did you mean 'build'?"),
        (["run", "--taks", "x"], "no option '--taks'; did you mean '--task'?"),
        (["score", "--prior", "p", "--smaples", "4"], "no option '--smaples'; did you mean '--samples'?"),
        (["ls", "taks"], "no kind of thing to list 'taks'; did you mean 'tasks'?"),
        (["run", "--workers", "many"], "'--workers'"),
        (["run", "--workers", "0"], "'--workers'"),
        (["train", "--prior", "p"], "Missing option"),
        (["leaderboard"], "Missing command"),
    ],
)
def test_a_wrong_word_gets_one_line(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in refused(capsys, *words)


def test_a_message_cannot_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in refused(capsys, "run", "no\x1b[2Jsuch")
    assert "\n" not in refused(capsys, "ls", "two\nlines")


# run


@pytest.mark.parametrize(
    "words, says",
    [
        (["nosuch"], "no suite 'nosuch'"),
        (["nosuch.yaml"], "no suite file at nosuch.yaml"),
        (["SUITE", "--task", "toy_aa"], "no task 'toy_aa'; did you mean 'toy_a'?"),
        (["SUITE", "--objective", "mien"], "no objective 'mien'; did you mean 'mine'?"),
        (["SUITE", "--set", "train.stesp=3"], "no setting 'train.stesp'; did you mean 'train.steps'?"),
        (["SUITE", "--set", "train.steps=few"], "train.steps"),
        (["SUITE", "--set", "steps"], "key=value expected"),
        (["SUITE", "--executor", "locla"], "no executor 'locla'; did you mean 'local'?"),
        (["SUITE", "--executor", "ray"], "klbench[ray]"),
        (["SUITE", "--include", "nowhere"], "--include nowhere: no such directory"),
    ],
)
def test_run_refuses_and_writes_nothing(capsys: pytest.CaptureFixture[str], toys: Path, words: list[str], says: str) -> None:
    words = [str(toys / "toys.yaml") if word == "SUITE" else word for word in words]
    assert says in refused(capsys, "run", *words, *([] if "--include" in words else ["--include", str(toys / "plugins")]))
    assert list(Path.cwd().iterdir()) == []


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that cost nothing, in this process."""

    def execute(cells: list[grid.GridCell], work: object, workers: int, on_event: Any) -> list[Failure]:
        failures = []
        for cell in cells:
            if Path("broken").exists() and cell.run.method == "mine":
                failures.append(Failure(cell.id, "reward f gave nan", "Traceback: here"))
                on_event({"run": cell.id, "phase": "failed", "reason": failures[-1].reason})
                continue
            write_atomically(cell.out / "records" / f"{cell.id}.json", record_of(cell.run).to_json().encode())
            on_event({"run": cell.id, "phase": "done"})
        return failures

    monkeypatch.setattr(executors, "load", lambda name: execute)
    monkeypatch.setattr(grid.resolve, "__defaults__", ((), lambda *_: {}))
    monkeypatch.setattr(grid.run_suite, "__kwdefaults__", {**(grid.run_suite.__kwdefaults__ or {}), "hashes": lambda *_: {}})
    monkeypatch.setattr(site, "write", lambda board, folder: (folder / "index.html").write_text("a page"))


def test_run_prints_the_board_and_where_it_lies(capsys: pytest.CaptureFixture[str], toys: Path, quickly: None) -> None:
    words = ["run", str(toys / "toys.yaml"), "--include", str(toys / "plugins"), "--seed", "3", "--set", "beta=0.25", "--device", "cpu"]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert Path("runs/toys/index.html").read_text() == "a page"
    assert out.splitlines()[-1] == "runs/toys/index.html" and "mine" in out and "│" not in out
    assert sum(line.startswith("[") for line in err.splitlines()) == 10
    manifest = json.loads(Path("runs/toys/manifest.json").read_text())
    assert manifest["seeds"] == [3, 4] and {t["beta"] for t in manifest["suite"]["tasks"].values()} == {0.25}
    assert manifest["include"] == [str(toys / "plugins")]

    assert cli.main([*words, "--task", "toy_b", "--objective", "mine", "--out", "there"]) == 0
    assert len(list(Path("there/records").iterdir())) == 3


def test_run_with_failed_cells_exits_1_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, toys: Path, quickly: None
) -> None:
    words = ["run", str(toys / "toys.yaml"), "--include", str(toys / "plugins"), "--device", "cpu"]
    Path("broken").touch()
    monkeypatch.delenv("KLBENCH_DEBUG", raising=False)
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert err.count("failed: reward f gave nan") == 4 and "Traceback" not in err
    assert err.splitlines()[-1] == "klbench: 4 of 10 cells failed; the same command tries them again"
    monkeypatch.setenv("KLBENCH_DEBUG", "1")
    assert cli.main(words) == 1
    assert capsys.readouterr().err.count("Traceback: here") == 4


@pytest.mark.parametrize(
    "raised, code, says",
    [
        (KeyboardInterrupt(), 130, "klbench: stopped; the same command goes on where this one was"),
        (SystemExit(143), 143, "klbench: stopped; the same command goes on where this one was"),
        (RuntimeError("no\nluck"), 1, "klbench: unexpected RuntimeError: no luck (KLBENCH_DEBUG=1 shows where)"),
        (UserError("two\nlines"), 2, "klbench: two lines"),
    ],
)
def test_whatever_is_raised_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, says: str
) -> None:
    def load(name: str) -> None:
        raise raised

    monkeypatch.delenv("KLBENCH_DEBUG", raising=False)
    monkeypatch.setattr(executors, "load", load)
    assert cli.main(["run"]) == code
    assert capsys.readouterr().err == says + "\n"
    monkeypatch.setenv("KLBENCH_DEBUG", "1")
    assert cli.main(["run"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code == 1)


def test_leaderboard_build(capsys: pytest.CaptureFixture[str], toys: Path, quickly: None) -> None:
    assert "no directory nowhere" in refused(capsys, "leaderboard", "build", "nowhere")
    Path("empty").mkdir()
    assert "no records in empty" in refused(capsys, "leaderboard", "build", "empty", "--out", "site")
    assert not Path("site").exists()
    cli.main(["run", str(toys / "toys.yaml"), "--include", str(toys / "plugins"), "--out", "done", "--device", "cpu"])
    capsys.readouterr()
    assert cli.main(["leaderboard", "build", "done", "--out", "site"]) == 0
    assert capsys.readouterr().out == "site/index.html\n"
    assert Path("site/board.json").read_bytes() == Path("done/board.json").read_bytes()


# score and train

REWARD = "def length(prompts, completions, **kw):\n    return [float(len(c)) for c in completions]\n\nlimit = 3\n"
GIVEN = ["--prompts", "p.txt", "--reward", "rewarding:length", "--beta", "0.5"]


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "either --task or --prompts"),
        (["--task", "toy", *GIVEN], "either --task or --prompts"),
        (["--prompts", "p.txt"], "--prompts and --reward go together"),
        (["--task", "toy", "--reward", "rewarding:length"], "go together"),
        (["--task", "toy", "--reward-max", "1"], "--reward-max belongs to --reward"),
        (["--prompts", "p.txt", "--reward", "rewarding:length"], "--prompts needs --beta"),
        ([*GIVEN, "--json", "nowhere/x.json"], "--json nowhere/x.json: no directory nowhere"),
        ([*GIVEN, "--policy", "b/mine"], "'mine' is taken by 'a/mine'; write NAME=b/mine"),
        ([*GIVEN, "--policy", "x="], "nothing after the ="),
        ([*GIVEN[2:], "--prompts", "q.txt"], "no prompts file at q.txt"),
        ([*GIVEN[2:], "--prompts", "empty.txt"], "no prompt in it"),
        ([*GIVEN[2:], "--prompts", "bad.jsonl"], "bad.jsonl, line 3: not JSON"),
        ([*GIVEN[2:], "--prompts", "odd.jsonl"], 'odd.jsonl, line 1: an object with a "prompt" or "text" string expected'),
        ([*GIVEN[2:], "--prompts", "latin.txt"], "latin.txt: cannot be read"),
        ([*GIVEN, "--reward", "rewarding"], "module:function expected"),
        ([*GIVEN, "--reward", "rewardign:length"], "no module 'rewardign'; did you mean 'rewarding'?"),
        ([*GIVEN, "--reward", "rewarding:lenght"], "no function in module rewarding 'lenght'; did you mean 'length'?"),
        ([*GIVEN, "--reward", "rewarding:limit"], "limit is not a function"),
        ([*GIVEN, "--reward", "needy:f"], "module needy imports 'nothing_of_that_name', which is not installed"),
        ([*GIVEN, "--reward", "broken:f"], "importing broken raised ZeroDivisionError"),
    ],
)
def test_score_refuses_at_the_door(capsys: pytest.CaptureFixture[str], api: Api, words: list[str], says: str) -> None:
    prepare()
    assert says in refused(capsys, "score", "--prior", "mini", "--policy", "a/mine", *words)
    assert api.calls == []


def prepare() -> None:
    files = {
        "p.txt": "The nurse said\n\nThe cook said \n",
        "empty.txt": "\n",
        "bad.jsonl": '{"prompt": "a"}\n\n{"prompt"\n',
        "odd.jsonl": '{"q": 1}\n',
        "good.jsonl": '{"prompt": "a"}\n\n{"text": "b", "id": 4}\n',
        "rewarding.py": REWARD,
        "needy.py": "import nothing_of_that_name\n",
        "broken.py": "1 / 0\n",
    }
    for name, text in files.items():
        Path(name).write_text(text)
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    for name in ("rewarding", "needy", "broken"):
        sys.modules.pop(name, None)


def test_score_hands_on_what_was_asked_and_prints_rows(capsys: pytest.CaptureFixture[str], api: Api) -> None:
    prepare()
    words = ["score", "--prior", "mini", "--policy", "mine=a/b", "--policy", "best_of_n:16", *GIVEN, "--reward-max", "40"]
    assert cli.main([*words, "--samples", "64", "--max-new-tokens", "8", "--seed", "7", "--device", "cpu", "--json", "out.json"]) == 0
    [asked] = api.calls
    reward, report = asked.pop("reward"), asked.pop("report")
    report("nobody looks")
    assert reward(prompts=["a"], completions=["four"]) == [4.0]
    assert asked == {
        "prior": "mini", "policies": {"mine": "a/b", "best_of_n:16": "best_of_n:16"}, "prompts": ["The nurse said", "The cook said "],
        "beta": 0.5, "reward_max": 40.0, "samples": 64, "max_new_tokens": 8, "seed": 7, "device": "cpu",
        "interval": "jackknife", "pool": True, "chat": False,
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "klbench: mine: scored as float32",
        "klbench: mine: reverse_kl is uncertified; whatever log Z is, it lies above 0.25",
        "klbench: budget spent",
    ]
    assert out.splitlines() == [
        "policy\treverse_kl\tstatus\tgold", "mine\t0.1235\tcertified\t", "best_of_n:16\t0.1235\tcertified\t",
    ]  # fmt: skip
    assert Path("out.json").read_text() == "{}"

    assert cli.main(["score", "--prior", "mini", "--policy", "rejection", "--task", "bias"]) == 0
    api.calls[-1].pop("report")
    usual = {"interval": "jackknife", "pool": True, "chat": False}
    assert api.calls[-1] == {"prior": "mini", "policies": {"rejection": "rejection"}, "task": "bias", "seed": 0, **usual}
    extra = [
        "--precision",
        "0.1",
        "--budget",
        "99",
        "--interval",
        "betting",
        "--measure",
        "kl_prior.k3",
        "--no-pool",
        "--bank",
        "b",
        "--chat",
    ]
    assert cli.main(["score", "--prior", "mini", "--policy", "rejection", "--task", "bias", *extra]) == 0
    wanted = {
        "precision": 0.1,
        "budget": 99,
        "interval": "betting",
        "measures": ["kl_prior.k3"],
        "pool": False,
        "bank": Path("b"),
        "chat": True,
    }
    assert {key: api.calls[-1][key] for key in wanted} == wanted
    assert cli.main([*words, "--prompts", "good.jsonl"]) == 0
    assert api.calls[-1]["prompts"] == ["a", "b"]


def test_train_hands_on_what_was_asked(capsys: pytest.CaptureFixture[str], api: Api) -> None:
    words = ["train", "--prior", "mini", "--task", "bias", "--objective", "rloo", "--beta", "0.3", "--out", "weights"]
    assert cli.main([*words, "--set", "train.steps=7", "--set", "train.lr=0.01", "--seed", "2"]) == 0
    assert api.calls == [{
        "prior": "mini", "task": "bias", "objective": "rloo", "out": Path("weights"), "beta": 0.3, "train": Train(steps=7, lr=0.01),
        "seed": 2, "include": (),
    }]  # fmt: skip
    assert capsys.readouterr().out == "weights\n"
    assert "did you mean 'train.steps'" in refused(capsys, *words, "--set", "train.stesp=7")
    assert "train settings alone" in refused(capsys, *words, "--set", "score.draws=64")
    assert "train takes --beta" in refused(capsys, *words, "--set", "beta=1")
    assert len(api.calls) == 1


# ls and validate


def test_ls_prints_a_row_a_line(capsys: pytest.CaptureFixture[str], toys: Path) -> None:
    assert cli.main(["ls", "tasks"]) == 0
    assert capsys.readouterr().out == "toy_a\tnothing\ntoy_b\tnothing\n"
    for kind in ("objectives", "samplers", "priors", "suites"):
        assert cli.main(["ls", kind]) == 0
        capsys.readouterr()


def test_validate_a_suite(capsys: pytest.CaptureFixture[str], toys: Path) -> None:
    include = ["--include", str(toys / "plugins")]
    assert cli.main(["validate", str(toys / "toys.yaml"), *include]) == 0
    assert "sound: 2 tasks, 10 runs" in capsys.readouterr().out
    Path("wrong.yaml").write_text(yaml.safe_dump({**SUITE, "objectvies": ["mine"]}))
    assert "'objectvies'; did you mean 'objectives'?" in refused(capsys, "validate", "wrong.yaml", *include)
    Path("absent.yaml").write_text(yaml.safe_dump({**SUITE, "objectives": ["mien"]}))
    assert "no objective 'mien'; did you mean 'mine'?" in refused(capsys, "validate", "absent.yaml", *include)
    Path("not.yaml").write_text("a: [")
    assert "not.yaml: not YAML" in refused(capsys, "validate", "not.yaml")


def test_validate_a_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no file at nowhere.py" in refused(capsys, "validate", "nowhere.py")
    Path("my-objective.py").write_text(OBJECTIVE)
    assert "a Python name expected" in refused(capsys, "validate", "my-objective.py")
    Path("empty.py").write_text("")
    assert "found 0" in refused(capsys, "validate", "empty.py")
    Path("broken.py").write_text("1 / 0")
    assert "broken.py: ZeroDivisionError" in refused(capsys, "validate", "broken.py")
    Path("plain.py").write_text(SAMPLER)  # its `pick` returns rewards where indices are due
    assert "plain.py: IndexError" in refused(capsys, "validate", "plain.py")
    rloo = (ROOT / "klbench/objectives/rloo.py").read_text(encoding="utf-8")
    Path("uphill.py").write_text(rloo.replace("return -(advantage", "return (advantage"))
    assert "uphill.py: the law '" in refused(capsys, "validate", "uphill.py")
    for name, text in {"rloo_again": rloo, "rejection_again": (ROOT / "klbench/samplers/rejection.py").read_text(encoding="utf-8")}.items():
        Path(f"{name}.py").write_text(text)
        assert cli.main(["validate", f"{name}.py"]) == 0
        assert "laws hold" in capsys.readouterr().out


def test_validate_no_task(capsys: pytest.CaptureFixture[str], toys: Path) -> None:
    assert "no task 'toy_aa'; did you mean 'toy_a'?" in refused(capsys, "validate", "toy_aa")


def test_doctor_says_what_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise UserError("no model in mini")

    monkeypatch.setattr(cli, "_prior_policy", missing)
    assert cli.main(["doctor"]) == 1
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert ["BROKEN", "prior mini", "UserError: no model in mini"] in rows
    assert {"python", "torch", "cores", "memory", "disk", "cuda", "torch threads"} <= {row[1] for row in rows if row[0] == "ok"}


# as a process


def test_one_line_and_no_directory_from_a_real_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "klbench.cli", "run", "nosuch"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("klbench: no suite 'nosuch'") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["tasks", "export", str(tmp_path / "file" / "x"), "--task", "exact"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "file" in told[0] and "unexpected" not in told[0]
