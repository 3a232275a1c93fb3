"""The one exception for input that a person can mend: it names the thing and the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints its text on one line and exits with code 2; from Python it is a ValueError."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """`no task 'toxicty'; did you mean 'toxicity'?`, or the list of what is there when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}" if known else "none is known"
    return UserError(f"no {kind} {name!r}; {hint}")
