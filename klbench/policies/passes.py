"""One causal model on rows of token ids: continuations drawn from its next-token laws, and logits along given ones.

Three layouts say the same to rounding:

- *cached* sampling: the rows' keys and values are computed once and shared by their K draws;
- *tree* scoring: a row and K continuations side by side, each continuation seeing the row and itself; one pass, with or without gradient;
- *plain*: a batch of whole sequences padded on the right, which no causal model can see. Slower, and right where the others are not:
  recurrent models, alibi, beyond a sliding window.

The first two need a decoder that takes position ids and attention masks as given. Whether a model does is decided by comparison with single
unpadded forwards, at loading and again at the first call of every larger shape; a model whose plain layout disagrees with them is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from klbench.errors import UserError

LOGITS = 6_000_000  # floats of logits held at once by a scoring pass: larger buffers cost page faults and gain nothing
LAYOUTS: Final = ("cached", "tree")
HALF: Final = (torch.bfloat16, torch.float16)

Rows = Sequence[list[int]]
Law = Callable[[Tensor], Tensor]


@final
class _Shared(DynamicLayer):
    """Keys and values of one layer in a buffer of the final length, which starts as the prompt's, repeated for its draws."""

    def __init__(self, keys: Tensor, values: Tensor, draws: int, room: int):
        super().__init__()
        prompts, heads, length, width = keys.shape
        self.buffers = []
        for part in (keys, values):
            buffer = part.new_empty(prompts * draws, heads, length + room, width)
            buffer.view(prompts, draws, heads, length + room, width)[:, :, :, :length] = part[:, None]
            self.buffers.append(buffer)
        self.length = length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = (b[:, :, :length] for b in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self.keys, self.values = (b[:, :, :end] for b in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


@final
@dataclass(frozen=True, eq=False)
class Shapes:
    """Sizes (path, row) at which a layout was compared with a plain pass: its longest sequence, and the columns of its widest row.

    What held at a size holds at smaller ones and what failed fails at larger ones: windows, position tables and biases are cut off there.
    """

    held: list[tuple[int, int]] = field(default_factory=list)
    failed: list[tuple[int, int]] = field(default_factory=list)

    def verdict(self, path: int, row: int) -> bool | None:
        """None where it has to be tried."""
        if any(path >= p and row >= r for p, r in self.failed):
            return False
        return True if any(path <= p and row <= r for p, r in self.held) else None


@final
@dataclass(frozen=True, eq=False)
class Passes:
    """A model and the layouts that may be tried on it. rows [P] of ids; continuations [P, K, T]; W: columns of the logits."""

    model: Any
    layouts: tuple[str, ...] = LAYOUTS
    shapes: dict[str, Shapes] = field(default_factory=lambda: {name: Shapes() for name in LAYOUTS})

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @cached_property
    def width(self) -> int:
        """W, the ids that the model can write."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def readable(self) -> int:
        """The ids that the model can read."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def hidden(self) -> int:
        """The width of the last hidden state, which the head reads."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @cached_property
    def context(self) -> int | None:
        """Positions that the model was built for; None where there is no such limit."""
        limit = getattr(self._config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @cached_property
    def window(self) -> int | None:
        """The shortest span of attention that the configuration names."""
        spans = [getattr(self._config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return min((s for s in spans if isinstance(s, int) and s > 0), default=None)

    @property
    def _config(self) -> Any:
        config = self.model.config
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    def sample(self, rows: Rows, uniform: Tensor, law: Law, stops: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """[P, K, T] tokens, mask and log-probabilities by inverse CDF at `uniform` [P, K, T].

        law: logits [R, W] to log-probabilities [R, V].  A sequence ends with its first stop; behind it the row is filled with stops[0].
        """
        size = max(map(len, rows)) + uniform.shape[2]
        known = self._verdict("cached", size, size)
        if known is not False:
            falling, at = _Falling(self, uniform, law, stops), _shortest(rows)
            last = (at + 1) * uniform.shape[1] - 1
            try:
                self._cached(rows, falling, slice(0) if known else slice(last, last + 1))
                if known is None:
                    said = self.alone(rows[at], falling.tokens[last])
                    known = self.agree(torch.cat(falling.heard), said[: len(falling.heard)])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever an architecture raises at a layout that it was not written for
                if known:
                    raise
                known = False
            self._learn("cached", size, size, known)
            if known:
                return falling.result()
        falling = _Falling(self, uniform, law, stops)
        self._uncached(rows, falling)
        return falling.result()

    def _cached(self, rows: Rows, falling: _Falling, witness: slice) -> None:
        """witness: sequences of [P K] whose logits are kept, to be compared."""
        P, K, T = falling.shape
        device = self.device
        ids, pad = self._padded(rows)
        length = ids.shape[1]
        real = torch.arange(length, device=device) >= pad[:, None]
        position = (torch.arange(length, device=device) - pad[:, None]).clamp(min=0)
        out = self.model(ids, attention_mask=real.long(), position_ids=position, use_cache=True, logits_to_keep=1)
        cache = Cache(layers=[_Shared(layer.keys, layer.values, K, T - 1) for layer in out.past_key_values.layers])
        logits = out.logits[:, -1].repeat_interleave(K, 0)
        seen = torch.cat([real.repeat_interleave(K, 0), real.new_ones(P * K, T)], 1).long()
        start = (length - pad).repeat_interleave(K)[:, None]
        for t in range(T):
            falling.heard.append(logits[witness])
            falling.take(t, logits)
            if t + 1 == T or not bool(falling.alive.any()):
                break
            step = self.model(
                falling.read[:, t : t + 1],
                attention_mask=seen[:, : length + t + 1],
                position_ids=start + t,
                past_key_values=cache,
                use_cache=True,
            )
            logits = step.logits[:, -1]

    def _uncached(self, rows: Rows, falling: _Falling) -> None:
        """Each distinct prefix is read anew at every token."""
        P, K, T = falling.shape
        which = torch.arange(P, device=self.device).repeat_interleave(K)[:, None]
        for t in range(T):
            prefix, back = torch.cat([which, falling.read[:, :t]], 1).unique(dim=0, return_inverse=True)
            texts = [rows[p] + new for p, *new in prefix.tolist()]
            falling.take(t, torch.cat([x[:, -1] for x in self._batches(texts, 1)])[back])
            if not bool(falling.alive.any()):
                break

    def logits(self, rows: Rows, tokens: Tensor) -> Tensor:
        """[P, K, T, W] next-token logits along continuations [P, K, T], float32; differentiable."""
        tokens = self._read(tokens.to(self.device))
        path = max(map(len, rows)) + tokens.shape[2]
        row = path + (tokens.shape[1] - 1) * (tokens.shape[2] - 1)
        known = self._verdict("tree", path, row)
        if known is not False:
            try:
                out = self._tree(rows, tokens)
                if known is None:
                    known = self.agree(out[_shortest(rows), -1].detach(), self.alone(rows[_shortest(rows)], tokens[_shortest(rows), -1]))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # as in sample
                if known:
                    raise
                known = False
            self._learn("tree", path, row, known)
            if known:
                return out
        return self.plain(rows, tokens)

    def _tree(self, rows: Rows, tokens: Tensor) -> Tensor:
        P, K, T = tokens.shape
        ids, pad = self._padded(rows)
        length, device = ids.shape[1], ids.device
        inner = tokens[:, :, :-1].reshape(P, K * (T - 1))
        order = torch.arange(length, device=device)
        position = torch.cat(
            [(order - pad[:, None]).clamp(min=0), ((length - pad)[:, None] + torch.arange(T - 1, device=device).repeat(K))], 1
        )
        branch = torch.cat([torch.full((length,), -1, device=device), torch.arange(K, device=device).repeat_interleave(T - 1)])
        depth = torch.cat([order, length + torch.arange(T - 1, device=device).repeat(K)])
        see = (depth[:, None] >= depth[None]) & ((branch[None] == -1) | (branch[:, None] == branch[None]))
        hidden = torch.arange(length + K * (T - 1), device=device) < pad[:, None]  # padding: seen by nobody but itself
        see = (see[None] & ~hidden[:, None, :]) | torch.eye(len(depth), dtype=torch.bool, device=device)
        dtype = self.model.dtype
        mask = torch.zeros(see.shape, dtype=dtype, device=device).masked_fill_(~see, torch.finfo(dtype).min)[:, None]
        out = self.model(
            torch.cat([ids, inner], 1),
            attention_mask=mask,
            position_ids=position,
            use_cache=False,
            logits_to_keep=1 + K * (T - 1),
        ).logits
        first = out[:, :1, None].expand(P, 1, K, out.shape[-1]).transpose(1, 2)  # the prompt's last position predicts all K
        rest = out[:, 1:].view(P, K, T - 1, out.shape[-1])
        return torch.cat([first, rest], 2).float()

    def plain(self, rows: Rows, tokens: Tensor) -> Tensor:
        """[P, K, T, W] logits, a sequence a row of the batch."""
        P, K, T = tokens.shape
        texts = [row + new[:-1] for row, some in zip(rows, tokens.tolist(), strict=True) for new in some]
        return torch.cat(list(self._batches(texts, T))).view(P, K, T, -1).float()

    def _batches(self, texts: Rows, last: int) -> Iterator[Tensor]:
        """[B, last, W] logits at the last so many ids of whole sequences, in order."""
        step = max(1, LOGITS // (max(map(len, texts)) * self.width))
        for i in range(0, len(texts), step):
            some = texts[i : i + step]
            length = max(map(len, some))
            ids = torch.tensor([r + [0] * (length - len(r)) for r in some], device=self.device)
            logits = self.model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            at = torch.tensor([len(r) for r in some], device=self.device)[:, None] - last + torch.arange(last, device=self.device)
            yield logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))

    @torch.no_grad()
    def alone(self, row: list[int], tokens: Tensor) -> Tensor:
        """[T, W] logits along one continuation [T] by one forward: no padding, no cache, no tree. What every layout has to say."""
        ids = torch.cat([torch.tensor(row, device=self.device), self._read(tokens[:-1])])[None]
        logits: Tensor = self.model(ids, use_cache=False).logits[0, len(row) - 1 :]
        return logits

    def agree(self, left: Tensor, right: Tensor, tolerance: float = 1e-3) -> bool:
        """Whether two sets of logits have the same softmax to rounding. NaN agrees with NaN: it is refused by name elsewhere."""
        coarse = self.model.dtype in HALF or torch.is_autocast_enabled(self.device.type)
        largest = left.float().nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True)  # large logits have coarser last bits
        left, right = left.float().log_softmax(-1), right.float().log_softmax(-1)
        spread = (right.amax(-1, keepdim=True) - right.amin(-1, keepdim=True)).clamp(max=1.0)  # an untrained model says little
        near = (left - right).abs() < (0.2 if coarse else tolerance) * spread + 1e-5 * (1 + largest)
        return bool((near | (left == right) | (left.isnan() & right.isnan())).all())

    def _padded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Left-padded ids [P, L] and the number of pads [P]."""
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(r)) + r for r in rows], device=self.device)
        return ids, torch.tensor([length - len(r) for r in rows], device=self.device)

    def _read(self, tokens: Tensor) -> Tensor:
        """Ids that the model cannot read have probability 0, and what follows them is of no account."""
        return torch.where(tokens < self.readable, tokens, 0)

    def _verdict(self, layout: str, path: int, row: int) -> bool | None:
        """Whether a layout may be used; None where it has to be tried. A mask given as a whole is used without the model's own window."""
        if layout not in self.layouts or (self.window is not None and path > self.window):
            return False
        return self.shapes[layout].verdict(path, row)

    def _learn(self, layout: str, path: int, row: int, holds: bool) -> None:
        shapes = self.shapes[layout]
        if shapes.verdict(path, row) is None:
            (shapes.held if holds else shapes.failed).append((path, row))


