"""Laws of realignment: the geometric mixture of each pair of next-token laws, at its edges, and what it is of whole outputs."""

import math

import numpy as np
import pytest
import torch

from klbench import method
from klbench.errors import UserError
from klbench.laws import check_blend, check_sampler
from klbench.policies.tabular import Tabular
from klbench.samplers.realignment import Realignment

Q = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64).log()
P0 = torch.tensor([0.2, 0.8, 0.0, 0.0], dtype=torch.float64).log()


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 2.5])
def test_laws_hold(lam, broken):
    assert broken(check_blend(Realignment(lam))) == [] == broken(check_sampler(Realignment(lam)))


@pytest.mark.parametrize(
    "lam, wanted",
    [
        (0.0, [0.2, 0.8, 0, 0]),  # the prior, whatever the policy lacks
        (1.0, [0.5, 0.25, 0.25, 0]),  # the policy, whatever the prior lacks
        (0.5, [math.sqrt(0.1), math.sqrt(0.2), 0, 0]),
        (2.0, [0.5**2 / 0.2, 0.25**2 / 0.8, 0, 0]),
        (1.0 + 1e-12, [0.5, 0.25, 0, 0]),  # a hair beyond the policy, what the prior lacks is gone
    ],
)
def test_by_hand(lam, wanted):
    found = Realignment(lam).law(Q, P0).exp()
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found, wanted / wanted.sum())


def test_what_agrees_stays():
    law = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(1)
    for lam in (0.2, 3.0, 1e6):
        torch.testing.assert_close(Realignment(lam).law(law, law), law)


def two_tokens(log_law):
    return Tabular(torch.as_tensor(log_law)[None], ("c",), vocabulary=2, length=2)  # AA, AB, BA, BB


@pytest.mark.parametrize("lam, first", [(0.0, 0.5), (0.5, 0.6017), (1.0, 0.6953)])
def test_claim_c37_token_by_token_is_not_the_tilt_of_outputs(lam, first):
    """Rewards (2, -2) after A, (.5, .5) after B, beta 1; the policy is the posterior."""
    reward = torch.tensor([2.0, -2.0, 0.5, 0.5], dtype=torch.float64)
    q, p0 = two_tokens(reward.log_softmax(0)), two_tokens(torch.zeros(4, dtype=torch.float64))
    laws = [policy.enumerate().log_prob[0, [0, 2], 0] for policy in (q, p0)]
    found = float(Realignment(lam).law(*laws).exp()[0])
    assert found == pytest.approx(first, abs=5e-5)
    outputs = (lam * reward).softmax(0)  # p* at beta / lam
    assert (abs(found - float(outputs[:2].sum())) < 1e-12) == (lam in (0.0, 1.0))


def test_an_arithmetic_mixture_is_not_it(mutant, broken):
    wrong = mutant(Realignment, law=lambda self, q, p0: ((1 - self.lam) * p0.exp() + self.lam * q.exp()).log())
    assert broken(check_blend(wrong)) == []  # it is a law
    assert not torch.allclose(wrong.law(Q, P0), Realignment().law(Q, P0))  # and another one


def test_a_mixture_that_is_not_normalised_is_rejected(mutant, broken):
    wrong = mutant(Realignment, law=lambda self, q, p0: (1 - self.lam) * p0 + self.lam * q)
    assert "a blended law is normalised" in broken(check_blend(wrong))


def test_one_normaliser_for_a_batch_is_rejected(mutant, broken):
    def law(self, q, p0):
        mixed = (q + p0) / 2
        return mixed - mixed.logsumexp(-1, keepdim=True).flatten()[0]

    assert "each pair is blended by itself" in broken(check_blend(mutant(Realignment, law=law)))


def test_mass_out_of_nowhere_is_rejected(mutant, broken):
    wrong = mutant(Realignment, law=lambda self, q, p0: ((q.exp() + p0.exp()) / 2 + 1e-3).log().log_softmax(-1))
    assert broken(check_blend(wrong)) == ["a token that neither has gets no mass"]


def test_a_law_that_reads_ids_is_rejected(mutant, broken):
    wrong = mutant(Realignment, law=lambda self, q, p0: (q + torch.arange(q.shape[-1]).to(q)).log_softmax(-1))
    assert "ids do not matter" in broken(check_blend(wrong))


def test_another_precision_is_rejected(mutant, broken):
    wrong = mutant(Realignment, law=lambda self, q, p0: Realignment(self.lam).law(q.double(), p0.double()))
    assert broken(check_blend(wrong)) == ["single precision is kept, and is enough"]


def test_refusals():
    for lam in (math.nan, math.inf):
        with pytest.raises(UserError, match="a number expected"):
            Realignment(lam)
    with pytest.raises(UserError, match="no next token in common"):
        Realignment().law(torch.tensor([0.0, -np.inf]), torch.tensor([-np.inf, 0.0]))
    assert method.sampler("realignment:1.5") == Realignment(1.5)
