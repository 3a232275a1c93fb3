"""The laws of a stranger's objective: what is declared is what is held against it."""

from dataclasses import dataclass
from typing import ClassVar, final

import pytest

from klbench import method
from klbench.errors import UserError
from klbench.laws import check_objective, check_sampler
from klbench.method import AbstractObjective


@final
@dataclass(frozen=True)
class Nothing(AbstractObjective):
    optimum: ClassVar[str] = "target"
    source: ClassVar[str] = "none"

    def loss(self, batch, beta):
        return (batch.log_q * 0).sum()


@pytest.mark.parametrize("name", method.names("objectives"))
def test_every_objective_passes_and_says_where_it_is_from(name):
    objective = method.objective(name)
    assert all(law.holds for law in check_objective(objective))
    assert objective.source and objective.optimum in ("target", "own", "none") and objective.draws in ("policy", "prior")


@pytest.mark.parametrize("name", method.names("samplers"))
def test_every_sampler_passes(name):
    assert all(law.holds for law in check_sampler(method.sampler(name)))


def test_a_loss_without_gradient_fails(broken):
    assert "the gradient does not vanish short of it" in broken(check_objective(Nothing()))


@pytest.mark.parametrize("word, says", [("posterior", "none of target, own, none"), ("own", "has no method own")])
def test_an_unsound_declaration_is_one_line(word, says):
    with pytest.raises(UserError, match=says):
        check_objective(type("Odd", (Nothing,), {"optimum": word})())
