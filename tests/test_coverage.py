"""docs/coverage.md is what docs/make_coverage.py writes; a name that is not there, or that nothing executes, stops it."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_coverage", ROOT / "docs" / "make_coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass with postponed annotations looks its module up there
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(maker: ModuleType) -> None:
    assert (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8") == maker.page(), "python docs/make_coverage.py"


def test_every_row_is_there_and_every_link_leads_somewhere(maker: ModuleType) -> None:
    text = maker.page()
    first, second = text.split("## D2.")
    for part, count in ((first, 51), (second, 73)):
        assert [int(n) for n in re.findall(r"^\| (\d+) \|", part, re.M)] == list(range(1, count + 1))
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in text.splitlines() if row.startswith("| ")} == {6}
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 200 and [link for link in links if not (ROOT / "docs" / link).is_file()] == []


@pytest.mark.parametrize(
    ("carrier", "says"),
    [
        ("objective:rlo", "there is no objective 'rlo'"),
        ("sampler:rloo", "there is no sampler 'rloo'"),
        ("switch:rebel.hubert", "there is no switch"),
        ("claim:C49", "there is no claim"),
        ("column:kl", "there is no column"),
        ("task:exact/easy", "there is no task"),
        ("audit:bias/yes_no:nothing", "there is no audit"),
        ("reward:nothing", "there is no reward"),
        ("command:fly", "there is no command"),
        ("function:klbench.pool.frontiers@tests/test_pool.py", "no frontiers in klbench.pool"),
        ("doc:README.md#Praise", "there is no doc"),
        ("wish:anything", "no kind 'wish'"),
        ("function:klbench.pool.frontier", "no file executes frontier"),
        ("function:klbench.pool.frontier@tests/test_nowhere.py", "none of tests/test_nowhere.py"),
        ("function:klbench.pool.frontier@tests/test_weights.py", "none of tests/test_weights.py executes frontier"),
        ("column:self_bleu@tests/test_pool.py", "executes self_bleu"),
    ],
)
def test_what_is_not_there_stops_the_page(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, carrier: str, says: str) -> None:
    with pytest.raises(LookupError, match=re.escape(says)):
        maker.shown(carrier)
    found = maker.rows()
    monkeypatch.setattr(maker, "rows", lambda: {**found, "D1": [replace(found["D1"][0], carried=[carrier]), *found["D1"][1:]]})
    with pytest.raises(LookupError, match="^D1 1: "):
        maker.page()


def test_a_row_says_what_carries_it_or_why_nothing_does(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = maker.rows()
    for changed in (replace(found["D2"][0], carried=[]), replace(found["D2"][0], reason="none")):
        monkeypatch.setattr(maker, "rows", lambda changed=changed: {**found, "D2": [changed, *found["D2"][1:]]})
        with pytest.raises(LookupError, match="^D2 1: either"):
            maker.page()
