"""Every claim has the expected verdict, and not with its wrong ingredient."""

from __future__ import annotations

import pytest

from klbench import claims

EVERY = [(tier, id) for tier in claims.TIERS for id in claims.catalogue(tier)]


@pytest.mark.parametrize("tier, id", EVERY)
def test_as_expected(tier: str, id: str) -> None:
    found = claims.catalogue(tier)[id].run()
    assert found.as_expected, [check for check in found.checks if check.verdict != "holds"]


@pytest.mark.parametrize("tier, id", EVERY)
def test_not_with_the_wrong_ingredient(tier: str, id: str) -> None:
    claim = claims.catalogue(tier)[id]
    assert claim.run(wrong=True).verdict != ("fails" if claim.refutes else "holds")
