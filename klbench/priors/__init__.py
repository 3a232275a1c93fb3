"""Named priors: `mini` and `tiny` ship with the package; other names are added here."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final

from klbench.errors import unknown

SHIPPED: Final = ("mini", "tiny")


def prior_path(name: str) -> Path:
    """The folder of a named prior, in Hugging Face format. Raises UserError with the nearest name."""
    if name not in SHIPPED:
        raise unknown("prior", name, SHIPPED)
    return Path(str(files("klbench.priors").joinpath(name)))
