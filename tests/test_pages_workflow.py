"""The workflow that publishes the boards, step by step in a copy of the repository: the site it would upload is whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from test_fresh_clone import copy_of_the_repository

from klbench.board import Board
from klbench.page import site
from klbench.record import Record

ROOT = Path(__file__).parents[1]
BOARDS = sorted(path.parent.name for path in (ROOT / "leaderboards").glob("*/board.json"))
REPOSITORY = "https://github.com/someone/klbench"

sys.path.insert(0, str(ROOT / "docs"))
import make_boards  # noqa: E402


def steps() -> dict[str, dict[str, Any]]:
    """The steps of the job that builds, those that run something by their name."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text(encoding="utf-8"))
    return {step["name"]: step for step in workflow["jobs"]["check"]["steps"] if "run" in step}


def do(step: dict[str, Any], where: Path) -> str:
    """A step as the runner does it: `bash -e`, and pipefail where it names its shell. This interpreter stands for what Install installs."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(where),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GITHUB_STEP_SUMMARY": str(where / "summary.md"),
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "someone/klbench",
    }
    flags = ["-eo", "pipefail"] if "shell" in step else ["-e"]
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", *flags, "-c", step["run"]],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("clone")
    copy_of_the_repository(where)
    return where


@pytest.fixture(scope="module")
def published(clone: Path) -> Path:
    """The folder that would be uploaded."""
    do(steps()["The site"], clone)
    return clone / "_site"


class Links(HTMLParser):
    """What a page asks for and leads to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if key in ("href", "src") and value]
        self.anchors |= {value for key, value in attrs if key == "id" and value}


def broken(root: Path, page: Path) -> list[str]:
    """Links of a page that lead to nothing inside of `root`; those to other hosts are not followed."""
    out, own = [], Links(page.read_text(encoding="utf-8"))
    for link in own.found:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        there = there / "index.html" if there.is_dir() else there
        if not there.is_relative_to(root.resolve()) or not there.is_file():
            out.append(link)
        elif parts.fragment and there.suffix == ".html" and "=" not in parts.fragment:
            anchors = own.anchors if there == page else Links(there.read_text(encoding="utf-8")).anchors
            out += [] if parts.fragment in anchors else [link]
    return out


def test_install_is_the_first_step_and_nothing_else_installs() -> None:
    first, *rest = steps().items()
    assert first[0] == "Install" and first[1]["run"].endswith("-c constraints.txt -e .") and (ROOT / "constraints.txt").is_file()
    assert not any("pip" in step["run"].split() for _, step in rest)


def test_the_site_holds_every_board_and_no_link_of_it_is_broken(published: Path) -> None:
    assert {"exact", "methods", "quick", "quick_all"} <= set(BOARDS)
    for name in BOARDS:
        assert (published / "leaderboards" / name / "index.html").read_bytes() == (ROOT / "leaderboards" / name / "index.html").read_bytes()
    for name in ("claims", "accuracy", "rewards"):
        assert (published / "leaderboards" / name / "index.html").is_file()
    assert not list(published.rglob("*.npz"))
    pages = sorted(published.rglob("*.html"))
    assert len(pages) > 400
    assert {str(page.relative_to(published)): found for page in pages if (found := broken(published, page))} == {}


def test_a_broken_link_would_be_seen(published: Path, tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_text(
        '<a href="a.html">a</a><a id="x" href="#x">b</a><a href="#y">c</a><a href="../out.html">d</a><a href="https://e.org">e</a>'
    )
    (tmp_path.parent / "out.html").write_text("")
    assert broken(tmp_path, page) == ["a.html", "#y", "../out.html"]


def test_the_front_page_of_the_site_leads_to_commits_and_into_the_repository(published: Path) -> None:
    links = Links((published / "leaderboards" / "index.html").read_text(encoding="utf-8")).found
    for name, manifest in make_boards.boards().items():
        assert f"{name}/index.html" in links and f"{REPOSITORY}/commit/{manifest['git'][:12]}" in links
    assert f"{REPOSITORY}/blob/HEAD/NOTICE" in links and not any(link.startswith("..") for link in links)


def test_what_stands_around_the_boards_is_what_the_script_writes() -> None:
    readme = (ROOT / "leaderboards" / "README.md").read_text(encoding="utf-8")
    assert make_boards.table(make_boards.boards()) in readme
    assert (ROOT / "leaderboards" / "index.html").read_text(encoding="utf-8") == make_boards.front(readme)
    assert all(manifest["links"] == make_boards.links(manifest) for manifest in make_boards.boards().values())
    front = ROOT / "leaderboards" / "index.html"
    assert [link for link in broken(ROOT, front) if not (front.parent / link).is_dir()] == []


@pytest.mark.parametrize("name", BOARDS)
def test_every_board_leads_to_claims_accuracy_rewards_its_suite_and_the_licences(name: str) -> None:
    page = ROOT / "leaderboards" / name / "index.html"
    found = Links(page.read_text(encoding="utf-8")).found
    manifest = json.loads(page.with_name("manifest.json").read_text(encoding="utf-8"))
    assert set(make_boards.links(manifest).values()) <= set(found) and "manifest.json" in found
    assert manifest["git"] in page.read_text(encoding="utf-8")
    assert broken(ROOT, page) == []


@pytest.mark.parametrize("link", ["javascript:alert(1)", "//evil.example", "https://evil.example", "\\\\evil.example", '"><script>'])
def test_a_manifest_leads_nowhere_but_beside_the_board(link: str) -> None:
    record = Record.read(next((ROOT / "leaderboards" / "quick" / "records").glob("bias-rloo-*.json")))
    board = Board.of([record], {"links": {"good": "../claims/index.html", "bad": link}})
    links = Links(dict(site.site(board))["index.html"]).found
    assert "../claims/index.html" in links and link not in links


@pytest.mark.slow
def test_every_board_is_what_its_records_and_samples_make(clone: Path) -> None:
    step = steps()["Every board is what its records and samples make"]
    do(step, clone)
    told = (clone / "summary.md").read_text(encoding="utf-8").splitlines()
    assert len(told) == len(BOARDS) and all(line.endswith("nothing differs") for line in told)
    edited = next((clone / "leaderboards" / "quick" / "records").glob("*.json"))
    text = edited.read_text(encoding="utf-8")
    bumped = re.sub(r'("value": -?\d+\.\d\d)(\d)', lambda m: m[1] + str((int(m[2]) + 1) % 10), text, count=1)
    assert bumped != text
    edited.write_text(bumped, encoding="utf-8")
    with pytest.raises(AssertionError, match="differ"):  # a job that fails
        do({**step, "run": step["run"].replace("leaderboards/*/", "leaderboards/quick/")}, clone)
