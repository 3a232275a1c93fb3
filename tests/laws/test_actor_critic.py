"""Laws of the actor-critic: every critic is unbiased at lam 1, the exact one at every lam, none below gamma 1."""

from dataclasses import replace

import pytest
import torch

from klbench.batch import Batch
from klbench.laws import WORLDS, check_objective, expected_gradient, stated_gradient
from klbench.objectives.actor_critic import ActorCritic

WORLD = WORLDS[0]
BETA = 0.7


def logits_of(world):
    return world.log_p0 + 0.5 * world.rewards.sin()


def exact(world, logits, beta, gamma=1.0):
    """The critic that is V of the policy: the mean, over the answers through a prefix, of what is still paid, discounted."""
    every = world.policy(logits).enumerate()
    paid = -beta * (every.log_prob - world.policy(world.log_p0).enumerate().log_prob)
    last = every.mask.sum(1) - 1
    paid[:, torch.arange(len(last)), last] += world.rewards
    gain = torch.zeros_like(paid)
    for t in reversed(range(world.length)):
        gain[..., t] = paid[..., t] + (gamma * gain[..., t + 1] if t + 1 < world.length else 0)
    weight = (every.log_prob.sum(2).exp()[..., None] * every.mask)[..., None] * world.features  # [P, S, T, D]
    critic = (weight * gain[..., None]).sum((0, 1, 2)) / weight.sum((0, 1, 2)).clamp(min=1e-300)
    return {"critic": critic.requires_grad_()}


