"""Where training ends on a table of a few answers: with exact gradients, and with sampled ones.

    exact     Adam along E_groups[grad loss], all groups listed (klbench.laws.expected_gradient)
    sampled   Adam along grad loss of K fresh draws a step, the objective's memory as it goes

A method that declares p* or a closed form has to end there, and one whose closed form is another than p* not at p*. An optimum without
mass on some answers is approached and never reached: what is left outside of it is measured, and the distance of the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from klbench.laws import Answers, Law, World, expected_gradient, fresh_state, optimum, settled_state
from klbench.method import AbstractStatefulObjective, Objective

WORLD: Final = World(counts=((1, 2, 3),), reward=((0.4, -0.3, 1.1),), draws=2, length=2)
BETA: Final = 0.7
NEAR: Final = 0.02  # nats
STEPS: Final = {"exact": 120, "sampled": 400}
RATE: Final = 0.1  # Adam's, falling to 0 along half a cosine
DRAWS: Final = 32  # K of a sampled group


@final
@dataclass(frozen=True)
class Ending:
    """Nats at the end of training. own: to the declared optimum, None where none is.  target: to p*.  outside: the mass on answers that the
    declared optimum has not; `own` is then that of the rest.  apart: from the declared optimum to p*, inf where that leaves answers out.
    """

    own: float | None
    target: float
    outside: float
    apart: float

    @property
    def arrived(self) -> bool:
        """At the declared optimum, within NEAR."""
        return self.own is not None and self.own < NEAR and self.outside < NEAR


def _kl(log_q: Tensor, log_p: Tensor) -> float:
    q = log_q.exp()
    return float(torch.where(q > 0, q * (log_q - log_p), 0.0).sum(1).mean())


def trained(objective: Objective, how: str, beta: float = BETA, seed: int = 0, world: World = WORLD, steps: int | None = None) -> Tensor:
    """[P, S] log-probabilities at the end. how: "exact" or "sampled"."""
    logits = world.log_p0.clone().requires_grad_()
    many = steps or STEPS[how]
    state = settled_state(objective, world, beta) if how == "exact" else fresh_state(objective, world)
    adam = torch.optim.Adam([logits], lr=RATE, betas=(0.9, 0.95))
    beside = [t for t in (state or {}).values() if t.requires_grad] if how == "sampled" else []
    critic = torch.optim.Adam(beside, lr=getattr(objective, "state_lr", RATE)) if beside else None
    generator = torch.Generator().manual_seed(seed)
    for step in range(many):
        for group in adam.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / many))
        if how == "exact":
            logits.grad = expected_gradient(objective, world, logits, beta, state)
        else:
            adam.zero_grad()
            answers = Answers(objective, world, logits)
            own = answers.own(DRAWS)
            laws = torch.stack([world.log_p0.exp(), logits.detach().softmax(1)])
            d = torch.cat([_drawn(law, int((own == mine).sum()), generator) for mine, law in zip((False, True), laws, strict=True)], 1)
            batch = answers.batch(d)
            if isinstance(objective, AbstractStatefulObjective):
                assert state is not None
                loss, after = objective.loss(batch, beta, state)
                state = {k: v if state[k].requires_grad else v.detach() for k, v in after.items()}
            else:
                loss = objective.loss(batch, beta)
            if critic is not None:
                critic.zero_grad()
            loss.backward()
            if critic is not None:
                critic.step()
        adam.step()
    return logits.detach().log_softmax(1)


def _drawn(law: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """[P, draws] answers by number."""
    return torch.multinomial(law, draws, replacement=True, generator=generator) if draws else torch.zeros(len(law), 0, dtype=torch.int64)


def ending(objective: Objective, how: str, beta: float = BETA, seed: int = 0) -> Ending:
    """Trains and measures. A sampled run has groups of DRAWS, which some optima depend on."""
    world = WORLD if how == "exact" else World(WORLD.counts, WORLD.reward, DRAWS, WORLD.length)
    log_q, target, best = trained(objective, how, beta, seed, world), world.log_target(beta), optimum(objective, world, beta)
    if best is None:
        return Ending(None, _kl(log_q, target), 0.0, math.nan)
    inside = best > -math.inf
    kept = log_q.masked_fill(~inside, -math.inf)
    mass = kept.logsumexp(1, keepdim=True)
    own = _kl(kept - mass, torch.where(inside, best, 0.0))
    return Ending(own, _kl(log_q, target), float((1 - mass.exp()).mean()), _kl(best, target))


def check_ending(objective: Objective) -> tuple[Law, ...]:
    """The laws on where training ends; none for a method that declares no optimum."""
    if objective.optimum == "none":
        return ()
    laws = []
    for how in STEPS:
        found = ending(objective, how)
        assert found.own is not None
        gap = max(found.own, found.outside)
        laws.append(
            Law(f"training with {how} gradients ends at the declared optimum", found.arrived, gap, "nats to it, or mass outside it")
        )
        if objective.optimum == "own":
            short = found.target > NEAR or found.apart < 2 * NEAR
            laws.append(Law(f"training with {how} gradients does not end at the posterior", short, found.target, "nats to the posterior"))
    return tuple(laws)
