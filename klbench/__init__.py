"""klbench: how far is a fine-tuned language model from the posterior that its reward and its KL penalty define?

The names below are fetched on first use: `import klbench` loads neither torch nor numpy, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    from klbench.api import score, train
    from klbench.batch import Batch
    from klbench.errors import UserError
    from klbench.estimate import Estimate
    from klbench.metrics import metric_path
    from klbench.priors import prior_path
    from klbench.rewards.training import train_reward
    from klbench.target import Policy, TiltedPrior

__version__ = "0.1.0"

__all__ = [
    "Batch", "Estimate", "Policy", "TiltedPrior", "UserError", "__version__", "metric_path", "prior_path", "score", "train", "train_reward",
]  # fmt: skip

_HOMES: Final = {
    "Batch": "klbench.batch",
    "Estimate": "klbench.estimate",
    "Policy": "klbench.target",
    "TiltedPrior": "klbench.target",
    "UserError": "klbench.errors",
    "metric_path": "klbench.metrics",
    "prior_path": "klbench.priors",
    "score": "klbench.api",
    "train": "klbench.api",
    "train_reward": "klbench.rewards.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'klbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@final
class _Front(ModuleType):
    """The package, with its public names kept: importing the file klbench/score.py would bind that module over the function `score`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
