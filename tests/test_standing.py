"""Methods over training seeds: means and intervals by hand, ranks that log Z cannot move, and who stands at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from test_board import certified, record

from klbench.board import Board
from klbench.estimate import Estimate, exactly, undefined
from klbench.record import Record
from klbench.standing import _welch, over_seeds, standings


def seeds_of(method: str, means: list[float], **change: object) -> list[Record]:
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 2, 6)
    curve = [{"step": 1.0, "samples": 64.0, "reverse_kl": 1.0, "wasted_nats": 0.5}, {"step": 2.0, "samples": 128.0}]
    return [record(method, list(hard + m - hard.mean()), m, seed=s, curve=curve, **change) for s, m in enumerate(means)]


def stand(records: list[Record]) -> dict[str, tuple[int, int]]:
    free = {r.run.id: np.array(r.prompts["free"]) for r in records}
    return {s.method: s.rank for s in standings({r.run.id: r for r in records}, {r.run.id: r.columns for r in records}, free)}


def test_a_figure_over_seeds_by_hand() -> None:
    values = [0.10, 0.12, 0.14, 0.11, 0.13]
    found = over_seeds([[certified(x, 0.01, up=0.02) for x in values]])[0]
    assert found.value == pytest.approx(0.12) and found.status == "certified" and found.n == 5 * 256
    spread = stats.t.ppf(0.975, 4) * np.std(values, ddof=1) / math.sqrt(5)
    own = 2.1447866879169273 * 0.01
    assert found.low == pytest.approx(0.12 - math.hypot(spread, own))
    assert found.high == pytest.approx(0.12 + math.hypot(spread, own + 0.02))  # what log Z may lack does not average away


def test_the_least_trusted_seed_speaks_for_all() -> None:
    doubtful = Estimate(0.3, status="uncertified", reason="reach 0.2")
    found = over_seeds([[certified(0.1), certified(0.2), doubtful]])[0]
    assert (found.status, found.reason, found.low, found.high) == ("uncertified", "reach 0.2", None, None)
    assert found.value == pytest.approx(0.2)
    assert over_seeds([[certified(0.1), undefined("no density")]])[0].value is None
    assert over_seeds([[certified(0.1), exactly(math.inf)]])[0].value == math.inf


def test_methods_are_compared_by_welch() -> None:
    rng = np.random.default_rng(0)
    free = [rng.normal(0, scale, size) for scale, size in ((1.0, 5), (0.1, 7), (3.0, 6))]
    first, second = np.triu_indices(3, 1)
    wanted = [stats.ttest_ind(free[a], free[b], equal_var=False).pvalue for a, b in zip(first, second, strict=True)]
    assert _welch(free, first, second) == pytest.approx(wanted, rel=1e-9)
    pooled = [stats.ttest_ind(free[a], free[b]).pvalue for a, b in zip(first, second, strict=True)]
    assert _welch(free, first, second) != pytest.approx(pooled, rel=1e-3)


def test_columns_do_not_mix() -> None:
    """Several at once are each by itself: a column without a value or an infinite one leaves its neighbours alone."""
    columns = [[certified(0.1), certified(0.2)], [certified(0.1), undefined("no density")], [certified(0.3), exactly(math.inf)]]
    assert over_seeds(columns) == [over_seeds([column])[0] for column in columns]


def test_five_seeds_make_a_method_and_four_do_not() -> None:
    five, four = seeds_of("rloo", [0.1, 0.11, 0.12, 0.1, 0.11]), seeds_of("grpo", [0.3, 0.31, 0.32, 0.3])
    sampler = seeds_of("rejection", [0.0] * 5, kind="sampler")
    assert list(stand([*five, *four, *sampler])) == ["rloo"]


def test_ranks_are_of_seeds_and_not_of_prompts() -> None:
    near = seeds_of("rloo", [0.10, 0.11, 0.12, 0.10, 0.11])
    far = seeds_of("grpo", [0.30, 0.31, 0.32, 0.30, 0.33])
    loud = seeds_of("dpo", [0.02, 0.40, 0.10, 0.35, 0.15])  # apart from neither
    assert stand([*near, *far, *loud]) == {"rloo": (1, 2), "dpo": (1, 3), "grpo": (2, 3)}
    shifted = [r.model_copy(update={"columns": {**r.columns, "reverse_kl": certified(5.0)}}) for r in near]  # another log Z, the same ranks
    assert stand([*shifted, *far, *loud])["rloo"] == (1, 2)


def test_equal_methods_share_their_places() -> None:
    same = [0.1, 0.12, 0.11, 0.13, 0.1]
    assert stand([*seeds_of("rloo", same), *seeds_of("ppo", same)]) == {"rloo": (1, 2), "ppo": (1, 2)}


def test_the_board_carries_methods_everywhere(tmp_path: object) -> None:
    records = [*seeds_of("rloo", [0.10, 0.11, 0.12, 0.10, 0.11]), *seeds_of("grpo", [0.30, 0.31, 0.32, 0.30, 0.33])]
    board = Board.of(records)
    (table,) = board.tables
    assert [m.method for m in table.methods] == ["rloo", "grpo"] and table.methods[0].curve == ((64.0, 1.0, 0.5),)
    assert len(table.rows) == 10 and [row.label for row in table.shown] == ["rloo s0", "grpo s0"]
    assert '"methods"' in board.to_json() and board.methods_csv().splitlines()[1].startswith("toy,mini,0.5,rloo,5,1,1")
    assert any(line.split()[1:3] == ["1", "rloo_x5_seeds"] for line in board.lines())
    assert "methods" not in Board.of(records[:4]).to_json()
