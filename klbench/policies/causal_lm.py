"""Hugging Face causal language models as policies: prompts to ids, logits to a law, draws to texts.

    q(x_t | c, x_<t) = D_n( ... D_1( softmax(logits of the first `words` ids) ))       D: decodings, as temperature and top-p

Sequences end at a stop (the tokenizer's EOS, unless said otherwise) or at `max_new_tokens`; a sequence that is cut has no EOS factor.
Log-softmax is in float32 whatever the weights' type. Draws are by inverse CDF from uniforms that depend on the seed alone, so that
neither the batch size nor the device moves them. `passes.py` runs the model.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from klbench.errors import UserError
from klbench.method import AbstractDecoding
from klbench.policies.passes import HALF, Passes, checked
from klbench.policies.prefixes import Piece, Prefixes
from klbench.policies.vocabulary import FLOATS, Head, LogProbs, between, spans
from klbench.target import Draws

SYSTEM_FILE: Final = "system_prompt.txt"  # beside the weights of a policy that was trained under one
ROWS = 1024  # sequences in flight while sampling
KEPT: Final = 1 << 26  # bytes of a prior's states that are held for the next policy
TOKENIZER_FILES: Final = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*", "tokenization_*.py", "tekken.json")


@dataclass(frozen=True)
class TokenLaws:
    """Per-token sums over the vocabulary along given sequences, each [P, N, T], 0 where the mask is False; nats.

    log_q, log_p0: of the token itself.  entropy: H(q(.|prefix)).  cross: H(q(.|prefix), p0(.|prefix)), so KL_t = cross - entropy.
    lost: KL(p0(.|prefix) || q(.|prefix)).
    """

    log_q: Tensor
    log_p0: Tensor
    entropy: Tensor
    cross: Tensor
    lost: Tensor


@final
@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal language model and its tokenizer as a Policy.

    stops: ids that end a sequence; empty for the tokenizer's EOS.  chat: a prompt is a user turn of the tokenizer's chat template, else it
    is encoded as the tokenizer does by default (with a BOS where it adds one).  system: a system message, or text on a line before the
    prompt.  decodings: applied in order to each next-token law.  words: ids from here on are left out of the law, which is renormalised
    over those before (None: all that the model has).  notes: what was done to a stranger's model, for people.
    """

    name: str
    model: Any
    tokenizer: Any
    stops: tuple[int, ...] = ()
    chat: bool = False
    system: str | None = None
    decodings: tuple[AbstractDecoding, ...] = ()
    words: int | None = None
    notes: tuple[str, ...] = ()
    _ids: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _passes: Passes | None = field(default=None, repr=False)
    _kept: dict[tuple[bytes, int], Tensor] = field(default_factory=dict, repr=False)  # states the next policy will ask a prior for again
    _agreed: list[Any] = field(default_factory=list, repr=False)  # tokenizers found to write the same ids: asked at every piece of work

    def __post_init__(self) -> None:
        if not self.stops:
            object.__setattr__(self, "stops", stops_of(self.model, self.tokenizer, self.chat))
        if self._passes is None:
            object.__setattr__(self, "_passes", Passes(self.model))

    @property
    def passes(self) -> Passes:
        """What runs the model."""
        assert self._passes is not None
        return self._passes

    @property
    def device(self) -> torch.device:
        return self.passes.device

    @property
    def eos(self) -> int:
        """The first stop: what fills a row behind its end."""
        return self.stops[0]

    @property
    def columns(self) -> int:
        """Ids that the law speaks of."""
        return self.passes.width if self.words is None else self.words

    def with_stops(self, stops: Sequence[int]) -> CausalLM:
        """This policy with sequences that end at any of `stops`; itself where these are its stops already."""
        return self if tuple(stops) == self.stops else replace(self, stops=tuple(stops))

    def with_words(self, words: int) -> CausalLM:
        """This policy over the first `words` ids alone, renormalised; itself where it speaks of no more."""
        return self if words >= self.columns else replace(self, words=words)

    def with_model(self, name: str, model: Any) -> CausalLM:
        """Another model of the same architecture and vocabulary, prompted, decoded and stopped as this one."""
        return replace(self, name=name, model=model, _passes=replace(self.passes, model=model), _kept={})

    def prompted(self, name: str, system: str | None, decodings: Sequence[AbstractDecoding]) -> CausalLM:
        """The same model under another system prompt (None: its own) and with further decodings."""
        system = self.system if system is None else system
        ids = self._ids if system == self.system else {}
        return replace(self, name=name, system=system, decodings=(*self.decodings, *decodings), _ids=ids, _kept={})

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt. Raises UserError when there are none, or when the chat template refuses it."""
        if prompt not in self._ids:
            ids = self._chat(prompt) if self.chat else self._open(prompt if self.system is None else f"{self.system}\n{prompt}")
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [int(self.tokenizer.bos_token_id)]
            if not ids:
                raise UserError(f"prompt {prompt!r} has no tokens under the tokenizer of {self.name}, and it has no BOS to start from")
            if max(ids) >= self.passes.readable:
                raise UserError(
                    f"prompt {prompt!r} has token {max(ids)}, and {self.name} reads {self.passes.readable} of them: wrong tokenizer?"
                )
            self._ids[prompt] = ids
        return self._ids[prompt]

    def _open(self, text: str) -> list[int]:
        ids, eos = list(self.tokenizer(text)["input_ids"]), self.tokenizer.eos_token_id
        while ids and ids[-1] == eos:  # some tokenizers close what they encode; a prompt is open
            ids.pop()
        return ids

    def _chat(self, prompt: str) -> list[int]:
        """The template writes its own BOS, so that none is added when its text is encoded."""
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns.append({"role": "user", "content": prompt})
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a stranger's program
            why = " ".join(str(error).split())[:200]
            raise UserError(f"the chat template of {self.name} does not take prompt {_short(prompt)}: {why}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encoded(self, prompts: Sequence[str], new: int) -> list[list[int]]:
        """Ids of prompts with room for `new` tokens. Raises UserError that names the first prompt for which there is none."""
        rows, context = [self.encode(p) for p in prompts], self.passes.context
        for prompt, ids in zip(prompts, rows, strict=True):
            if context is not None and len(ids) + new - 1 > context:  # the last token is never read
                raise UserError(
                    f"prompt {_short(prompt)} has {len(ids)} tokens: with {new} new ones that is more than the {context} of {self.name}"
                )
        return rows

    def spelled(self, prompts: Sequence[str], texts: Sequence[Sequence[str]], end: bool = False) -> tuple[Tensor, Tensor]:
        """tokens, mask [P, N, T] of continuations given as texts [P][N], the leading space included; `end`: with the stop behind each.

        A continuation has the ids that it has behind its prompt, unless prompt and text share an id there: then those it has alone.
        Raises UserError for a text without a token.
        """
        rows = [[self._continued(p, text) + ([self.eos] if end else []) for text in row] for p, row in zip(prompts, texts, strict=True)]
        for row, given in zip(rows, texts, strict=True):
            for ids, text in zip(row, given, strict=True):
                if not ids:
                    raise UserError(f"continuation {text!r} has no tokens under the tokenizer of {self.name}")
        widest = max((len(ids) for row in rows for ids in row), default=0)
        tokens = torch.tensor([[ids + [self.eos] * (widest - len(ids)) for ids in row] for row in rows], dtype=torch.int64)
        lengths = torch.tensor([[len(ids) for ids in row] for row in rows])
        return tokens, torch.arange(widest) < lengths[..., None]

    def _continued(self, prompt: str, text: str) -> list[int]:
        if not self.chat:
            whole, start = self._open(f"{self.system}\n{prompt}{text}" if self.system is not None else prompt + text), self.encode(prompt)
            if len(whole) > len(start) and whole[: len(start)] == start:
                return whole[len(start) :]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        """[P][N] texts of draws [P, N, T], special tokens and the stop left out."""
        rows = [row[keep].tolist() for row, keep in zip(tokens.flatten(0, 1), mask.flatten(0, 1), strict=True)]
        rows = [r[:-1] if r and r[-1] in self.stops else r for r in rows]
        distinct = {tuple(r): "" for r in rows}
        texts = self.tokenizer.batch_decode([list(r) for r in distinct], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for key, text in zip(distinct, texts, strict=True):
            distinct[key] = text
        flat = [distinct[tuple(r)] for r in rows]
        n = tokens.shape[1]
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    @property
    def linear(self) -> Head | None:
        """The head, where the law is the softmax of a linear map of the last hidden states."""
        return None if self.decodings else self.passes.linear(self.words)

    def law(self, logits: Tensor) -> Tensor:
        """[..., V] float32 log-probabilities of the next token from logits [..., W]; V = columns."""
        logp = (logits if self.words is None else logits[..., : self.words]).float().log_softmax(-1)
        for decoding in self.decodings:
            logp = decoding.law(logp)
        return logp

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int, share: slice = slice(None)) -> Draws:
        """`draws` independent continuations of each prompt with their log-probabilities; [P, draws, max_new_tokens].

        share: of these prompts alone, at least one, and the same draws as among all.
        Raises UserError for a prompt that leaves no room for them, and for a model whose probabilities are no numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), draws, max_new_tokens, generator=generator, dtype=torch.float64)[share]
        rows = self._encoded(prompts[share], max_new_tokens)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        if draws > ROWS:
            for p, row in enumerate(rows):
                pieces = [self._drawn([row], u) for u in uniform[p : p + 1].split(ROWS, 1)]
                parts.append(tuple(torch.cat(x, 1) for x in zip(*pieces, strict=True)))  # type: ignore[arg-type]
        else:
            step = max(1, ROWS // draws)
            parts = [self._drawn(rows[i : i + step], uniform[i : i + step]) for i in range(0, len(rows), step)]
        tokens, mask, log_q = (torch.cat(x) for x in zip(*parts, strict=True))
        return Draws(tokens, mask, self._sound(log_q))

    @torch.no_grad()
    def extend(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor, new: int, seed: int) -> Draws:
        """Draws [P, N, t] with up to `new` more tokens each; those that have ended stay. log_q is of the new tokens alone."""
        generator = torch.Generator().manual_seed(seed)
        P, N, t = tokens.shape
        uniform = torch.rand(P, N, new, generator=generator, dtype=torch.float64)
        ended = ~mask[:, :, -1] | torch.isin(tokens[:, :, -1], torch.tensor(self.stops)) if t else torch.zeros(P, N, dtype=torch.bool)
        more, kept, log_q = torch.full((P, N, new), self.eos), torch.zeros(P, N, new, dtype=torch.bool), torch.zeros(P, N, new)
        at = (~ended).nonzero()
        starts = self._encoded(prompts, t + new)
        rows = [starts[p] + tokens[p, n].tolist() for p, n in at.tolist()]
        for i in range(0, len(rows), ROWS):
            where = at[i : i + ROWS].unbind(1)
            drawn = self._drawn(rows[i : i + ROWS], uniform[where][:, None])
            for into, part in zip((more, kept, log_q), drawn, strict=True):
                into[where] = part[:, 0]
        return Draws(torch.cat([tokens, more], 2), torch.cat([mask, kept], 2), torch.cat([torch.zeros(P, N, t), self._sound(log_q)], 2))

    @torch.no_grad()
    def states(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, K, T + 1, D] last hidden state before each token and after the last; behind the end of a draw that of its end, repeated.

        D = W for a model whose logits are more than a linear map of its hidden states: those logits. Raises UserError for a prompt that
        leaves no room: unlike a sampler, this reads the last token too.
        """
        P, N, T = tokens.shape
        padded = torch.cat([tokens, tokens.new_full((P, N, 1), self.eos)], 2)
        longer = torch.cat([torch.ones_like(mask[:, :, :0]) if T else mask, mask.new_ones(P, N, 1), mask], 2)
        out: Tensor | None = None
        for piece, found in self._states(prompts, padded, longer[:, :, : T + 1]):
            out = found.new_zeros(P * N * (T + 1), found.shape[1], device="cpu") if out is None else out
            out[piece.place] = found.cpu()[piece.node]
        assert out is not None
        joined = out.view(P, N, T + 1, -1)
        last = mask.sum(2, keepdim=True).expand(P, N, T + 1)
        where = torch.minimum(torch.arange(T + 1).expand(P, N, T + 1), last)
        return joined.gather(2, where[..., None].expand(-1, -1, -1, joined.shape[3]))

    def _drawn(self, rows: list[list[int]], uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        law = self.law if self.decodings or self.words else _same
        return self.passes.sample(rows, uniform, law, self.stops)

    def _states(
        self, prompts: Sequence[str], tokens: Tensor, mask: Tensor | None, most: int | None = None
    ) -> Iterator[tuple[Piece, Tensor]]:
        """Distinct prefixes in pieces, and the states [R, D] at their nodes; differentiable."""
        rows = self._encoded(prompts, tokens.shape[2])
        for piece in Prefixes.of(tokens, mask).pieces([len(r) for r in rows], most or self.passes.positions):
            yield piece, self.passes.states(rows, piece)

    def _recalled(self, key: tuple[bytes, int], made: Callable[[], Tensor]) -> Tensor:
        """A piece's states along sequences that several policies are asked about, as a bank's are; the latest, up to KEPT bytes."""
        found = self._kept.pop(key, None)
        found = self._kept[key] = made() if found is None else found
        while self._kept and sum(t.numel() * t.element_size() for t in self._kept.values()) > KEPT:
            del self._kept[next(iter(self._kept))]
        return found

    def logits(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """[P, K, T, W] next-token logits along continuations [P, K, T], float32; differentiable.

        Before `words` and `decodings`: `law` makes log-probabilities of them. All of them at once: for small shapes.
        Raises UserError for a prompt that leaves no room.
        """
        found = [
            (piece.place, self.passes.head(states)[piece.node.to(states.device)]) for piece, states in self._states(prompts, tokens, None)
        ]
        order = torch.cat([place for place, _ in found]).argsort().to(self.device)
        return torch.cat([logits for _, logits in found])[order].view(*tokens.shape, -1).float()

    def _sound(self, log_prob: Tensor) -> Tensor:
        """Raises UserError when there is NaN among log-probabilities: in the weights, or where an infinity met another."""
        if log_prob.isnan().any():
            raise UserError(f"{self.name}: its log-probabilities are not numbers (NaN): look for NaN or infinite weights")
        return log_prob

    def log_probs(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """[P, K, T] log-probability of each token, 0 where the mask is False; differentiable.

        known [P, K, T]: the values where they are known, as they are for this policy's own fresh draws; the gradient is the same.
        -inf where a decoding truncates. Raises UserError for a prompt that leaves no room.
        """
        out = torch.zeros(tokens.numel(), device=self.device)
        places, parts = [], []
        for piece, states in self._states(prompts, tokens, mask):
            places.append(piece.place)
            parts.append(self._picked(states, piece, None if known is None else known.reshape(-1)[piece.place]))
        return out.index_put((torch.cat(places).to(out.device),), torch.cat(parts)).view(tokens.shape)

    def _picked(self, states: Tensor, piece: Piece, known: Tensor | None = None) -> Tensor:
        """[M] log-probabilities of a piece's tokens from the states at its nodes."""
        token, linear = piece.next.to(states.device), self.linear
        if linear is not None:
            kind = states.device.type
            half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            values = None if known is None else known.to(states.device)
            found: Tensor = LogProbs.apply(states, *linear, piece.node, token, values, half, torch.is_grad_enabled())
            return found
        said = lambda s, n, t: _pick(self.law(self.passes.head(s))[n], t)  # noqa: E731
        node, parts = piece.node.to(states.device), spans(piece.node, len(states), self._at_once)
        return torch.cat([_again(said, states[rows], node[some] - rows.start, token[some]) for rows, some in parts])

    @property
    def _at_once(self) -> int:
        """Laws held at once where each is needed whole."""
        return max(1, FLOATS // self.columns)

    def prompt_log_prob(self, prompts: Sequence[str]) -> Tensor:
        """[P] log-probability of each prompt's tokens behind its first, differentiable; 0 for a prompt of one."""
        rows = [self.encode(p) for p in prompts]
        widest = max(len(ids) - 1 for ids in rows)
        if not widest:
            return torch.zeros(len(rows), device=self.device)
        tokens = torch.tensor([ids[1:] + [self.eos] * (widest + 1 - len(ids)) for ids in rows])[:, None]
        there = (torch.arange(widest) < torch.tensor([[len(ids) - 1] for ids in rows]))[:, None]
        starts = [ids[:1] for ids in rows]
        total = torch.zeros(len(rows), device=self.device)
        for piece in Prefixes.of(tokens, there).pieces([1] * len(rows), self.passes.positions):
            said = self._picked(self.passes.states(starts, piece), piece)
            total = total.index_add(0, (piece.place // widest).to(said.device), said)
        return total

    @torch.no_grad()
    def log_prob(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, T] float32 on the CPU, 0 where the mask is False, -inf where a decoding truncates. Raises UserError as `sample` does."""
        return self._sound(self.log_probs(prompts, tokens, mask).cpu())

    def weights_hash(self) -> str:
        """SHA-256 of the weights and the tokenizer, and of whatever else moves the law: names the distribution, wherever its files lie."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        if (self.stops, self.chat, self.system, self.decodings, self.words) != ((self.tokenizer.eos_token_id,), False, None, (), None):
            template = self.tokenizer.chat_template if self.chat else None
            law = [sorted(self.stops), self.chat, template, self.system, list(map(repr, self.decodings)), self.words]
            found.update(json.dumps(law).encode())
        return found.hexdigest()

    def save(self, folder: Path) -> None:
        """Weights as safetensors, configuration and tokenizer: what `from_pretrained` loads; and the system prompt, where there is one."""
        with _no_bars():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.system is not None:
            (folder / SYSTEM_FILE).write_text(self.system, encoding="utf-8")


def system_of(folder: str | Path) -> str | None:
    """The system prompt that a policy was saved with."""
    path = Path(folder) / SYSTEM_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _pick(law: Tensor, index: Tensor) -> Tensor:
    """[M] entries of laws [M, V] at ids [M]; -inf for an id beyond them."""
    return law.gather(1, index.clamp(max=law.shape[1] - 1)[:, None])[:, 0].masked_fill(index >= law.shape[1], -torch.inf)


def _same(logits: Tensor) -> Tensor:
    return logits


def _again(made: Callable[..., Any], *given: Tensor) -> Any:
    """`made(*given)`, whose inner tensors are made anew for the gradient in place of being kept."""
    return checkpoint(made, *given, use_reentrant=False) if torch.is_grad_enabled() else made(*given)


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")


def stops_of(model: Any, tokenizer: Any, chat: bool = False) -> tuple[int, ...]:
    """The tokenizer's EOS; in a chat also what the model's generation configuration ends a turn with. Raises UserError where neither is."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if chat:
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found += [int(i) for i in (named if isinstance(named, Sequence) else [named]) if i is not None]
    if not found:
        raise UserError("the tokenizer has no EOS token; set tokenizer.eos_token: sequences have to end somewhere")
    return tuple(dict.fromkeys(found))


@torch.no_grad()
def token_laws(q: CausalLM, p0: CausalLM, prompts: Sequence[str], tokens: Tensor, mask: Tensor, drawn: Tensor | None = None) -> TokenLaws:
    """What the estimators need along given sequences under both models, in one pass each; [P, N, T] float32 on the CPU.

    drawn [P, n, T]: log-probabilities of the first n sequences as q itself drew them. A token that a decoding kept when it was drawn, and
    that the rounding of another pass puts at the other side of the edge, keeps the value it was drawn with.
    cross is infinite where q has mass that p0 has not, lost where p0 has mass that q has not.
    Raises UserError when the two do not share a vocabulary, or end sequences elsewhere.
    """
    same_vocabulary(q, p0)
    out = torch.zeros(5, tokens.numel())
    same = p0.model is q.model and p0.tokenizer is q.tokenizer and (p0.chat, p0.system) == (q.chat, q.system)
    most = min(q.passes.positions, p0.passes.positions)
    rows, starts = q._encoded(prompts, tokens.shape[2]), p0._encoded(prompts, tokens.shape[2])
    versions = [w._version for w in p0.model.parameters()]  # weights that are written to say other things
    asked = repr((rows, starts, most, versions)).encode() + tokens.cpu().numpy().tobytes() + mask.cpu().numpy().tobytes()
    key = hashlib.sha256(asked).digest()
    for number, (piece, states) in enumerate(q._states(prompts, tokens, mask, most)):
        theirs = states if same else p0._recalled((key, number), partial(p0.passes.states, starts, piece)).to(states.device)
        node, token = piece.node.to(states.device), piece.next.to(states.device)
        heads = q.linear, p0.linear
        found: Iterable[Tensor] | None = None
        if heads[0] is not None and heads[1] is not None and q.columns == p0.columns:
            found = between(states, heads[0], theirs, heads[1], piece.node, token)
        if found is None:
            found = _whole(q, states, p0, theirs, same, piece.node, token)
        log_q, log_p0, *sums = found
        out[:, piece.place] = torch.stack([log_q, log_p0, *(x[node] for x in sums)]).cpu()
    log_q, log_p0, entropy, cross, lost = (x.view(tokens.shape) for x in out)
    if drawn is not None:
        part = log_q[:, : drawn.shape[1]]
        part.copy_(torch.where(part == -torch.inf, drawn, part))
    q._sound(log_q)
    p0._sound(log_p0)
    return TokenLaws(log_q, log_p0, entropy, cross, lost)


def _whole(q: CausalLM, ours: Tensor, p0: CausalLM, theirs: Tensor, same: bool, node: Tensor, token: Tensor) -> Iterable[Tensor]:
    """What `between` returns, from whole laws: with decodings, and with tokens that have no mass. same: both have the same logits."""
    parts, place = [], node.to(ours.device)
    for rows, some in spans(node, len(ours), q._at_once):
        logits = q.passes.head(ours[rows])
        lq = q.law(logits)
        l0 = lq if p0 is q else p0.law(logits if same else p0.passes.head(theirs[rows]))
        at, which = place[some] - rows.start, token[some]
        picked = [_pick(law[at], which) for law in (lq, l0)]
        lq, l0 = _as_wide(lq, l0), _as_wide(l0, lq)
        q_low, p_low = lq.clamp(min=-1e30), l0.clamp(min=-1e30)  # 0 times -inf is 0 here: a token nobody draws
        apart = ((l0 == -torch.inf) & (lq > -torch.inf)).any(-1)
        gone = ((lq == -torch.inf) & (l0 > -torch.inf)).any(-1)
        entropy = -torch.linalg.vecdot(lq.exp(), q_low)
        cross = (-torch.linalg.vecdot(lq.exp(), p_low)).masked_fill(apart, torch.inf)
        parts.append((*picked, entropy, cross, torch.linalg.vecdot(l0.exp(), p_low - q_low).masked_fill(gone, torch.inf)))
    return (torch.cat(x) for x in zip(*parts, strict=True))


def log_probs_and_kl(q: CausalLM, p0: CausalLM, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[P, K, T] log q of each token and KL(q(.|prefix) || p0(.|prefix)), 0 where the mask is False; both differentiable in q."""
    same_vocabulary(q, p0)
    starts = p0._encoded(prompts, tokens.shape[2])

    def made(ours: Tensor, theirs: Tensor, at: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        lq = q.law(q.passes.head(ours))
        with torch.no_grad():
            l0 = p0.law(p0.passes.head(theirs)).to(lq.device)
        lq, l0 = _as_wide(lq, l0), _as_wide(l0, lq)
        there = lq > -torch.inf
        gap = torch.where(there, lq, 0.0) - torch.where(there, l0, 0.0)
        return _pick(lq[at], which), (lq.exp() * gap).sum(-1)[at]

    places, log_q, kl = [], [], []
    for piece, states in q._states(prompts, tokens, mask, min(q.passes.positions, p0.passes.positions)):
        with torch.no_grad():
            theirs = p0.passes.states(starts, piece)
        node, token = piece.node.to(states.device), piece.next.to(states.device)
        for rows, some in spans(piece.node, len(states), q._at_once):
            found = _again(made, states[rows], theirs[rows], node[some] - rows.start, token[some])
            places.append(piece.place[some])
            log_q.append(found[0])
            kl.append(found[1])
    where = (torch.cat(places).to(q.device),)
    return tuple(torch.zeros(tokens.numel(), device=q.device).index_put(where, torch.cat(x)).view(tokens.shape) for x in (log_q, kl))  # type: ignore[return-value]


def _as_wide(law: Tensor, other: Tensor) -> Tensor:
    """A law over as many ids as another: those that it does not know have no mass."""
    beyond = other.shape[-1] - law.shape[-1]
    return torch.nn.functional.pad(law, (0, beyond), value=-torch.inf) if beyond > 0 else law


def extra_words(q: Any, p0: Any) -> dict[str, int] | None:
    """Words that q's tokenizer has beyond p0's; None when the two read or write some id differently.

    Extra words may only follow the shared ones, as when a trainer adds a pad token.
    """
    ours, theirs = q.get_vocab(), p0.get_vocab()
    if ours == theirs:
        return {}
    shared = {i for word, i in theirs.items() if ours.get(word) == i}
    extra = {word: i for word, i in ours.items() if word not in theirs}
    lacking = {word: i for word, i in theirs.items() if word not in ours}
    moved = len(shared) + len(lacking) < len(theirs)
    if moved or not shared or min([*extra.values(), *lacking.values()]) < max(shared) or set(extra.values()) & set(lacking.values()):
        return None
    return extra


def same_vocabulary(q: CausalLM, p0: CausalLM) -> None:
    """Raises UserError unless both models read and write the same token ids, and end a sequence at the same ones."""
    if q is p0:
        return
    if not any(known is p0.tokenizer for known in (q.tokenizer, *q._agreed)):
        if extra_words(q.tokenizer, p0.tokenizer) is None:
            raise UserError(f"{q.name} and {p0.name} have different tokenizers: their log-probabilities do not speak of the same sequences")
        q._agreed.append(p0.tokenizer)
    if set(q.stops) != set(p0.stops):
        raise UserError(f"{q.name} ends a sequence at ids {sorted(q.stops)} and {p0.name} at {sorted(p0.stops)}: give both the same stops")


def wrap(
    name: str, model: Any, tokenizer: Any, device: str | None = "cpu", *, chat: bool = False, system: str | None = None,
    decodings: Sequence[AbstractDecoding] = (), notes: Sequence[str] = (),
) -> CausalLM:  # fmt: skip
    """A transformers model in memory as a policy. The model is left as it is: what runs is a copy in evaluation mode.

    The copy shares the weights where they are in float32 on `device` already (None: wherever they are), else it has its own, in float32.
    Raises UserError that names the model when it is no causal language model, has no EOS or no chat template, or cannot be scored.
    """
    return settled(name, _copied(name, model, device), tokenizer, chat=chat, system=system, decodings=decodings, notes=notes)


def settled(
    name: str, model: Any, tokenizer: Any, *, chat: bool = False, system: str | None = None, decodings: Sequence[AbstractDecoding] = (),
    notes: Sequence[str] = (),
) -> CausalLM:  # fmt: skip
    """A policy of a model of klbench's own, which is in evaluation mode where it is to stay. Raises UserError as `wrap` does."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{name}: its tokenizer has no chat template, which chat prompts need")
    try:
        stops = stops_of(model, tokenizer, chat)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return CausalLM(name, model, tokenizer, stops, chat, system, tuple(decodings), notes=tuple(notes), _passes=checked(name, model))


def _copied(name: str, model: Any, device: str | None) -> Any:
    """The same module tree in evaluation mode over the same tensors, or over float32 ones on another device."""
    _refuse_kind(name, model.config, type(model).__name__)
    if model.get_output_embeddings() is None:
        raise UserError(f"{name}: {type(model).__name__} has no language-model head; klbench scores causal language models")
    where = next(model.parameters()).device if device is None else device_of(device)
    half = any(p.dtype in HALF for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    if not half and all(t.device == where for t in tensors):
        return _twin(name, model, {id(t): t for t in tensors}).eval()
    made = (_renewed(model) if half and any(b.dtype in HALF for b in model.buffers()) else None) or _twin(name, model, {})
    return (made.float() if half else made).to(where).eval()


def _twin(name: str, model: Any, kept: dict[int, Any]) -> Any:
    """A copy of a module tree in which `kept`, by id, are the same objects."""
    try:
        return copy.deepcopy(model, kept)
    except Exception as error:
        kind = type(model).__name__
        raise UserError(f"{name}: {kind} cannot be copied ({type(error).__name__}: {error}); save it and give its directory") from None


def _renewed(model: Any) -> Any:
    """The model made anew from its configuration and weights, for position tables that were cast with the weights; None if it cannot be."""
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn and overwritten here moves nobody's random numbers
            fresh = type(model)(copy.deepcopy(model.config))
        fresh.load_state_dict(model.state_dict())
    except Exception:  # a wrapper around a model, with a constructor of its own
        return None
    return fresh


def device_of(device: str) -> torch.device:
    """Raises UserError for what is no device, or is not here."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r}: cpu, cuda, cuda:N or mps expected") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} asked for, and this machine has no CUDA device")
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        raise UserError(f"device {device!r} asked for, and this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _refuse_kind(name: str, config: Any, kind: str = "") -> None:
    """Raises UserError for what is no causal language model, by its name."""
    kinds = [kind] if kind else list(getattr(config, "architectures", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: {kinds[0] if kinds else config.model_type} is an encoder-decoder; klbench scores causal language models")
    for found in kinds:
        if found.endswith(("ForMaskedLM", "ForPreTraining")):
            raise UserError(f"{name}: {found} is a masked language model; klbench scores causal language models")


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' progress bars off for a while: a bar a worker would tear klbench's own display."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds files of a tokenizer. Asked first, as transformers makes an empty one up for some architectures."""
    return any(next(folder.glob(pattern), None) is not None for pattern in TOKENIZER_FILES)


def tokenizer_of(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a directory or on a hub. Raises UserError when there is none."""
    local = Path(folder).is_dir()
    if local and not has_tokenizer(Path(folder)):
        raise UserError(f"no tokenizer in {folder}: save one there with tokenizer.save_pretrained, or pass tokenizer=")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=local)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"no tokenizer could be loaded from {folder}: {' '.join(str(error).split())[:300]}") from None


def model_of(folder: str | Path, name: str, dtype: str = "float32", trust_remote_code: bool = False) -> Any:
    """The causal language model in a local directory, or on a hub by `owner/name`. Safetensors only.

    Raises UserError that names the directory when there is no model in it, when it is of another kind, when weights are missing from it
    (transformers would draw them at random), or when it cannot be loaded.
    """
    path = Path(folder)
    local = path.is_dir()
    if local and not (path / "config.json").is_file():
        steps = sorted((p for p in path.glob("checkpoint-*") if (p / "config.json").is_file()), key=lambda p: p.stat().st_mtime)
        raise UserError(f"no model in {path}: config.json is missing" + (f"; did you mean {steps[-1]}?" if steps else ""))
    if not local and (path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/"))):
        raise UserError(f"no model directory at {folder}")
    try:
        with _no_bars():
            _refuse_kind(name, AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=local))
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=local,
                output_loading_info=True,
            )  # fmt: skip
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError) as error:
        raise UserError(f"no model could be loaded from {folder}: {' '.join(str(error).split())[:300]}") from None
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"{folder} holds no whole {type(model).__name__}: {len(missing)} weights are missing, {missing[0]} among them")
    return model


def load(
    folder: str | Path, name: str | None = None, device: str | None = "cpu", dtype: str = "float32", trust_remote_code: bool = False, *,
    tokenizer: Any = None, chat: bool = False, system: str | None = None, decodings: Sequence[AbstractDecoding] = (),
    notes: Sequence[str] = (),
) -> CausalLM:  # fmt: skip
    """A policy from a local directory, or from a hub by `owner/name`, with the tokenizer beside it unless one is given.

    Raises UserError as `model_of`, `tokenizer_of` and `wrap` do.
    """
    name = name or Path(folder).name
    where = device_of(device or "cpu")
    model = model_of(folder, name, dtype, trust_remote_code)
    words = tokenizer_of(folder, trust_remote_code) if tokenizer is None else tokenizer
    system = system_of(folder) if system is None else system
    return settled(name, model.to(where).eval(), words, chat=chat, system=system, decodings=decodings, notes=notes)
