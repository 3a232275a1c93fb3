"""The posterior that every policy is measured against, and the contracts of what users bring: policies and rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, final, runtime_checkable

import numpy as np

from klbench.errors import UserError
from klbench.estimate import Array

if TYPE_CHECKING:  # a task and its reward are read without torch
    from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """N continuations of each of P prompts, EOS counted where there is one; on the CPU.

    tokens [P, N, T] int64, mask [P, N, T] bool, log_q [P, N, T] float32: log-probability of each token under the policy that drew it.
    """

    tokens: Tensor
    mask: Tensor
    log_q: Tensor


@runtime_checkable
class Policy(Protocol):
    """Anything that draws and scores: `log_prob` is the exact log-density of what `sample` draws, at temperature 1."""

    @property
    def name(self) -> str: ...

    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int) -> Draws:
        """`draws` independent continuations of each prompt; the same seed gives the same draws."""
        ...

    def log_prob(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, T] log-probability of each token given the prompt and the tokens before it; 0 where the mask is False."""
        ...

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        """[P][N] texts of draws: what a reward reads."""
        ...


@runtime_checkable
class Steerable(Policy, Protocol):
    """A policy that can go on from where a draw stands: what SMC, MCMC and controlled decoding steer."""

    def extend(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor, new: int, seed: int) -> Draws:
        """Draws [P, N, t] with up to `new` more tokens each, [P, N, t + new]: those that have ended (a mask False, or a stop) stay.

        log_q is of the new tokens, and 0 at the given ones.
        """
        ...

    def states(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, T + 1, D] float32 features of the prefix before each token and of the whole: what a value function is fitted on."""
        ...


@runtime_checkable
class Drawer(Protocol):
    """The half of a Policy that needs no probability. Of its draws, `log_q` is not read."""

    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int) -> Draws:
        """`draws` independent continuations of each prompt; the same seed gives the same draws."""
        ...

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        """[P][N] texts of draws: what a reward reads."""
        ...


@final
@dataclass(frozen=True, eq=False)
class WithoutDensity:
    """A policy that draws and whose probability of the prior's sequences nobody can compute; `reason` says why, for people.

    Its draws count in its own tokens, so `decode` is its own too: only its texts meet the prior. It is no Policy, as it has no log_prob.
    """

    drawer: Drawer
    reason: str

    @property
    def name(self) -> str:
        return str(getattr(self.drawer, "name", type(self.drawer).__name__))

    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int) -> Draws:
        """The drawer's draws."""
        return self.drawer.sample(prompts, draws, max_new_tokens, seed)

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        """The drawer's texts."""
        return self.drawer.decode(tokens, mask)


class Reward(Protocol):
    """f(prompts, completions) -> one float a completion: TRL's signature, the two lists of equal length."""

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]: ...


@dataclass(frozen=True)
class TiltedPrior:
    """p*(x|c) = p0(x|c) exp(r(c, x) / beta) / Z(c), the only place where a reward is divided by beta.

    reward_max: the declared ceiling of the reward, one number or one a prompt; infinite when nobody declared it, and then nothing
    that contains log Z can be certified. A moment target is one of these with reward lambda_c phi(x), beta = 1 and ceiling |lambda_c|.
    Raises UserError unless beta is finite and positive.
    """

    prior: Policy
    reward: Reward
    beta: float
    reward_max: float = math.inf
    ceilings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise UserError(f"beta must be finite and above 0, got {self.beta}")

    def ceiling(self, prompts: Sequence[str]) -> Array:
        """[P] reward ceiling of each prompt."""
        return np.array([self.ceilings.get(p, self.reward_max) for p in prompts], dtype=np.float64)

    def tilt(self, reward: Array, beta: float | None = None) -> Array:
        """log p*/p0 up to the constant: reward / beta, nats."""
        return np.asarray(reward, dtype=np.float64) / (self.beta if beta is None else beta)

    def rewards(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> Array:
        """[P, N] rewards of N completions a prompt, checked: one finite float each, none above the ceiling.

        Raises UserError that names the prompt and the completion, once, here and nowhere else.
        """
        return evaluate(self.reward, prompts, completions, self.ceiling(prompts))


def evaluate(reward: Reward, prompts: Sequence[str], completions: Sequence[Sequence[str]], ceiling: Array | None = None) -> Array:
    """[P, N] values of a reward (or of a gold reward or a feature, which have no ceiling to hold), checked at the one door."""
    widths = {len(row) for row in completions}
    if len(widths) > 1:
        raise ValueError(f"as many completions of each prompt expected, got {sorted(widths)}")
    flat_prompts = [p for p, row in zip(prompts, completions, strict=True) for _ in row]
    flat = [c for row in completions for c in row]
    top = np.full(len(prompts), math.inf) if ceiling is None else ceiling
    return _checked(reward, flat_prompts, flat, top).reshape(len(prompts), max(widths, default=0))


def _checked(reward: Reward, prompts: list[str], completions: list[str], ceiling: Array) -> Array:
    """Rewards of aligned prompts and completions as float64, or a UserError. `ceiling` [P] repeats over equal runs of completions."""
    name = getattr(reward, "__name__", type(reward).__name__)
    given = reward(prompts=prompts, completions=completions)
    try:
        values = np.array([math.nan if x is None else float(x) for x in given], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name} must return a list of floats: {error}") from None
    if len(values) != len(completions):
        raise UserError(f"reward {name} returned {len(values)} values for {len(completions)} completions")
    if len(values) == 0:
        return values
    top = np.repeat(ceiling, len(values) // len(ceiling))
    bad = ~np.isfinite(values) | (values > top + 1e-9 * np.maximum(1.0, np.abs(top)))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        what = f"above its declared maximum {top[i]:g}" if math.isfinite(values[i]) else "not a finite number"
        raise UserError(f"reward {name} gave {values[i]:g}, {what}, for prompt {prompts[i]!r} and completion {completions[i]!r}")
    return values
