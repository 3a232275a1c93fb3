"""Laws of ancestral sampling: the prior's own draws, in order."""

import numpy as np
import pytest

from klbench.errors import UserError
from klbench.laws import check_sampler
from klbench.samplers.ancestral import Ancestral


def test_laws_hold(broken):
    assert broken(check_sampler(Ancestral())) == []


def test_sorting_by_reward_is_rejected(mutant, broken):
    wrong = mutant(Ancestral, pick=lambda self, reward, beta, top, draws, seed: (np.argsort(-reward)[:draws], len(reward)))
    assert "pick draws from the law of log_ratio" in broken(check_sampler(wrong))


def test_too_few_draws_are_refused():
    with pytest.raises(UserError, match="needs 4 prior draws, got 3"):
        Ancestral().pick(np.zeros(3), 1.0, 1.0, 4, 0)
