"""Work shared out among the cores of this machine, for a command that forks while it holds what the work reads.

Each process takes the next piece that nobody has, this one among them, so that a long piece delays nobody. A child ends with its parent,
or after the piece it is at. Conventions: pieces are independent, and their results come back in order, so that nothing tells how many
processes there were.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from threading import Thread
from typing import Any, Final, TypeVar, final

T = TypeVar("T")

NUMBER: Final = 4  # bytes of a piece's number in the pipe that hands them out
ROOM: Final = 1 << 20  # bytes of results that a child may leave without waiting for its parent, where the system lets it
MOST: Final = 4096 // NUMBER  # what any pipe takes before anybody reads


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def done(pieces: Sequence[Callable[[], T]], processes: int) -> list[T]:
    """The results of all pieces, in order.

    Raises what the first piece raised that failed (no piece is begun once one has), and OSError where a child was killed.
    """
    if len(pieces) > MOST:
        raise ValueError(f"at most {MOST:,} pieces, got {len(pieces):,}")
    found: dict[int, Any] = {}
    with _numbers(len(pieces)) as taken:
        children = [_forked(pieces, taken) for _ in range(min(processes, len(pieces)) - 1)]
        readers = [Thread(target=_receive, args=(pipe, found)) for _, pipe in children]
        for reader in readers:
            reader.start()
        try:
            found.update(_some(pieces, taken))
        finally:
            for reader in readers:
                reader.join()
            ends = [os.waitpid(pid, 0)[1] for pid, _ in children]
    failed = [number for number in sorted(found) if isinstance(found[number], _Failed)]
    if failed:
        raise found[failed[0]].error
    if any(ends) or len(found) < len(pieces):
        raise OSError(errno.ECHILD, "a process that shared the work was killed")
    return [found[number] for number in range(len(pieces))]


@final
@dataclass(frozen=True)
class _Failed:
    error: Exception


@contextmanager
def _numbers(count: int) -> Iterator[int]:
    """The end of a pipe from which any process may take the next number."""
    end, start = os.pipe()
    try:
        os.write(start, b"".join(k.to_bytes(NUMBER, "little") for k in range(count)))
    finally:
        os.close(start)
    try:
        yield end
    finally:
        os.close(end)


def _some(pieces: Sequence[Callable[[], T]], taken: int, wanted: Callable[[], bool] = lambda: True) -> Iterator[tuple[int, Any]]:
    """(number, result) of the pieces that this process gets hold of."""
    while wanted() and (next_one := os.read(taken, NUMBER)):
        number = int.from_bytes(next_one, "little")
        try:
            yield number, pieces[number]()
        except Exception as error:
            while os.read(taken, 1 << 16):  # nothing is left for the others
                pass
            yield number, _Failed(error)


def _forked(pieces: Sequence[Callable[[], T]], taken: int) -> tuple[int, Connection[Any, Any]]:
    """Number of a child that does its share, and the pipe on which it says what comes out."""
    receive, send = Pipe(duplex=False)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):  # a user may have so many bytes of pipes
            fcntl.fcntl(send.fileno(), fcntl.F_SETPIPE_SZ, ROOM)
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child formats text and writes files
        pid = os.fork()
    if pid:
        send.close()
        return pid, receive
    code = 1
    try:
        receive.close()
        gc.disable()  # a child is short-lived, and a collection would touch every page that it shares with its parent
        for result in _some(pieces, taken, lambda: os.getppid() == parent):
            send.send(result)
        code = 0
    finally:
        os._exit(code)


def _receive(pipe: Connection[Any, Any], found: dict[int, Any]) -> None:
    """All that a child says, while this process does its own share: results are unpacked as they come."""
    with pipe, suppress(EOFError, OSError):  # the end, and that of a child killed while it spoke
        while True:
            number, result = pipe.recv()
            found[number] = result
