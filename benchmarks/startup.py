"""What a person waits for before anything happens: import of klbench, `klbench --help`, and the board without torch.

    python benchmarks/startup.py [--rounds 11]

Each command in a fresh interpreter, in turn, median and range over the rounds; "bare" is the interpreter alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "import klbench (at most 0.3 s)": [sys.executable, "-c", "import klbench, sys; assert 'torch' not in sys.modules"],
    "klbench --help (at most 0.5 s)": [str(Path(sys.executable).with_name("klbench")), "--help"],
    "import klbench.board": [sys.executable, "-c", "import klbench.board, sys; assert 'torch' not in sys.modules"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        kept = seconds[1:]  # the first round fills the disk cache
        print(f"{name:34s} {statistics.median(kept):6.3f} s  ({min(kept):.3f} to {max(kept):.3f})")


if __name__ == "__main__":
    main()
