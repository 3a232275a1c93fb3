"""klbench's own gate as it ships: what CI compares with, and what was measured of it (ci/, docs/gate.md)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from klbench import run as grid
from klbench.gate import calibration, settings, sides
from klbench.gate.compare import check

ROOT = Path(__file__).parents[1]
GATE = ROOT / "ci" / "gate.yaml"
BASELINE = ROOT / "ci" / "baseline.json"


@pytest.fixture(scope="module")
def measured() -> calibration.Calibration:
    found = calibration.read(GATE)
    assert found is not None
    return found


def test_the_rate_was_measured_for_these_settings_and_holds(measured: calibration.Calibration) -> None:
    gate = settings.load(GATE)
    assert measured.gate == gate.sha256 and measured.rate == gate.rate == 0.05 and measured.held
    assert measured.whole.of >= 1000 and measured.alarms["retrained"].of >= 200
    assert measured.whole.high <= 0.065
    assert calibration.noise_for(gate, GATE)[0] == measured.noise


def test_the_power_is_what_is_asked(measured: calibration.Calibration) -> None:
    twice = next(p for p in measured.power if p.times == 2.0)
    assert twice.blocked.low >= 0.8 and twice.found.value >= twice.blocked.value - 0.01


def test_no_margin_is_below_what_can_be_detected(measured: calibration.Calibration) -> None:
    for name, metric in settings.load(GATE).metrics.items():
        if metric.margin is not None:
            assert metric.margin >= measured.detectable[name], name


def test_the_baseline_is_of_the_suite_as_it_stands(measured: calibration.Calibration) -> None:
    """Else `make gate` would compare with what nobody trains any more. Its noise names every trained policy."""
    there = {record.run.id for record in sides.read(BASELINE)}
    asked = grid.resolve(grid.suite_of("gate"))
    assert there == {run.id for run in asked}
    trained = {run.method for run in asked if run.kind == "objective"}
    assert {name.split("|")[1] for name in measured.noise} == trained


def test_the_baseline_passes_against_itself_and_not_when_a_figure_is_worse(measured: calibration.Calibration) -> None:
    gate, records = settings.load(GATE), sides.read(BASELINE)
    assert check(records, records, gate, measured.noise).code == 0
    worse = [r.model_copy(update={"prompts": r.prompts | {"free": [x + 0.5 for x in r.prompts["free"]]}}) for r in records]
    found = check(records, worse, gate, measured.noise)
    assert found.code == 1 and {c.cell.method for c in found.of("regression")} >= {"rloo", "dpo", "dpg"}


def test_two_seeds_of_the_quick_suite_pass_the_default_gate() -> None:
    """ci/quick.json: `klbench run quick --seed 1`. Each margin can be detected there, whatever the margin."""
    was, now = sides.read(ROOT / "leaderboards" / "quick"), sides.read(ROOT / "ci" / "quick.json")
    found = check(was, now, settings.DEFAULT)
    assert found.code == 0, found.sentence
    share = settings.DEFAULT.rate / sum(c.decides for c in found.comparisons)
    for c in found.comparisons:
        if c.decides:
            assert c.shift is not None and c.asked.margin is not None
            assert c.shift.seen(share, 0.0, two_sided=False) <= c.asked.margin, c.why


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_gate", ROOT / "docs" / "make_gate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_that_was_measured(measured: calibration.Calibration) -> None:
    text = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
    assert text == maker().page(text, measured), "python docs/make_gate.py"
