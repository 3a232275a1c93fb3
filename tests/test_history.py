"""A metric over commits: the change points by brute force and by their rate, and histories made with git."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import gated
import numpy as np
import pytest
from scipy.stats import binom, chi2

from klbench import cli, history
from klbench.errors import UserError
from klbench.estimate import Array
from klbench.gate import sides

# --- change points ---


def by_brute_force(x: Array, s: Array) -> list[int]:
    """The best of all 2^(n-1) partitions."""

    def cost(cuts: tuple[int, ...]) -> float:
        ends = [0, *cuts, len(x)]
        total = history.penalty(len(x)) * len(cuts)
        for a, b in itertools.pairwise(ends):
            w = 1 / s[a:b] ** 2
            total += float((w * (x[a:b] - np.average(x[a:b], weights=w)) ** 2).sum())
        return total

    every = (cuts for m in range(len(x)) for cuts in itertools.combinations(range(1, len(x)), m))
    return list(min(every, key=cost))


@pytest.mark.parametrize("seed", range(12))
def test_the_partition_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    s = rng.uniform(0.05, 0.4, 9)
    x = rng.normal(0, 1, 9) * s + np.repeat(rng.normal(0, 1, 3), 3)
    assert history.change_points(x, s) == by_brute_force(x, s)


def test_the_penalty_is_the_union_bound() -> None:
    assert history.penalty(2) == pytest.approx(chi2.isf(history.RATE, 1), abs=1e-6)
    price = history.penalty(4)
    assert sum(ways * chi2.sf(m * price, m) for m, ways in ((1, 3), (2, 3), (3, 1))) == pytest.approx(history.RATE, rel=1e-6)
    prices = [history.penalty(n) for n in (2, 10, 100, 1000, 5000)]
    assert prices == sorted(prices) and all(np.isfinite(prices)) and prices[-1] < 60


def alarms(series: int = 2000, length: int = 20) -> int:
    """How many of so many series without a change have a mark."""
    rng = np.random.default_rng(7)
    found = 0
    for _ in range(series):
        s = rng.uniform(0.5, 2.0, length)
        found += bool(history.change_points(rng.normal(0, 1, length) * s, s))
    return found


def holds(count: int, series: int = 2000) -> bool:
    """Whether so many false marks can be had at RATE, at one in a thousand."""
    return count <= binom.isf(1e-3, series, history.RATE)


def test_a_series_without_a_change_is_seldom_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert holds(alarms())
    right = history.penalty
    monkeypatch.setattr(history, "penalty", lambda n: right(n) / 2)  # the mutant: half the price of a change
    assert not holds(alarms())


def test_a_planted_change_is_found_where_it_is() -> None:
    rng = np.random.default_rng(3)
    found = [history.change_points(rng.normal(0, 1, 24) + 6.0 * (np.arange(24) >= 15), np.ones(24)) for _ in range(200)]
    assert sum(marks == [15] for marks in found) > 190


def test_what_was_broken_and_mended_has_both_marks() -> None:
    x = np.zeros(30)
    x[12] = 8.0  # a search that splits once at a time averages it away
    assert history.change_points(x, np.ones(30)) == [12, 13]


def test_without_noise_every_change_is_one() -> None:
    assert history.change_points(np.array([1.0, 1.0, 1.0 + 1e-6, 1.0 + 1e-6, 1.0]), np.zeros(5)) == [2, 4]
    assert history.change_points(np.array([1.0, 1.0, 1.0]), np.zeros(3)) == []
    assert history.change_points(np.array([1.0]), np.ones(1)) == []


# --- histories ---


class Repository:
    """A git repository in which a baseline is committed again and again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.git("init", "-q")

    def git(self, *words: str) -> str:
        who = {f"GIT_{role}_{part}": "x" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
        date = {"GIT_AUTHOR_DATE": "2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE": "2026-01-02T03:04:05Z"}
        done = subprocess.run(["git", *words], cwd=self.home, env={**os.environ, **who, **date}, capture_output=True, text=True, check=True)
        return done.stdout

    def commit(self, name: str, subject: str, content: str | list[sides.Record]) -> None:
        if isinstance(content, str):
            (self.home / name).write_text(content, encoding="utf-8")
        else:
            sides.write(self.home / name, content)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", subject)


HOSTILE = '"><script>alert(1)</script>\x1b[31m | $x$ ::error::'


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Versions 0 to 7: 2 renames the file, 4 is broken, and from 5 on a policy is 0.5 nats worse."""
    monkeypatch.chdir(tmp_path)
    made = Repository(tmp_path)
    for i in range(8):
        if i == 2:
            made.git("mv", "old.json", "base é.json")
        name = "old.json" if i < 2 else "base é.json"
        grain = 1 + max(0, i - 2) / 100
        records = [gated.record("dpo", 0.5 if i >= 5 else 0.0, noise=grain), gated.record("rloo", noise=grain if i else 1.1)]
        made.commit(name, HOSTILE if i == 6 else f"version {i}", "{broken" if i == 4 else records)
    return made


def said_by(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[list[str]], str]:
    code = cli.main(["history", *words])
    out, err = capsys.readouterr()
    return code, [line.split("\t") for line in out.splitlines()], err


def test_versions_values_and_the_mark(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, err = said_by(capsys, "base é.json")
    assert code == 0 and rows[0] == list(history.HEAD) and len(rows) == 8
    assert [row[8] for row in rows[1:6]] == ["version 0", "version 1", "version 2", "version 3", "version 5"]
    assert [row[4] for row in rows[1:]] == ["0.2"] * 4 + ["0.45"] * 3 and {row[3] for row in rows[1:]} == {"2"}
    assert [row[7] for row in rows[1:]] == [""] * 4 + ["worse by 0.25"] + [""] * 2
    assert rows[1][5:7] == ["0.1804", "0.2196"]  # 1.96 times the mean of two standard errors of 0.01
    broken = repository.git("log", "--format=%h", "--abbrev=10", "--grep=version 4").strip()
    assert (
        err == f"klbench: passed over {broken}: base é.json: cannot be read: {err.partition('cannot be read: ')[2]}"
        and err.count("\n") == 1
    )


def test_a_filter_leaves_the_others_out(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    _, rows, _ = said_by(capsys, "base é.json", "--policy", "rloo")
    assert {row[4] for row in rows[1:]} == {"0.2"} and {row[7] for row in rows[1:]} == {""} and {row[3] for row in rows[1:]} == {"1"}
    _, rows, _ = said_by(capsys, "base é.json", "--policy", "dpo", "--metric", "gold")
    assert [row[7] for row in rows[1:]] == [""] * 4 + ["worse by 0.5"] + [""] * 2
    _, rows, _ = said_by(capsys, "base é.json", "--metric", "entropy")
    assert {row[7] for row in rows[1:]} == {""}


def test_a_policy_that_joins_moves_nothing(tmp_path: Path) -> None:
    made = Repository(tmp_path)
    made.commit("b.json", "one", [gated.record("dpo")])
    made.commit("b.json", "two", [gated.record("dpo"), gated.record("collapsed", 40.0)])
    (points,) = history.read(tmp_path / "b.json", "reverse_kl").points.values()
    assert [p.value for p in points] == pytest.approx([0.2, 20.2])
    assert [p.level for p in points] == [0.0, 0.0] and points[1].step is None


def test_other_prompts_begin_anew(tmp_path: Path) -> None:
    made = Repository(tmp_path)
    made.commit("b.json", "one", [gated.record()])
    made.commit("b.json", "two", [gated.record(worse=9.0, prompts="other")])
    told = history.read(tmp_path / "b.json", "reverse_kl")
    (points,) = told.points.values()
    assert [told.mark(p) for p in points] == ["", "cannot be compared with the version before"]


def test_seeds_that_disagree_widen_what_is_needed(tmp_path: Path) -> None:
    """Two seeds 0.4 apart: v = 0.08, s = sqrt(0.08 / 2) = 0.2; a move by 0.3 of the mean is nothing then, and plain with one seed."""
    made = Repository(tmp_path)
    for name, worse in (("one", 0.0), ("two", 0.3)):
        made.commit("b.json", name, [gated.record(worse=worse - 0.2), gated.record(worse=worse + 0.2, seed=1)])
    (points,) = history.read(tmp_path / "b.json", "reverse_kl").points.values()
    assert points[1].stderr == pytest.approx(0.2, rel=1e-6) and points[1].level == pytest.approx(0.3) and points[1].step is None
    made.commit("c.json", "one", [gated.record(worse=0.1)])
    made.commit("c.json", "two", [gated.record(worse=0.4)])
    (points,) = history.read(tmp_path / "c.json", "reverse_kl").points.values()
    assert points[1].stderr == pytest.approx(0.01 / 4) and points[1].step == pytest.approx(0.3)


def test_an_uncertified_figure_has_no_interval(tmp_path: Path) -> None:
    one = gated.record()
    figure = one.columns["reverse_kl"]
    doubtful = gated.changed(one, columns={"reverse_kl": type(figure)(figure.value, status="uncertified")})
    made = Repository(tmp_path)
    made.commit("b.json", "one", [doubtful])
    (points,) = history.read(tmp_path / "b.json", "reverse_kl").points.values()
    assert (points[0].low, points[0].high) == (None, None)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_one_file_in_which_nothing_runs(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, _ = said_by(capsys, "base é.json", "--out", "h.html")
    assert code == 0 and rows[-1] == ["h.html"]
    text = Path("h.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert {tag for tag, _ in tags.found} & {"script", "img", "iframe", "object", "form"} == set()
    assert all(str(attributes.get(name, "#")).startswith(("#", "data:")) for _, attributes in tags.found for name in ("href", "src"))
    assert "worse by 0.25" in text and re.search(r'aria-label="reverse_kl, nats on bias over 7 versions\. \w{10} worse by 0\.25\."', text)
    assert "default-src 'none'" in text and "\x1b" not in text
    said_by(capsys, "base é.json", "--out", "again.html")
    assert Path("again.html").read_text(encoding="utf-8") == text


def test_on_the_terminal_a_subject_is_text(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["history", "base é.json"])
    out = capsys.readouterr().out
    assert "<script>" in out and all(line.replace("\t", "").isprintable() for line in out.splitlines())


def test_a_picture_is_a_picture(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    assert said_by(capsys, "base é.json", "--out", "h.png")[0] == 0
    assert Path("h.png").read_bytes().startswith(b"\x89PNG\r\n")


Refused = Callable[[Repository], tuple[list[str], str]]
REFUSED: dict[str, tuple[list[str], str]] = {
    "column": (["base é.json", "--metric", "reverse_k"], "did you mean 'reverse_kl'"),
    "a column that no version has": (["base é.json", "--metric", "tv"], "no version of it has the column tv"),
    "task": (["base é.json", "--task", "bais"], "did you mean 'bias'"),
    "policy": (["base é.json", "--policy", "dp"], "did you mean 'dpo'"),
    "not committed": (["new.json"], "no version of it is committed"),
    "never a baseline": (["text.md"], "no committed version of it can be read"),
    "no folder": (["nowhere/base.json"], "no file nowhere/base.json"),
    "picture": (["base é.json", "--out", "h.pdf"], "ends in .html or .png"),
    "folder of the picture": (["base é.json", "--out", "nowhere/h.html"], "no directory nowhere"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_code_2(words: list[str], said: str, repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.commit("text.md", "text", "no baseline")
    Path("new.json").write_text("{}", encoding="utf-8")
    code, rows, err = said_by(capsys, *words)
    assert (code, rows, err.count("\n")) == (2, [], 1) and said in err


def test_outside_git_is_one_line_and_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    sides.write(tmp_path / "base.json", [gated.record()])
    code, _, err = said_by(capsys, str(tmp_path / "base.json"))
    assert code == 2 and "not a git repository" in err and err.count("\n") == 1


def test_without_git_it_says_so(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="git is not installed"):
        history.read(Path("base é.json"), "reverse_kl")


def test_a_name_is_a_name_to_git(tmp_path: Path) -> None:
    made = Repository(tmp_path)
    for name in ("--output=stolen", "$(touch stolen)", "*.json"):
        sides.write(tmp_path / name, [gated.record()])
        made.git("add", "--", f":(literal){name}")
        made.git("commit", "-q", "-m", name)
        assert history.read(tmp_path / name, "reverse_kl").points["bias"][-1].version.subject == name
    assert not (tmp_path / "stolen").exists()
