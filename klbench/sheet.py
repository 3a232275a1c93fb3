"""The sheet of one target: draws of the prior and of policies, and what each policy says of each. It grows; nothing is drawn twice.

    law          draws                                     said by policy q: `Rows`
    the bank     N0 prior draws, n0 of them scored         log q, log p0, control variates, computed when first asked for
    a policy     N of its own                              the same; by itself and, for a pool, by the others

A figure of its own reads two entries (own draws and bank, said by q); a pooled one those of q on every member's draws, and the members'
densities on every row: linear in policies, since a pool has at most eight members. Shapes [P prompts, N draws]; nats; float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klbench import estimate, streams
from klbench.bank import Bank
from klbench.errors import UserError
from klbench.estimate import Array, Estimate
from klbench.method import AbstractSampler, AbstractSteering, RewardLaw
from klbench.models import Opened
from klbench.policies.causal_lm import CausalLM, token_laws
from klbench.pool import Pool, Stratum
from klbench.rows import Rows
from klbench.target import Draws, Policy, Steerable, TiltedPrior, WithoutDensity

PRIOR_CHUNK: Final = 256  # prior draws a prompt that a sampler is fed at a time
MOST_PRIOR_DRAWS: Final = 65536  # a prompt; a sampler that needs more is refused
NOT_DENSE: Final = (WithoutDensity, AbstractSampler, AbstractSteering)  # an estimated density weights no mixture
MEMBERS: Final = 8  # policies of a pool, at most (DESIGN.md section 3)


@dataclass
class Law:
    """The draws of one law so far. prior_draws: what a sampler spent on them; said: by policy, of the first draws."""

    policy: Opened | None  # None: the prior's bank
    seed: int
    draws: Draws | None = None
    texts: list[list[str]] = field(default_factory=list)
    reward: Array = field(default_factory=lambda: np.zeros((0, 0)))
    log_p0: Array | None = None  # where no pass is needed to know it
    prior_draws: int = 0
    chunks: int = 0
    said: dict[str, Rows] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return 0 if self.draws is None else self.draws.tokens.shape[1]


@final
class Sheet:
    """One target's draws. `bank` is what the prior's draws are; its first `scored` are said by every policy, the rest speak for log Z."""

    def __init__(self, prior: Policy, target: TiltedPrior, prompts: Sequence[str], bank: Bank, scored: int, length: int):
        self.prior, self.target, self.prompts, self.length = prior, target, list(prompts), length
        self.laws: dict[str, Law] = {}
        self.tops = target.ceiling(prompts)
        self.set_bank(bank, scored)

    def set_bank(self, bank: Bank, scored: int) -> None:
        """A longer bank that begins with the present one, or more of it scored."""
        old = self.laws.get("")
        self.posterior: dict[str, Estimate] | None = None  # its own figures, the same for every policy (klbench.score.of_target)
        self.bank, n0 = bank, min(scored, bank.reward.shape[1])
        tokens, mask = torch.from_numpy(bank.tokens[:, :n0]).long(), torch.from_numpy(bank.mask[:, :n0])
        self.laws[""] = Law(
            None, 0, Draws(tokens, mask, torch.zeros(0)), reward=bank.reward[:, :n0], log_p0=bank.log_p0[:, :n0],
            said={} if old is None else old.said,
        )  # fmt: skip

    @property
    def rest(self) -> Array:
        """[P, M] rewards of the bank's unscored draws."""
        return self.bank.reward[:, self.laws[""].size :]

    def add(self, name: str, policy: Opened, draws: int, seed: int) -> None:
        """A policy by name with its first draws."""
        self.laws[name] = Law(policy, seed)
        self.draw(name, draws)

    def draw(self, name: str, draws: int) -> None:
        """More draws of a policy; chunk j depends on the seed and j alone."""
        law = self.laws[name]
        seed = law.seed if not law.chunks else streams.seed(law.seed, f"more/{law.chunks}")
        law.chunks += 1
        if isinstance(law.policy, AbstractSampler):
            new, reward, used = picked(law.policy, self.prior, self.target, self.prompts, self.bank, draws, self.length, seed)
            log_p0 = new.log_q.double().sum(2).numpy()
            law.log_p0 = log_p0 if law.log_p0 is None else np.concatenate([law.log_p0, log_p0], 1)
            law.prior_draws += used
            texts = self.prior.decode(new.tokens, new.mask)
        elif isinstance(law.policy, AbstractSteering):
            if not isinstance(self.prior, Steerable):
                raise UserError(f"{name}: {self.prior.name} cannot go on from where a draw stands (no extend, no states)")
            steered = law.policy.steer(self.prior, self.target, self.prompts, draws, self.length, seed)
            new, texts = steered.draws, self.prior.decode(steered.draws.tokens, steered.draws.mask)
            law.prior_draws += math.ceil(steered.prior_tokens / self.length)  # in whole draws' worth of tokens
            reward = self.target.rewards(self.prompts, texts)
        else:
            assert law.policy is not None
            new = law.policy.sample(self.prompts, draws, self.length, seed)
            if isinstance(law.policy, WithoutDensity):
                new = replace(new, log_q=torch.zeros(new.tokens.shape))
            texts = law.policy.decode(new.tokens, new.mask)
            reward = self.target.rewards(self.prompts, texts)
        reward = reward.astype(np.float32).astype(np.float64)  # as the bank's are: a sampler's density depends on which rewards are equal
        law.texts = [[*a, *b] for a, b in zip(law.texts or [[] for _ in texts], texts, strict=True)]
        law.reward = reward if law.draws is None else np.concatenate([law.reward, reward], 1)
        law.draws = new if law.draws is None else _joined(law.draws, new)

    def why_none(self, name: str) -> str:
        """Why a policy has no density, "" where it has one."""
        policy = self.laws[name].policy
        return policy.reason if isinstance(policy, WithoutDensity) else policy.why if isinstance(policy, AbstractSteering) else ""

    def rows(self, name: str, law: str) -> Rows:
        """What policy `name` says of the draws of `law` ("" is the bank's scored part); computed once for each draw."""
        at = self.laws[law]
        known = at.said.get(name)
        done = 0 if known is None else known.log_q.shape[1]
        if done < at.size:
            new = self._say(name, law, slice(done, at.size))
            known = at.said[name] = new if known is None else Rows.joined(known, new)
        assert known is not None
        return known if known.log_q.shape[1] == at.size else known.part(slice(0, at.size))

    def _say(self, name: str, law: str, part: slice) -> Rows:
        policy, at = self.laws[name].policy, self.laws[law]
        assert policy is not None and at.draws is not None and not isinstance(policy, WithoutDensity | AbstractSteering)
        reward = at.reward[:, part]
        if isinstance(policy, AbstractSampler):
            log_p0 = self.rows(law, law).log_p0 if at.log_p0 is None else at.log_p0
            return self._by_ratio(policy, log_p0[:, part], reward)
        drawn = at.draws.log_q[:, part] if name == law else None
        return rows_of(policy, self.prior, self.prompts, at.draws.tokens[:, part], at.draws.mask[:, part], reward, drawn)

    def _by_ratio(self, sampler: AbstractSampler, log_p0: Array, reward: Array, keep: NDArray[np.bool_] | None = None) -> Rows:
        """Rows of a sampler, whose density is a function of the reward's law: that of the bank [N0], or of the part of it in `keep`."""
        bank = self.bank.reward if keep is None else self.bank.reward[:, keep]
        found = zip(reward, bank, self.tops, strict=True)
        ratio = np.stack([sampler.log_ratio(r, RewardLaw.of(b), self.target.beta, float(top)) for r, b, top in found])
        return Rows.of_ratio(log_p0, reward, ratio).rounded()

    def pool(self, name: str, members: Sequence[str] = ()) -> Pool:
        """The strata of one policy: bank, own draws, and those of the pool's other members."""
        others = [m for m in members if m != name]
        laws = ["", name, *others]
        density = {m: np.concatenate([self.rows(m, law).log_q for law in laws], 1) for m in others}
        policy = self.laws[name].policy

        def made(keep: NDArray[np.bool_] | None, refits: Sequence[Pool] = ()) -> Pool:
            bank, own, *rows = (self.rows(name, law) for law in laws)
            if isinstance(policy, AbstractSampler) and keep is not None:
                bank, own, *rows = (self._by_ratio(policy, x.log_p0, x.reward, keep) for x in (bank, own, *rows))
            strata = [Stratum(said, density[m]) for m, said in zip(others, rows, strict=True)]
            return Pool(own, bank, self.rest, self.tops, strata, refits)

        if not isinstance(policy, AbstractSampler):
            return made(None)
        block = np.concatenate([estimate.blocks_of(self.laws[""].size), estimate.blocks_of(self.rest.shape[1])])
        return made(None, [made(block != b) for b in range(estimate.BLOCKS)])

    def measured(self, name: str) -> bool:
        """Whether a policy's distance to the posterior is an estimate: it has a density and does not draw the posterior itself."""
        policy = self.laws[name].policy
        return not self.why_none(name) and not (isinstance(policy, AbstractSampler) and policy.draws_target)

    def members(self, names: Sequence[str], pilot: int, seed: int, most: int = MEMBERS) -> list[str]:
        """The policies of a pool: all that know their density, or the `most` nearest to the posterior by KL(q||p0) - E_q r/beta on a pilot.

        The pilot is drawn for this and enters no figure: choosing by the draws that are then averaged would bias them. A sampler's
        density is an estimate, with which no mixture may be weighted.
        """
        dense = [name for name in names if not isinstance(self.laws[name].policy, NOT_DENSE)]
        if len(dense) <= most:
            return dense
        found: dict[str, float] = {}
        for name in dense:
            policy = self.laws[name].policy
            trial = Sheet(self.prior, self.target, self.prompts, self.bank, 0, self.length)
            assert policy is not None
            trial.add(name, policy, pilot, streams.seed(seed, f"pilot/{name}"))
            rows = trial.rows(name, name)
            found[name] = float((rows.log_q - rows.log_p0 - self.target.tilt(rows.reward)).mean())
        return sorted(sorted(dense, key=lambda name: found[name])[:most], key=dense.index)


