"""What an import may load: the files that run in a second stay free of torch, and `import klbench` loads next to nothing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STARRED = ("errors", "estimate", "measure", "streams", "record", "suite", "board")  # the star of shared/STYLE.md section 2
STARRED += ("gate.settings", "gate.sides", "gate.compare", "gate.report", "commands.check", "commands.history", "history")
HOMES: dict[str, str] = importlib.import_module("klbench")._HOMES
PRESENT = [name for name in STARRED if (ROOT / "klbench" / f"{name.replace('.', '/')}.py").is_file()]


def loaded_after(code: str) -> set[str]:
    """Names in sys.modules after a fresh interpreter ran the code."""
    report = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_probe_sees_a_module() -> None:
    assert "numpy" in loaded_after("import numpy")


def test_the_starred_files_of_the_first_floors_are_there() -> None:
    assert {"estimate", "measure", "streams", "record", "suite"} <= set(PRESENT)


@pytest.mark.parametrize("name", PRESENT)
def test_starred_file_leaves_torch_out(name: str) -> None:
    loaded = loaded_after(f"import klbench.{name}")
    assert f"klbench.{name}" in loaded
    assert {"torch", "transformers", "sklearn"} & loaded == set()


def test_building_a_board_leaves_torch_out(tmp_path: Path) -> None:
    """Two seconds that a reader would wait for: the command as it is run, on the records of a published board."""
    words = ["leaderboard", "build", str(ROOT / "leaderboards" / "quick"), "--out", str(tmp_path)]
    loaded = loaded_after(f"from klbench.cli import app\ntry:\n    app({words!r})\nexcept SystemExit as end:\n    assert not end.code")
    assert (tmp_path / "index.html").is_file() and "klbench.page.site" in loaded
    assert {"torch", "transformers", "sklearn", "scipy.stats", "pandas"} & loaded == set()


def test_klbench_loads_neither_torch_nor_numpy() -> None:
    loaded = loaded_after("import klbench; dir(klbench); klbench.__version__")
    assert {"torch", "numpy", "scipy", "pydantic", "transformers"} & loaded == set()


def test_importing_klbench_takes_less_than_300_ms() -> None:
    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        return time.perf_counter() - start

    # The best of five: a busy machine can slow every single one, and it is the import that is on trial.
    assert min(seconds("import klbench") for _ in range(5)) < 0.3 + min(seconds("pass") for _ in range(3))


def test_public_names_come_from_their_homes() -> None:
    import klbench
    from klbench.estimate import Estimate
    from klbench.target import TiltedPrior

    assert klbench.Estimate is Estimate
    assert klbench.TiltedPrior is TiltedPrior
    assert set(klbench.__all__) <= set(dir(klbench))


def test_an_unknown_name_is_an_attribute_error() -> None:
    import klbench

    with pytest.raises(AttributeError, match="no attribute 'scroe'"):
        _ = klbench.scroe


def test_a_module_never_hides_a_function_of_its_name() -> None:
    """Importing klbench/score.py makes the import system bind the module as `klbench.score`, over the public function."""
    code = "import types, klbench; klbench.score = types.ModuleType('klbench.score'); klbench.other = types.ModuleType('klbench.other')"
    check = "assert 'score' not in vars(klbench); assert 'other' in vars(klbench)"
    loaded_after(f"{code}\n{check}")


def test_the_table_of_homes_is_the_public_interface() -> None:
    import klbench

    assert set(klbench.__all__) == {*klbench._HOMES, "__version__"}


@pytest.mark.parametrize("name", sorted(HOMES))
def test_a_public_name_is_at_home(name: str) -> None:
    import klbench

    path = ROOT.joinpath(*HOMES[name].split("."))
    files = [f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file() and f.stat().st_size > 0]
    if not files:
        pytest.skip(f"{HOMES[name]} is not written yet")
    assert callable(getattr(klbench, name))
