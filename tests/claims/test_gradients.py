"""The claims in klbench/claims/gradients.py: each verdict as expected, and not so with the wrong ingredient."""

import pytest

from klbench.claims import gradients  # noqa: F401  registers them
from klbench.claims.contract import CLAIMS

IDS = ("C02", "C04", "C07", "C08", "C09", "C10", "C11", "C22", "C23", "C24", "C48")


@pytest.mark.parametrize("id", IDS)
def test_as_expected(id):
    found = CLAIMS[id].run()
    assert found.as_expected, [check for check in found.checks if check.verdict != "holds"]


@pytest.mark.parametrize("id", IDS)
def test_the_wrong_ingredient_shows(id):
    assert CLAIMS[id].run(wrong=True).verdict != "holds"
