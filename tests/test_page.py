"""The files of a board's site: one writer, the same bytes, text that means harm, what a reader without scripts gets."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_board import certified, record

from klbench.board import Board
from klbench.errors import UserError
from klbench.estimate import Estimate
from klbench.page import axes, site, views
from klbench.record import Record, Sample


@pytest.fixture
def records() -> list[Record]:
    """p* itself, a winner, an uncertified one, and the prior."""
    prompts = {"reward_max": [1.0] * 40}
    rng = np.random.default_rng(0)
    free = {mean: list(mean + rng.normal(0, 0.1, 40)) for mean in (2.0, 0.1, 0.5, 0.0)}
    return [
        record("ancestral", free[2.0], 2.0, kind="policy", curve=[]),
        record("rloo", free[0.1], 0.1),
        record("grpo", free[0.5], 0.5, "uncertified", prompts=prompts),
        record("rejection", free[0.0], 0.0, "exact", kind="sampler", curve=[]),
    ]


def files(records: list[Record], manifest: dict[str, object] | None = None) -> dict[str, str]:
    return dict(site.site(Board.of(records, manifest)))


def given(text: str) -> tuple[str, object]:
    """What a data file hands to the page."""
    name, value = json.loads("[" + re.fullmatch(r"klbench\.take\((.*)\);\n", text, re.S)[1] + "]")  # type: ignore[index]
    return name, value


class Reader(HTMLParser):
    """Tags, ids and what would be asked for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.asked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            assert not key.startswith("on"), key
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href", "action", "data"):
                self.asked.append(value or "")


# --- every file ---


def test_what_pages_ask_for_is_there(records: list[Record]) -> None:
    made = files(records)
    for name, text in made.items():
        if not name.endswith(".html"):
            continue
        reader = Reader(text)
        assert len(reader.ids) == len(set(reader.ids))
        assert "default-src 'none'" in text and 'name="viewport"' in text and "#00000" not in text
        for asked in reader.asked:
            if asked.startswith("#"):
                assert asked[1:] in reader.ids, (name, asked)
            elif asked != "data:,":
                target = asked.partition("#")[0]
                path = target.removeprefix("../") if target.startswith("../") else f"{'pages/' * name.startswith('pages/')}{target}"
                assert path in made or path in ("board.json", "board.csv") or path.startswith("records/"), (name, asked)
    assert not re.search(r"@import|url\((?!#)", made["pages/style.css"])


def test_the_same_records_give_the_same_bytes(records: list[Record]) -> None:
    shuffled = list(records)
    random.Random(1).shuffle(shuffled)
    assert shuffled != records and files(shuffled) == files(records)


def test_pages_take_the_place_of_older_ones_and_of_nobody_else_s(records: list[Record], tmp_path: Path) -> None:
    site.write(Board.of(records), tmp_path)
    gone = tmp_path / "pages" / f"{records[1].run.id}.html"
    assert gone.is_file()
    site.write(Board.of([records[0], *records[2:]]), tmp_path)
    assert not gone.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "pages"]
    (tmp_path / "theirs" / "pages").mkdir(parents=True)
    with pytest.raises(UserError, match="is not klbench's"):
        site.write(Board.of(records), tmp_path / "theirs")
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == ["pages"]