@final
class _Falling:
    """Draws as they fall, [P K, T]; `alive` until a stop."""

    def __init__(self, passes: Passes, uniform: Tensor, law: Law, stops: tuple[int, ...]):
        P, K, T = self.shape = tuple(uniform.shape)
        device = passes.device
        self.law, self.uniform, self.readable = law, uniform.view(P * K, T).to(device), passes.readable
        self.fill, self.stops = stops[0], torch.tensor(stops, device=device)
        self.tokens = torch.full((P * K, T), self.fill, dtype=torch.long, device=device)
        self.read = torch.zeros_like(self.tokens)  # what the model is given of them
        self.mask = torch.zeros(P * K, T, dtype=torch.bool, device=device)
        self.log_q = torch.zeros(P * K, T, device=device)
        self.alive = torch.ones(P * K, dtype=torch.bool, device=device)
        self.heard: list[Tensor] = []

    def take(self, t: int, logits: Tensor) -> None:
        """The t-th token of each from its logits [P K, W]."""
        token, logp = draw(self.law(logits), self.uniform[:, t])
        self.tokens[:, t] = torch.where(self.alive, token, self.fill)
        self.read[:, t] = torch.where(self.alive & (token < self.readable), token, 0)
        self.mask[:, t] = self.alive
        self.log_q[:, t] = torch.where(self.alive, logp, 0.0)
        self.alive = self.alive & ~torch.isin(token, self.stops)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """[P, K, T] tokens, mask, log-probabilities, on the CPU."""
        tokens, mask, log_q = (x.view(self.shape).cpu() for x in (self.tokens, self.mask, self.log_q))
        return tokens, mask, log_q


