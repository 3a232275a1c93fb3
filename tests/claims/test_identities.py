"""The claims in klbench/claims/identities.py: each verdict as expected, and not so with the wrong ingredient."""

import pytest

from klbench.claims import identities  # noqa: F401  registers them
from klbench.claims.contract import CLAIMS

IDS = ("C01", "C03", "C05", "C06", "C41", "C43", "C45", "C47")


@pytest.mark.parametrize("id", IDS)
def test_as_expected(id):
    found = CLAIMS[id].run()
    assert found.as_expected, [check for check in found.checks if check.verdict != "holds"]


@pytest.mark.parametrize("id", IDS)
def test_the_wrong_ingredient_shows(id):
    assert CLAIMS[id].run(wrong=True).verdict != "holds"
