"""`klbench reward` from its words to its files: what is read, refused, written, and shown."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from klbench import cli
from klbench.errors import UserError
from klbench.reward_eval import cards, report, validation
from klbench.reward_eval.board import MEANINGS, Board
from klbench.reward_eval.validation import Validation

PAIRS = [("The man said", " she left.", " he did not."), ("The man said", " yes.", " no no."), ("So", " thanks.", " thanks.")]


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's validation folder, with a name that a page must escape."""
    folder = tmp_path_factory.mktemp("family") / "validation"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(["a", "b", "c"], rng.integers(1, 9))) for _ in range(60)]
    lines(folder / "<i>words.jsonl", [{"text": w, "label": int(len(w.split()) + rng.normal() < 5)} for w in words])
    lines(folder / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])
    tests = [("short", "a", True, "p1"), ("long", "a b c a b c a b", False, "p1"), ("short", "b", True, "")]
    lines(folder / "functional.jsonl", [{"functionality": f, "text": t, "good": g, "pair": p} for f, t, g, p in tests])
    return folder


@pytest.fixture(scope="module")
def checks(folder: Path) -> Validation:
    return Validation(
        (validation.labels_of(folder / "<i>words.jsonl"),),
        (validation.pairs_of(folder / "pairs.jsonl"),),
        tuple(validation.rows_of(folder / "functional.jsonl", validation._case)),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, checks: Validation) -> Path:
    """What the command writes, run twice into two folders, for a task with a gold reward and every kind of validation."""
    home = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "of", lambda task: checks)
        for name in ("one", "two"):
            words = ["reward", "exact", "--samples", "64", "--reward", "klbench.rewards.null:shorter", "--out", str(home / name)]
            assert cli.main(words) == 0
    return home


def test_the_files(written: Path) -> None:
    board = Board.read(written / "one" / "rewards.json")
    (table,) = board.tables
    assert [(c.reward, c.role) for c in table.cards][:2] == [("reward", "reward"), ("gold", "gold")]
    assert [c.reward for c in table.cards if c.role == "null"] == ["length", "prior", "constant"]
    named = {c.reward: c for c in table.cards}
    length, given = named["length"].columns, named["klbench.rewards.null:shorter"].columns
    assert length == given and length["pairs.shipped"].value == pytest.approx(2.5 / 3), "2 words beat 3, 1 beats 2, and a tie"
    assert (length["auc.<i>words"].value or 0) > 0.9 and (length["functional.order"].value, length["functional.macro"].value) == (1, 1)
    assert named["constant"].columns["pairs.prior"].value == 0.5 and "pairs.prior" not in named["gold"].columns
    assert named["klbench.rewards.null:shorter"].curves and not named["length"].curves, "a null is no likelihood"
    assert {a.texts for a in table.agreement} == {"prior", "<i>words"} and len(table.agreement) == 6
    kinds = {re.sub(r"\.(<i>words|shipped)$", ".FILE", name) for c in table.cards for name in c.columns}
    kinds = {re.sub(r"^raw_.*", "raw_….FILE", re.sub(r"^best_of_\d", "best_of_k", name)) for name in kinds}
    assert {k for k in kinds if not k.startswith(("functional.is.", "functional.group."))} <= set(MEANINGS), "each column has a meaning"
    rows = list(csv.DictReader((written / "one" / "rewards.csv").read_text(encoding="utf-8").splitlines()))
    assert {r["column"] for r in rows if r["reward"] == "length"} == set(length)


def test_the_same_seed_makes_the_same_bytes(written: Path) -> None:
    for name in ("rewards.json", "rewards.csv", "index.html"):
        assert (written / "one" / name).read_bytes() == (written / "two" / name).read_bytes()


def test_the_page_asks_for_nothing_and_escapes_names(written: Path) -> None:
    page = (written / "one" / "index.html").read_text(encoding="utf-8")
    assert "&lt;i&gt;words" in page and "<i>words" not in page
    assert "<script" not in page and not re.findall(r"(?:src|href)=\"(?!#|data:)", page) and "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page and page.count("<svg") >= 3
    assert "klbench reward exact --reward klbench.rewards.null:shorter --samples 64" in page and str(written) not in page