def _shortest(rows: Rows) -> int:
    """The row with most padding before it."""
    return min(range(len(rows)), key=lambda p: len(rows[p]))


def draw(logp: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R] and their log-probabilities from laws [R, V], by inverse CDF at uniforms [R] in [0, 1)."""
    cumulative = logp.exp().cumsum(1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform[:, None].to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, point, right=True).clamp_(max=logp.shape[1] - 1)
    return token[:, 0], logp.gather(1, token)[:, 0]


@torch.no_grad()
def checked(name: str, model: Any) -> Passes:
    """The passes of a model, without the layouts that do not say what single forwards say.

    Raises UserError that names the model when a padded batch does not say it either, when later tokens move earlier predictions, when its
    probabilities are not numbers, or when it cannot be run on token ids at all.
    """
    bare, kind = Passes(model), type(model).__name__
    T = min(3, (bare.context or 8) - 2)
    if T < 1:
        raise UserError(f"{name}: a context of {bare.context} tokens is too short to write in")
    some = [(5 * i + 1) % min(bare.readable, bare.width) for i in range(3 + 4 * T)]
    rows = [some[:1], some[: min(3, (bare.context or 8) - T)]]
    tokens = torch.tensor(some[-4 * T :], device=bare.device).view(2, 2, T)
    try:
        plain = bare.plain(rows, tokens)
        alone = [bare.alone(rows[p], tokens[p, p]) for p in range(2)]
        start = bare.alone(rows[1], tokens[1, 1, :1])[0]
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{name}: {kind} cannot be run on token ids alone: {why}") from None
    if not all(bool(x.isfinite().any(-1).all()) and not bool(x.isnan().any()) for x in alone):
        raise UserError(f"{name}: its log-probabilities are not numbers (NaN): look for NaN or infinite weights")
    if not bare.agree(start, alone[1][0], 1e-4):  # an untrained bidirectional model is near this
        raise UserError(f"{name}: what {kind} predicts moves when later tokens are added: it is not causal")
    if not all(bare.agree(plain[p, p], alone[p]) for p in range(2)):
        raise UserError(f"{name}: {kind} gives other probabilities in a padded batch than alone, so that it cannot be scored")
    return Passes(
        model, tuple(layout for layout, holds in (("cached", _cached_holds), ("tree", _tree_holds)) if holds(bare, rows, tokens, plain))
    )


def _cached_holds(bare: Passes, rows: Rows, tokens: Tensor, plain: Tensor) -> bool:
    uniform = torch.linspace(0.05, 0.95, tokens.numel(), dtype=torch.float64).view(tokens.shape)
    falling = _Falling(bare, uniform, lambda logits: logits.float().log_softmax(-1), (-1,))
    try:
        bare._cached(rows, falling, slice(None))
        said = bare.plain(rows, falling.tokens.view(tokens.shape)).flatten(0, 1)
    except Exception:  # whatever an architecture raises at a cache that it was not written for
        return False
    return bare.agree(torch.stack(falling.heard, 1), said)


def _tree_holds(bare: Passes, rows: Rows, tokens: Tensor, plain: Tensor) -> bool:
    try:
        return bare.agree(bare._tree(rows, tokens), plain)
    except Exception:  # or at a mask
        return False