def test_shared_out_among_processes_the_files_are_the_same(records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_by(2, monkeypatch)
    site.write(Board.of(records), tmp_path / "two")
    there = {str(path.relative_to(tmp_path / "two")) for path in (tmp_path / "two").rglob("*.*")}
    assert there == set(made := files(records)) and all((tmp_path / "two" / name).read_text("utf-8") == made[name] for name in made)
    monkeypatch.setattr(views, "policy", lambda *_: 1 / 0)  # in both processes
    with pytest.raises(ZeroDivisionError):
        site.write(Board.of(records), tmp_path / "none")
    assert not (tmp_path / "none" / "index.html").exists()


def shared_by(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "WORTH", 1)
    monkeypatch.setattr(site, "CHUNK", 1)
    monkeypatch.setattr("klbench.shares.cores", lambda: processes)


def filed(records: list[Record], folder: Path) -> Path:
    (folder / "records").mkdir(parents=True)
    for one in records:
        (folder / "records" / f"{one.run.id}.json").write_text(one.to_json(), encoding="utf-8")
    return folder


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_built_from_files_by_any_number_of_processes_the_files_are_those_of_the_records(
    records: list[Record], processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them seeds of methods with curves, another table, and the longest frontier in one record alone."""
    rng = np.random.default_rng(1)
    curve = [{"samples": 64.0 * k, "reverse_kl": 1.0 / k, "wasted_nats": 0.5 / k, "reward": 0.1 * k} for k in (1, 2)]
    seeds = [record(m, list(rng.normal(0.3, 0.1, 40)), 0.3, seed=s, curve=curve) for m in ("dpo", "ppo") for s in range(5)]
    other = record("rloo", [0.1, 0.2], task="zoo", truths={"reverse_kl": 0.1})
    short = [r.model_copy(update={"frontier": r.frontier[k % 3 :]}) for k, r in enumerate([*records, *seeds])]
    every = [*short, other]
    shared_by(processes, monkeypatch)
    folder = filed(every, tmp_path / "board")
    assert site.build(folder) == folder / "index.html"
    built = {name: content for name, content in bytes_in(folder).items() if not name.startswith("records")}
    board = Board.of(every)
    wanted = {**dict(site.site(board)), **{name: text() for name, text in board.files().items()}}
    assert set(built) == set(wanted) and "methods.csv" in built
    assert [name for name, text in wanted.items() if built[name] != text.encode()] == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda text: text[: len(text) // 2], "the file: "),
        (lambda text: text.replace('"free": [\n   ', '"free": [\n   NaN,\n   ', 1), "prompts.free.0: "),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 7'), "schema_version: a record of schema 7"),
        (lambda text: text.replace('"status": "certified"', '"status": "fine"', 1), "columns."),
    ],
)
def test_of_records_that_are_not_sound_the_first_is_refused_by_name_and_nothing_is_written(
    records: list[Record], processes: int, spoil: Callable[[str], str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_by(processes, monkeypatch)
    folder = filed(records, tmp_path / "board")
    site.build(folder)
    before = bytes_in(folder)
    paths = sorted((folder / "records").iterdir())
    sound = paths[1].read_text(encoding="utf-8")
    for path in paths[1:3]:
        path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
        assert path.read_bytes() != before[f"records/{path.name}"]
    with pytest.raises(UserError, match="^" + re.escape(f"{paths[1]}: {says}")):
        site.build(folder)
    paths[1].write_text(sound, encoding="utf-8")
    with pytest.raises(UserError, match="^" + re.escape(f"{paths[2]}: {says}")):
        site.build(folder)
    after = bytes_in(folder)
    assert {name for name in after if after[name] != before.get(name)} == {f"records/{paths[2].name}"}


def test_published_pages_are_what_the_records_make() -> None:
    boards = [path.parent.parent for path in (Path(__file__).parents[1] / "leaderboards").glob("*/pages/compare.html")]
    assert boards
    for folder in boards:
        made = dict(site.site(Board.read(folder)))
        there = {str(path.relative_to(folder)) for path in (folder / "pages").iterdir()} | {"index.html"}
        assert there == set(made)
        assert [name for name in made if (folder / name).read_text(encoding="utf-8") != made[name]] == []


def test_a_licence_stands_on_each_library(records: list[Record]) -> None:
    made = files(records)
    for name in site.VENDOR:
        head = made[f"pages/{name}"][:1500]
        assert "Permission" in head and "Copyright" in head


def test_vendored_files_are_what_their_readme_says() -> None:
    import hashlib
    from importlib.resources import files as packaged

    folder = packaged("klbench.page").joinpath("vendor")
    readme = folder.joinpath("README.md").read_text(encoding="utf-8")
    for name in site.VENDOR:
        assert hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() in readme, name


# --- the front page without scripts ---


def test_marks_what_is_not_certified(records: list[Record]) -> None:
    text = files(records)["index.html"]
    row = re.search(r'<tr class="objective is-uncertified">.*?</tr>', text, re.S)
    assert row and "0.500" in row[0] and ">?<" in row[0] and ">uncertified<" in row[0] and re.search(r"in 0\.\d\d\d … \d", row[0])
    assert re.search(r'<tr class="target is-exact">.*?the posterior.*?</tr>', text, re.S)
    assert "marks an uncertified figure" in text
    assert "marks an uncertified figure" not in files([r for r in records if r.status != "uncertified"])["index.html"]


def test_the_marks_end_not_far_beyond_the_nearest_null_row(records: list[Record]) -> None:
    """A uniform policy forty nats away must not push all others to the left edge; who is beyond has an arrow."""
    rows = [(0.02, "dpo", "objective"), (0.4, "ancestral", "sampler"), (36.0, "uniform", "sampler"), (47.0, "reinforce", "objective")]
    made = [
        record(method, [x, x + 0.001], kind=kind, columns={"reverse_kl": Estimate(x, x, x, 0.0)}) for x, method, kind in rows
    ]  # fmt: skip
    text = files(made)["index.html"]
    beyond = re.findall(r'<tr class="(\w+) [^>]*>(?:(?!</tr>).)*dot beyond', text, re.S)
    assert beyond == ["null", "objective"]
    places = [float(x) for x in re.findall(r'class="dot " style="left:([\d.]+)%', text)]
    assert places == pytest.approx([100 * math.sqrt(0.02 / 1.04), 100 * math.sqrt(0.4 / 1.04)], abs=0.01)


def test_a_missing_column_is_an_en_dash(records: list[Record]) -> None:
    assert 'data-column="gold"' not in files(records)["index.html"]
    columns = {**records[0].columns, "gold": certified(0.77)}
    text = files([records[0].model_copy(update={"columns": columns}), *records[1:]])["index.html"]
    rows = re.findall(r'<tr class="(?:objective|target|null) .*?</tr>', text, re.S)
    assert len(rows) == 4 and sum("0.770" in row for row in rows) == 1
    assert all(('<td class="figure">–</td>' in row) == ("0.770" not in row) for row in rows)


@pytest.mark.parametrize(("wasted", "said"), [(certified(-0.5), True), (certified(0.2), False)])
def test_says_who_lies_beyond_the_frontier(wasted: Estimate, said: bool) -> None:
    text = files([record("a", [0.1, 0.2], columns={"wasted_nats": wasted}), record("b", [0.1, 0.2])])["index.html"]
    assert ("Beyond the frontier" in text) == said


def test_rows_and_figures_have_a_limit_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "STATIC_ROWS", 24)
    monkeypatch.setattr(site, "STATIC_FIGURES", 1)
    made = files([record(f"m{k}", [float(k), k + 1.0], task=f"t{k // 10}") for k in range(30)])
    text = made["index.html"]
    assert text.count('class="objective is-certified"') == 24 and text.count("2 more</th>") == 3
    assert text.count("<svg") == 1 and "The figures of 2 more tables are drawn where scripts run" in text
    assert len(given(made["pages/board.js"])[1]["rows"]["label"]) == 30  # type: ignore[index]


def test_manifest_and_command_are_in_the_footer(records: list[Record]) -> None:
    manifest = {"command": ["klbench", "run", "quick"], "seeds": [0, 1], "versions": {"torch": "2.9"}, "machine": {"host": "secret"}}
    made = files(records, manifest)
    footer = made["index.html"].split("<footer")[1]
    assert "klbench run quick</code>" in footer and "<dt>versions.torch</dt><dd>2.9</dd>" in footer and "<dd>0, 1</dd>" in footer
    assert not any("secret" in text for text in made.values())


# --- data ---


def test_data_says_what_the_board_says(records: list[Record]) -> None:
    name, data = given(files(records)["pages/board.js"])
    assert name == "board" and isinstance(data, dict)
    rows, board = data["rows"], Board.of(records)
    assert rows["label"] == [row.label for row in board.tables[0].rows] == ["rejection", "rloo", "grpo", "ancestral"]
    assert [rows["status"]["words"][k] for k in rows["status"]["at"]] == ["exact", "certified", "uncertified", "certified"]
    assert rows["rank"] == [None if row.rank is None else list(row.rank) for row in board.tables[0].rows]
    value, low, high = data["figures"]["reverse_kl"]
    assert value == [0.0, 0.1, 0.5, 2.0] and low[0] is None and low[2] is None and high[1] == pytest.approx(0.121448, abs=1e-6)
    assert rows["bracket"][2][0] == pytest.approx(board.tables[0].rows[2].bracket[0], rel=1e-5)  # type: ignore[index]


def test_draws_are_found_by_the_shard_of_their_row() -> None:
    rows = [record(f"m{k}", [float(k), k + 1.0], task=f"t{k // 30}") for k in range(60)]
    made = files(rows)
    data = given(made["pages/board.js"])[1]
    for own, shard in zip(data["rows"]["id"], data["rows"]["shard"], strict=True):  # type: ignore[index]
        assert own in given(made[f"pages/draws-{shard}.js"])[1]  # type: ignore[operator]
    assert len([name for name in made if "draws-" in name]) == 4  # 25 and 5 of each task


def test_infinity_and_nan_are_no_json(records: list[Record]) -> None:
    assert views.short(float("nan")) is None
    curve = [{"step": 0.0, "reward": float("inf"), "kl_prior": 1.0}]
    steps = views.Said.of(records[1].model_copy(update={"curve": curve})).curve
    assert json.loads(steps) == {"kl_prior": [1.0], "reward": [None], "step": [0.0]}


def test_a_long_curve_keeps_its_last_point() -> None:
    curve = [{"step": float(i), "reward": i / 10} for i in range(101)]
    kept = views.curve(record("a", [0.1, 0.2], curve=curve))
    assert len(kept["step"]) <= views.POINTS and kept["step"][-1] == 100.0 and kept["reward"][-1] == 10.0


# --- text ---


def test_harmful_text_is_shown_and_not_run() -> None:
    texts = [("<script>alert(1)</script>", "\x1b[2J</p><img src=x onerror=alert(2)>"), ("שלום\u202e", "x" * 1_000_000)]
    samples = [Sample(prompt=prompt, completion=text, reward=0.0, log_p0=-1.0, log_q=-2.0) for prompt, text in texts]
    name = '"><img src=y onerror=alert(3)>'
    harm = record("<b>$m_1</b>", [0.1, 0.2], task=name, samples=samples, notes=["<i>note"], cost={"<u>": "<s>"})
    made = files([harm], {"command": "klbench run </script><script>"})
    for file, text in made.items():
        if file.endswith(".html"):
            assert {"img", "u", "s"} & set(Reader(text).tags) == set() and len(text) < 200_000
        if re.search(r"(board|draws|curves)[-\d]*\.js$", file):
            assert "<" not in text and text.isascii()
        if file.endswith((".html", "0.js")):
            assert not {"\x1b", "\u202e", "\u2028"} & set(text)
    page = made[f"pages/{harm.run.id}.html"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "993,400 in the record" in page
    assert Reader(page).tags.count("script") == 4 + 1  # its own four, and the data of the curve
    assert "$m_1" in made["index.html"].split("<svg")[1]  # no formula is made of a name


@pytest.mark.parametrize(
    ("text", "seen"), [("plain", "plain"), ("a\nb\tc", "a\nb\tc"), ("a\x07b", "a\ufffdb"), ("e\u202ef", "e\ufffdf"), ("\xa0é", "\xa0é")]
)
def test_cut_keeps_what_can_be_seen(text: str, seen: str) -> None:
    assert views.cut(text) == (seen, "", 0)


def test_cut_hides_the_rest_and_counts_what_it_leaves_out() -> None:
    head, rest, left = views.cut("y" * (views.HEAD + views.REST + 5))
    assert (len(head), len(rest), left) == (views.HEAD, views.REST, 5)


# --- the command that makes a policy again ---


@pytest.mark.parametrize(
    ("command", "again"),
    [
        ("klbench run quick --out runs/x --workers=2", "klbench run quick --task toy --objective rloo --set 'seeds=[0]' --out runs/again"),
        (
            "klbench run quick --task a --task toy --set beta=0.1 --seed 4",
            "klbench run quick --set beta=0.1 --task toy --objective rloo --set 'seeds=[0]' --out runs/again",
        ),
        ("klbench score --prior p", "klbench score --prior p"),
        ("", ""),
    ],
)
def test_the_command_is_narrowed_to_the_policy(command: str, again: str, records: list[Record]) -> None:
    board = Board.of(records, {"command": command})
    row = next(row for _, row in board.rows if row.label == "rloo")
    assert views.again(row, views.Origin.of(board.manifest)) == again


def test_that_command_asks_for_the_run_itself() -> None:
    """On the published board: the suite, narrowed as the page says, holds the very run (hashes aside, which come with the machine)."""
    import shlex

    from klbench import run as grid

    board = Board.read(Path(__file__).parents[1] / "leaderboards" / "quick")
    row = next(row for _, row in board.rows if row.record.run.method == "rloo")
    words = shlex.split(views.again(row, views.Origin.of(board.manifest)))
    option = {key: words[words.index(key) + 1] for key in ("--task", "--objective", "--set")}
    suite = grid.suite_of(words[2], [option["--set"]], tasks=[option["--task"]], objectives=[option["--objective"]])
    runs = grid.resolve(suite, hashes=lambda *_: row.record.run.hashes)
    assert row.record.run in runs


# --- figures ---


def test_figures_are_coloured_by_the_page(records: list[Record]) -> None:
    text = files(records)["index.html"]
    assert text.count("<svg") == 1 and "var(--accent)" in text and "foreignobject" not in text.lower()
    assert axes.ticks(50.0, 0.12) == [0.0, 1.0, 5.0, 10.0, 20.0, 50.0]
