"""Seeds by purpose: training, scoring and the bank never share draws, whatever the seeds of the runs."""

from __future__ import annotations

import hashlib


def seed(run_seed: int, purpose: str) -> int:
    """A 63-bit seed for one purpose of one run, e.g. `seed(0, "train/sample/17")`.

    The first 63 bits of SHA-256 of both: a step's draws depend on its number and on nothing drawn before, so a run that is
    resumed needs no generator state.
    """
    digest = hashlib.sha256(f"{int(run_seed)}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
