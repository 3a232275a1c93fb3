"""The README's command in a fresh copy of the repository: it installs, trains, scores and prints a board. Minutes: `make test-slow`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def copy_of_the_repository(to: Path) -> None:
    """What a clone would hold once everything here is committed: tracked files and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


@pytest.mark.slow
def test_make_run_in_a_fresh_copy_ends_with_the_board(tmp_path: Path) -> None:
    copy_of_the_repository(tmp_path)
    # make hands its own flags down in the environment; a person's shell has none of them.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}

    def make_run() -> str:
        done = subprocess.run(["make", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    first = make_run()
    assert "reverse" in first, "no board on the terminal"
    out = tmp_path / "runs" / "quick"
    assert len(list((out / "records").glob("*.json"))) >= 30  # three tasks, ten methods at the least
    assert "<html" in (out / "index.html").read_text(encoding="utf-8")
    records = {path.name: path.read_bytes() for path in (out / "records").glob("*.json")}

    second = make_run()
    assert "installing" in first and "installing" not in second
    assert {path.name: path.read_bytes() for path in (out / "records").glob("*.json")} == records
