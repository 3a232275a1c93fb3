"""What an installed klbench holds: the list of packages is the tree's, and a built wheel works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SHIPPED = {".json", ".jsonl", ".safetensors", ".npz", ".yaml", ".j2", ".css"}  # what the code reads when it runs
SOURCES = {"klbench": "klbench", "tasks": "klbench_tasks"}  # folder in the checkout: name it is installed by
# What a wheel is made of. A copy of it, so that building leaves no build/ in the checkout and reads no stale one.
PARTS = ["klbench", "tasks", "pyproject.toml", "README.md", "LICENSE", "NOTICE"]


def packages_of(tree: Path) -> set[str]:
    """Installed names of all folders with an `__init__.py`."""
    found = set()
    for folder, name in SOURCES.items():
        for init in (tree / folder).rglob("__init__.py"):
            found.add(".".join((name, *init.parent.relative_to(tree / folder).parts)))
    return found


def test_the_list_of_packages_is_the_tree() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_of(ROOT)


def test_a_folder_that_is_not_listed_is_seen(tmp_path: Path) -> None:
    for name in ("klbench/objectives/new", "tasks/toy"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
    assert packages_of(tmp_path) == {"klbench.objectives.new", "klbench_tasks.toy"}


def test_every_task_folder_has_an_entry_point() -> None:
    points = PROJECT["project"]["entry-points"]["klbench.tasks"]
    families = {path.parent.name for path in (ROOT / "tasks").glob("*/task.py")}
    assert families <= set(points)
    for name, value in points.items():
        assert value.startswith(f"klbench_tasks.{name.partition('/')[0]}.task:")


def test_every_dependency_that_is_pinned_fits_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), requirement
    assert lines[next(i for i, line in enumerate(lines) if not line.startswith("#"))].startswith("torch=="), (
        "torch decides the install's size"
    )
    assert not [v for v in pins.values() if "+" in v], "a local version exists on one machine alone"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without isolation: the setuptools of the test environment, and no network."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / part)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_what_the_code_reads(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, name in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and (path.suffix in SHIPPED or path.suffix == ".py")
    }
    assert wanted - inside == set()
    assert "klbench/py.typed" in inside
    assert any(name.startswith("klbench/priors/mini/") for name in inside)
    assert any(name.startswith("klbench_tasks/toxicity/") and name.endswith(".safetensors") for name in inside)
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert [name for name in inside if name.split("/")[0] in ("tasks", "tests", "docs")] == []


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In a venv that borrows this one's site-packages by a .pth file: dependencies from there, klbench from the wheel."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(*words: str) -> str:
        done = subprocess.run([str(python), *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    call("-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel))
    own = Path(call("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A plain path line: the .pth files of the borrowed folder, its editable klbench among them, are not read.
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    report = """
import json, klbench, klbench.method, klbench.suite, klbench.task
from importlib.resources import files
import klbench_tasks
print(json.dumps({
    "at": [klbench.__file__, klbench_tasks.__file__], "version": klbench.__version__, "suites": klbench.suite.names(),
    "tasks": klbench.task.names(), "objectives": klbench.method.names("objectives"),
    "prior": sorted(p.name for p in files("klbench.priors").joinpath("mini").iterdir()),
}))"""
    seen = json.loads(call("-c", report).splitlines()[-1])
    assert all(Path(at).is_relative_to(own) for at in seen["at"])
    assert seen["version"] == "0.1.0"
    assert set(seen["tasks"]) >= {"toxicity", "bias", "factuality"}
    assert seen["suites"] == sorted(p.stem for p in (ROOT / "klbench" / "suites").glob("*.yaml"))
    assert seen["objectives"] == sorted(p.stem for p in (ROOT / "klbench" / "objectives").glob("[!_]*.py"))
    assert {p.name for p in (ROOT / "klbench/priors/mini").glob("*.safetensors")} <= set(seen["prior"])
    assert "quick" in call(str(python.with_name("klbench")), "ls", "suites")
