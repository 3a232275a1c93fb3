"""The claims on whose draws are learned from: each verdict as expected, and not so with the wrong ingredient."""

import pytest

from klbench.claims import online  # noqa: F401  registers them
from klbench.claims.contract import CLAIMS

IDS = ("C39", "C40", "F08")


@pytest.mark.parametrize("id", IDS)
def test_as_expected(id):
    found = CLAIMS[id].run()
    assert found.as_expected, [check for check in found.checks if check.verdict != "holds"]


@pytest.mark.parametrize("id", IDS)
def test_the_wrong_ingredient_shows(id):
    assert CLAIMS[id].run(wrong=True).verdict != ("fails" if CLAIMS[id].refutes else "holds")
