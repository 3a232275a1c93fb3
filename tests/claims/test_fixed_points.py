"""The claims in klbench/claims/fixed_points.py: each verdict as expected, and not so with the wrong ingredient."""

import pytest

from klbench.claims import fixed_points  # noqa: F401  registers them
from klbench.claims.contract import CLAIMS

IDS = ("C12", "C13", "C14", "C15", "C16", "C44")


@pytest.mark.parametrize("id", IDS)
def test_as_expected(id):
    found = CLAIMS[id].run()
    assert found.as_expected, [check for check in found.checks if check.verdict != "holds"]


@pytest.mark.parametrize("id", IDS)
def test_the_wrong_ingredient_shows(id):
    assert CLAIMS[id].run(wrong=True).verdict != "holds"
