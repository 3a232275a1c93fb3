"""Wall time of `klbench run quick`, two processes of one thread against one, and where the time goes.

    python benchmarks/quick.py [--rounds 1] [--workers 2 1]

Every run is from nothing, in turn in one go; the share of training and scoring is read from the records' cost.machine.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 1])
    args = parser.parse_args()
    walls: dict[int, list[float]] = {w: [] for w in args.workers}
    for _ in range(args.rounds):
        for workers in args.workers:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                command = [
                    str(Path(sys.executable).with_name("klbench")),
                    "run",
                    "quick",
                    "--out",
                    f"{folder}/out",
                    "--workers",
                    str(workers),
                ]
                subprocess.run(command, check=True, capture_output=True)
                walls[workers].append(time.perf_counter() - start)
                cells = [json.loads(p.read_text()) for p in sorted(Path(folder, "out", "records").glob("*.json"))]
                machine = [c["cost"]["machine"] for c in cells]
                train, score = (sum(m[f"seconds_{part}"] for m in machine) for part in ("train", "score"))
                print(
                    f"{workers} workers: {walls[workers][-1]:.0f} s, {len(cells)} cells, training {train:.0f} s, scoring {score:.0f} s",
                    flush=True,
                )
    for workers, seconds in walls.items():
        print(f"{workers} workers: median {statistics.median(seconds):.0f} s ({min(seconds):.0f} to {max(seconds):.0f})")
    if {1, 2} <= set(walls):
        print(f"two processes of one thread are {statistics.median(walls[1]) / statistics.median(walls[2]):.2f} times as fast as one")


if __name__ == "__main__":
    main()
