"""kill -9 at random moments, on a small suite (ci/kill_and_resume.py does it on any)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
name: small
tasks: {bias: {}, factuality: {}}
objectives: [rloo, ppo, trajectory_balance]
samplers: [rejection]
train: {steps: 8, prompts: 8, samples: 4, checkpoint_every: 2}
score: {draws: 32, bank: 32, prompts: 4}
"""


@pytest.mark.slow
def test_records_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SUITE)
    script = Path(__file__).parents[1] / "ci" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "small.yaml"), "--kills", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "records equal; left over: nothing" in done.stdout
