"""npz files of strangers: what they claim is checked before anything is unpacked, and an array of Python objects is refused."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from klbench.errors import UserError

MOST_PACKED: Final = 1 << 28  # bytes of a file
MOST_UNPACKED: Final = 1 << 30  # bytes of its arrays together
MOST_ARRAYS: Final = 4096  # what a pool of eight members and a hundred policies says


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name.

    Raises UserError, of one line that names the file, where there is none, it is no npz, it is larger than MOST_PACKED, it would be larger
    than MOST_UNPACKED unpacked, an array claims more than the file holds of it, or one holds objects, which only a pickle could make.
    """
    try:
        if path.stat().st_size > MOST_PACKED:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, at most {MOST_PACKED:,} are read")
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = file.infolist()
            size = sum(member.file_size for member in members)
            if size > MOST_UNPACKED or len(members) > MOST_ARRAYS:
                raise UserError(f"{path}: {len(members)} arrays of {size:,} bytes unpacked, at most {MOST_UNPACKED:,} are read")
            for member in members:
                with file.open(member) as part:
                    _check(part, member.file_size, member.filename)
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        told = str(error) if isinstance(error, UserError) else f"{path}: no npz of klbench: {' '.join(str(error).split())[:200]}"
        raise UserError(told) from None


def _check(part: Any, size: int, name: str) -> None:
    """A header that claims no more than there is, of numbers."""
    version = npy.read_magic(part)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"{name}: an array of format {version}")
    shape, _, kind = read(part)
    if kind.hasobject:
        raise ValueError(f"{name}: an array of Python objects, which are not read")
    if math.prod(shape) * kind.itemsize > size:
        raise ValueError(f"{name}: its header claims {math.prod(shape) * kind.itemsize:,} bytes, the file holds {size:,}")