def test_what_is_printed(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(Board.read(written / "one" / "rewards.json"))
    out = capsys.readouterr().out.splitlines()
    head = out[0].split("\t")
    assert head[:3] == ["task", "reward", "role"] and "pairs, prior draws" in head and "certified 1/β" in head
    assert all(len(row.split("\t")) == len(head) for row in out) and len(out) == 7
    assert [row.split("\t")[1] for row in out][-3:] == ["length", "prior", "constant"]


def test_a_board_that_was_tampered_with_is_refused(written: Path, tmp_path: Path) -> None:
    data = json.loads((written / "one" / "rewards.json").read_text(encoding="utf-8"))
    data["tables"][0]["cards"][0]["columns"]["pairs.prior"]["value"] = "much"
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"bad.json: tables.0.cards.0.columns"):
        Board.read(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["reward", "exakt"], "did you mean 'exact"),
        (["reward", "exact", "exact"], "each once"),
        (["reward", "exact", "--pairs", "none.jsonl"], "no file at none.jsonl"),
        (["reward", "exact", "--reward", "nothing_like_it"], "no reward 'nothing_like_it'"),
        (["reward", "exact", "--samples", "8"], "64"),
        (["reward", "exact", "--json", "there/x.json"], "no directory there"),
        (["reward", "exact", "--policies", "there", "--samples", "64"], "no records"),
        (["reward"], "TASK"),
    ],
)
def test_bad_words_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and says in said[0], said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("read", "row", "says"),
    [
        (validation.pairs_of, '{"prompt": "a", "chosen": "b"}', '"rejected": a string'),
        (validation.pairs_of, "[1]", "an object expected"),
        (validation.labels_of, '{"text": "a", "label": 2}', '"label": 0, 1'),
        (validation.labels_of, '{"text": "a", "label": NaN}', '"label": 0, 1'),
        (validation.labels_of, '{"label": 1}', '"text": a string'),
        (validation.labels_of, "{", "line 2"),
    ],
)
def test_a_bad_row_is_named(read, row: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + row + "\n")
    with pytest.raises(UserError, match=r"x.jsonl, line 2: .*|line 2") as caught:
        read(path)
    assert says in str(caught.value)
    path.write_text("\n\n")
    with pytest.raises(UserError, match="no row"):
        read(path)


def test_prompts_are_clusters_and_texts_without_one_are_their_own(tmp_path: Path, checks: Validation) -> None:
    assert checks.pairs[0].cluster.tolist() == [0, 0, 1] and len(set(checks.labelled[0].cluster)) == 60
    assert checks.missing == [] and Validation().missing == ["labelled texts", "pairs", "functional tests"]


def test_a_reward_is_asked_once_a_text() -> None:
    seen: list[str] = []

    def reward(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        seen.extend(completions)
        return [float(len(c)) for c in completions]

    asked = cards.Asked(reward, 5.0)
    assert asked(["p", "p", "q"], ["aa", "aa", "aa"]).tolist() == [2, 2, 2] and asked(["p"], ["aa"]).tolist() == [2]
    assert seen == ["aa", "aa"]
    with pytest.raises(UserError, match="above its declared maximum 5"):
        asked(["p"], ["too long"])


def test_a_reward_that_knows_its_own_prompts_alone_is_left_out_where_it_is_asked_others(checks: Validation) -> None:
    world = cards.World.of("exact", None, 64)
    own = cards.judges(world, [])[0]

    def refuses(prompts: list[str], texts: list[str]) -> np.ndarray:
        raise KeyError(prompts[0])

    narrow = cards.Judge("narrow", "other", own.draws, own.ceiling, refuses)
    card, _ = cards.card(world, narrow, own, checks, [], 0, lambda text: None)
    assert card.columns["pairs.prior"].value == 1 and not any(name.endswith("shipped") for name in card.columns)
    assert card.notes and "KeyError" in card.notes[0]
    assert all(a.texts == "prior" for a in cards.agreement(world, [own, narrow], {"reward": 0.0, "narrow": 0.0}, checks))


def test_trained_policies_join_the_curve() -> None:
    root = Path(__file__).parents[1] / "leaderboards" / "quick"
    world = cards.World.of("toxicity", None, 64)
    records = cards.trained(root, world)
    assert len(records) >= 5 and all(r.run.kind != "sampler" and r.run.task == "toxicity" for r in records)
    assert cards.trained(root, cards.World.of("exact", None, 64)) == []


def test_what_is_published_is_what_its_figures_make() -> None:
    folder = Path(__file__).parents[1] / "leaderboards" / "rewards"
    board = Board.read(folder / "rewards.json")
    assert board.to_json() == (folder / "rewards.json").read_text(encoding="utf-8")
    assert board.to_csv() == (folder / "rewards.csv").read_text(encoding="utf-8")
    assert report.page(board) == (folder / "index.html").read_text(encoding="utf-8")
    for table in board.tables:
        assert {"length", "prior", "constant"} <= {c.reward for c in table.cards if c.role == "null"}
        assert table.draws == 2048 and table.cards[0].sharpness and table.cards[0].edge


def test_the_command_starts_without_torch() -> None:
    code = "import sys, klbench.cli; klbench.cli.main(['reward', '--help']); print('torch' in sys.modules, 'scipy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False False")
