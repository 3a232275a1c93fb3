"""One causal model on rows of token ids: continuations drawn from its next-token laws, and logits along given ones.

Four layouts say the same to rounding:

- *cached* sampling: keys and values of a prompt are computed once and shared by its draws, those of a prefix by the draws that have it;
- *static* sampling, on CUDA: a prompt's keys and values are shared out to its draws, which then go side by side to the end (`static.py`);
- *tree* scoring: a row and its continuations' distinct prefixes side by side, each seeing what it goes on from; with or without gradient;
- *plain*: a batch of whole sequences padded on the right, which no causal model can see. Slower, and right where the others are not:
  recurrent models, alibi, beyond a sliding window.

The first three need a decoder that takes position ids and attention masks as given. Whether a model does is decided by comparison with
single unpadded forwards, at loading and again at the first call of every larger shape; a model whose plain layout disagrees is refused.

What a pass over given continuations returns are *states*, of which `head` makes logits a few rows at a time. They are the last hidden
states where the logits are a linear map of those, and the logits themselves for models that do more to them or have no such states.
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
from klbench.policies import attention
from klbench.policies.prefixes import Piece, Prefixes
from klbench.policies.static import Step
from klbench.policies.vocabulary import FLOATS, Head, draw, product

LOGITS = 6_000_000  # floats of logits held at once by a pass without a linear head
POSITIONS = 2048  # read at once by a pass without gradient
LAYOUTS: Final = ("static", "cached", "tree")
LOOKS: Final = 16  # tokens between two looks at whether every draw has ended, at each of which the processor waits for the device
HALF: Final = (torch.bfloat16, torch.float16)

Rows = Sequence[list[int]]
Law = Callable[[Tensor], Tensor]


@final
class _Shared(DynamicLayer):
    """Keys and values of one layer in a buffer of the final size; the first `rows` are in use."""

    def __init__(self, keys: Tensor, values: Tensor, of: Tensor, draws: int, room: int):
        """keys, values [P, H, L, W] of prompts.  of [R]: the prompt of each first row.  draws: rows there can be; room: tokens to come."""
        super().__init__()
        _, heads, self.length, width = keys.shape
        self.buffers = []
        for part in (keys, values):
            buffer = part.new_empty(draws, heads, self.length + room, width)
            buffer[: len(of), :, : self.length] = part[of]
            self.buffers.append(buffer)
        self.rows, self.dtype, self.device, self.is_initialized = len(of), keys.dtype, keys.device, True
        self.show()

    def show(self) -> tuple[Tensor, Tensor]:
        keys, values = (b[: self.rows, :, : self.length] for b in self.buffers)
        self.keys, self.values = keys, values
        return keys, values

    def move(self, source: Tensor, target: Tensor, rows: int) -> None:
        """Copies rows, none of which is both source and target; then the first `rows` are in use."""
        if len(source):
            for buffer in self.buffers:
                buffer[target, :, : self.length] = buffer[source, :, : self.length]
        self.rows = rows
        self.show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, start : self.length] = new
        return self.show()

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
    """A model and the layouts that may be tried on it. rows [P] of ids; continuations [P, K, T]; W: columns of the logits.

    split: the logits are the head's of the last hidden states, and nothing else.
    """

    model: Any
    layouts: tuple[str, ...] = LAYOUTS
    split: bool = False
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

    def linear(self, words: int | None) -> Head | None:
        """Weight and bias of the head, for the first `words` ids; None where it is not linear, or there is more to the logits."""
        head = self.model.get_output_embeddings() if self.split else None
        if type(head) is not torch.nn.Linear:
            return None
        return head.weight[:words], None if head.bias is None else head.bias[:words]

    @property
    def positions(self) -> int:
        """Read at once: as many as keep the processor busy, fewer where each is a row of logits."""
        return POSITIONS if self.split else max(1, min(POSITIONS, LOGITS // self.width))

    def head(self, states: Tensor) -> Tensor:
        """[R, W] logits from states [R, D]."""
        if not self.split:
            return states
        linear = self.linear(None)
        if linear is None or torch.is_grad_enabled():
            found: Tensor = self.model.get_output_embeddings()(states)
            return found
        return product(states, *linear)

    def sample(self, rows: Rows, uniform: Tensor, law: Law, stops: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """[P, K, T] tokens, mask and log-probabilities by inverse CDF at `uniform` [P, K, T].

        law: logits [R, W] to logits or log-probabilities [R, V].  A sequence ends with its first stop; behind it the row is filled with
        stops[0].
        """
        size = max(map(len, rows)) + uniform.shape[2]
        for layout in self.drawing:
            known = self._verdict(layout, size, size)
            if known is False:
                continue
            falling, at = _Falling(self, uniform, law, stops), _shortest(rows)
            last = (at + 1) * uniform.shape[1] - 1
            try:
                self.fall(layout, rows, falling, slice(0) if known else slice(last, last + 1))
                if known is None:
                    said = self.alone(rows[at], falling.tokens[last])
                    heard = torch.cat(falling.heard)
                    known = all(
                        self.agree(logits, self.head(states))
                        for logits, states in zip(heard.split(8), said[: len(heard)].split(8), strict=True)
                    )
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever an architecture raises at a layout that it was not written for
                if known:
                    raise
                known = False
            self._learn(layout, size, size, known)
            if known:
                return falling.result()
        falling = _Falling(self, uniform, law, stops)
        self._uncached(rows, falling)
        return falling.result()

    @property
    def drawing(self) -> tuple[str, ...]:
        """Layouts to sample by, best first: on a processor every row costs, on a GPU every wait does."""
        return ("static", "cached") if self.device.type == "cuda" else ("cached",)

    def fall(self, layout: str, rows: Rows, falling: _Falling, witness: slice) -> None:
        """All draws by a layout. witness: sequences of [P K] whose logits are kept, to be compared."""
        (self._static if layout == "static" else self._cached)(rows, falling, witness)

    def _static(self, rows: Rows, falling: _Falling, witness: slice) -> None:
        """Draws of a prompt have a row each from their second token on, whether they have ended or not."""
        (_, K, T), device, dtype = falling.shape, self.device, self.model.dtype
        ids, pad = self._padded(rows)
        order = torch.arange(ids.shape[1], device=device)
        real, mask = order >= pad[:, None], None
        if any(len(row) < len(order) for row in rows):
            see = (real[:, None] & (order <= order[:, None])) | (order == order[:, None])
            mask = torch.zeros(see.shape, dtype=dtype, device=device).masked_fill_(~see, torch.finfo(dtype).min)[:, None]
        out, logits = self._last(ids, attention_mask=mask, position_ids=(order - pad[:, None]).clamp(min=0))
        step = Step(self._last, out.past_key_values.layers, real, K, T - 1, dtype)
        alive, row = torch.ones_like(falling.live, dtype=torch.bool), falling.node
        for t in range(T):
            if witness != slice(0) and bool(alive[witness].all()):
                falling.heard.append(logits[row[witness]])
            token, logp = draw(falling.law(logits), falling.uniform[:, t], row)
            falling.put(t, token, logp, alive)
            alive = alive & (token[:, None] != falling.stops).all(1)
            if t + 1 == T or ((t + 1) % LOOKS == 0 and not bool(alive.any())):
                break
            logits, row = step(self._read(token)), falling.live

    def _cached(self, rows: Rows, falling: _Falling, witness: slice) -> None:
        T, device = falling.shape[2], self.device
        ids, pad = self._padded(rows)
        length = ids.shape[1]
        ragged = bool(pad.any())
        order = torch.arange(length, device=device)
        real = order >= pad[:, None]
        position = (order - pad[:, None]).clamp(min=0)
        out, logits = self._last(ids, attention_mask=real.long() if ragged else None, position_ids=position)
        cache: Cache | None = None
        prompt = torch.arange(len(rows), device=device)
        for t in range(T):
            falling.hear(logits, witness)
            falling.take(t, logits)
            if t + 1 == T or not len(falling.live):
                break
            source, token, stay = falling.branch(t)
            prompt, n = prompt[source], len(source)
            if cache is None:
                cache = Cache(layers=[_Shared(x.keys, x.values, source, len(falling.tokens), T - 1) for x in out.past_key_values.layers])
            else:
                moved = (~stay).nonzero()[:, 0]
                for layer in cache.layers:
                    assert isinstance(layer, _Shared)
                    layer.move(source[moved], moved, n)
            seen = None
            if ragged:
                seen = torch.cat([real[prompt], real.new_ones(n, t + 1)], 1).long()
            at = (length - pad)[prompt][:, None] + t
            _, logits = self._last(token[:, None], attention_mask=seen, position_ids=at, past_key_values=cache)

    def _last(self, ids: Tensor, **given: Any) -> tuple[Any, Tensor]:
        """What the model returns when it keeps a cache, and the logits [B, W] behind the last id."""
        if not self.split:
            out = self.model(ids, use_cache=True, logits_to_keep=1, **given)
            return out, out.logits[:, -1]
        out = self.model.base_model(ids, use_cache=True, **given)
        return out, self.head(out[0][:, -1])

    def _uncached(self, rows: Rows, falling: _Falling) -> None:
        """Each distinct prefix is read anew at every token."""
        texts = [list(row) for row in rows]
        for t in range(falling.shape[2]):
            falling.take(t, torch.cat([x[:, -1] for x in self._batches(texts, 1)]))
            if not len(falling.live):
                break
            source, token, _ = falling.branch(t)
            texts = [[*texts[i], new] for i, new in zip(source.tolist(), token.tolist(), strict=True)]

    def states(self, rows: Rows, piece: Piece) -> Tensor:
        """[R, D] states at the nodes of a piece, of which `head` makes logits; differentiable."""
        lengths = [len(rows[p]) for p in piece.prompt]
        n = piece.there.shape[1]
        path, row = max(lengths) + 1 + piece.deepest, max(lengths) + n
        known = self._verdict("tree", path, row)
        if known is not False:
            try:
                out = self._tree(rows, piece)
                if known is None:
                    at = _shortest([rows[p] for p in piece.prompt])
                    tokens, nodes = piece.path(at)
                    known = self.alike(out[nodes], self.alone(rows[piece.prompt[at]], torch.tensor([*tokens, 0], device=self.device)))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # as in sample
                if known:
                    raise
                known = False
            self._learn("tree", path, row, known)
            if known:
                return out
        return self._plainly(rows, piece)

    def _tree(self, rows: Rows, piece: Piece) -> Tensor:
        ids, pad = self._padded([rows[p] for p in piece.prompt])
        B, length = ids.shape
        n, device = piece.there.shape[1], ids.device
        order = torch.arange(length, device=device)
        position = torch.cat([(order - pad[:, None]).clamp(min=0), (length - pad)[:, None] + (piece.depth - 1).clamp(min=0).to(device)], 1)
        see = torch.zeros(B, length + n, length + n, dtype=torch.bool, device=device)
        see[:, :, :length] = (order <= torch.arange(length + n, device=device)[:, None]) & (order >= pad[:, None, None])
        see[:, length:, length:] = piece.sees().to(device)
        see |= torch.eye(length + n, dtype=torch.bool, device=device)  # padding is seen by nobody but itself
        dtype = self.model.dtype
        mask = torch.zeros(see.shape, dtype=dtype, device=device).masked_fill_(~see, torch.finfo(dtype).min)[:, None]
        given = {"attention_mask": mask, "position_ids": position, "use_cache": False}
        whole = torch.cat([ids, self._read(piece.token.to(device))], 1)
        if self.split:
            out = self.model.base_model(whole, **given)[0][:, length - 1 :]
        else:
            out = self.model(whole, logits_to_keep=1 + n, **given).logits[:, -1 - n :]
        return out.reshape(B * (1 + n), -1)[piece.nodes.to(device)]

    def _plainly(self, rows: Rows, piece: Piece) -> Tensor:
        """States by the plain layout: every prefix that no other goes on from is read as a sequence of its own."""
        width, n = piece.there.shape[1] + 1, piece.there.shape[1]
        number = {place: i for i, place in enumerate(piece.nodes.tolist())}
        texts: list[list[int]] = []
        want: list[list[int]] = []  # the nodes along each text
        for b, p in enumerate(piece.prompt):
            parents, tokens = piece.parent[b].tolist(), piece.token[b].tolist()
            inner, here = set(parents), [j for j in range(n) if bool(piece.there[b, j])]
            for leaf in [j for j in here if j not in inner] or [-1]:
                along, words, j = [], [], leaf
                while j >= 0:
                    along.append(number[b * width + 1 + j])
                    words.append(tokens[j] if tokens[j] < self.readable else 0)
                    j = parents[j]
                texts.append([*rows[p], *reversed(words)])
                want.append([number[b * width], *reversed(along)])
        deepest = max(map(len, want))
        found = [x[deepest - len(nodes) :] for x, nodes in zip(self._one_by_one(texts, deepest), want, strict=True)]
        flat = torch.tensor([node for nodes in want for node in nodes], device=self.device)
        order = torch.empty(len(piece.nodes), dtype=torch.long, device=self.device)
        order[flat] = torch.arange(len(flat), device=self.device)
        return torch.cat(found)[order]

    def _one_by_one(self, texts: Rows, last: int) -> Iterator[Tensor]:
        for batch in self._batches(texts, last, self.split):
            yield from batch

    def plain(self, rows: Rows, tokens: Tensor) -> Tensor:
        """[P, K, T, W] logits, a sequence a row of the batch."""
        P, K, T = tokens.shape
        texts = [row + new[:-1] for row, some in zip(rows, tokens.tolist(), strict=True) for new in some]
        return torch.cat(list(self._batches(texts, T))).view(P, K, T, -1).float()

    def _batches(self, texts: Rows, last: int, states: bool = False) -> Iterator[Tensor]:
        """[B, last, W] logits at the last so many ids of whole sequences, in order; states: the last hidden states [B, last, D] instead.

        A sequence of fewer ids has those at its first one in front.
        """
        step = max(1, LOGITS // (max(map(len, texts)) * self.width))
        for i in range(0, len(texts), step):
            some = texts[i : i + step]
            length = max(map(len, some))
            ids = torch.tensor([r + [0] * (length - len(r)) for r in some], device=self.device)
            model = self.model.base_model if states else self.model
            out = model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
            found = out[0] if states else out.logits
            at = torch.tensor([len(r) for r in some], device=self.device)[:, None] - last + torch.arange(last, device=self.device)
            yield found.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, found.shape[-1]))

    @torch.no_grad()
    def alone(self, row: list[int], tokens: Tensor) -> Tensor:
        """[T, D] states along one continuation [T] by one forward: no padding, no cache, no tree. What every layout has to say."""
        ids = torch.cat([torch.tensor(row, device=self.device), self._read(tokens[:-1])])[None]
        if self.split:
            states: Tensor = self.model.base_model(ids, use_cache=False)[0][0, len(row) - 1 :]
            return states
        logits: Tensor = self.model(ids, use_cache=False).logits[0, len(row) - 1 :]
        return logits

    @torch.no_grad()
    def alike(self, left: Tensor, right: Tensor) -> bool:
        """Whether states [T, D] give the same laws to rounding; some rows at a time, as all logits would take more memory than the pass."""
        step = max(1, FLOATS // (8 * self.width))
        return all(self.agree(self.head(a), self.head(b)) for a, b in zip(left.split(step), right.split(step), strict=True))

    def agree(self, left: Tensor, right: Tensor, tolerance: float = 1e-3) -> bool:
        """Whether two sets of logits have the same softmax to rounding. NaN agrees with NaN: it is refused by name elsewhere.

        In half precision single rare tokens are off by more than a wrong layout would move them: there the mean difference under the law
        is looked at.
        """
        coarse = self.model.dtype in HALF or torch.is_autocast_enabled(self.device.type)
        largest = left.float().nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True)  # large logits have coarser last bits
        left, right = left.float().log_softmax(-1), right.float().log_softmax(-1)
        spread = (right.amax(-1, keepdim=True) - right.amin(-1, keepdim=True)).clamp(max=1.0)  # an untrained model says little
        apart = (left - right).abs()
        if coarse:
            mean = (right.exp() * apart.nan_to_num(0.0)).sum(-1)
            return bool((mean < 0.2 * spread[..., 0] + 1e-5).all())
        near = apart < tolerance * spread + 1e-5 * (1 + largest)
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
    """Draws as they fall, [P K, T]. live [M]: those that have not ended; node [M]: the row of the logits that each goes on from."""

    def __init__(self, passes: Passes, uniform: Tensor, law: Law, stops: tuple[int, ...]):
        P, K, T = self.shape = tuple(uniform.shape)
        device = passes.device
        self.law, self.uniform, self.readable = law, uniform.view(P * K, T).to(device), passes.readable
        self.fill, self.stops = stops[0], torch.tensor(stops, device=device)
        self.tokens = torch.full((P * K, T), self.fill, dtype=torch.long, device=device)
        self.mask = torch.zeros(P * K, T, dtype=torch.bool, device=device)
        self.log_q = torch.zeros(P * K, T, device=device)
        self.live = torch.arange(P * K, device=device)
        self.node = torch.arange(P, device=device).repeat_interleave(K)
        self.heard: list[Tensor] = []

    def hear(self, logits: Tensor, witness: slice) -> None:
        """Keeps what some of the sequences are told, as long as they live."""
        wanted = torch.arange(len(self.tokens), device=self.live.device)[witness]
        if len(wanted):
            row = torch.full((len(self.tokens),), -1, device=self.live.device)
            row[self.live] = self.node
            found = row[wanted]
            if bool((found >= 0).all()):
                self.heard.append(logits[found])

    def take(self, t: int, logits: Tensor) -> None:
        """The t-th token of each live draw from the logits [R, W]."""
        token, logp = draw(self.law(logits), self.uniform[self.live, t], self.node)
        self.tokens[self.live, t], self.mask[self.live, t], self.log_q[self.live, t] = token, True, logp
        keep = ~torch.isin(token, self.stops)
        self.live, self.node = self.live[keep], self.node[keep]

    def put(self, t: int, token: Tensor, log_prob: Tensor, alive: Tensor) -> None:
        """The t-th token of every draw [P K], alive or not: no shape depends on which."""
        self.tokens[:, t], self.mask[:, t] = torch.where(alive, token, self.fill), alive
        self.log_q[:, t] = torch.where(alive, log_prob, 0.0)

    def branch(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows to come, one for each distinct prefix of the live draws: [R'] the row it goes on from, its token, and whether it stays.

        One of those that go on from a row stays in its place where there is such a row among the R'; the others take the places that are
        left. So no row is needed by a mover after another has taken its place.
        """
        token = self.tokens[self.live, t]
        token = torch.where(token < self.readable, token, 0)  # what cannot be read has probability 0: what follows is of no account
        key, child = (self.node * self.readable + token).unique(return_inverse=True)
        n, row = len(key), key // self.readable
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        stays = first & (row < n)
        free = torch.ones_like(stays)
        free[row[stays]] = False
        place = row.clone()
        place[~stays] = free.nonzero()[:, 0]
        self.node = place[child]
        order = place.argsort()
        return row[order], (key % self.readable)[order], stays[order]

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """[P, K, T] tokens, mask, log-probabilities, on the CPU."""
        tokens, mask, log_q = (x.view(self.shape).cpu() for x in (self.tokens, self.mask, self.log_q))
        return tokens, mask, log_q