def wild(world):
    width = world.features.shape[3]
    return {"critic": torch.randn(width, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()}


def off(objective, world, state):
    """Relative distance to -grad J."""
    found = expected_gradient(objective, world, logits_of(world), BETA, state)
    wanted = stated_gradient(ActorCritic(), world, logits_of(world), BETA)
    return float((found - wanted).norm() / wanted.norm())


def test_laws_hold(broken):
    assert broken(check_objective(ActorCritic())) == []


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("lam, wild_is_off", [(1.0, False), (0.95, True), (0.0, True)])
def test_the_exact_critic_is_unbiased_at_every_lam(world, lam, wild_is_off):
    one = replace(world, draws=1)
    assert off(ActorCritic(lam), one, exact(one, logits_of(one), BETA)) < 1e-7
    assert (off(ActorCritic(lam), one, wild(one)) > 5e-3) == wild_is_off
    assert wild_is_off or off(ActorCritic(lam), one, wild(one)) < 1e-7


@pytest.mark.parametrize("lam", [1.0, 0.0])
@pytest.mark.parametrize("discounted", [False, True])
def test_a_discount_is_biased_with_either_critic(lam, discounted):
    one = replace(WORLD, draws=1)
    assert off(ActorCritic(lam, gamma=0.9), one, exact(one, logits_of(one), BETA, 0.9 if discounted else 1.0)) > 1e-2


def returns(batch, beta, state, shift=False, every=False, whole=False, attached=False):
    """The loss at gamma = lam = 1 with its choices open, without the critic's own part."""
    value = (batch.features @ state["critic"]).detach() * batch.mask
    if shift:  # the value behind the token, which depends on it
        value = torch.cat([value[..., 1:], torch.zeros_like(value[..., :1])], 2)
    u = batch.log_q - batch.log_p0
    last = torch.nn.functional.one_hot(batch.mask.sum(2) - 1, batch.mask.shape[2])
    paid = batch.reward[..., None] * (batch.mask if every else last) - beta * (u if attached else u.detach())
    paid = paid * batch.mask
    ahead = paid.sum(2, keepdim=True).expand_as(paid) if whole else paid.flip(2).cumsum(2).flip(2)
    return -batch.total((ahead - value) * batch.log_q).mean(), state


@pytest.mark.parametrize(
    "choice, right", [({}, True), ({"whole": True}, True), ({"shift": True}, False), ({"every": True}, False), ({"attached": True}, False)]
)
def test_mutants_are_rejected(mutant, choice, right):
    # paid for the past too, a token only gets noise
    gap = off(mutant(ActorCritic, loss=lambda self, *given: returns(*given, **choice)), WORLD, wild(WORLD))
    assert gap < 1e-7 if right else gap > 1e-2


def test_a_wrong_beta_is_rejected(mutant, broken):
    wrong = mutant(ActorCritic, loss=lambda self, batch, beta, state: ActorCritic().loss(batch, beta * 1.1, state))
    assert broken(check_objective(wrong))


def answer(s, logits, features=True):
    """A batch of one draw: the answer s of WORLD under the policy of these logits."""
    every, prior = WORLD.policy(logits).enumerate(), WORLD.policy(WORLD.log_p0).enumerate()
    return Batch(
        every.tokens[None, [s]],
        every.mask[None, [s]],
        every.log_prob[:, [s]],
        prior.log_prob[:, [s]],
        WORLD.rewards[:, [s]],
        torch.zeros(1, 1),
        features=WORLD.features[:, [s]] if features else None,
    )


def expected(objective, logits, state, beta):
    chance = logits.detach().softmax(1)[0]
    return sum(chance[s] * objective.loss(answer(s, logits), beta, state)[0] for s in range(4))


def test_no_noise_at_the_target_with_the_exact_critic():
    logits = WORLD.log_target(0.4).requires_grad_()
    state = exact(WORLD, logits.detach(), 0.4)
    for s in range(4):
        for lam in (0.0, 0.95, 1.0):
            (gradient,) = torch.autograd.grad(ActorCritic(lam).loss(answer(s, logits), 0.4, state)[0], logits)
            assert float(gradient.norm()) < 1e-12


def critic_gradient(objective, state):
    (gradient,) = torch.autograd.grad(expected(objective, logits_of(WORLD), state, BETA), state["critic"])
    return float(gradient.norm())


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_the_critic_rests_at_the_exact_value(mutant, lam):
    state = exact(WORLD, logits_of(WORLD), BETA)
    assert critic_gradient(ActorCritic(lam), state) < 1e-12
    assert critic_gradient(ActorCritic(lam), {"critic": (state["critic"] + 0.1).detach().requires_grad_()}) > 1e-2

    def mean_over_tokens(self, batch, beta, state):
        loss, state = ActorCritic(lam).loss(batch, beta, state)
        return loss / batch.mask.sum(), state

    assert critic_gradient(mutant(ActorCritic, loss=mean_over_tokens), state) > 1e-3


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_training_both_ends_at_the_target(lam):
    objective, logits, beta = ActorCritic(lam), WORLD.log_p0.clone().requires_grad_(), 0.5
    state = objective.init(1, WORLD.features.shape[3])
    adam = torch.optim.Adam([{"params": [logits]}, {"params": [state["critic"]], "lr": 0.1}], lr=0.05)
    for _ in range(200):
        adam.zero_grad()
        expected(objective, logits, state, beta).backward()
        adam.step()
    q = logits.detach().log_softmax(1)
    assert float((q.exp() * (q - WORLD.log_target(beta))).sum()) < 0.02
    assert float((q.exp() * (q - WORLD.log_p0)).sum()) > 0.1


def test_gae_by_hand():
    """Two tokens of which one more is masked: V = 1, 2; log q/p0 = .5 each, beta 2, r 3: paid -1 and 2."""
    log_q = torch.tensor([-1.0, -1.0, 0.0]).double().reshape(1, 1, 3).requires_grad_()
    mask = torch.tensor([True, True, False]).reshape(1, 1, 3)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]).double().reshape(1, 1, 3, 2)
    reward = torch.full((1, 1), 3.0).double()
    batch = Batch(torch.zeros(1, 1, 3).long(), mask, log_q, log_q.detach() - 0.5 * mask, reward, reward * 0)
    state = {"critic": torch.tensor([1.0, 2.0]).double().requires_grad_()}
    loss, _ = ActorCritic(lam=0.5, gamma=0.5).loss(replace(batch, features=features), 2.0, state)
    by_policy, by_critic = torch.autograd.grad(loss, [log_q, state["critic"]])
    # d = -1 + .5 * 2 - 1 = -1 and 2 - 2 = 0, so A = -1 and 0
    assert by_policy.flatten().tolist() == [1.0, 0.0, 0.0] and by_critic.tolist() == [2.0, 0.0]


def test_features_are_needed():
    with pytest.raises(ValueError, match="features"):
        ActorCritic().loss(answer(0, WORLD.log_p0, features=False), 1.0, ActorCritic().init(1, 3))
