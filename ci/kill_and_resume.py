"""Kills a run with -9 at random moments, finishes it, and compares its records with those of an undisturbed run.

    python ci/kill_and_resume.py [SUITE] [--kills 3] [--seed 0] [--against DIR] [-- further options of klbench run]

Exit 0 when every record is equal outside cost.machine, 1 with the first difference else. `make test-slow` runs it on a small suite.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KLBENCH = str(Path(sys.executable).with_name("klbench"))


def records(out: Path) -> dict[str, dict[str, object]]:
    """Records by name, without what may differ between equal runs."""
    found = {}
    for path in sorted((out / "records").glob("*.json")):
        data = json.loads(path.read_text())
        data["cost"].pop("machine")
        found[path.name] = data
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="quick")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", type=Path, help="an undisturbed run that is there already")
    parser.add_argument("--minutes", type=float, default=4.5, help="how long that one took, for the random moments")
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        start, length = time.monotonic(), 60 * args.minutes
        if args.against:
            whole = args.against
        else:
            subprocess.run([KLBENCH, "run", args.suite, "--out", str(whole), *args.options], check=True, capture_output=True)
            length = time.monotonic() - start
        print(f"undisturbed: {length:.0f} s, {len(records(whole))} records", flush=True)
        for kill in range(args.kills):
            child = subprocess.Popen(
                [KLBENCH, "run", args.suite, "--out", str(cut), *args.options],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            moment = chance.uniform(0.1, 0.6) * length
            try:
                child.wait(moment)
            except subprocess.TimeoutExpired:
                os.kill(child.pid, signal.SIGKILL)  # the owner alone: its workers must die by themselves
                child.wait()
            print(f"kill {kill + 1} after {moment:.1f} s: {len(records(cut))} records", flush=True)
        subprocess.run([KLBENCH, "run", args.suite, "--out", str(cut), *args.options], check=True, capture_output=True)
        want, got = records(whole), records(cut)
        if want.keys() != got.keys():
            print(f"records differ by name: {sorted(want.keys() ^ got.keys())}")
            return 1
        for name in want:
            if want[name] != got[name]:
                print(f"{name} differs")
                return 1
        left = [str(p.relative_to(cut)) for p in cut.rglob("*") if p.name.endswith((".part", ".work"))]
        print(f"{len(want)} records equal; left over: {left or 'nothing'}")
        return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
