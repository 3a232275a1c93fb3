"""The gate: what is compared with what, when a difference is a regression, and what was measured of it. Every rule meets its mutant."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from klbench.errors import UserError
from klbench.estimate import Estimate
from klbench.gate import calibrate, calibration, compare, report, settings, sides
from klbench.gate.calibration import Calibration, Power, Share
from klbench.gate.compare import WHOLE, Comparison, Shift, check, decide, key
from klbench.gate.settings import Gate, Metric
from klbench.gate.sides import Cell
from klbench.ranks import holm
from klbench.record import OtherSchemaError, Record, Run, Score

PROMPTS = 20


def metric(direction: str = "min", margin: float | None = 0.1, weight: float = 1.0) -> Metric:
    return Metric(direction=direction, margin=None if direction == "info" else margin, weight=weight)  # type: ignore[arg-type]


GATE = Gate(metrics={"reverse_kl": metric()})


def made(
    free: Sequence[float] | float = 0.0, *, task: str = "t", method: str = "m", kind: str = "objective", beta: float = 1.0, seed: int = 0,
    status: str = "certified", prompts: int = PROMPTS, hashes: dict[str, str] | None = None, columns: dict[str, Estimate] | None = None,
    arrays: dict[str, list[float]] | None = None, truths: dict[str, float] | None = None, **run: Any,
) -> Record:  # fmt: skip
    values = [float(free)] * prompts if isinstance(free, int | float) else [float(x) for x in free]
    mean = float(np.mean(values))
    figure = Estimate(1 + mean, stderr=0.01, status=status)
    return Record(
        run=Run(
            task=task, task_version=run.get("version", 1), method=method, kind=kind, prior=run.get("prior", "mini"), beta=beta, seed=seed,  # type: ignore[arg-type]
            max_new_tokens=run.get("length", 8), score=Score(), hashes={"prior": "a", "prompts": "b", "target": "c"} | (hashes or {}),
        ),
        status=status,
        columns={"reverse_kl": figure, **(columns or {})},
        prompt_ids=[f"p{i}" for i in range(len(values))],
        prompts={"free": values, **(arrays or {})},
        frontier=[], samples=[], cost={}, truths=truths or {},
    )  # fmt: skip


def noise(seed: int, size: float = 0.05, count: int = PROMPTS) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, size, count)


# --- one metric of one policy ---


def test_few_prompts_are_a_t_test_and_many_a_permutation_test() -> None:
    few = noise(0, count=8) + 0.03
    assert Shift(few).p(False) == pytest.approx(stats.ttest_1samp(few, 0, alternative="greater").pvalue)
    assert Shift(few).p(True) == pytest.approx(stats.ttest_1samp(few, 0).pvalue)
    many = noise(1) + 0.02
    exact = stats.permutation_test((many,), np.mean, permutation_type="samples", alternative="greater", n_resamples=20_000, rng=1).pvalue
    assert Shift(many).p(False) == pytest.approx(exact, abs=0.01)
    assert Shift(-many).p(False) == pytest.approx(1 - exact, abs=0.01)
    assert Shift(many).p(True) == Shift(-many).p(True)


def test_the_permutation_test_holds_its_level_where_the_law_is_far_from_normal() -> None:
    rng = np.random.default_rng(0)
    draws = rng.standard_t(2, (400, 18))
    p = np.array([Shift(d).p(False) for d in draws])
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / len(p))
    assert (p <= 0.2).mean() >= 0.14  # and is not idle


@pytest.mark.parametrize("count", [6, 18])
def test_seeds_that_differ_are_no_regression_once_their_noise_is_known(count: int) -> None:
    """A shift common to all prompts is what a training seed does. Without sigma the test takes it for a worsening."""
    rng = np.random.default_rng(1)
    shifts = [rng.normal(0, 0.02, count) + rng.normal(0, 0.1) for _ in range(300)]
    known = np.mean([Shift(d, 0.1, 50.0).p(False) <= 0.05 for d in shifts])
    ignored = np.mean([Shift(d).p(False) <= 0.05 for d in shifts])
    assert known <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300) and ignored > 0.3


def test_nothing_moved_nothing_found() -> None:
    still = Shift(np.zeros(20))
    assert (still.p(False), still.p(True), still.upper(False), still.seen(0.01, 0.1, False)) == (1.0, 1.0, 0.0, 0.1)
    exact = Shift(np.array([0.3]))
    assert exact.p(False) == 0.0 and Shift(np.array([-0.3])).p(False) == 1.0  # two figures without error


@pytest.mark.parametrize(("count", "sigma", "dof"), [(8, 0.0, math.inf), (24, 0.0, math.inf), (24, 0.02, 300.0), (8, 0.03, 12.0)])
def test_the_detectable_worsening_is_found_four_times_in_five(count: int, sigma: float, dof: float) -> None:
    rng = np.random.default_rng(2)
    level, found, noticed = 0.01, [], []
    for _ in range(250):
        error = rng.normal(0, 0.05, count) + (rng.normal(0, 1) * sigma if sigma else 0.0)
        known = sigma * math.sqrt(rng.chisquare(dof) / dof) if sigma else 0.0
        blank = Shift(error, known, dof)
        found.append(replace(blank, values=error + blank.seen(level, 1e-9, False)).p(False) <= level)
        noticed.append(blank.p(False) <= level)
    assert 0.75 <= np.mean(found) <= 0.99 and np.mean(noticed) <= 0.03


def test_a_permutation_that_can_never_reach_the_level_detects_nothing() -> None:
    assert math.isinf(Shift(noise(0, count=16)).seen(1e-6, 0.1, False))
    assert math.isfinite(Shift(noise(0, count=16)).seen(1e-4, 0.1, False))
    assert math.isinf(Shift(noise(0, count=16), 0.1, 300.0).seen(1e-6, 0.1, False))
    assert math.isfinite(Shift(noise(0, count=16), 0.1, 300.0).seen(1e-3, 0.1, False))


# --- many of them ---


def test_weighted_holm() -> None:
    p = np.array([0.01, 0.04, 0.03])
    assert holm(p, np.ones(3)) == pytest.approx([0.03, 0.06, 0.06])
    # weights 2, 1, 1: p/w is .005, .04, .03; sums left are 4, 1, 2
    assert holm(p, np.array([2.0, 1.0, 1.0])) == pytest.approx([0.02, 0.06, 0.06])
    assert holm(p, np.array([1.0, 1.0, 8.0])) == pytest.approx([0.0375, 0.04, 0.0375])  # sums left are 2, 1, 10
    rng = np.random.default_rng(0)
    weights = np.array([1.0, 3.0, 0.5, 0.5, 2.0])
    errors = np.mean([(holm(rng.uniform(size=5), weights) <= 0.05).any() for _ in range(4000)])
    unadjusted = np.mean([(rng.uniform(size=5) <= 0.05).any() for _ in range(4000)])
    assert errors <= 0.06 < unadjusted


def given(values: Any, asked: Metric | None = None, name: str = "reverse_kl", sigma: float = 0.0) -> Comparison:
    shift = Shift(np.asarray(values, dtype=np.float64), sigma)
    return Comparison(Cell("t", "m", 1.0), name, asked or metric(), "0", "not compared", 1.0, 1.0, shift=shift)


@pytest.mark.parametrize(
    ("worse", "size", "margin", "verdict"),
    [
        (0.30, 0.05, 0.1, "regression"),
        (0.08, 0.05, 0.1, "regression"),  # beyond noise, and more than the margin is not refused
        (0.04, 0.02, 0.1, "within margin"),
        (0.00, 0.05, 0.1, "no regression"),
        (-0.3, 0.05, 0.1, "no regression"),
        (0.02, 0.40, 0.1, "inconclusive"),
        (-0.4, 0.60, 0.1, "no regression"),  # one of the margin's size would be missed, but is refused here
    ],
)
def test_verdicts(worse: float, size: float, margin: float, verdict: str) -> None:
    values = noise(4, size)
    found = decide([given(values - values.mean() + worse, metric(margin=margin))], (), (), GATE).comparisons[0]
    assert found.verdict == verdict
    assert found.worse == pytest.approx(worse) and found.why.startswith("reverse_kl of m on t ")


def test_a_band_moves_neither_way_and_info_decides_nothing() -> None:
    values = noise(5) - 0.4
    assert decide([given(values, metric("band"))], (), (), GATE).outcome == "regression"
    assert decide([given(values, metric("min"))], (), (), GATE).outcome == "pass"
    shown = replace(given(-values, metric("info")), verdict="info")
    assert decide([shown], (), (), GATE).outcome == "nothing measured"
    assert decide([shown, given(values)], (), (), GATE).outcome == "pass"


def test_precedence() -> None:
    bad, unclear, good = given(noise(6) + 1), given(noise(6, 2.0)), given(noise(6, 0.01))
    difference = sides.Difference("t m", "other prompts")
    assert decide([bad, unclear, good], [difference], (), GATE).code == 4
    assert decide([], (), (), GATE).code == 5
    assert decide([bad, unclear, good], (), (), GATE).code == 1
    assert decide([unclear, good], (), (), GATE).code == 3
    assert decide([good], (), (), GATE).code == 0


# --- two sides ---


def test_log_z_cancels_in_a_difference_of_reverse_kl() -> None:
    """The columns differ by what log Z was estimated as; `free` does not, and is what is compared."""
    a = made(noise(0))
    b = a.model_copy(update={"columns": {"reverse_kl": Estimate(9.0, stderr=0.01)}})
    assert check([a], [b], GATE).outcome == "pass"
    worse = made(noise(0) + 0.5).model_copy(update={"columns": a.columns})
    assert check([a], [worse], GATE).outcome == "regression"


def test_statuses() -> None:
    good, doubtful = made(noise(0)), made(noise(0), status="uncertified")
    assert check([good], [doubtful], GATE).outcome == "inconclusive"
    assert "certified before and uncertified now" in check([good], [doubtful], GATE).comparisons[0].why
    both = check([doubtful], [doubtful], GATE)
    assert both.outcome == "pass" and "needs no log Z" in both.comparisons[0].note
    assert check([doubtful], [made(noise(0) + 1, status="uncertified")], GATE).outcome == "regression"
    gate = Gate(metrics={"reverse_kl": metric(), "wasted_nats": metric()})

    def wasted(value: float | None, status: str) -> Record:
        return made(noise(0), columns={"wasted_nats": Estimate(value, stderr=0.01, status=status)})

    found = check([wasted(0.1, "uncertified")], [wasted(9.0, "uncertified")], gate)
    assert found.outcome == "pass" and found.of("not compared")[0].note == "uncertified on both sides"
    assert check([wasted(0.1, "certified")], [wasted(9.0, "certified")], gate).outcome == "regression"
    assert check([wasted(0.1, "certified")], [wasted(0.1, "uncertified")], gate).outcome == "inconclusive"
    assert check([wasted(0.1, "uncertified")], [wasted(0.1, "certified")], gate).of("not compared")
    assert check([wasted(0.1, "certified")], [made(noise(0))], gate).outcome == "inconclusive"  # gone
    only = Gate(metrics={"wasted_nats": metric()})
    assert check([wasted(0.1, "uncertified")], [wasted(9.0, "uncertified")], only).code == 5


def test_larger_is_better_for_some() -> None:
    gate = Gate(metrics={"gold": metric("max")})

    def gold(values: Any) -> Record:
        return made(columns={"gold": Estimate(float(np.mean(values)), stderr=0.01)}, arrays={"gold": [float(x) for x in values]})

    less, more = gold(noise(1)), gold(noise(2) + 0.5)
    assert check([more], [less], gate).outcome == "regression" and check([less], [more], gate).outcome == "pass"
    assert "fell by" in check([more], [less], gate).sentence


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hashes": {"prior": "z"}}, "prior (weights or tokenizer) differs"),
        ({"hashes": {"prompts": "z"}}, "prompts differs"),
        ({"hashes": {"target": "z"}}, "reward or target differs"),
        ({"hashes": {"task": "z"}}, "task's code (reward or target) differs: hash none in the baseline, z in"),
        ({"prompts": PROMPTS - 5}, "20 in the baseline, 15 in the candidate, 5 are gone"),
        ({"beta": 0.5}, "its β is 1 in the baseline and 0.5 in the candidate"),
        ({"version": 2}, "task version is 1 in the baseline and 2"),
        ({"length": 16}, "max_new_tokens is 8 in the baseline and 16"),
        ({"prior": "other"}, "prior is mini in the baseline and other"),
        ({"method": "n"}, "the candidate has no record of it"),
        ({"task": "u"}, "no record of the task t"),
    ],
)
def test_what_cannot_be_compared_is_named(change: dict[str, Any], said: str) -> None:
    found = check([made()], [made(**change)], GATE)
    assert found.code == 4 and said in found.sentence and "t m β 1" in found.sentence
    assert check([made()], [made()], GATE).code == 0


def test_rewards_may_differ_where_the_gate_says_so() -> None:
    gate = Gate(metrics={"reverse_kl": metric(), "reward": metric("max"), "gold": metric("max")}, rewards_differ=True)
    figures = {name: Estimate(0.5, stderr=0.01) for name in ("reward", "gold")}
    worse = figures | {"gold": Estimate(0.1, stderr=0.01), "reward": Estimate(0.1, stderr=0.01)}
    a, b = made(columns=figures), made(9.0, columns=worse, hashes={"target": "z"})
    found = check([a], [b], gate)
    assert found.outcome == "regression" and {c.metric for c in found.of("regression")} == {"gold"}
    assert {c.metric for c in found.of("not compared")} == {"reverse_kl", "reward"}


def test_seeds_are_paired_by_label_and_their_spread_counts() -> None:
    spread = [0.0, 0.4, -0.4]
    a = [made(noise(s) + x, seed=s) for s, x in enumerate(spread)]
    b = [made(noise(10 + s) + x + 0.2, seed=s) for s, x in enumerate(spread)]
    shift = check(a, b, GATE).comparisons[0].shift
    assert shift is not None
    variances = [np.var([np.mean(r.prompts["free"]) for r in side], ddof=1) for side in (a, b)]
    assert shift.sigma == pytest.approx(math.sqrt(sum(variances) / 3)) and shift.dof == 4
    assert check(a, b, GATE).outcome == "inconclusive"  # of 0.2, with seeds 0.4 apart, three say nothing
    assert check(a[:1], b[:1], GATE).outcome == "regression"  # about two checkpoints, and said so
    assert "these two checkpoints" in check(a[:1], b[:1], GATE).comparisons[0].note
    known = {key(Cell("t", "m", 1.0), "reverse_kl"): (0.5, 100.0)}
    assert check(a[:1], b[:1], GATE, known).outcome == "inconclusive"
    sampler = [[r.model_copy(update={"run": r.run.model_copy(update={"kind": "sampler"})}) for r in side[:1]] for side in (a, b)]
    assert check(*sampler, GATE, known).outcome == "regression"  # nobody trained it: no seed to blame


def test_seed_labels() -> None:
    a = [made(seed=0), made(seed=1)]
    gone = check(a, [made(seed=0)], GATE)
    assert gone.code == 4 and "seed 1 is in the baseline and not in the candidate" in gone.sentence
    assert check(a, [*a, made(seed=2)], GATE).code == 0
    other = check([made(seed=0)], [made(seed=7)], GATE)
    assert other.code == 0 and other.comparisons[0].seeds == "0 against 7"
    with pytest.raises(UserError, match="two records of t, m, beta 1 and seed 0"):
        check([made(), made()], [made()], GATE)


def test_new_policies_are_told_and_decide_nothing() -> None:
    found = check([made()], [made(), made(9.0, method="n")], GATE)
    assert found.code == 0 and [c.method for c in found.new] == ["n"]


def test_infinite_figures() -> None:
    gate = Gate(metrics={"forward_kl": metric()})
    finite, infinite = (made(columns={"forward_kl": Estimate(x, stderr=0.1)}) for x in (1.0, math.inf))
    assert check([finite], [infinite], gate).outcome == "regression"
    assert check([infinite], [finite], gate).outcome == "pass"
    assert check([infinite], [infinite], gate).code == 5


def test_estimators_are_gated_too() -> None:
    gate = Gate(metrics={"stderr.reverse_kl": metric(margin=0.2), "error.reverse_kl": metric(margin=0.02)})

    def board(error: float, stderr: float) -> list[Record]:
        out = []
        for i, e in enumerate(noise(3, 0.005, 12)):
            figure = {"reverse_kl": Estimate(0.3 + error + e, stderr=stderr * (1 + e))}
            out.append(made(method=f"m{i}", columns=figure, truths={"reverse_kl": 0.3}))
        return out

    good = board(0.0, 0.01)
    assert check(good, board(0.0, 0.01), gate).outcome == "pass"
    wide, off = check(good, board(0.0, 0.02), gate), check(good, board(0.1, 0.01), gate)
    assert [c.metric for c in wide.of("regression")] == ["stderr.reverse_kl"] and wide.of("regression")[0].cell == WHOLE
    assert [c.metric for c in off.of("regression")] == ["error.reverse_kl"]


# --- files ---


def test_baseline_files_come_back(tmp_path: Path) -> None:
    records = [made(noise(s), seed=s) for s in range(3)]
    sides.write(tmp_path / "b.json", records)
    assert sides.read(tmp_path / "b.json") == sorted(records, key=lambda r: r.run.id)
    (tmp_path / "run" / "records").mkdir(parents=True)
    for r in records:
        (tmp_path / "run" / "records" / f"{r.run.id}.json").write_text(r.to_json())
    (tmp_path / "run" / "board.json").write_text('{"tables": []}')
    for place in ("run", "run/board.json"):
        assert {r.run.id for r in sides.read(tmp_path / place)} == {r.run.id for r in records}
    assert sides.read(tmp_path / "run" / "records" / f"{records[0].run.id}.json") == records[:1]


def test_places_that_hold_no_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or directory"):
        sides.read(tmp_path / "none")
    with pytest.raises(UserError, match="a run directory expected"):
        sides.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert sides.read(tmp_path) == []
    for text, said in (
        ("", "cannot be read"),
        ("[]", "a record, a baseline or a board expected"),
        ("[" * 100_000, "cannot be read"),
        ('{"tables": []}', "without its records"),
        ('{"klbench_baseline": 1}', "a list expected"),
        ('{"klbench_baseline": 1, "records": [{}]}', "records.0"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=said):
            sides.read(tmp_path / "x.json")
    for data in ({"klbench_baseline": 9, "records": []}, {**made().model_dump(mode="json"), "schema_version": 9}):
        (tmp_path / "x.json").write_text(json.dumps(data))
        with pytest.raises(OtherSchemaError, match="schema 9"):
            sides.read(tmp_path / "x.json")
    short = made().model_dump(mode="json")
    short["prompts"]["free"].pop()
    (tmp_path / "x.json").write_text(json.dumps(short))
    with pytest.raises(UserError, match="free: 20 numbers expected"):
        sides.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a mapping"),
        ("metrics: {}", "every one is info"),
        ("metric: {}", "did you mean 'metrics'"),
        ("metrics: {reverse-kl: {direction: min}}", "min needs a margin"),
        ("metrics: {reverse_kl: {direction: info, margin: 1}}", "info has no margin"),
        ("metrics: {reverse_kl: {direction: down, margin: 1}}", "'min', 'max', 'band' or 'info'"),
        ("metrics: {revers_kl: {direction: min, margin: 1}}", "did you mean 'reverse_kl'"),
        ("metrics: {error.revers_kl: {direction: min, margin: 1}}", "did you mean 'reverse_kl'"),
        ("metrics: {reverse_kl: {direction: min, margin: 1, wieght: 2}}", "did you mean 'weight'"),
        ("metrics: {reverse_kl: {direction: min, margin: -1}}", "greater than 0"),
        ("metrics: {reverse_kl: {direction: min, margin: .nan}}", "finite number"),
        ("metrics: {reverse_kl: {direction: info}}", "every one is info"),
        ("{metrics: {reverse_kl: {direction: min, margin: 1}}, tasks: {t: {gold: {margin: 1}}}}", "no metric 'gold'"),
        ("{metrics: {reverse_kl: {direction: min, margin: 1}}, tasks: {t: {reverse_kl: {margin: 1, margn: 1}}}}", "did you mean 'margin'"),
        ("{metrics: {reverse_kl: {direction: min, margin: 1}}, rate: 2}", "rate"),
        ("!!python/object/apply:os.system [true]", "cannot be read"),
        ("a: [", "cannot be read"),
        ("a: " + "[" * 1000, "cannot be read"),
    ],
)
def test_gate_files_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        settings.load(tmp_path / "gate.yaml")
    assert "gate.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_task_may_have_a_margin_of_its_own(tmp_path: Path) -> None:
    text = "{metrics: {reverse_kl: {direction: min, margin: 0.1}}, tasks: {t: {reverse_kl: {margin: 5}}}}"
    (tmp_path / "gate.yaml").write_text(text)
    gate = settings.load(tmp_path / "gate.yaml")
    values = noise(0) + 1
    assert check([made()], [made(values)], gate).outcome == "pass"
    assert check([made(task="u")], [made(values, task="u")], gate).outcome == "regression"
    both = settings.read({**gate.model_dump(), "methods": {"m": {"reverse_kl": {"margin": 0.2}}}}, "both")
    assert check([made()], [made(values)], both).outcome == "regression"  # the method's word is last
    assert both.metric("reverse_kl", "t", "m:4").margin == 0.2 and both.metric("reverse_kl", "t", "n").margin == 5
    with pytest.raises(UserError, match=r"methods\.m: no metric 'gold'"):
        settings.read({**gate.model_dump(), "methods": {"m": {"gold": {"margin": 0.2}}}}, "both")
    assert gate.sha256 != GATE.sha256 == Gate(metrics={"reverse_kl": metric()}).sha256


# --- what was measured of a gate ---


def measured(alarms: int, of: int = 1000, gate: Gate = GATE) -> Calibration:
    return Calibration(
        gate.sha256, gate.rate, {"retrained": Share(alarms, of)}, Share(0, of), (Power(2.0, Share(9, 10), Share(8, 10)),), {}, {"gold": 0.1}
    )


def test_shares_have_exact_intervals() -> None:
    for count, of in ((0, 20), (7, 200), (20, 20)):
        exact = stats.binomtest(count, of).proportion_ci(method="exact")
        assert (Share(count, of).low, Share(count, of).high) == pytest.approx((exact.low, exact.high))


def test_a_gate_that_does_not_hold_its_rate_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    assert "stated, not measured" in calibration.noise_for(GATE, file)[1]
    fine = replace(measured(30), noise={"t|m|1|reverse_kl": (0.2, 9.0)}, command="klbench check")
    fine.write(calibration.place_of(file))
    assert calibration.read(file) == fine
    found, said = calibration.noise_for(GATE, file)
    assert found == fine.noise and "30 of 1,000: 3 %" in said
    assert "was changed since" in calibration.noise_for(GATE.model_copy(update={"rate": 0.01}), file)[1]
    measured(90).write(calibration.place_of(file))
    with pytest.raises(UserError, match=r"states a false-alarm rate of 5 % and does not hold it: 90 of 1,000"):
        calibration.noise_for(GATE, file)
    one_kind = replace(measured(0), alarms={"retrained": Share(30, 200), "split": Share(0, 800)})
    assert one_kind.whole.low < 0.05 and not one_kind.held  # the whole would hide it
    assert measured(58).held and not measured(70).held


@pytest.mark.parametrize(
    "data", [[], {}, {"schema": 2}, {"schema": 1}, {"noise": {"x": [1]}}, {"noise": {"x": [-1, 3]}}, {"noise": {"x": ["a", 3]}},
             {"alarms": {"split": [3, 1]}}, {"alarms": {"split": [True]}}, {"rate": "x"}],
)  # fmt: skip
def test_calibrations_that_are_none(tmp_path: Path, data: Any) -> None:
    if isinstance(data, dict) and "schema" not in data and data:
        data = json.loads(measured(1).to_json()) | data
    calibration.place_of(tmp_path / "gate.yaml").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"gate\.calibration\.json") as caught:
        calibration.read(tmp_path / "gate.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("alarms", "of", "said"), [(30, 1000, ": held"), (0, 20, "too few comparisons"), (90, 1000, "NOT HELD")])
def test_a_rate_is_held_where_that_was_shown(capsys: pytest.CaptureFixture[str], alarms: int, of: int, said: str) -> None:
    report.show_calibration(measured(alarms, of))
    assert said in capsys.readouterr().out.splitlines()[-1]


def boards(count: int, seed_sd: float = 0.1) -> list[list[Record]]:
    """Three trained policies and a sampler, whose draws and training seeds differ from board to board."""
    rng = np.random.default_rng(0)
    out = []
    for b in range(count):
        trained = [made(rng.normal(0, 0.03, PROMPTS) + rng.normal(0, seed_sd), method=f"m{i}", seed=b) for i in range(3)]
        out.append([*trained, made(rng.normal(0, 0.03, PROMPTS), method="s", kind="sampler", seed=b)])
    return [calibrate._as_labelled(board) for board in out]


def test_a_calibration_measures_alarms_and_power(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, equals = Gate(metrics={"reverse_kl": metric(margin=0.3)}), boards(60)
    alarms, undecided, power, detectable = calibrate._retrained(equals, gate)
    assert detectable["reverse_kl"] == pytest.approx(4.4 * math.hypot(0.1 * math.sqrt(2), 0.03 * math.sqrt(2 / PROMPTS)), rel=0.5)
    assert len(alarms) == 60 and Share(sum(alarms), 60).low <= 0.05 and undecided.of == 60
    found = {p.times: p.found.value for p in power}
    assert found[0.5] < 0.6 < 0.8 <= found[2.0] and found[1.0] < found[2.0]
    assert power[-1].blocked.value >= 0.8
    assert Share(sum(calibrate._reseeded(equals, gate)), 60).low <= 0.05
    noise = calibrate.noise_of(equals, gate)
    assert {name.split("|")[1] for name in noise} == {"m0", "m1", "m2"}  # a sampler has no training seed
    assert all(sd == pytest.approx(0.1, rel=0.3) and dof == 59 for sd, dof in noise.values())
    monkeypatch.setattr(calibrate, "noise_of", lambda boards, gate: {})  # the mutant: seeds that are not reckoned with
    tight = gate.model_copy(update={"metrics": {"reverse_kl": metric(margin=0.01)}})
    assert Share(sum(calibrate._retrained(equals, tight)[0]), 60).low > 0.05


def test_no_board_helps_to_judge_itself() -> None:
    equals = boards(10)
    used = calibrate._ring(equals, GATE)
    assert [(a, b) for a, b, _ in used] == [(equals[i], equals[(i + 1) % 10]) for i in range(10)]
    for i, (_, _, noise) in enumerate(used):
        if i not in (4, 9):
            assert noise == calibrate.noise_of(equals[5:] if i < 4 else equals[:5], GATE) != {}
    assert used[4][2] == calibrate.noise_of([b for j, b in enumerate(equals) if j not in (4, 5)], GATE)


def test_labels_count_from_zero() -> None:
    board = [made(seed=s, method=m) for m in ("a", "b") for s in (12, 10)]
    assert [r.run.seed for r in calibrate._as_labelled(board)] == [1, 0, 1, 0]


def test_calibrating_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json; to calibrate"):
        calibrate.run(tmp_path, GATE)
    with pytest.raises(UserError, match="at least 8 retrainings"):
        calibrate.run(tmp_path, GATE, retrainings=1)


def test_the_default_gate_reads_back() -> None:
    assert settings.read(settings.DEFAULT.model_dump(), "default") == settings.DEFAULT
    assert compare.CODES == {"pass": 0, "regression": 1, "inconclusive": 3, "not comparable": 4, "nothing measured": 5}