def _shortest(rows: Rows) -> int:
    """The row with most padding before it."""
    return min(range(len(rows)), key=lambda p: len(rows[p]))


@torch.no_grad()
def checked(name: str, model: Any) -> Passes:
    """The passes of a model, without the layouts that do not say what single forwards say.

    Raises UserError that names the model when a padded batch does not say it either, when later tokens move earlier predictions, when its
    probabilities are not numbers, or when it cannot be run on token ids at all.
    """
    attention.take(model)
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
    bare = Passes(model, split=_splits(bare, rows[1], tokens[1, 1]))
    found = [layout for layout in bare.drawing if _draws_hold(bare, layout, rows, tokens)]
    if _tree_holds(bare, rows, tokens, plain):
        found.append("tree")
    return Passes(model, tuple(found), bare.split)


def _splits(bare: Passes, row: list[int], tokens: Tensor) -> bool:
    """Whether the head reads the last hidden states, and what it says are the logits: nothing is done before or behind it."""
    ids = torch.cat([torch.tensor(row, device=bare.device), bare._read(tokens)])[None]
    read: list[Tensor] = []
    pattern = torch.linspace(-300, 300, bare.width, device=bare.device)  # a cap or a scale would show on it

    def hook(module: Any, given: Any, found: Tensor) -> Tensor:
        read.append(given[0])
        return pattern.to(found.dtype).expand(found.shape)

    try:
        base = bare.model.base_model
        hidden = base(ids, use_cache=False)[0]
        handle = bare.model.get_output_embeddings().register_forward_hook(hook)
        try:
            said = bare.model(ids, use_cache=False).logits
        finally:
            handle.remove()
        return base is not bare.model and torch.equal(said[0, 0].float(), pattern.to(said.dtype).float()) and torch.equal(read[0], hidden)
    except Exception:  # a wrapper without a base of its own, or whose base returns something else
        return False


def _draws_hold(bare: Passes, layout: str, rows: Rows, tokens: Tensor) -> bool:
    uniform = torch.linspace(0.05, 0.95, tokens.numel(), dtype=torch.float64).view(tokens.shape)
    falling = _Falling(bare, uniform, lambda logits: logits, (-1,))
    try:
        bare.fall(layout, rows, falling, slice(None))
        said = bare.plain(rows, falling.tokens.view(tokens.shape)).flatten(0, 1)
    except Exception:  # whatever an architecture raises at a cache that it was not written for
        return False
    return bare.agree(torch.stack(falling.heard, 1), said)


def _tree_holds(bare: Passes, rows: Rows, tokens: Tensor, plain: Tensor) -> bool:
    (piece,) = Prefixes.of(tokens).pieces([len(r) for r in rows], 1 << 30)
    try:
        found = bare.head(bare._tree(rows, piece))[piece.node.to(bare.device)]
    except Exception:  # or at a mask
        return False
    return bare.agree(found.float(), plain.flatten(0, 2)[piece.place.to(bare.device)])
