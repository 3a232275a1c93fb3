"""docs/methods is what docs/make_methods.py writes, and every entry of section B names files that are there, or a reason."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from klbench import method

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_methods", ROOT / "docs" / "make_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_pages_are_made_from_the_code(maker: ModuleType) -> None:
    there = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "methods").glob("*.md")}
    made = maker.pages()
    assert sorted(there) == sorted(made)
    assert [name for name, text in made.items() if there[name] != text] == [], "run python docs/make_methods.py"


def test_every_objective_carries_an_entry_and_every_entry_a_file_or_a_reason(maker: ModuleType) -> None:
    carried = [name for _, names, _ in maker.ENTRIES.values() for name in names]
    assert set(carried) <= set(method.names("objectives")) and len(set(carried)) == len(carried)
    assert all(bool(names) != bool(why) for _, names, why in maker.ENTRIES.values())
    assert [f"B{i}.{j}" for i, n in ((1, 3), (2, 20), (3, 3), (4, 12), (5, 4)) for j in range(1, n + 1)] == list(maker.ENTRIES)


def test_a_file_is_at_most_sixty_lines_beside_its_docstring() -> None:
    for name in method.names("objectives"):
        text = (ROOT / "klbench" / "objectives" / f"{name}.py").read_text(encoding="utf-8")
        code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip() and not line.startswith(("from ", "import "))]
        assert len(code) <= 60, f"{name}: {len(code)} lines"
