"""Ten thousand records become a board: how long that takes, and how long a browser needs to have the front page in hand.

    python benchmarks/board.py [--records 10000] [--rounds 3] [--keep DIR]

The records vary a published one (leaderboards/quick, its draws, curve and prompts included): 40 methods at 5 seeds make a table of 200, and
there are as many tables as that takes. Building is `klbench leaderboard build` in a fresh process, files read and written; the browser is
headless Chromium on the files, from the start of navigation to a table that sorts and filters. Page weight is what the browser loads.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np

from klbench.record import Record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser  # noqa: E402

MODEL = "leaderboards/quick/records/bias-rloo-b1-s0-*.json"
METHODS, SEEDS = 40, 5


def varied(model: dict[str, Any], number: int, rng: np.random.Generator) -> Record:
    """The record of another method, seed, task or β; its figures moved a little, some of them uncertified."""
    table, row = divmod(number, METHODS * SEEDS)
    data = json.loads(json.dumps(model))
    data["run"] |= {
        "method": f"method_{row // SEEDS}",
        "seed": row % SEEDS,
        "task": f"family_{table // 5}/variant",
        "beta": (table % 5 + 1) / 5,
    }
    moved = float(rng.gamma(2.0, 0.3)) + 0.05 * (row // SEEDS)
    data["prompts"]["free"] = [x + moved + float(rng.normal(0, 0.2)) for x in data["prompts"]["free"]]
    for name in ("reverse_kl", "kl_prior", "wasted_nats"):
        figure = data["columns"][name]
        for part in ("value", "low", "high"):
            figure[part] = figure[part] + moved
        figure["population"] = None
    data["columns"]["reward"] |= {part: data["columns"]["reward"][part] + 0.1 * moved for part in ("value", "low", "high")}
    if number % 7 == 0:
        data["columns"]["reverse_kl"] |= {"status": "uncertified", "low": None, "high": None}
    return Record.model_validate(data)


def made(folder: Path, records: int) -> None:
    rng = np.random.default_rng(0)
    (path,) = ROOT.glob(MODEL)
    model = json.loads(path.read_text(encoding="utf-8"))
    (folder / "records").mkdir(parents=True)
    for number in range(records):
        record = varied(model, number, rng)
        (folder / "records" / f"{record.run.id}.json").write_text(record.to_json(), encoding="utf-8")


def opened(page: Path) -> tuple[float, float]:
    """(seconds until the table can be used, MB loaded, figures included) in a browser of its own."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            browser.open(page.as_uri(), "figures")
            ready = browser.js("return performance.getEntriesByName('board')[0].startTime")
            loaded = [Path(unquote(urlparse(url).path)) for url in browser.asked() if url.startswith("file:")]
        finally:
            browser.quit()
    return ready / 1000, sum(path.stat().st_size for path in loaded) / 1e6


def measured(folder: Path, rounds: int, what: str) -> None:
    builds, works, opens, weights = [], [], [], []
    for _ in range(rounds):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [str(Path(sys.executable).with_name("klbench")), "leaderboard", "build", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
        builds.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        works.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        seconds, weight = opened(folder / "index.html")
        opens.append(seconds)
        weights.append(weight)
    took = f"{statistics.median(builds):.1f} s ({min(builds):.1f} to {max(builds):.1f}; {statistics.median(works):.1f} s of processor)"
    print(f"{what}: built in {took}", end=", ")
    print(
        f"in hand after {statistics.median(opens):.2f} s ({min(opens):.2f} to {max(opens):.2f}), {statistics.median(weights):.2f} MB loaded"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="make the records here and leave them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        quick = Path(scratch, "quick")
        shutil.copytree(ROOT / "leaderboards" / "quick", quick, ignore=shutil.ignore_patterns("samples"))
        measured(quick, args.rounds, "quick, 39 records (at most 2 MB)")
        folder = args.keep or Path(scratch, "many")
        if not (folder / "records").is_dir():
            made(folder, args.records)
        measured(folder, args.rounds, f"{args.records:,} records (at most 10 s and 1 s)")


if __name__ == "__main__":
    main()
