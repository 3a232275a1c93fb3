"""Verdicts by hand, and the front: what is said of a claim in the terminal, in the file and on the page."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from klbench import claims
from klbench.claims import Line, report
from klbench.claims.contract import Check, Claim, at_least, at_most, mean_of, near, share_of
from klbench.errors import UserError


@pytest.mark.parametrize(
    "check, verdict",
    [
        (near("x", 0.5, 0.5, 0.01), "holds"),
        (near("x", 0.52, 0.5, 0.01), "fails"),
        (at_most("x", 0.1, 0.1), "holds"),
        (at_most("x", 0.2, 0.1), "fails"),
        (at_least("x", 0.2, 0.1), "holds"),
        (at_least("x", math.nan, 0.1), "fails"),
        (Check("x", 1.0, 0.0, 2.0, 0.5, 1.5), "holds"),
        (Check("x", 1.9, 0.0, 2.0, 1.5, 2.3), "inconclusive"),
        (Check("x", 2.5, 0.0, 2.0, 2.1, 2.9), "fails"),
    ],
)
def test_a_check(check: Check, verdict: str) -> None:
    assert check.verdict == verdict


def test_means_and_shares_have_intervals() -> None:
    found = mean_of("x", [1.0, 2.0, 3.0, 4.0], least=0.0)
    assert found.measured == 2.5 and found.low == pytest.approx(2.5 - 3.182446305284263 * math.sqrt(5 / 3) / 2) and found.verdict == "holds"
    share = share_of("x", 0, 20, most=0.2)
    assert share.low == pytest.approx(0.0, abs=1e-12) and share.high == pytest.approx(0.16113, abs=1e-4) and share.verdict == "holds"


def claim(*checks: Check, refutes: bool = False) -> Claim:
    return Claim("X01", "A <b>statement</b>.", "arXiv:1234.56789", "a sign", lambda wrong: checks, "fails" if refutes else "holds", refutes)


def test_one_failing_check_fails_a_claim_and_refutes_nothing() -> None:
    good, bad, unsure = near("a", 1, 1, 0.1), near("b", 2, 1, 0.1), Check("c", 1.0, 0.0, 1.0, 0.5, 1.5)
    assert [claim(*c).run().verdict for c in ((good,), (good, bad), (good, unsure))] == ["holds", "fails", "inconclusive"]
    assert [claim(*c, refutes=True).run().verdict for c in ((good,), (good, bad), (good, unsure))] == [
        "fails",
        "inconclusive",
        "inconclusive",
    ]


def test_the_catalogue_is_whole() -> None:
    every = claims.catalogue()
    assert list(every) == sorted(every)
    assert set(every) == {f"C{i:02d}" for i in range(1, 49)} | {f"F{i:02d}" for i in range(1, 13)}
    assert set(claims.catalogue("quick")) < set(every)
    assert all(c.refutes == (c.expected == "fails") for c in every.values() if not c.note or c.refutes)
    assert all(c.wrong and c.source and c.statement.endswith(".") for c in every.values())


def test_an_unknown_id_is_one_line() -> None:
    with pytest.raises(UserError, match="C060.*C06"):
        claims.chosen(["C060"], "exact")
    with pytest.raises(UserError, match="tier"):
        claims.chosen([], "slow")


def test_what_is_written_can_be_read_and_harms_nobody(tmp_path: Path) -> None:
    verdict = claim(near("x < y", 1.0, 1.0, 0.1), at_most("z", math.inf, 1.0)).run()
    line = Line(verdict.claim, verdict, "fails")
    report.write([line], tmp_path, "klbench claims")
    data = json.loads((tmp_path / "claims.json").read_text())
    assert data["claims"][0]["verdict"] == "fails" and data["claims"][0]["checks"][1]["measured"] == "inf"
    page = (tmp_path / "index.html").read_text()
    assert "A &lt;b&gt;statement" in page and "<script" not in page and "https://arxiv.org/abs/1234.56789" in page
    assert not line.sound and "not as expected: X01" in report.summary([line])


def test_the_command_prints_a_row_a_claim_and_its_exit_code() -> None:
    klbench = Path(sys.executable).with_name("klbench")
    done = subprocess.run([klbench, "claims", "c06", "F07", "--workers", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows[:3]] == [["claim", "verdict"], ["C06", "holds"], ["F07", "fails"]]
    bad = subprocess.run([klbench, "claims", "C99"], capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1 and "C99" in bad.stderr


def test_the_published_page_is_of_this_catalogue() -> None:
    published = json.loads((Path(__file__).parents[2] / "leaderboards" / "claims" / "claims.json").read_text(encoding="utf-8"))
    every = claims.catalogue()
    assert [c["id"] for c in published["claims"]] == list(every)
    assert [c["id"] for c in published["claims"] if c["verdict"] != every[c["id"]].expected] == []
    assert [c["id"] for c in published["claims"] if c["statement"] != every[c["id"]].statement] == []
