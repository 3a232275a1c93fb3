"""The laws of a stranger's objective: what is declared is what is held against it."""

from dataclasses import dataclass
from typing import ClassVar, final

import pytest

from klbench import method
from klbench.convergence import check_ending
from klbench.errors import UserError
from klbench.laws import check_objective, check_sampler
from klbench.method import AbstractObjective
from klbench.objectives.ipo import IPO
from klbench.objectives.rloo import RLOO


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
    assert objective.source and objective.optimum in ("target", "own", "none") and objective.draws in ("policy", "prior", "both")


@pytest.mark.parametrize("name", [n for n in method.names("objectives") if method.objective(n).optimum != "none"])
def test_training_ends_where_it_is_declared_to(name):
    assert [law for law in check_ending(method.objective(name)) if not law.holds] == []


def test_training_that_ends_elsewhere_is_rejected(mutant, broken):
    def own(self, reward, law, beta, draws):
        return reward / beta - law.log_mean_exp(law.levels / beta)

    wrong = mutant(RLOO, loss=lambda self, batch, beta: RLOO.loss(self, batch, 1.5 * beta))
    assert len(broken(check_ending(wrong))) == 2
    assert len(broken(check_ending(mutant(IPO, own=own)))) == 2  # it calls the posterior its own, and ends elsewhere


@pytest.mark.parametrize("name", method.names("samplers"))
def test_every_sampler_passes(name):
    assert all(law.holds for law in check_sampler(method.sampler(name)))


def test_a_loss_without_gradient_fails(broken):
    assert "the gradient does not vanish short of it" in broken(check_objective(Nothing()))


@pytest.mark.parametrize("word, says", [("posterior", "none of target, own, none"), ("own", "has no method own")])
def test_an_unsound_declaration_is_one_line(word, says):
    with pytest.raises(UserError, match=says):
        check_objective(type("Odd", (Nothing,), {"optimum": word})())