def _joined(a: Draws, b: Draws) -> Draws:
    return Draws(torch.cat([a.tokens, b.tokens], 1), torch.cat([a.mask, b.mask], 1), torch.cat([a.log_q, b.log_q], 1))


def rows_of(
    policy: Policy, prior: Policy, prompts: Sequence[str], tokens: Tensor, mask: Tensor, reward: Array, drawn: Tensor | None = None
) -> Rows:
    """What both models say of given sequences, rounded to float32. Policies without token laws get no control variates.

    drawn: log q of each token as the policy drew them, where it did (klbench.policies.causal_lm.token_laws says what for).
    Raises UserError that names the policy whose log-probabilities are not numbers.
    """
    if isinstance(policy, CausalLM) and isinstance(prior, CausalLM):
        laws = token_laws(policy, prior, prompts, tokens, mask, drawn)
        lq, l0, h, c, lost = (x.double().sum(2).numpy() for x in (laws.log_q, laws.log_p0, laws.entropy, laws.cross, laws.lost))
        with np.errstate(invalid="ignore"):  # -inf where a decoding cuts: the pool gives such rows no weight
            found = Rows(lq, l0, reward, -lq - h, -l0 - c, c - h, h, lost)
    else:
        lq, l0 = (p.log_prob(prompts, tokens, mask).double().sum(2).numpy() for p in (policy, prior))
        with np.errstate(invalid="ignore"):
            found = Rows.of_ratio(l0, reward, lq - l0)
            found = replace(found, log_q=lq)
    for name, says in ((policy.name, lq), (prior.name, l0)):
        if np.isnan(says).any():
            raise UserError(f"{name}: its log-probabilities are not numbers (NaN); are its weights whole?")
    return found.rounded()


