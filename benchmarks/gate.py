"""What a CI job waits for: `klbench check` of two boards of the size of leaderboards/quick, 42 policies with 40 prompts at most.

    python benchmarks/gate.py [--rounds 5]

Each command in a fresh interpreter, median and range; goal: 2 s on idle cores. The last line also writes JUnit, summary and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def moved(source: Path, target: Path) -> int:
    """A copy of a board's records in which every policy moved a little; how many."""
    rng = np.random.default_rng(0)
    (target / "records").mkdir(parents=True)
    (target / "manifest.json").write_text("{}", encoding="utf-8")
    files = sorted((source / "records").glob("*.json"))
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        data["prompts"]["free"] = [x + float(rng.normal(0, 0.05)) for x in data["prompts"]["free"]]
        (target / "records" / file.name).write_text(json.dumps(data), encoding="utf-8")
    return len(files)


def timed(words: list[str], rounds: int) -> str:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - start)
        if done.returncode not in (0, 1, 3):
            raise SystemExit(done.stderr)
    kept = times[1:]  # the first round fills the disk cache
    return f"{statistics.median(kept):6.2f} s  ({min(kept):.2f} to {max(kept):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        quick, other = ROOT / "leaderboards" / "quick", Path(scratch, "other")
        count = moved(quick, other)
        check = [str(Path(sys.executable).with_name("klbench")), "check", "--baseline", str(quick), "--candidate", str(other)]
        files = ["--junit", f"{scratch}/junit.xml", "--summary", f"{scratch}/summary.md", "--json", f"{scratch}/check.json"]
        print(f"bare interpreter                     {timed([sys.executable, '-c', 'pass'], rounds)}")
        print(f"klbench check, {count} against {count} records  {timed(check, rounds)}")
        print(f"the same with all three files        {timed([*check, *files], rounds)}")


if __name__ == "__main__":
    main()
