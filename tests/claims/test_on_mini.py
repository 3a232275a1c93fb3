"""Claims of the quick tier on the mini prior: the expected verdict, and not with the wrong ingredient."""

from __future__ import annotations

import pytest

from klbench import claims


@pytest.mark.parametrize("id", claims.catalogue("quick"))
def test_verdicts(id: str) -> None:
    claim = claims.catalogue("quick")[id]
    assert claim.run().as_expected, claim.run().checks
    assert claim.run(wrong=True).verdict != "holds"
