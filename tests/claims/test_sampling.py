"""The claims on samplers: each verdict as expected, and not so with the wrong ingredient."""

import pytest

from klbench.claims import sampling  # noqa: F401  registers them
from klbench.claims.contract import CLAIMS

IDS = ("C33", "C34", "C35", "C36", "C37", "C38")


@pytest.mark.parametrize("id", IDS)
def test_as_expected(id):
    found = CLAIMS[id].run()
    assert found.as_expected, [check for check in found.checks if check.verdict != "holds"]


@pytest.mark.parametrize("id", IDS)
def test_the_wrong_ingredient_shows(id):
    assert CLAIMS[id].run(wrong=True).verdict != ("fails" if CLAIMS[id].refutes else "holds")