def picked(
    sampler: AbstractSampler, prior: Policy, target: TiltedPrior, prompts: Sequence[str], bank: Bank, draws: int, length: int, seed: int
) -> tuple[Draws, Array, int]:
    """`draws` draws a prompt of a sampler, from as many fresh prior draws as it asks for; their rewards; prior draws used in all."""
    tops = target.ceiling(prompts)
    parts: list[Draws] = []
    kept: list[Array] = []
    spent = 0
    for p, prompt in enumerate(prompts):
        need = sampler.cost(RewardLaw.of(bank.reward[p]), target.beta, float(tops[p])) * draws
        tokens, masks, logs, rewards = [], [], [], []
        chunk = 0
        while True:
            more = PRIOR_CHUNK * max(1, int(min(need * 1.15, MOST_PRIOR_DRAWS) / PRIOR_CHUNK)) if not chunk else PRIOR_CHUNK
            fresh = prior.sample([prompt], more, length, streams.seed(seed, f"{prompt}/{chunk}"))
            chunk += 1
            tokens.append(fresh.tokens[0])
            masks.append(fresh.mask[0])
            logs.append(fresh.log_q[0])
            rewards.append(target.rewards([prompt], prior.decode(fresh.tokens, fresh.mask))[0])
            reward = np.concatenate(rewards)
            try:
                index, used = sampler.pick(reward, target.beta, float(tops[p]), draws, streams.seed(seed, f"{prompt}/pick"))
            except UserError:
                if len(reward) >= MOST_PRIOR_DRAWS:
                    raise
                continue
            at = torch.from_numpy(np.asarray(index))
            parts.append(Draws(torch.cat(tokens)[at], torch.cat(masks)[at], torch.cat(logs)[at]))
            kept.append(reward[index])
            spent += used
            break
    every = (torch.stack([getattr(part, name) for part in parts]) for name in ("tokens", "mask", "log_q"))
    return Draws(*every), np.stack(kept), spent
