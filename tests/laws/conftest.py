"""Fixtures of the laws: a mutant is the real class with one method replaced, so that it declares what the real one declares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from klbench.laws import Law


@pytest.fixture
def mutant() -> Callable[..., Any]:
    """mutant(RLOO, loss=wrong_loss) is an RLOO with that loss."""

    def make(of: type, **methods: Callable[..., Any]) -> Any:
        return type("Mutant", (of,), dict(methods))()

    return make


@pytest.fixture
def broken() -> Callable[[tuple[Law, ...]], list[str]]:
    """Names of the laws that do not hold."""
    return lambda laws: [law.name for law in laws if not law.holds]
