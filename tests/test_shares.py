"""Work on several processes: in order, each piece once, failures by name, nothing left running."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from klbench import shares
from klbench.errors import UserError


def square(k: int) -> tuple[int, int]:
    time.sleep(0.002)
    return k * k, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 3, 50])
def test_results_come_back_in_order_from_as_many_processes(processes: int) -> None:
    found = shares.done([partial(square, k) for k in range(40)], processes)
    assert [x for x, _ in found] == [k * k for k in range(40)]
    assert len({pid for _, pid in found}) <= processes and (processes == 1 or len({pid for _, pid in found}) > 1)
    for pid in {pid for _, pid in found} - {os.getpid()}:  # none is left, not even as a zombie; the process may have other children
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_no_work_is_done_at_once() -> None:
    assert shares.done([], 4) == []


def test_each_piece_is_done_once(tmp_path: Path) -> None:
    def mark(k: int) -> None:
        with open(tmp_path / str(k), "x") as file:
            file.write(str(os.getpid()))

    shares.done([partial(mark, k) for k in range(100)], 3)
    assert len(list(tmp_path.iterdir())) == 100


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_first_failure_is_raised_and_no_more_is_begun(processes: int, tmp_path: Path) -> None:
    def fail(k: int) -> None:
        (tmp_path / str(k)).touch()
        time.sleep(0.05 if k == 2 else 0.001)  # the first in order need not be the first in time
        if k in (2, 3, 4):
            raise UserError(f"piece {k}")

    with pytest.raises(UserError, match="piece 2"):
        shares.done([partial(fail, k) for k in range(60)], processes)
    assert len(list(tmp_path.iterdir())) < 30


def test_a_child_that_is_killed_is_an_error(tmp_path: Path) -> None:
    parent = os.getpid()

    def die() -> None:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)

    with pytest.raises(OSError, match="was killed"):
        shares.done([die] * 4, 2)


def test_a_result_that_cannot_be_sent_is_an_error_and_not_a_wait() -> None:
    parent = os.getpid()
    with pytest.raises(OSError, match="was killed"):
        shares.done([lambda: time.sleep(0.1) if os.getpid() == parent else open(os.devnull)] * 6, 2)


def test_more_pieces_than_a_pipe_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 1,024"):
        shares.done([time.sleep] * 1025, 2)  # type: ignore[list-item]
