"""The statements that need a qualifier: each verdict as expected, and not so with the wrong ingredient."""

import pytest

from klbench.claims import qualified  # noqa: F401  registers them
from klbench.claims.contract import CLAIMS

IDS = ("F01", "F02", "F03", "F04", "F05", "F07", "F09", "F10", "F11", "F12")


@pytest.mark.parametrize("id", IDS)
def test_as_expected(id):
    found = CLAIMS[id].run()
    assert found.as_expected, [check for check in found.checks if check.verdict != "holds"]


@pytest.mark.parametrize("id", IDS)
def test_the_wrong_ingredient_shows(id):
    assert CLAIMS[id].run(wrong=True).verdict != ("fails" if CLAIMS[id].refutes else "holds")
