"""Measurements of the library `evaluate` as rewards: `evaluate:PATH_OR_NAME[:KEY]`, each completion measured by itself.

A measurement reads one list of texts and returns a dictionary. Under KEY stands a list with one figure a text, or one figure of all texts:
then it is asked of every text alone. Without KEY the one entry that is a figure is meant.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from klbench.errors import UserError, unknown
from klbench.rewards.calling import texts_of

EXAMPLE: Final = "the cat"  # what a measurement is tried on when it is opened


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """One figure a completion. given: the name of the measurement's input.  one_by_one: it tells one figure of all the texts it gets."""

    name: str
    module: Any
    given: str
    key: str
    one_by_one: bool
    reward_max: float = math.inf

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: object) -> list[float]:
        """Raises UserError where the measurement fails on a text."""
        texts = texts_of(completions)
        distinct = list(dict.fromkeys(texts))
        found: dict[str, float] = {}
        for some in [[text] for text in distinct] if self.one_by_one else [distinct] if distinct else []:
            value = self._figures(some)
            if isinstance(value, Sequence) and len(value) != len(some):
                raise UserError(f"{self.name}: {len(value)} figures of {len(some)} texts")
            found.update(zip(some, value if isinstance(value, Sequence) else [value], strict=True))
        return [float(found[text]) for text in texts]

    def _figures(self, texts: list[str]) -> Any:
        # `compute` writes its inputs to a table on the disk first, 10 ms a call; what a module's author defines is this.
        try:
            return self.module._compute(**{self.given: texts})[self.key]
        except Exception as error:  # whatever code of a stranger raises
            first = texts[0] if len(texts) == 1 else f"{texts[0]!r} and {len(texts) - 1} more"
            raise UserError(f"{self.name} raised {type(error).__name__} on {first!r}: {' '.join(str(error).split())[:200]}") from None


def _is_figure(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], numbers.Real))


def open_measurement(words: str) -> Measured:
    """Raises UserError for what `evaluate` cannot load, reads other things than texts, or gives no figure under the key."""
    import evaluate

    place, key = words, ""
    if not Path(place).exists() and ":" in place:
        place, _, key = words.rpartition(":")
    name = f"evaluate:{words}"
    where = str(Path(place).resolve()) if Path(place).exists() else place  # `evaluate` looks for a folder's file by the folder's own name
    try:
        module = evaluate.load(where)
    except Exception as error:  # no such file, no network, a missing package, a script that raises
        raise UserError(f"{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    alternatives = module.features if isinstance(module.features, list) else [module.features]
    fits = [dict(f) for f in alternatives if len(f) == 1 and getattr(next(iter(f.values())), "dtype", "") in ("string", "large_string")]
    if not fits:
        reads = "; or ".join(", ".join(map(str, f)) for f in alternatives)
        raise UserError(f"{name} reads {reads}: a reward has completions alone, one list of texts")
    given = next(iter(fits[0]))
    try:
        tried = module._compute(**{given: [EXAMPLE]})
    except Exception as error:
        raise UserError(f"{name} raised {type(error).__name__} on {EXAMPLE!r}: {' '.join(str(error).split())[:200]}") from None
    figures = [k for k, value in tried.items() if _is_figure(value)]
    if key and key not in figures:
        raise unknown(f"figure of evaluate:{place}", key, figures)
    if not key and len(figures) != 1:
        which = f"which of {', '.join(figures)}? write evaluate:{place}:KEY" if figures else f"no figure among {', '.join(map(str, tried))}"
        raise UserError(f"{name}: {which}")
    key = key or figures[0]
    return Measured(name, module, given, key, one_by_one=isinstance(tried[key], numbers.Real))
