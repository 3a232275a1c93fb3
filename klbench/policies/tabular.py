"""A softmax table over every answer: the policy on which laws are proved, because every expectation over it is a finite sum.

    q(x | c) = exp(l_cx) / sum_y exp(l_cy)          x: each sequence of at most T tokens over V words
    q(x_t | c, x_<t) = M_t+1(x) / M_t(x)            M_t(x): mass of the sequences that share the first t tokens with x

With an `eos`, a sequence ends at its first one (counted) or is cut at T; behind the end the row is filled with `eos` and masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Final, final

import torch
from torch import Tensor

from klbench.errors import UserError
from klbench.target import Draws

MOST: Final = 4096  # sequences; the prefix table holds T times the square of it


@lru_cache(maxsize=32)
def sequences(vocabulary: int, length: int, eos: int | None = None) -> tuple[Tensor, Tensor]:
    """All S answers in lexicographic order: tokens [S, T] int64 and mask [S, T] bool. Raises UserError when S > 4096."""
    if vocabulary < 2 or length < 1 or not (eos is None or 0 <= eos < vocabulary):
        raise UserError(f"vocabulary >= 2, length >= 1 and eos among the words expected: {vocabulary}, {length}, {eos}")
    going = vocabulary if eos is None else vocabulary - 1
    if sum(going**t for t in range(length)) * (vocabulary - going) + going**length > MOST:
        raise UserError(f"a table holds at most {MOST} answers; {vocabulary} words at length {length} are more")
    rows: list[tuple[int, ...]] = []
    for row in product(range(vocabulary), repeat=length):
        end = length if eos is None or eos not in row else row.index(eos) + 1
        if all(word == eos for word in row[end:]):  # the one filling of each ended sequence
            rows.append(row)
    tokens = torch.tensor(rows, dtype=torch.int64)
    if eos is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    ended = (tokens == eos).cumsum(1)
    return tokens, (ended - (tokens == eos).long()) == 0


@lru_cache(maxsize=32)
def _shared(vocabulary: int, length: int, eos: int | None) -> Tensor:
    """[T + 1, S, S] bool: whether two answers agree in their first t tokens."""
    tokens, _ = sequences(vocabulary, length, eos)
    agree = tokens[:, None, :] == tokens[None, :, :]
    ones = torch.ones_like(agree[..., :1])
    return torch.cat([ones, agree.long().cumprod(2).bool()], 2).permute(2, 0, 1)


@lru_cache(maxsize=32)
def _prefixes(vocabulary: int, length: int, eos: int | None) -> tuple[Tensor, Tensor]:
    """The M beginnings of answers by number, the empty one being 0: which one more word makes of each, [M, V] int64, -1 for none; and
    those of each answer, [S, T + 1], that of its end repeated.
    """
    tokens, mask = sequences(vocabulary, length, eos)
    bodies = [tuple(row[: int(kept.sum())]) for row, kept in zip(tokens.tolist(), mask, strict=True)]
    number = {prefix: i for i, prefix in enumerate(dict.fromkeys(x[:t] for t in range(length + 1) for x in bodies))}
    longer = torch.full((len(number), vocabulary), -1)
    for prefix, i in number.items():
        if prefix:
            longer[number[prefix[:-1]], prefix[-1]] = i
    return longer, torch.tensor([[number[x[:t]] for t in range(length + 1)] for x in bodies])


@dataclass(frozen=True, eq=False)
class Everything:
    """Every answer: tokens, mask [S, T]; log_prob [P, S, T] of each token given those before it, 0 where masked, with gradient."""

    tokens: Tensor
    mask: Tensor
    log_prob: Tensor


@final
@dataclass(frozen=True, eq=False)
class Tabular:
    """logits [P, S], one row a prompt, in the order of `sequences`; they may require a gradient, and keep their dtype and device.

    Raises UserError when the shape is not [P, S].
    """

    logits: Tensor
    prompts: tuple[str, ...]
    vocabulary: int
    length: int
    eos: int | None = None
    name: str = "tabular"

    def __post_init__(self) -> None:
        wanted = (len(self.prompts), len(sequences(self.vocabulary, self.length, self.eos)[0]))
        if tuple(self.logits.shape) != wanted:
            raise UserError(f"logits: {wanted} (prompts, answers) expected, got {tuple(self.logits.shape)}")

    def enumerate(self) -> Everything:
        """All answers with their per-token log-probabilities; the sum over tokens is log_softmax of the logits."""
        tokens, mask = sequences(self.vocabulary, self.length, self.eos)
        mass = self._prefix_mass()
        return Everything(tokens, mask, (mass[1:] - mass[:-1]).permute(1, 2, 0))

    def kl_token(self, prior: Tabular) -> Tensor:
        """[P, S, T] KL(q(.|x_<t) || p0(.|x_<t)) at each prefix of each answer, nats, with gradient; 0 where masked."""
        share = _shared(self.vocabulary, self.length, self.eos)[:-1]
        gap = (self.enumerate().log_prob - prior.enumerate().log_prob.detach()).permute(2, 0, 1)  # [T, P, S]
        weight = (self.logits[None, :, None, :] - self._prefix_mass()[:-1, :, :, None]).exp() * share[:, None]
        return (weight * gap[:, :, None, :]).sum(3).permute(1, 2, 0)

    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int) -> Draws:
        """Independent answers, cut at max_new_tokens; the same seed gives the same draws. Raises UserError beyond the table's length."""
        if not 1 <= max_new_tokens <= self.length:
            raise UserError(f"this table answers in 1 to {self.length} tokens, not {max_new_tokens}")
        generator = torch.Generator().manual_seed(seed)
        every, rows = self.enumerate(), self._rows(prompts)
        law = self.logits.detach()[rows].double().softmax(1).cpu()
        picked = torch.multinomial(law, draws, replacement=True, generator=generator)  # [P, N]
        log_q = every.log_prob.detach().cpu()[rows[:, None], picked][..., :max_new_tokens]
        return Draws(every.tokens[picked][..., :max_new_tokens], every.mask[picked][..., :max_new_tokens], log_q.float())

    def extend(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor, new: int, seed: int) -> Draws:
        """Draws [P, N, t] with up to `new` more tokens each: a whole answer that begins with each draw, cut after t + new tokens.

        Raises UserError beyond the table's length, and for a draw that no answer begins with.
        """
        P, N, t = tokens.shape
        if not 1 <= t + new <= self.length:
            raise UserError(f"this table answers in 1 to {self.length} tokens, not {t + new}")
        uniform = torch.rand(P * N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        every, kept = sequences(self.vocabulary, self.length, self.eos)
        longer, along = _prefixes(self.vocabulary, self.length, self.eos)
        law = self.logits.detach().double().softmax(1).cpu()
        fresh = torch.cat([torch.ones_like(kept[:, :1]), kept], 1)
        mass = law.new_zeros(len(law), len(longer)).index_add(1, along[fresh], (law[:, :, None] * fresh)[:, fresh])
        # a law a prefix, not a draw: there are many draws and few prefixes
        number, back = self._at(prompts, tokens, mask)[..., t].flatten().unique(return_inverse=True)
        given = law[number // len(longer)] * (along[:, t] == (number % len(longer))[:, None])
        cumulative = given.cumsum(1)
        cumulative = cumulative / cumulative[:, -1:] + torch.arange(len(given))[:, None]
        point = back + uniform * (1 - 2**-30)  # a sum with `back` must not round up to the next law
        picked = (torch.searchsorted(cumulative.flatten(), point, right=True) - back * len(every)).view(P, N)
        said = mass[self._rows(prompts)[:, None, None], along[picked]].log().diff(dim=2)[..., : t + new]
        said[..., :t] = 0.0
        return Draws(every[picked][..., : t + new], kept[picked][..., : t + new], said.float())

    def states(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, T + 1, D] one-hot of the prompt and the prefix before each token and of the whole: a value on them can be any function.

        Raises UserError for a draw that no answer begins with.
        """
        width = len(self.prompts) * len(_prefixes(self.vocabulary, self.length, self.eos)[0])
        at = self._at(prompts, tokens, mask)
        return torch.zeros(*at.shape, width).scatter_(3, at[..., None], 1.0)

    def _at(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, T + 1] the number of each prefix plus M times its prompt's. Raises UserError for a draw that no answer begins with."""
        longer, _ = _prefixes(self.vocabulary, self.length, self.eos)
        word = tokens.clamp(0, self.vocabulary - 1)
        at = torch.zeros(*tokens.shape[:2], tokens.shape[2] + 1, dtype=torch.int64)
        for t in range(tokens.shape[2]):
            here, going = at[..., t], mask[..., t]
            after = longer[here, word[..., t]]
            stray = torch.where(going, (after < 0) | (word != tokens)[..., t], (longer[here] >= 0).any(-1))
            if bool(stray.any()):
                raise UserError(f"no answer of this table begins with the tokens {tokens[stray][0, : t + 1].tolist()}")
            at[..., t + 1] = torch.where(going, after, here)
        return at + self._rows(prompts)[:, None, None] * len(longer)

    def _beginning(self, every: Everything, tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, S] bool: which answers begin with each draw. Raises UserError for a draw that none begins with."""
        length = tokens.shape[2]
        filled = tokens if self.eos is None else torch.where(mask, tokens, self.eos)
        same = (filled[:, :, None, :] == every.tokens[:, :length]).all(3) & (mask[:, :, None, :] == every.mask[:, :length]).all(3)
        if not bool(same.any(2).all()):
            raise UserError(f"no answer of this table begins with the tokens {filled[~same.any(2)][0].tolist()}")
        return same

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        """[P][N] texts: token ids with blanks between them, EOS left out."""
        return [
            [
                " ".join(str(int(t)) for t, m in zip(row, keep, strict=True) if m and int(t) != self.eos)
                for row, keep in zip(some, kept, strict=True)
            ]
            for some, kept in zip(tokens, mask, strict=True)
        ]

    def log_prob(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, T] with gradient; T may be below the table's length. Raises UserError for a sequence that no answer begins with."""
        every, length = self.enumerate(), tokens.shape[2]
        if length > self.length:
            raise UserError(f"this table answers in at most {self.length} tokens, not {length}")
        first = (
            self._beginning(every, tokens, mask).int().argmax(2)
        )  # any answer with that beginning: the tokens asked for have the same log-probability in all
        return every.log_prob[self._rows(prompts)[:, None], first][..., :length]

    def _rows(self, prompts: Sequence[str]) -> Tensor:
        missing = [p for p in prompts if p not in self.prompts]
        if missing:
            raise UserError(f"this table has no prompt {missing[0]!r}")
        return torch.tensor([self.prompts.index(p) for p in prompts])

    def _prefix_mass(self) -> Tensor:
        """[T + 1, P, S] log-mass of the answers that share the first t tokens with each answer, unnormalised."""
        share = _shared(self.vocabulary, self.length, self.eos)
        return self.logits[None, :, None, :].masked_fill(~share[:, None], -torch.inf).logsumexp(3)
